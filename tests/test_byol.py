"""BYOL and its EMAN mode against the formula; faults planted beside it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from models.methods import byol, regression_method
from models.methods.base import StepInputs
from models.momentum import ema_update
from tests.formula import assert_same_gradients, mlp, pooled, unit
from tests.method_references import gradients, ready

MODES = ("own", "ema")


def reference(method: Any, inputs: StepInputs) -> Tensor:
    views = (inputs.view1, inputs.view2)
    predictions = []
    for view in views:
        projected = mlp(pooled(method.encoder(view))[:, None], method.projector)
        predictions.append(mlp(projected, method.predictor)[:, 0])
    with torch.no_grad():
        targets = [mlp(pooled(method.momentum_encoder(v))[:, None], method.momentum_projector)[:, 0] for v in views]
    total = torch.zeros(())
    for prediction, target in ((predictions[0], targets[1]), (predictions[1], targets[0])):
        for p, z in zip(unit(prediction), unit(target), strict=True):
            total = total + (2 - 2 * (p * z).sum()) / len(prediction)
    return total


def check(method: Any, inputs: StepInputs) -> None:
    # The reference runs on a copy: in training mode a forward pass moves running statistics.
    other = copy.deepcopy(method)
    expected = reference(other, inputs)
    loss = method(inputs).loss
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert_same_gradients(gradients(method, loss), gradients(other, expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bn", ["group", "sync"])
def test_loss_and_gradients_equal_the_formula(mode: str, bias: bool, bn: str) -> None:
    method, inputs = ready("byol", momentum_norm=mode, head_bias=bias)
    from models.norm import convert_batch_norm

    convert_batch_norm(method, bn, 4 if bn == "group" else 0)
    method.train()
    check(method, inputs)
    assert 0 <= method(inputs).loss <= 8


def test_perfect_prediction_gives_zero_and_opposite_gives_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    method, inputs = ready("byol")
    target = method.target(inputs.view1)
    monkeypatch.setattr(method, "target", lambda images: target)
    for sign, value in ((1.0, 0.0), (-1.0, 8.0)):
        monkeypatch.setattr(method.predictor, "forward", lambda rows, s=sign: s * 3.0 * target)
        assert method(inputs).loss.item() == pytest.approx(value, abs=1e-9)


def test_eman_averages_the_whole_state_and_stays_in_evaluation_mode() -> None:
    method, inputs = ready("byol", momentum_norm="ema")
    assert method.training and not method.momentum_encoder.training and not method.momentum_projector.training
    method.eval()
    method.train()
    assert not any(m.training for m in method.momentum_encoder.modules())
    before = copy.deepcopy(method.momentum_encoder.state_dict())
    output = method(inputs)
    assert all(torch.equal(v, before[k]) for k, v in method.momentum_encoder.state_dict().items())
    method.after_step(output, 0.9)
    online = method.encoder.state_dict()
    for key, value in method.momentum_encoder.state_dict().items():
        expected = online[key] if "num_batches" in key else 0.9 * before[key] + 0.1 * online[key]
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    assert (online["bn1.running_mean"] - before["bn1.running_mean"]).abs().max() > 1e-4


def test_own_statistics_are_not_averaged() -> None:
    method, inputs = ready("byol", momentum_norm="own")
    output = method(inputs)
    before = copy.deepcopy(method.momentum_encoder.bn1.running_mean)
    method.after_step(output, 0.5)
    assert torch.equal(method.momentum_encoder.bn1.running_mean, before)
    assert method.momentum_encoder.training


def _no_stop_gradient(patch: pytest.MonkeyPatch) -> None:
    def leaky(prediction: Tensor, target: Tensor) -> Tensor:
        return 2 - 2 * (unit(prediction) * unit(target)).sum(1)

    def target(self: Any, images: Tensor) -> Tensor:
        return self.projector(pooled(self.encoder(images)))

    patch.setattr(byol, "byol_regression", leaky)
    patch.setattr(byol.Byol, "target", target)


def _same_view(patch: pytest.MonkeyPatch) -> None:
    original, seen = byol.Byol.target, []

    def swapped(self: Any, images: Tensor) -> Tensor:
        seen.append(images)
        return original(self, seen[0])

    patch.setattr(byol.Byol, "target", swapped)


def _no_predictor(patch: pytest.MonkeyPatch) -> None:
    original = byol.Byol.forward

    def forward(self: Any, inputs: StepInputs) -> Any:
        self.predictor.forward = lambda rows: rows
        return original(self, inputs)

    patch.setattr(byol.Byol, "forward", forward)


@pytest.mark.parametrize("fault", [_no_stop_gradient, _same_view, _no_predictor])
def test_planted_fault_is_caught(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method, inputs = ready("byol")
    check(method, inputs)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check(method, inputs)


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_momentum_network_is_caught(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def moves() -> None:
        method, inputs = ready("byol", momentum_norm=mode)
        before = copy.deepcopy(method.momentum_pairs())
        method.after_step(method(inputs), 0.9)
        for (online, momentum), (_, old) in zip(method.momentum_pairs(), before, strict=True):
            ema_update([(online, old)], 0.9)
            for p, q in zip(momentum.parameters(), old.parameters(), strict=True):
                torch.testing.assert_close(p, q)

    moves()
    monkeypatch.setattr(regression_method, "follow", lambda *args, **rest: None)
    with pytest.raises(AssertionError):
        moves()
