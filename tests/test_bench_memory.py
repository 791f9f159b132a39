"""The memory benchmark at a tiny size, and what it refuses."""

import csv

import pytest

from tools import bench_memory

TINY = "--batch 8 --positions 4 --queue 4096 --rounds 1 --methods densecl".split()


def test_both_contenders_are_measured(tmp_path, capsys):
    path = tmp_path / "memory.csv"
    assert bench_memory.main([*TINY, "--output", str(path)]) == 0
    rows = list(csv.DictReader(path.open()))
    assert [row["contender"] for row in rows] == ["by blocks", "materialised"]
    assert all("40 rows" in row["setting"] and row["unit"] == "MiB" for row in rows)
    assert capsys.readouterr().out.splitlines()[-1].startswith("bottleneck: ")


def test_contenders_that_disagree_are_refused(monkeypatch):
    found = {"by blocks": 1.0, "materialised": 1.1}
    monkeypatch.setattr(
        bench_memory, "in_a_process", lambda name, *_: {"mib": 1.0, "loss": found[name], "gradient": 1.0}
    )
    with pytest.raises(RuntimeError, match="loss 1.0 by blocks, 1.1 materialised"):
        bench_memory.main([*TINY, "--no-csv"])


def test_what_does_not_fit_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(bench_memory, "proc_kib", lambda *_: 0)
    monkeypatch.setattr(bench_memory, "in_a_process", lambda *_: {"mib": 1.0, "loss": 1.0, "gradient": 1.0})
    assert bench_memory.main([*TINY, "--no-csv"]) == 0
    said = capsys.readouterr().out
    assert "materialised: left out" in said and said.splitlines()[-1].endswith("not compared")


def test_a_failing_process_says_why():
    with pytest.raises(RuntimeError, match="KeyError"):
        bench_memory.in_a_process("no such contender", 4, 512)


def test_rows_of_the_methods():
    assert [bench_memory.rows_of(name, 256, 49) for name in bench_memory.METHODS] == [768, 12800, 13312]
