"""The harness of the benchmarks, and every benchmark at a tiny size on the CPU."""

import csv

import pytest
import torch

from tools import bench_ops, bench_step, reference_port
from tools.augment_contenders import CONTENDERS, installed
from tools.benchmarking import (
    COLUMNS,
    Report,
    Summary,
    check_twice_eager,
    choose_device,
    peak_mib,
    time_interleaved,
)


def test_summary_is_median_and_percentiles():
    summary = Summary.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (summary.median, summary.n) == (3.5, 6)
    assert summary.p20 == pytest.approx(2.0) and summary.p80 == pytest.approx(5.0)


def test_contenders_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = time_interleaved(calls, rounds=4, warmup=1)
    assert order == ["a", "b", *"abababab"]
    assert all(len(values) == 4 and min(values) >= 0 for values in seconds.values())


def test_inner_divides_and_time_limit_stops():
    calls = []
    seconds = time_interleaved({"a": lambda: calls.append(1)}, rounds=1000, warmup=0, inner=7, max_seconds=0)
    assert len(seconds["a"]) == 3 and len(calls) == 21


def test_rows_are_appended_below_one_header(tmp_path):
    path = tmp_path / "deep" / "bench.csv"
    for run in range(2):
        report = Report("bench")
        report.add("ours", "throughput", "images/s", [100.0 + run, 300.0, 200.0], setting="b=3, odd")
        report.append_csv(path)
    rows = list(csv.DictReader(path.open()))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 2
    assert rows[0]["median"] == "200" and rows[0]["n"] == "3" and rows[0]["setting"] == "b=3, odd"
    assert all(rows[1][column] for column in COLUMNS)
    assert "ours" in report.table() and "images/s" in report.table()


def test_check_refuses_errors_above_twice_eager():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = torch.tensor([1.0 + 1e-3, 2.0])
    check_twice_eager("fine", torch.tensor([1.0 - 1.5e-3, 2.0]), eager, exact)
    with pytest.raises(RuntimeError, match="twice eager"):
        check_twice_eager("bad", torch.tensor([1.0 - 3e-3, 2.0]), eager, exact)
    with pytest.raises(RuntimeError, match="nan"):
        check_twice_eager("bad", torch.tensor([float("nan"), 2.0]), eager, exact)


def test_peak_memory_is_seen():
    peak = peak_mib(lambda: torch.zeros(2**20).add(1).sum(), torch.device("cpu"))
    assert 8 <= peak < 9, "two tensors of 4 MiB at a time"


def test_missing_gpu_is_the_users_mistake():
    if torch.cuda.is_available():
        assert choose_device("auto").type == "cuda"
    else:
        with pytest.raises(ValueError, match="--device cpu"):
            choose_device("cuda")


def rows_of(path):
    return list(csv.DictReader(path.open()))


def test_bench_ops_at_a_tiny_size(tmp_path, capsys):
    path = tmp_path / "ops.csv"
    flags = "--device cpu --batch 2 --channels 16 --queue 300 --size 32 --rounds 1 --masks 3 --groups 2 --output"
    assert bench_ops.main([*flags.split(), str(path), "--ops", "box_pool", "masked_pool", "queue_contrast"]) == 0
    contenders = {row["contender"] for row in rows_of(path)}
    assert {"box_pool: definition", "box_pool: mask multiply (official)", "masked_pool: eager"} <= contenders
    memory = {row["contender"]: float(row["median"]) for row in rows_of(path) if row["unit"] == "MiB"}
    assert memory["queue_contrast: by blocks"] < memory["queue_contrast: materialised"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("bottleneck: box_pool (definition) ")


def test_bench_ops_refuses_a_wrong_operator(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_ops, "box_pool", lambda *inputs: bench_ops.box_pool_definition(*inputs) * 1.01)
    with pytest.raises(RuntimeError, match="box_pool, definition"):
        bench_ops.main("--device cpu --ops box_pool --batch 2 --channels 8 --rounds 1 --no-csv".split())


@pytest.mark.parametrize("name", CONTENDERS)
def test_augment_contenders_do_the_work(name):
    module, build = CONTENDERS[name]
    if not installed(module):
        pytest.skip(f"{module} is not installed")
    images = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    result = build(images)()
    assert result.shape == (2, 3, 32, 32) and result.isfinite().all() and float(result.abs().max()) < 3


STEP = "--device cpu --arch resnet18 --image-size 64 --batch 4 --queue 16 --rounds 1".split()


def test_bench_step_at_a_tiny_size(tmp_path, capsys):
    path = tmp_path / "step.csv"
    assert bench_step.main([*STEP, "--profile", "--output", str(path)]) == 0
    rows = rows_of(path)
    rates = {row["contender"]: float(row["median"]) for row in rows if row["metric"] == "throughput"}
    assert {"official port", "strong eager", "ours, not compiled", "ours with augmentation"} <= set(rates)
    assert min(rates.values()) > 0
    assert {"part: backward", "part: momentum trunk, forward"} <= {row["contender"] for row in rows}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("bottleneck: ours") and "x official port" in last and "longest part" in last


def test_bench_step_refuses_a_port_that_computes_something_else(monkeypatch):
    monkeypatch.setattr(reference_port, "TEMPERATURE", 0.19)
    with pytest.raises(RuntimeError, match="ours, fp32: loss"):
        bench_step.main([*STEP, "--no-csv"])
