"""What the loop does when a loss is not finite, and when ranks average their running statistics."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train.inputs
import train.main
from models.hyperparameters import CONFIGS
from tests.method_cases import BATCH, build, make_inputs, online_parameters, small_config
from tests.runs import TINY, last_wins, rows
from tools import replay
from train.errors import EXIT_NON_FINITE, NonFinite
from train.loop import PATIENCE, Job, _average_if_late, _averages_at, _give_up_if_stuck, _update, take_step
from train.optim import Lars, with_momentum_buffers
from train.resolve import resolve
from train.runtime import Runtime
from train.state import TrainState


def argv(run_dir: Path, steps: int, *more: str) -> list[str]:
    return last_wins(["--method", "regioncl-m", "--run-dir", str(run_dir), "--max-steps", str(steps), *TINY, *more])


def test_one_bad_batch_is_skipped_told_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    build = train.inputs.InputBuilder.build

    def poisoned(self, batch, step, epoch):
        inputs = build(self, batch, step, epoch)
        if step == 4:
            inputs[0].view1[0, 0, 0, 0] = torch.nan
        return inputs

    monkeypatch.setattr(train.inputs.InputBuilder, "build", poisoned)
    assert train.main.main(argv(tmp_path / "run", 8)) == 0
    assert [row["step"] for row in rows(tmp_path / "run", "skipped_step")] == [5]
    losses = [row["loss"] for row in rows(tmp_path / "run", "train")]
    assert len(losses) == 4 and all(loss == loss for loss in losses)
    # Every line is strict JSON, and the exported backbone took no harm from the batch.
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    from safetensors.torch import load_file

    for name, tensor in load_file(tmp_path / "run" / "backbone.safetensors").items():
        assert torch.isfinite(tensor).all(), name
    # The bad step is found again, from the checkpoint before it and its number alone.
    assert replay.main([str(tmp_path / "run")]) == EXIT_NON_FINITE
    assert "step 5 is not finite again: view1 of the input, image 0" in capsys.readouterr().out
    monkeypatch.setattr(train.inputs.InputBuilder, "build", build)
    assert replay.main([str(tmp_path / "run")]) == 0
    assert "steps 5 to 5 are finite here" in capsys.readouterr().out


def test_a_run_that_stays_non_finite_gives_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    flags = ("--epochs", "20", "--optim.lr", "1e30", "--checkpoint-every", "500")
    code = train.main.main(argv(tmp_path / "run", 200, *flags))
    assert code == EXIT_NON_FINITE
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"{PATIENCE} steps in a row" in last and "--optim.lr" in last
    assert len(rows(tmp_path / "run", "skipped_step")) == PATIENCE


def test_a_rollback_goes_on_behind_the_bad_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("train.loop.PATIENCE", 4)
    build = train.inputs.InputBuilder.build

    def poisoned(self, batch, step, epoch):
        inputs = build(self, batch, step, epoch)
        if 5 <= step < 9:
            inputs[0].view1[0, 0, 0, 0] = torch.nan
        return inputs

    monkeypatch.setattr(train.inputs.InputBuilder, "build", poisoned)
    flags = ("--on-non-finite", "rollback", "--checkpoint-every", "4")
    assert train.main.main(argv(tmp_path / "run", 12, *flags)) == 0
    # The checkpoint of step 8 is from amid the bad steps.
    told = [(row["step"], row["weights_of_step"]) for row in rows(tmp_path / "run", "rollback")]
    assert told == [(9, 4)]
    assert [row["step"] for row in rows(tmp_path / "run", "train")][-1] == 12


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lars"])
def test_a_first_step_skipped_as_on_cuda_leaves_no_trace(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused forms exist on the CPU too; there they take the way that CUDA's take, without a wait of the host."""
    torch.manual_seed(0)
    module = torch.nn.Linear(50, 40)
    plain = copy.deepcopy(module)
    gradient = torch.randn(40, 50)

    def optimizer_of(parameters: list[torch.Tensor]) -> Any:
        if kind == "sgd":
            return with_momentum_buffers(torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True))
        return torch.optim.AdamW(parameters, fused=True) if kind == "adamw" else Lars(parameters, lr=0.1)

    device = torch.device("cuda")
    first, second = optimizer_of([module.weight]), optimizer_of([plain.weight])
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: torch.full_like(tensor, torch.nan))  # as memory may be
    for bad in (True, False, False):
        for optimizer, weight in ((first, module.weight), (second, plain.weight)):
            if optimizer is second and bad:
                continue
            weight.grad = torch.full_like(gradient, torch.inf) if bad else gradient.clone()
            state: Any = SimpleNamespace(optimizer=optimizer, scaler=None)
            assert _update(state, torch.tensor(bad), device)
    assert torch.equal(module.weight, plain.weight) and torch.isfinite(plain.weight).all()


# ---------------------------------------------------------------------------------------------------------------------
# Where a value that is not finite comes from, and what it must not reach


def job_of(method_name: str, device: str) -> tuple[Job, TrainState]:
    """A run of one process whose tensors are on the CPU, whatever device the loop is told that it works on."""
    fields = {field.name for field in dataclasses.fields(CONFIGS[method_name])}
    line = f"--method {method_name} --run-dir none --loader synthetic --data 128 --global-batch {BATCH} --optim.lr 0.05"
    config = resolve(line.split())
    changes = {"momentum_norm": "ema"} if "momentum_norm" in fields else {}
    method = build(method_name, small_config(method_name, **changes))
    optimizer = with_momentum_buffers(
        torch.optim.SGD(online_parameters(method).values(), lr=0.1, momentum=0.9, fused=True)
    )
    runtime = Runtime(0, 1, torch.device(device), torch.float32, False)
    state = TrainState(method, optimizer, None, 0, {}, 0, torch.zeros(1, dtype=torch.int64))
    quiet = SimpleNamespace(row=lambda *values, **named: None)
    job = Job(config, runtime, method, None, quiet, None, 100, 100, 10, None)  # type: ignore[arg-type]
    return job, state


def nan_in_the_input(state: TrainState, inputs: Any) -> None:
    inputs.view1[0, 0, 0, 0] = torch.nan


def infinite_gradient(state: TrainState, inputs: Any) -> None:
    parameter = next(state.method.encoder.parameters())
    handle = parameter.register_hook(lambda gradient: handle.remove() or gradient.fill_(torch.inf))


def variance_that_overflows(state: TrainState, inputs: Any) -> None:
    norm = next(m for m in state.method.encoder.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))

    def overflow(*_: Any) -> None:
        handle.remove()
        norm.running_var.data.fill_(torch.inf)  # unseen by autograd, as an overflow is

    handle = norm.register_forward_hook(overflow)


@pytest.mark.parametrize("spoil", [nan_in_the_input, infinite_gradient, variance_that_overflows])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["moco-v2", "byol"])
def test_a_bad_step_reaches_neither_weights_nor_statistics_nor_queue(name: str, device: str, spoil: Any) -> None:
    torch.set_num_threads(1)
    job, state = job_of(name, device)
    for step in range(2):
        take_step(job, state, step, [make_inputs(state.method, step)])
    before = {key: value.clone() for key, value in state.method.state_dict().items()}
    momentum = [value["momentum_buffer"].clone() for value in state.optimizer.state.values()]
    inputs = make_inputs(state.method, 2)
    spoil(state, inputs)
    take_step(job, state, 2, [inputs])
    for key, value in state.method.state_dict().items():
        # The host of a GPU does not know of the bad step: the average goes on towards weights that stood still.
        averaged = device == "cuda" and "momentum_" in key
        assert torch.isfinite(value).all() if averaged else torch.equal(value, before[key]), key
    assert all(map(torch.equal, momentum, [value["momentum_buffer"] for value in state.optimizer.state.values()]))
    assert state.non_finite.item() == 1
    take_step(job, state, 3, [make_inputs(state.method, 3)])
    assert state.non_finite.item() == 0 and all(torch.isfinite(v).all() for v in state.method.state_dict().values())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_spoiled_momentum_network_ends_the_run_with_the_weights_whole(device: str) -> None:
    torch.set_num_threads(1)
    job, state = job_of("byol", device)
    take_step(job, state, 0, [make_inputs(state.method, 0)])
    next(state.method.momentum_encoder.parameters()).data.fill_(torch.nan)
    weights = [parameter.clone() for parameter in state.method.encoder.parameters()]
    with pytest.raises(NonFinite, match=f"{PATIENCE} steps in a row"):
        for step in range(1, PATIENCE + 1):
            take_step(job, state, step, [make_inputs(state.method, step)])
        _give_up_if_stuck(state)  # as with each row; the CPU's host has looked before
    assert all(map(torch.equal, weights, state.method.encoder.parameters()))


@pytest.mark.parametrize(
    ("device", "deterministic", "ranks", "steps"),
    [("cuda", False, 2, [10, 20]), ("cuda", True, 2, [9, 10, 11, 19, 20]), ("cpu", False, 2, [9, 10, 11, 19, 20])]
    + [("cuda", False, 1, []), ("cpu", False, 1, [])],
)
def test_when_ranks_average_their_running_statistics(
    device: str, deterministic: bool, ranks: int, steps: list[int]
) -> None:
    """On GPUs with the rows of metrics and, late, before who reads them; elsewhere after every step."""
    runtime = SimpleNamespace(device=torch.device(device), world_size=ranks)
    job: Any = SimpleNamespace(
        runtime=runtime, config=SimpleNamespace(run=SimpleNamespace(deterministic=deterministic, log_every=10))
    )
    assert [step for step in (9, 10, 11, 19, 20) if _averages_at(job, step)] == steps


def test_statistics_that_are_late_are_averaged_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    averaged: list[int] = []
    monkeypatch.setattr("train.loop.average_buffers", lambda buffers: averaged.append(len(buffers)))
    runtime = SimpleNamespace(device=torch.device("cuda"), world_size=2)
    run = SimpleNamespace(deterministic=False, log_every=10)
    job: Any = SimpleNamespace(runtime=runtime, config=SimpleNamespace(run=run))
    for step in (10, 11):  # averaged already, and not
        state: Any = SimpleNamespace(step=step, method=torch.nn.BatchNorm1d(2))
        _average_if_late(job, state)
    assert averaged == [2]
