"""A plan of runs goes on where it was stopped or killed, and a finished run has its row once."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import run_results
from tools.bench.shapes import write_pictures
from tools.run_results import add_row, chosen, main, only_one, read_rows, status
from tools.support.plans import COLUMNS, TIMED, Planned, finished_row, progress, read_plan
from train.build import build_method, check_fit
from train.errors import UserMistake
from train.resolve import resolve
from train.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
PLAN = """
flags = "--arch resnet10-w16 --image-size 32 --epochs 2 --global-batch 16 --log-every 1 --checkpoint-every 1"
linear = "--recipe logistic"
[[runs]]
method = "simsiam"
[[runs]]
method = "moco-v2"
flags = "--queue-size 64"
"""


def write_plan(folder: Path, text: str = PLAN) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    return path


def test_every_method_comes_once_before_any_comes_twice(tmp_path: Path) -> None:
    runs = read_plan(write_plan(tmp_path, 'seeds = [0, 1]\n[[runs]]\nmethod = "byol"\n[[runs]]\nmethod = "care"\n'))
    assert [(run.method, run.recipe, run.seed) for run in runs] == [
        ("byol", "byol-small", 0),
        ("care", "care-small", 0),
        ("byol", "byol-small", 1),
        ("care", "care-small", 1),
    ]


def test_methods_and_seeds_choose_runs_of_a_plan(tmp_path: Path) -> None:
    runs = read_plan(write_plan(tmp_path, 'seeds = [0, 1]\n[[runs]]\nmethod = "byol"\n[[runs]]\nmethod = "care"\n'))
    assert chosen(runs, [], []) == runs
    assert [(run.method, run.seed) for run in chosen(runs, ["care"], [])] == [("care", 0), ("care", 1)]
    assert [(run.method, run.seed) for run in chosen(runs, ["care", "byol"], [1])] == [("byol", 1), ("care", 1)]
    with pytest.raises(UserMistake, match="no such run of simclr; its methods are byol, care, its seeds 0, 1"):
        chosen(runs, ["simclr", "care"], [])
    with pytest.raises(UserMistake, match="no such run of seed 2"):
        chosen(runs, [], [2, 0])


@pytest.mark.parametrize("plan", sorted((ROOT / "tools" / "plans").glob("*.toml")), ids=lambda path: path.stem)
def test_runs_of_a_plan_can_be_trained(plan: Path) -> None:
    runs = read_plan(plan)
    assert len({run.key for run in runs}) == len(runs)
    runtime = Runtime(0, 1, torch.device("cpu"), torch.float32, False)
    for run in runs:
        if run.seed == runs[0].seed:
            config = resolve(["--method", run.method, "--recipe", run.recipe, *run.flags])
            # Flags can be right one by one and not together: MoBY's drop-path on a ResNet is refused only here.
            check_fit(config, runtime, build_method(config, runtime))


@pytest.mark.parametrize(
    ("text", "message"),
    [("runs = 3", "each with a method"), ("[[runs]]\nrecipe = 'a'", "method"), ("[[", "small.toml")],
)
def test_a_plan_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match=message):
        read_plan(write_plan(tmp_path, text))
    with pytest.raises(UserMistake, match="has byol-small-dim-64-seed0 twice"):
        read_plan(write_plan(tmp_path, '[[runs]]\nmethod = "byol"\nflags = "--dim 64"\n' * 2))
    with pytest.raises(UserMistake, match="cannot be read"):
        read_plan(tmp_path / "missing.toml")


def test_a_plan_can_have_the_runs_of_another(tmp_path: Path) -> None:
    write_plan(tmp_path, 'flags = "--epochs 6"\n[[runs]]\nmethod = "byol"\nflags = "--dim 64"\n')
    plan = tmp_path / "long.toml"
    plan.write_text('flags = "--epochs 16"\nruns_of = "small"\n[[runs]]\nmethod = "care"\n')
    assert [(run.plan, run.method, run.flags) for run in read_plan(plan)] == [
        ("long", "byol", ("--epochs", "16", "--dim", "64")),
        ("long", "care", ("--epochs", "16")),
    ]
    plan.write_text('runs_of = "none"\n')
    with pytest.raises(UserMistake, match=r"none\.toml cannot be read"):
        read_plan(plan)


def test_an_ablation_has_a_folder_of_its_own(tmp_path: Path) -> None:
    text = 'flags = "--epochs 2"\n[[runs]]\nmethod = "byol"\n[[runs]]\nmethod = "byol"\nflags = "--optim.lr 1e-3"\n'
    assert [run.name for run in read_plan(write_plan(tmp_path, text))] == [
        "byol-small-seed0",
        "byol-small-optim.lr-1e-3-seed0",
    ]


def write_run(folder: Path, rates: tuple[float, ...]) -> None:
    folder.mkdir(parents=True)
    config = {
        "recipe": {"arch": "resnet18", "image_size": 64, "epochs": 2, "global_batch": 10},
        "run": {"method": "byol"},
        "data_images": 50,
    }
    (folder / "config.json").write_text(json.dumps(config))
    knn = [{"kind": "knn", "step": 5 * n, "epoch": n, "top1": top1} for n, top1 in enumerate((0.3, 0.6, 0.5))]
    train = [{"kind": "train", "step": 5 * n, "images_per_s": rate} for n, rate in enumerate(rates, 1)]
    rows = [{"kind": "start", "step": 0, "last_step": 10}, *knn, *train, {"kind": "health", "view_retrieval": 0.2}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": 10, **row}) + "\n" for row in rows))


def test_a_row_has_the_figures_of_its_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run", (5.0, 10.0))
    (tmp_path / "run" / "eval-linear.json").write_text('{"top1": 0.7, "protocol": "linear"}')
    row = finished_row(
        Planned("p", "byol", "byol-small", 0, ("--a", "1")), tmp_path / "run", dict.fromkeys(COLUMNS, "")
    )
    assert (row["untrained"], row["best"], row["last"], row["linear"]) == ("0.3000", "0.6000", "0.5000", "0.7000")
    assert row["curve"] == "0:0.3000 1:0.6000 2:0.5000"
    # 5 steps of 10 images at 5 images/s and 5 steps at 10: 15 s.
    assert (row["minutes"], row["images_per_s"], row["flags"]) == ("0.2", "7.5", "--a 1")


def test_progress_is_at_the_rate_of_the_newest_rows(tmp_path: Path) -> None:
    assert progress(tmp_path / "none").seconds_left is None
    write_run(tmp_path / "run", (5.0,))
    assert progress(tmp_path / "run").step == 5 and progress(tmp_path / "run").seconds_left == pytest.approx(10)


def test_the_status_names_what_is_done_and_what_is_left(tmp_path: Path) -> None:
    runs = read_plan(write_plan(tmp_path))
    rows = tmp_path / "rows.csv"
    write_run(tmp_path / "out" / runs[1].name, (5.0,))
    done = dict.fromkeys(COLUMNS, "") | dict(
        zip(("plan", "method", "recipe", "flags", "seed"), runs[0].key, strict=True)
    )
    add_row(rows, done | {"untrained": "0.1", "last": "0.4", "linear": "0.5"})
    shown = status(runs, tmp_path / "out", rows)
    assert "simsiam-small-seed0" in shown and "20-NN 0.1 -> 0.4" in shown
    assert "50%, 0 min left" in shown and shown.endswith("1 of 2 done; 0 min left")


def test_one_plan_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_results.tempfile, "gettempdir", lambda: str(tmp_path))
    with only_one(), pytest.raises(UserMistake, match="another plan"), only_one():
        pass
    with only_one():
        pass


def table(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in read_rows(path)]


@pytest.mark.slow
def test_kills_change_no_row(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", 4, 0)
    write_pictures(tmp_path / "val", 2, 1)
    plan = write_plan(tmp_path)
    data = ["--data", str(tmp_path / "train"), "--val-data", str(tmp_path / "val")]

    def command(name: str) -> list[str]:
        places = ["--out", str(tmp_path / name), "--rows", str(tmp_path / f"{name}.csv")]
        return [sys.executable, str(ROOT / "tools" / "run_results.py"), str(plan), *data, *places]

    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command("whole"), env=environment, check=False).returncode == 0
    for kill in range(10):
        child = subprocess.Popen(command("killed"), env=environment, start_new_session=True)
        time.sleep(6 + 2.3 * kill)
        if child.poll() is not None:
            break
        # The whole session: a killed job takes its training with it.
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert subprocess.run(command("killed"), env=environment, check=False).returncode == 0
    assert table(tmp_path / "killed.csv") == table(tmp_path / "whole.csv")
    assert len(table(tmp_path / "whole.csv")) == 2
    before = (tmp_path / "whole.csv").read_bytes()
    assert subprocess.run(command("whole"), env=environment, check=False).returncode == 0
    assert (tmp_path / "whole.csv").read_bytes() == before, "what is done is not run again"


def test_a_stop_is_passed_on_with_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(tmp_path)
    started: list[str] = []

    def call(self: Any, argv: list[str]) -> int:
        started.append(argv[1])
        return 75

    monkeypatch.setattr(run_results.Commands, "call", call)
    monkeypatch.setattr(run_results.tempfile, "gettempdir", lambda: str(tmp_path))
    arguments = [str(plan), "--data", "d", "--val-data", "v", "--out", str(tmp_path), "--rows", str(tmp_path / "r.csv")]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert main(arguments) == 75 and started == ["train/main.py"]
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
    assert not (tmp_path / "r.csv").exists()


def test_two_at_once_have_half_of_the_cores_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both run at the same time, keep to their share, and each leaves its row."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    both, seen = threading.Barrier(2), []

    def call(self: Any, argv: list[str]) -> int:
        if argv[1] == "train/main.py":
            both.wait(30)
            # A process takes the cores of the thread that starts it.
            show = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
            seen.append({int(core) for core in subprocess.run(show, stdout=subprocess.PIPE, check=True).stdout.split()})
            write_run(Path(argv[argv.index("--run-dir") + 1]), (5.0,))
        else:
            Path(argv[argv.index("--output") + 1]).write_text('{"top1": 0.7, "protocol": "linear"}')
        return 0

    monkeypatch.setattr(run_results.Commands, "call", call)
    monkeypatch.setattr(run_results.Commands, "__init__", lambda self, minutes: None)
    monkeypatch.setattr(run_results.tempfile, "gettempdir", lambda: str(tmp_path))
    places = ["--out", str(tmp_path), "--rows", str(tmp_path / "r.csv"), "--data", "d", "--val-data", "v"]
    assert main([str(write_plan(tmp_path)), *places, "--at-once", "2"]) == 0
    half = len(cores) // 2
    assert len(seen) == 2 and not seen[0] & seen[1] and all(len(each) == half for each in seen)
    rows = read_rows(tmp_path / "r.csv")
    assert {row["method"] for row in rows} == {"simsiam", "moco-v2"} and {row["cores"] for row in rows} == {str(half)}
    with pytest.raises(UserMistake, match=f"has {len(cores)} cores"):
        main([str(write_plan(tmp_path)), *places, "--at-once", str(len(cores) + 1)])
    with pytest.raises(UserMistake, match="leave it out on a GPU"):
        main([str(write_plan(tmp_path)), *places, "--at-once", "2", "--device", "cuda"])


def test_published_rows_are_of_runs_that_a_plan_names() -> None:
    rows = read_rows(run_results.ROWS)
    planned = {run.key for plan in (ROOT / "tools" / "plans").glob("*.toml") for run in read_plan(plan)}
    assert rows and {run_results.key_of(row) for row in rows} <= planned
    for row in rows:
        assert tuple(row) == COLUMNS
        assert all(0 <= float(row[name]) <= 1 for name in ("untrained", "best", "last", "linear", "view_retrieval"))


def test_rows_are_a_table_that_csv_reads(tmp_path: Path) -> None:
    add_row(tmp_path / "r.csv", dict.fromkeys(COLUMNS, "a,b"))
    add_row(tmp_path / "r.csv", dict.fromkeys(COLUMNS, "c"))
    with (tmp_path / "r.csv").open(newline="") as stream:
        found = list(csv.reader(stream))
    assert tuple(found[0]) == COLUMNS and len(found) == 3
