"""Bytes that a step moves to and from memory if nothing stays in a cache, counted from shapes.

Each tensor that an operation reads or writes counts once; what an operation must read twice (batch norm, whose
statistics come first) counts twice. Views and allocations move nothing. Our kernels, which PyTorch's dispatcher does
not see, are counted where they are called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.ops import batch_norm_act_host, batch_norm_act_kernels
from models.ops.batch_norm_act_kernels import BatchNormActKernels
from models.ops.box_pool_kernels import BoxPoolKernels
from models.ops.masked_pool_kernels import MaskedPoolKernels
from pipeline.kernels import fused_augment

READS = {
    "native_batch_norm": {"input": 2},
    "cudnn_batch_norm": {"input": 2},
    "_batch_norm_with_update": {"input": 2},
    "native_batch_norm_backward": {"grad_out": 2, "input": 2},
    "cudnn_batch_norm_backward": {"grad_output": 2, "input": 2},
    "batch_norm_backward": {"grad_out": 2, "input": 2},
    # The gradients of inputs and of weights are two kernels.
    "convolution_backward": {"grad_output": 2},
}
"""Operation -> argument -> how often it is read, where that is not once."""
NOT_READ = {"copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_"}
"""Operations in place that do not look at what was there."""
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}


class Traffic(TorchDispatchMode):
    """Counts within its block, backward passes included.

    Attributes:
        moved: bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.moved += moved_by(func, args, kwargs or {}, result)
        return result


def moved_by(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that one call of an operation of PyTorch moves."""
    schema, name = func._schema, func._schema.name.partition("::")[2]
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
    if is_view or name in ALLOCATES:
        return 0
    times, total, written = READS.get(name, {}), 0, set()
    for place, argument in enumerate(schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        reads = 0 if writes and (argument.kwarg_only or name in NOT_READ) else times.get(argument.name, 1)
        for tensor in tensors_of(value):
            total += (reads + writes) * bytes_of(tensor)
            if writes:
                written.add(id(tensor))
    # What was written in place is returned as well.
    return total + sum(bytes_of(tensor) for tensor in tensors_of(result) if id(tensor) not in written)


def tensors_of(value: Any) -> list[Tensor]:
    """Tensors on the device inside a value; numbers on the host are no traffic of the device's memory."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_cuda]


def bytes_of(tensor: Tensor) -> int:
    """Of the memory behind a tensor: an expanded one has less than its shape says."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _read_twice(*places: int) -> Callable[[tuple, Any], int]:
    """Bytes of a kernel's call: arguments and results once, but these arguments twice."""

    def moved(arguments: tuple, result: Any) -> int:
        again = sum(bytes_of(tensor) for place in places for tensor in tensors_of(arguments[place]))
        return again + sum(bytes_of(tensor) for tensor in tensors_of((arguments, result)))

    return moved


# Arguments are counted without the object that a method belongs to.
OWN: list[tuple[Any, str, Callable[[tuple, Any], int]]] = [
    (BatchNormActKernels, "forward", _read_twice(0)),
    (BatchNormActKernels, "backward", _read_twice(0, 1, 6)),
    (BatchNormActKernels, "move_running", _read_twice(0, 1)),
    (BoxPoolKernels, "forward", _read_twice()),
    (BoxPoolKernels, "backward", lambda arguments, result: sum(map(bytes_of, (arguments[0], arguments[2], result)))),
    (MaskedPoolKernels, "forward", _read_twice()),
    (MaskedPoolKernels, "backward", _read_twice(0)),
    (fused_augment, "augment", _read_twice(0)),  # the mean luma comes first
]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Within the block all operations count, those of our kernels too."""
    traffic = Traffic()

    def counting(function: Callable[..., Any], owner: Any, moved: Callable[[tuple, Any], int]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            traffic.moved += moved(arguments[1:] if isinstance(owner, type) else arguments, result)
            return result

        return call

    with contextlib.ExitStack() as stack:
        for owner, name, moved in OWN:
            stack.enter_context(_replaced(owner, name, counting(getattr(owner, name), owner, moved)))
        # C++ launches what Python launches, and would not be seen here.
        stack.enter_context(_replaced(batch_norm_act_host, "operator", lambda: None))
        stack.enter_context(_replaced(batch_norm_act_kernels, "_launches", {}))
        with traffic:
            yield traffic
