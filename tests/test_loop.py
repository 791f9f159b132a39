"""What the loop does when a loss is not finite."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train.inputs
import train.main
from tests.runs import TINY, last_wins, rows
from train.errors import EXIT_NON_FINITE
from train.loop import PATIENCE, _update
from train.optim import Lars, with_momentum_buffers


def argv(run_dir: Path, steps: int, *more: str) -> list[str]:
    return last_wins(["--method", "regioncl-m", "--run-dir", str(run_dir), "--max-steps", str(steps), *TINY, *more])


def test_one_bad_batch_is_skipped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    build = train.inputs.InputBuilder.build

    def poisoned(self, batch, step):
        inputs = build(self, batch, step)
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


def test_a_run_that_stays_non_finite_gives_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    flags = ("--epochs", "20", "--optim.lr", "1e30", "--checkpoint-every", "500")
    code = train.main.main(argv(tmp_path / "run", 200, *flags))
    assert code == EXIT_NON_FINITE
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"{PATIENCE} steps in a row" in last and "--optim.lr" in last
    assert len(rows(tmp_path / "run", "skipped_step")) == PATIENCE


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
