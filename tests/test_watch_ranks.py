"""What watches a run of two processes: the probe, loggers, callbacks and the live page speak once, for all ranks."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.runs import rows, run
from tests.test_callbacks import RUN
from train.callbacks import Started
from train.record.loggers import NOTE, Logger

CALLS = "calls.jsonl"


class Service(Logger):
    """A logger whose external run is a file beside the run's rows; each line names the process that sent it."""

    name = "service"

    def open(self, run: Started, identity: str | None) -> str:
        self._file = open(run.run_dir / CALLS, "a")
        self._write("open", run.config["world_size"])
        return identity or "first"

    def send(self, figures: dict[str, float], step: int) -> None:
        self._write("send", [step, sorted(figures)])

    def close(self, outcome: str) -> None:
        self._write("close", outcome)
        self._file.close()

    def _write(self, call: str, value: object) -> None:
        self._file.write(json.dumps([os.getpid(), call, value]) + "\n")


def watched(folder: Path, steps: int) -> list[tuple[int, str, object]]:
    flags = [*RUN[:-1], str(steps), "--val-data", "32", "--probe", "--live-report", "1", "--callbacks"]
    log = folder.with_suffix(".log")
    assert run([*flags, "tests.test_watch_ranks:Service", "--run-dir", str(folder)], 2, log) == [0, 0], log.read_text()
    return [tuple(json.loads(line)) for line in (folder / CALLS).read_text().splitlines()]


def test_two_ranks_are_one_run_for_whoever_watches(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    calls = watched(folder, 6)
    every = rows(folder)
    assert max(Counter((row["kind"], row["step"]) for row in every).values()) == 1
    probes = [row for row in every if row["kind"] == "probe"]
    assert [row["step"] for row in probes] == [0, 4, 6] and all(0 <= row["top1"] <= 1 for row in probes)
    assert len({process for process, _, _ in calls}) == 1, "one rank alone talks to the service"
    assert calls[0][1:] == ("open", 2) and calls[-1][1:] == ("close", "done")
    sent = [value for _, call, value in calls if call == "send"]
    assert len(sent) == len(every) and [6, ["probe/epoch", "probe/epochs", "probe/top1"]] in [
        [step, [name for name in names if "images" not in name]] for step, names in sent
    ]
    assert json.loads((folder / NOTE).read_text())["service"]["id"] == "first"
    page = (folder / "report.html").read_text()
    assert "probe" in page and 'http-equiv="refresh"' not in page, "the last page is loaded by no browser again"


@pytest.mark.slow
def test_a_run_that_goes_on_sends_nothing_twice(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    watched(folder, 4)
    calls = watched(folder, 6)
    sent = [(value[0], value[1][0].partition("/")[0]) for _, call, value in calls if call == "send"]
    assert max(Counter(sent).values()) == 1 and sum(call == "open" for _, call, _ in calls) == 2
