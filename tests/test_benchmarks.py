"""The harness of the benchmarks, and every benchmark at a tiny size on the CPU."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from tests.runs import last_wins
from tools import bench_ops, bench_pipeline, bench_step, bench_train
from tools.bench import reference_port
from tools.bench.augment_contenders import CONTENDERS, installed
from tools.bench.projection import project, read_measured
from tools.bench.rows import COLUMNS, Report, Row, Summary
from tools.bench.timing import check_twice_eager, choose_device, peak_mib, time_interleaved
from tools.support import cli
from train.build import build_method


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


def test_on_a_gpu_the_host_runs_ahead_as_in_training(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("event")

        def elapsed_time(self, end):
            return 10_000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    calls = {"a": lambda: said.append("call")}
    seconds = time_interleaved(calls, device=torch.device("cuda"), rounds=2, warmup=0)
    assert said == ["wait", "event", *["call"] * 5, "event", "wait"] * 2
    assert seconds == {"a": [2.0, 2.0]}


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


def test_a_table_fits_the_terminal_and_says_what_is_shared_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    report = Report("bench")
    long = "ours through FFCV's Loader, whole MoCo v2 augmentation on the CPU, bfloat16"
    report.add(long, "throughput", "images/s", [100.0], setting="8400 images; batch 256; epochs of 1024 images")
    report.add("theirs", "time on one thread", "us/image", [1.0], setting="8400 images; batch 256")
    table = report.table()
    assert all(len(line) <= 80 for line in table.splitlines()), table
    assert table.startswith("8400 images; batch 256\n") and table.count("batch 256") == 1
    # What only one row has stands beside its name, and no word of a name is lost.
    words = " ".join(table.split())
    assert all(word in words for word in [*long.split(), "epochs", "1024"]) and "theirs" in table


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


NORM = "--device cpu --ops batch_norm_act --batch 4 --norm-channels 8 --norm-grid 5 --norm-groups 2 --rounds 1".split()


def test_bench_ops_measures_fused_batch_norm(tmp_path, capsys):
    path = tmp_path / "ops.csv"
    assert bench_ops.main([*NORM, "--output", str(path)]) == 0
    names = ("eager", "eager, one group", "definition", "definition, one group")
    assert {row["contender"] for row in rows_of(path)} == {f"batch_norm_act: {name}" for name in names}
    assert "batch_norm_act (definition) " in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match="--batch 4 is not a multiple of --norm-groups 3"):
        bench_ops.main(last_wins([*NORM, "--norm-groups", "3"]))


def test_bench_ops_refuses_a_wrong_fused_batch_norm(monkeypatch):
    original = bench_ops.norm_relu
    monkeypatch.setattr(
        bench_ops,
        "norm_relu",
        lambda *inputs: original(*inputs) * (1.1 if bench_ops.NORM.asked_for else 1.0),
    )
    with pytest.raises(RuntimeError, match="batch_norm_act, definition"):
        bench_ops.main([*NORM, "--no-csv"])


@pytest.mark.parametrize("name", CONTENDERS)
def test_augment_contenders_do_the_work(name):
    module, build = CONTENDERS[name]
    if not installed(module):
        pytest.skip(f"{module} is not installed")
    images = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    result = build(images)()
    assert result.shape == (2, 3, 32, 32) and result.isfinite().all() and float(result.abs().max()) < 3


STEP = "--device cpu --arch resnet18 --image-size 64 --batch 2 --queue 16 --rounds 1".split()
FEW = ["official port", "strong eager", "strong eager + box pooling", "strong eager + blockwise queue loss"]


def run_bench_step(path, *more):
    assert bench_step.main(last_wins([*STEP, "--profile", "--output", str(path), *more])) == 0
    rows = rows_of(path)
    rates = {row["contender"]: float(row["median"]) for row in rows if row["metric"] == "throughput"}
    assert {*FEW, "ours, not compiled", "ours with augmentation"} <= set(rates) and min(rates.values()) > 0
    assert {"part: backward", "part: momentum trunk, forward"} <= {row["contender"] for row in rows}


def test_bench_step_at_a_tiny_size(tmp_path, capsys):
    run_bench_step(tmp_path / "step.csv", "--contenders", *FEW)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("bottleneck: ours") and "x official port" in last and "longest part" in last


def test_bench_step_tries_levers_alone_and_together(tmp_path):
    path, levers = tmp_path / "step.csv", ["one-group", "shared-forward", "shared-forward+one-group"]
    assert bench_step.main([*STEP, "--output", str(path), "--contenders", *FEW[:1], "--try", *levers]) == 0
    contenders = {row["contender"] for row in rows_of(path) if row["metric"] == "throughput"}
    assert {"ours + one-group", "ours + shared-forward", "ours + shared-forward + one-group"} < contenders


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--try", "norm-kernel+graph"], "--try graph needs a CUDA device"),
        (["--method", "moco-v2", "--try", "shared-forward"], "moco-v2 swaps no regions"),
    ],
)
def test_bench_step_refuses_levers_that_are_not_there(flags, message):
    with pytest.raises(ValueError, match=message):
        bench_step.main([*STEP, "--no-csv", *flags])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bench_step_with_every_contender(tmp_path, precision):
    run_bench_step(tmp_path / "step.csv", "--precision", precision)


def test_bench_step_refuses_a_port_that_computes_something_else(monkeypatch):
    monkeypatch.setattr(reference_port, "TEMPERATURE", 0.19)
    with pytest.raises(RuntimeError, match="ours, fp32: loss"):
        bench_step.main([*STEP, "--no-csv"])


@pytest.mark.parametrize("factor", [2.0, 0.0, -1.0])
def test_bench_step_refuses_a_trunk_with_wrong_gradients(monkeypatch, factor):
    def spoiled(config, runtime):
        method = build_method(config, runtime)
        for parameter in method.encoder.parameters():
            parameter.register_hook(lambda gradient: gradient * factor)
        return method

    monkeypatch.setattr(bench_step, "build_method", spoiled)
    with pytest.raises(RuntimeError, match="ours, fp32: the gradient of encoder"):
        bench_step.main([*STEP, "--no-csv"])


@pytest.mark.parametrize(("method", "arch"), [("simsiam", "resnet18"), ("moco-v2", "resnet10-w16")])
def test_bench_step_where_there_is_no_released_step(tmp_path, capsys, method, arch):
    path = tmp_path / "step.csv"
    flags = f"--device cpu --method {method} --arch {arch} --image-size 32 --batch 2 --rounds 1 --output"
    assert bench_step.main([*flags.split(), str(path)]) == 0
    assert "the released step is left out" in capsys.readouterr().err
    assert {row["contender"] for row in rows_of(path)} == {"ours, not compiled", "ours with augmentation", "step"}


@pytest.fixture
def small_folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BILINEAR).save(folder / f"{number}.jpg")
    return folder


def test_bench_train_at_a_tiny_size(tmp_path, small_folder, capsys):
    path = tmp_path / "train.csv"
    flags = "--device cpu --method moco-v2 --arch resnet18 --image-size 32 --batch 4 --queue 16 --rounds 1".split()
    flags += ["--steps", "1", "--settle", "0", "--data", str(small_folder), "--output", str(path)]
    assert bench_train.main(flags) == 0
    rows = {(row["contender"], row["metric"]): float(row["median"]) for row in rows_of(path)}
    for contender in ("loader alone (folder)", "model alone", "end to end (synthetic)", "end to end (folder)"):
        assert rows[contender, "throughput"] > 0
    share = rows["end to end (folder)", "share of synthetic rate"]
    expected = rows["end to end (folder)", "throughput"] / rows["end to end (synthetic)", "throughput"]
    assert share == pytest.approx(100 * expected, rel=1e-2)
    assert 0 <= rows["end to end (folder)", "data wait"] <= 100
    assert capsys.readouterr().out.splitlines()[-1].startswith("bottleneck: ")


def test_bench_train_names_what_limits():
    def rows(*rates):
        names = ("loader", "model", "synthetic", "real")
        return [Row(name, "throughput", "images/s", Summary.of([r])) for name, r in zip(names, rates, strict=True)]

    assert "the loader, 50" in bench_train.conclusion(rows(50, 100, 95, 48))
    assert "the model, 100" in bench_train.conclusion(rows(500, 100, 95, 94))
    assert "beside each other" in bench_train.conclusion(rows(500, 100, 95, 60))


def measured_csv(path, device="NVIDIA H200"):
    report = Report("bench_step")
    setting = "regioncl-m, resnet50, 224 px, batch 256, bn group 128, bfloat16"
    for contender, metric, value in (
        ("ours", "throughput", 3000.0),
        ("ours with augmentation", "throughput", 3100.0),
        ("step", "flops an image", 57e9),
        ("step", "parameters", 28e6),
    ):
        report.add(contender, metric, "any", [value], setting)
    report.append_csv(path)
    path.write_text(path.read_text().replace(",cpu,", f",{device},"))
    return path


def test_projection_follows_its_model(tmp_path, capsys):
    path = measured_csv(tmp_path / "bench_step.csv")
    measured = read_measured(path, "regioncl-m", "resnet50")
    assert (measured.gpu, measured.batch, measured.images_per_s) == ("H200", 256, 3000.0)
    assert project(measured, "1xH200") == pytest.approx(3000)
    # By hand: 57e9 / (0.7 * 989e12) s of products an image, the rest of 1 / 3000 s by bandwidth.
    products = 57e9 / (0.7 * 989e12)
    a100 = 1 / (products * 989 / 312 + (1 / 3000 - products) * 4.8 / 1.555)
    assert project(measured, "1xA100") == pytest.approx(a100)
    assert project(measured, "8xA100") == pytest.approx(8 * a100), "gradients travel behind the backward pass"
    assert project(measured, "8xV100") < project(measured, "8xA100")
    assert bench_train.main(["--project", "8xA100", "--rows", str(path)]) == 0
    assert capsys.readouterr().out.startswith("projection, not measured: 8xA100 ")


def test_projection_needs_rows_of_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="has none; run tools/bench_step.py"):
        read_measured(measured_csv(tmp_path / "cpu.csv", device="cpu"), "regioncl-m", "resnet50")
    path = measured_csv(tmp_path / "gpu.csv")
    with pytest.raises(ValueError, match="measured on a GPU"):
        read_measured(path, "moco-v2", "resnet50")
    with pytest.raises(ValueError, match="8xA100"):
        project(read_measured(path, "regioncl-m", "resnet50"), "8xB42")


@pytest.mark.parametrize("tool", [bench_ops, bench_pipeline, bench_step, bench_train])
@pytest.mark.parametrize("mistake", [["--round", "3"], ["--rounds", "0"]])
def test_a_mistake_is_one_line_and_code_2(tool, mistake, capsys):
    assert cli.call(tool.main, mistake) == 2
    message = capsys.readouterr().err
    assert "--rounds" in message and message.count("\n") == 1


def test_a_path_that_is_missing_is_one_line_with_a_remedy(tmp_path, capsys):
    assert cli.call(bench_pipeline.main, ["--data", str(tmp_path / "none.beton"), "--no-csv"]) == 2
    message = capsys.readouterr().err
    assert "none.beton" in message and "check the path" in message and message.count("\n") == 1
