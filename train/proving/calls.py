"""Which calls of our operators a step makes, found without computing anything."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.methods.base import Method, StepInputs
from models.ops.operator import recording

from .setting import Setting, chosen


@dataclass(frozen=True)
class Shape:
    """A tensor without its values."""

    size: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool


@dataclass(frozen=True)
class OperatorCall:
    """One call: the operator's name, and its arguments with a `Shape` in place of each tensor."""

    name: str
    arguments: tuple[Any, ...]


def operator_calls(setting: Setting, method: Method, inputs: StepInputs) -> Counter[OperatorCall]:
    """How often one forward pass makes each call; neither parameters nor running statistics change.

    The batch norms count as if each were fused.
    """
    calls: Counter[OperatorCall] = Counter()

    def record(name: str, arguments: tuple[Any, ...]) -> None:
        calls[OperatorCall(name, tuple(_shape(each) for each in arguments))] += 1

    # PyTorch works out shapes alone here; real parameters are taken for their shapes and stay as they are.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    before = [buffer.clone() for buffer in method.buffers()]
    with chosen("batch_norm_act", "definition"), recording(record), fake, setting.runtime.autocast():
        method(inputs)
    # PyTorch does move the counters of batches, small integers whose values the mode keeps track of.
    for buffer, saved in zip(method.buffers(), before, strict=True):
        buffer.copy_(saved)
    return calls


def _shape(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return Shape(tuple(value.shape), value.dtype, value.requires_grad)
