"""Training through `train/main.py` on a GPU against the CPU in fp32: each precision, a lost batch, a resume, one rank.

The same tests run on the CPU, where they compare it with itself in the precisions that it has.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.runs import TINY, comparable, last_wins, rows
from train import build
from train.inputs import InputBuilder
from train.main import main

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
STEPS = 20
# Of the loss at each step, relative: rounding grows from step to step.
TOLERANCE = {"fp32": 0.02, "bf16": 0.1, "fp16": 0.05}


def train(folder: Path, device: str, precision: str = "fp32", *flags: str) -> Path:
    """A run of twenty steps; skips where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    options = "--arch resnet10-w16 --image-size 32 --data 168 --log-every 1 --checkpoint-every 50".split()
    options += ["--optim.lr", "0.01", "--max-steps", str(STEPS)]
    argv = [*TINY, *options, "--device", device, "--precision", precision, "--run-dir", str(folder), *flags]
    assert main(last_wins(["--method", "regioncl-m", *argv])) == 0
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on the CPU in fp32."""
    return train(tmp_path_factory.mktemp("reference") / "run", "cpu")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run, "train")]


def weights(run: Path) -> torch.Tensor:
    return torch.cat([value.flatten().double() for _, value in sorted(load_file(run / "backbone.safetensors").items())])


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "bf16"), *(pytest.param("cuda", precision, marks=GPU) for precision in TOLERANCE)],
)
def test_each_precision_learns_what_fp32_learns(tmp_path: Path, reference: Path, device: str, precision: str) -> None:
    run = train(tmp_path / "run", device, precision)
    expected, found = losses(reference), losses(run)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=TOLERANCE[precision])
    # The whole way that the weights have gone, not what the loss happens to show of it.
    start = weights(train(tmp_path / "start", "cpu", "fp32", "--optim.lr", "1e-30"))
    way, wanted = weights(run) - start, weights(reference) - start
    assert float(torch.cosine_similarity(way, wanted, dim=0)) > 0.9
    assert 0.9 < float(way.norm() / wanted.norm()) < 1.1


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_that_is_not_finite_is_lost_alone(tmp_path: Path, monkeypatch, device: str) -> None:
    build = InputBuilder.build

    def spoilt(builder, batch, step, epoch):
        inputs = build(builder, batch, step, epoch)
        if step == 7:
            inputs[0].view1[0, 0, 0, 0] = math.nan
        return inputs

    monkeypatch.setattr(InputBuilder, "build", spoilt)
    run = train(tmp_path / "run", device)
    assert [row["step"] for row in rows(run, "skipped_step")] == [8]
    assert len(losses(run)) == STEPS - 1 and all(map(math.isfinite, losses(run)))
    assert bool(weights(run).isfinite().all())


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, device: str) -> None:
    whole = train(tmp_path / "whole", device)
    train(tmp_path / "parts", device, "fp32", "--max-steps", "11")
    parts = train(tmp_path / "parts", device)
    assert comparable(parts)[2] == comparable(whole)[2]
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize("device", DEVICES)
def test_ddp_of_one_rank_trains_as_none(tmp_path: Path, monkeypatch, device: str) -> None:
    alone = train(tmp_path / "alone", device)
    wrap, wrapped = build.wrap_distributed, []

    def wrap_even_one(method, runtime, deterministic):
        wrapped.append(wrap(method, replace(runtime, world_size=2), deterministic))
        return wrapped[-1]

    monkeypatch.setattr(build, "wrap_distributed", wrap_even_one)
    backend, meeting = "nccl" if device == "cuda" else "gloo", f"file://{tmp_path}/meeting"
    dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
    try:
        run = train(tmp_path / "wrapped", device)
    finally:
        dist.destroy_process_group()
    assert isinstance(wrapped[0], torch.nn.parallel.DistributedDataParallel)
    assert torch.equal(weights(run), weights(alone))
