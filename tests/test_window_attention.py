"""Attention inside windows: torchvision's bits, PyTorch's fused attention beside them, and refused wrong forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.swin_transformer import ShiftedWindowAttention

from models.ops import window_attention as module
from models.ops.choice import WINDOWS
from models.ops.window_attention import fused_window_attention, window_attention_definition
from models.swin import _attended, _parted
from train.proving.kernels import ODD_WINDOWS, window_trial
from train.proving.prover import Candidate, Verdict, prove

CPU = torch.device("cpu")
SIDE, HEADS, DIM = 7, 2, 16
MAPS = ((14, 14), (21, 14), (7, 7), (7, 21), (14, 7), (13, 20), (4, 16))
"""Whole windows, one window along an axis or along both, and maps that windows do not divide."""


@pytest.fixture(autouse=True)
def choice_as_before() -> Iterator[None]:
    yield
    WINDOWS.set("auto")


def attention(shift: int) -> ShiftedWindowAttention:
    torch.manual_seed(0)
    layer = ShiftedWindowAttention(DIM, [SIDE, SIDE], [shift, shift], HEADS)
    with torch.no_grad():
        layer.relative_position_bias_table.normal_()
    return layer


def tokens_of(shape: tuple[int, int]) -> Tensor:
    return torch.randn(2, *shape, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()


def results(layer: ShiftedWindowAttention, call: Any, shape: tuple[int, int]) -> list[Tensor]:
    """Values and gradients of input and parameters."""
    x = tokens_of(shape)
    values = call(x)
    wanted = [x, *layer.parameters()]
    return [values, *torch.autograd.grad(values.float().square().sum(), wanted)]


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_definition_has_torchvision_s_bits(shape: tuple[int, int], shift: int, autocast: bool) -> None:
    layer = attention(shift)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = results(layer, layer, shape)
        ours = results(layer, lambda x: _attended(layer, x, _parted(SIDE, SIDE // 2)), shape)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("shift", [0, 3])
def test_the_fused_form_agrees_with_torchvision(shape: tuple[int, int], shift: int) -> None:
    layer = attention(shift)
    theirs = results(layer, layer, shape)
    WINDOWS.set("cuda")
    ours = results(layer, lambda x: _attended(layer, x, _parted(SIDE, SIDE // 2)), shape)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Calls(TorchDispatchMode):
    """Counts what is computed; views cost no launch."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def computed(call: Any) -> int:
    with torch.no_grad(), Calls() as calls:
        call()
    return sum(calls.counts.values())


def test_a_mask_costs_a_few_launches() -> None:
    layer, parted = attention(3), _parted(SIDE, 3)
    x = tokens_of((21, 21)).detach()
    theirs, ours = computed(lambda: layer(x)), computed(lambda: _attended(layer, x, parted))
    assert theirs - ours >= 9


def proved(dtype: torch.dtype) -> Verdict:
    trials = [window_trial(shape, dtype, masked, True, 1, CPU) for shape in ODD_WINDOWS for masked in (False, True)]
    candidate = Candidate("window_attention", lambda: trials)
    return prove(candidate, lambda ours, usual: (ours(), usual(), (1.0, 2.0))[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fused_form_is_proved(dtype: torch.dtype) -> None:
    verdict = proved(dtype)
    assert verdict.right and verdict.faster and verdict.checked == 2 * len(ODD_WINDOWS), verdict.reason


def without_mask(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    return fused_window_attention(query, key, value, bias, None)


def turned_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    return fused_window_attention(query, key, value, bias.mT, mask)


def no_gradient_of_the_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    values = fused_window_attention(query, key, value, bias.detach(), mask)
    return values + 0 * bias.sum()


def mask_of_the_first_window(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    return fused_window_attention(query, key, value, bias, None if mask is None else mask[:1].expand_as(mask))


FAULTS = {
    without_mask: "the result is off by",
    turned_bias: "the result is off by",
    mask_of_the_first_window: "the result is off by",
    no_gradient_of_the_bias: "the gradient of the bias is off by",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_form_is_refused(fault: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fused_window_attention", fault)
    verdict = proved(dtype)
    assert not verdict.right and FAULTS[fault] in verdict.reason, verdict.reason


@pytest.mark.parametrize("masked", [False, True])
def test_values_to_the_formula(masked: bool) -> None:
    shape = (2, 3, 2, 5, 4)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    query, key, value, bias = draw(shape), draw(shape), draw(shape), draw(2, 5, 5)
    mask = torch.where(draw(3, 5, 5) > 0, -100.0, 0.0).double() if masked else None
    for form in (window_attention_definition, fused_window_attention):
        values = form(query, key, value, bias, mask)
        for b, w, h in ((0, 0, 0), (1, 2, 1), (0, 1, 1)):
            for i in range(5):
                logits = [
                    float(
                        query[b, w, h, i] @ key[b, w, h, j] / 2 + bias[h, i, j] + (0 if mask is None else mask[w, i, j])
                    )
                    for j in range(5)
                ]
                weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
                torch.testing.assert_close(values[b, w, h, i], weights @ value[b, w, h])
