"""The benchmark of the quickstart: one figure a seed, clear or not, beside processes that really compute."""

import csv
import os
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from tools import bench_quickstart
from tools.bench import busy
from tools.bench_quickstart import Outcome
from tools.quickstart import Gain


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_others_compute_while_the_block_lasts_and_are_gone_afterwards(monkeypatch):
    started = []
    popen = busy.subprocess.Popen
    monkeypatch.setattr(
        busy.subprocess, "Popen", lambda *args, **how: started.append(popen(*args, **how)) or started[-1]
    )
    with busy.busy(1):
        deadline = time.monotonic() + 30
        while cpu_seconds(started[0].pid) < 0.1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert started[0].returncode is not None


@pytest.mark.parametrize(
    ("before", "after", "clear"), [(0.3, 0.5, True), (0.3, 0.31, False), (0.0, 0.0, False), (0.0, 1.0, True)]
)
def test_a_gain_is_clear_above_twice_its_standard_error(before, after, clear):
    assert Gain("view retrieval", before, after, 500).clear == clear


def test_rows_hold_a_figure_for_each_seed(monkeypatch, tmp_path, capsys):
    asked, others = [], []

    def quickstart(folder, seed, minutes, scratch):
        asked.append((folder, seed, minutes))
        return Outcome([Gain("20-NN top-1", 0.2, (0.2, 0.3, 0.4)[seed], 500)], 5.0 + seed, 0.5, 100.0)

    def beside(number):
        others.append(number)
        return nullcontext()

    monkeypatch.setattr(bench_quickstart, "quickstart", quickstart)
    monkeypatch.setattr(bench_quickstart, "busy", beside)
    monkeypatch.setattr(bench_quickstart, "usable_cores", lambda: 4)
    path = tmp_path / "quickstart.csv"
    assert bench_quickstart.main(["photos", "--half", "--minutes", "2", "--output", str(path)]) == 0
    assert asked == [(Path("photos"), seed, 2.0) for seed in range(3)] and others == [4]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "ahead of the untrained backbone by more than twice the standard error: 20-NN top-1 in 2 of 3 seeds"
    rows = {row["metric"]: row for row in csv.DictReader(path.open())}
    assert rows["20-NN top-1, trained"]["median"] == "30" and rows["20-NN top-1, trained"]["n"] == "3"
    assert rows["time"]["median"] == "6" and rows["share of the cores"]["median"] == "50"
    assert rows["time"]["setting"] == "2 minutes, seeds 0 1 2; beside 4 busy processes"


def test_a_folder_is_meant_from_where_the_benchmark_was_started(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    commands = []

    def refuse(command, name):
        commands.append(command)
        raise RuntimeError(name)

    monkeypatch.setattr(bench_quickstart, "output_of", refuse)
    with pytest.raises(RuntimeError, match="quickstart"):
        bench_quickstart.quickstart(Path("photos"), 0, 1.0, tmp_path)
    assert commands[0][:2] == ["tools/quickstart.py", str(tmp_path / "photos")]


@pytest.mark.slow
def test_a_quickstart_of_one_seed_has_its_rows(tmp_path):
    path = tmp_path / "quickstart.csv"
    assert bench_quickstart.main(["--seeds", "3", "--minutes", "1", "--output", str(path)]) == 0
    rows = {row["metric"]: float(row["median"]) for row in csv.DictReader(path.open())}
    assert rows["view retrieval, trained"] > 0 and 0 < rows["share of the cores"] <= 100 and rows["rate"] > 0
