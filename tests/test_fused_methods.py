"""Every method with the fused batch norm takes the step of the method without it: loss, gradients, statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.methods import METHODS
from models.ops import batch_norm_act
from models.ops.batch_norm_act_kernels import SOURCE, BatchNormActKernels
from models.ops.choice import NORM
from tests.cuda_host import HostModule
from tests.method_cases import build, make_inputs, randomise_norms, to_double

Step = tuple[dict[str, Tensor], list[tuple]]


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> BatchNormActKernels:
    """The CUDA source, compiled for the host."""
    folder = tmp_path_factory.mktemp("kernels")
    load = functools.cache(functools.partial(HostModule, SOURCE, folder=folder))
    return BatchNormActKernels(load, blocks=64, min_rows=1)


def step(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss, gradients and buffers of one training step."""
    method = build(name, bn_mode="group").to(dtype)
    randomise_norms(method)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    method.train()
    inputs = make_inputs(method, 1)
    loss = method(to_double(inputs) if dtype == torch.float64 else inputs).loss
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients, **dict(method.named_buffers())}


@pytest.mark.parametrize("name", METHODS)
def test_the_definition_takes_the_same_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for mode in ("auto", "definition"):
        monkeypatch.setattr(NORM, "_mode", mode)
        outcomes.append(step(name, torch.float64))
    plain, fused = outcomes
    assert plain.keys() == fused.keys()
    for key, value in plain.items():
        torch.testing.assert_close(fused[key], value, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", METHODS)
def test_the_kernels_take_the_same_step(
    name: str, monkeypatch: pytest.MonkeyPatch, host_kernels: BatchNormActKernels
) -> None:
    """The CUDA source on the host errs at most a few times as much as PyTorch's batch norm, against float64."""
    exact, plain = step(name, torch.float64), step(name, torch.float32)
    launched: list[str] = []
    monkeypatch.setattr(NORM, "_mode", "cuda")
    operator: Any = __import__("sys").modules[batch_norm_act.__module__]
    answer: Callable[..., BatchNormActKernels] = lambda *_: launched.append(name) or host_kernels  # noqa: E731
    monkeypatch.setattr(operator, "kernels_for", answer)
    monkeypatch.setattr(operator, "kernels_to_move", answer)
    fused = step(name, torch.float32)
    assert bool(launched) == (name not in ("moby", "regioncl-moby")), "swin has no batch norm of maps"
    for key, value in exact.items():
        if not value.is_floating_point():
            assert torch.equal(fused[key], value), key
            continue
        scale = float(value.abs().max()) or 1.0
        error, usual = (float((each[key].double() - value).abs().max()) / scale for each in (fused, plain))
        assert error <= 8 * usual + 1e-5, f"{key}: {error:.1e} of the largest value, {usual:.1e} without the kernels"
