"""The acceptance run survives its parts, ends in time, goes on where it stopped, and refuses a planted wrong kernel."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tools import gpu_acceptance
from tools.bench.acceptance import Outcome, Part, Progress, run_parts
from tools.bench.acceptance_page import best_line, end_to_end_line, lever_line, read_rows, step_lines

TINY = "--device cpu --batch 8 --arch resnet18 --image-size 64 --queue 64 --rounds 1 --steps 1".split()


def script(name: str, code: str, seconds: float = 60.0, **more: object) -> Part:
    return Part(name, lambda batch: [sys.executable, "-c", f"batch = {batch}\n{code}"], seconds, least_s=0.0, **more)  # type: ignore[arg-type]


def test_a_part_may_fail_hang_or_need_too_much(tmp_path: Path) -> None:
    sleeps = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parts = [
        script("good", "print('41'); print('fine')"),
        script("bad", "raise SystemExit('it broke')"),
        script("dead", "import os; os.abort()"),
        script("slow", sleeps, seconds=1.0),
        script("large", "if batch > 4: raise MemoryError('CUDA out of memory')\nprint('fits', batch)"),
        script("absent", "", missing="it needs a GPU"),
    ]
    progress = Progress(tmp_path, "a card")
    list(run_parts(parts, progress, 16, time.monotonic() + 120))
    found = progress.outcomes
    assert {name: each.status for name, each in found.items()} == {
        "good": "done",
        "bad": "failed",
        "dead": "failed",
        "slow": "no time",
        # Sixteen and eight were too many; then its tries were used up.
        "large": "no memory",
        "absent": "left out",
    }
    assert found["good"].end == "fine" and "it broke" in found["bad"].end and "signal 6" in found["dead"].end
    assert found["slow"].seconds < 30 and found["large"].batch == 8


def test_a_second_start_goes_on(tmp_path: Path) -> None:
    counter = tmp_path / "calls"
    count = f"open({str(counter)!r}, 'a').write('x')"
    parts = [script("once", count), script("never", "raise SystemExit(1)")]
    # No time at all: nothing is begun, nothing is counted as tried.
    nothing = [Part(part.name, part.command, 60.0, least_s=5.0) for part in parts]
    assert list(run_parts(nothing, Progress(tmp_path, "a card"), 4, time.monotonic())) == []
    for _ in range(3):
        list(run_parts(parts, Progress(tmp_path, "a card"), 4, time.monotonic() + 60))
    assert counter.read_text() == "x" and Progress(tmp_path, "a card").outcomes["never"].tries == 2
    # Another card has outcomes of its own; a damaged file costs no more than the work.
    assert Progress(tmp_path, "another card").outcomes == {}
    (tmp_path / "state.json").write_text("{")
    assert Progress(tmp_path, "a card").outcomes == {}


def row(contender: str, metric: str, median: float) -> dict[str, str]:
    return {"contender": contender, "metric": metric, "median": str(median)}


def test_the_page_gives_a_verdict_on_each_lever() -> None:
    rows = [row("ours", "throughput", 2000), row("ours + norm-kernel", "throughput", 2900)]
    assert lever_line("norm-kernel", rows).startswith("norm-kernel: pays, 1.45x (2000 -> 2900 images/s")
    assert "costs, 0.50x" in lever_line("graph", [rows[0], row("ours + graph", "throughput", 1000)])
    assert "changes nothing" in lever_line("graph", [rows[0], row("ours + graph", "throughput", 2001)])
    assert lever_line("graph", []) == "graph: not measured"
    assert best_line([rows], True) == "best step: 2900 images/s, 1.18 of the bar 2450, 0.88 of the roofline 3300"
    assert best_line([rows], False) == "best step: 2900 images/s" and "not measured" in best_line([], True)
    port = [row("strong eager", "throughput", 1000), row("bound", "throughput bound", 8000)]
    lines = step_lines([*rows, *port])
    assert lines == [
        "step: 2000 images/s",
        "  2.00 x strong eager (1000)",
        "  25% of the rate of its products alone at the data sheet's peak",
    ]
    shares = [row("end to end (folder)", "throughput", 98), row("end to end (folder)", "share of synthetic rate", 98)]
    assert end_to_end_line(shares) == "end to end (folder): 98 images/s, 98% of synthetic, reaches 97%"


def run(folder: Path, *more: str) -> tuple[int, str, dict[str, Outcome]]:
    code = gpu_acceptance.main([*TINY, "--output", str(folder), *more])
    parts = json.loads((folder / "state.json").read_text())["parts"]
    return code, (folder / "page.txt").read_text(), {name: Outcome(**each) for name, each in parts.items()}


def test_a_planted_wrong_kernel_is_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    parts = ["--parts", "kernels", "lever graph", "DALI"]
    code, page, found = run(tmp_path, *parts, "--plan", "tests.planted_kernels:wrong_boxes", "--minutes", "10")
    assert code == 2 and found["kernels"].status == "failed"
    assert "box_pool (wrong at (3, 7, 5, 3) float32" in page and "the means is off by" in page
    assert found["lever graph"].end == found["DALI"].end == "it needs a GPU"
    agrees = {
        each["contender"]: float(each["median"])
        for each in read_rows(tmp_path / "kernels.csv")
        if each["metric"] == "agrees with its definition"
    }
    assert agrees["box_pool"] == 0 and agrees["batch_norm_act"] == 1


@pytest.mark.slow
def test_the_whole_run_at_a_tiny_size(tmp_path: Path) -> None:
    parts = ["step", "lever shared-forward", "method simsiam", "method moby", "end to end"]
    code, page, found = run(tmp_path, "--parts", *parts, "--minutes", "20")
    assert code == 0, page
    assert {each.status for each in found.values()} == {"done"}
    assert "strong eager" in page and "shared-forward: " in page and "% of synthetic" in page
    assert "  simsiam: " in page and "  moby: " in page and "not measured" not in page
    moby = next(line for line in page.splitlines() if line.startswith("  moby: "))
    assert "images/s, attention " in moby and moby.endswith("x")


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--parts 'steps' is unknown"):
        gpu_acceptance.main([*TINY, "--output", str(tmp_path), "--parts", "steps"])
