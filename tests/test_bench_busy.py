"""The benchmark of a busy machine: alone and beside others in turn."""

import csv
from contextlib import nullcontext

import pytest

from tools import bench_busy

TINY = "--arch resnet10-w16 --steps 8 --crops 10 --rounds 1 --epochs 1".split()


def test_each_way_of_waiting_is_measured_alone_and_disturbed_in_turn(monkeypatch, tmp_path, capsys):
    beside = []

    def others(number):
        beside.append(number)
        return nullcontext()

    rates = iter([10.0, 7.0, 10.0, 4.0] * 2)
    monkeypatch.setattr(bench_busy, "usable_cores", lambda: 4)
    monkeypatch.setattr(bench_busy, "busy", others)
    monkeypatch.setitem(bench_busy.COMMANDS, "loader", lambda *_: next(rates))
    path = tmp_path / "busy.csv"
    assert bench_busy.main([*TINY[:-4], "--rounds", "2", "--commands", "loader", "--output", str(path)]) == 0
    assert beside == [0, 2, 0, 2] * 2
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "rate kept with half the cores busy: loader 70% sleeping, loader 40% spinning"
    rows = list(csv.DictReader(path.open()))
    assert [(row["contender"], row["setting"].rpartition("; ")[2], row["median"]) for row in rows] == [
        ("loader, sleeping", "alone", "10"),
        ("loader, sleeping", "beside 2 busy", "7"),
        ("loader, spinning", "alone", "10"),
        ("loader, spinning", "beside 2 busy", "4"),
    ]


def test_an_evaluation_without_a_run_is_refused():
    with pytest.raises(ValueError, match="add training"):
        bench_busy.main([*TINY, "--no-csv", "--commands", "evaluation"])


def test_a_failing_command_says_why():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        bench_busy.run(["-c", "1 / 0"], "PASSIVE")


@pytest.mark.slow
def test_every_command_has_a_rate_under_the_chosen_waiting(tmp_path):
    path = tmp_path / "busy.csv"
    assert bench_busy.main([*TINY, "--waiting", "sleeping", "--output", str(path)]) == 0
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 6 and all(float(row["median"]) > 0 for row in rows)
