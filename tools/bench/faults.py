"""Faults that keep a method from learning, to be planted on purpose: does the learning benchmark notice them?

Each fault replaces attributes of modules in `models/` through a patcher, which puts the originals back later.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import torch

from models import losses, momentum
from models.methods import moco_v3, pixpro, queue_method, regioncl_s, simsiam


class Patcher(Protocol):
    """What replaces an attribute for a while: `Replacements` below, or pytest's `monkeypatch`."""

    def setattr(self, target: Any, name: str, value: Any, /) -> None:
        """Give attribute `name` of `target` the value `value`."""


class Replacements:
    """A patcher that puts the originals back, the last replaced first, at the end of its `with` block."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def setattr(self, target: Any, name: str, value: Any, /) -> None:
        """Give attribute `name` of `target`, which must have it, the value `value`."""
        self._originals.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    def __enter__(self) -> Replacements:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._originals:
            setattr(*self._originals.pop())


def no_stop_gradient(patch: Patcher) -> None:
    """SimSiam's and RegionCL-S's target is trained as well: gradients flow through both sides of the cosine."""
    for module in (simsiam, regioncl_s):
        patch.setattr(module, "negative_cosine", _cosine_without_stop)


def _cosine_without_stop(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return -losses.row_dots(losses.unit(p), losses.unit(z))


def no_predictor(patch: Patcher) -> None:
    """SimSiam and RegionCL-S compare projections with projections, without the predictor between them."""
    original = simsiam.instance_loss
    for module in (simsiam, regioncl_s):
        patch.setattr(module, "instance_loss", lambda predictions, projections: original(projections, projections))


def copying_momentum(patch: Patcher) -> None:
    """The momentum network becomes a copy of the online network at every step."""
    for module in (queue_method, moco_v3, pixpro, momentum):
        original = module.ema_update
        patch.setattr(module, "ema_update", lambda pairs, m, update=original, **more: update(pairs, 0.0, **more))


FAULTS: dict[str, Callable[[Patcher], None]] = {
    fault.__name__: fault for fault in (no_stop_gradient, no_predictor, copying_momentum)
}
"""Faults by the name that `tools/bench_learning.py --fault` takes."""
