"""A GPU that is not there: tensors that say they are on `cuda:0` and hold nothing, and a watch over their use.

PyTorch's FakeTensorMode computes shapes, dtypes and devices without values. So it refuses what a GPU would refuse at
once, an operation on tensors of two devices, and what would make the host wait, a value read on the host or a shape
that depends on values. Copies that wait are noticed here. What needs a driver is replaced: page-locked memory is marked
memory, streams and events only keep a record, and the autograd engine, whose threads belong to real devices, is a walk
over the graph's nodes in Python.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DEVICE = torch.device("cuda:0")
STAGED_BYTES = 64 * 1024
"""CUDA stages a copy of ordinary host memory up to this size and returns; a larger one may wait for the stream."""


class HostWaits(AssertionError):
    """An operation that keeps the host until the device is done."""


class Watch(TorchDispatchMode):
    """Refuses copies that the host waits for and a generator of another device; stands in for kernels without a rule.

    Attributes:
        pinned: storages of page-locked memory by identity, held so that none is taken for another.
        streams: (tensor's shape, stream) of every `record_stream`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: dict[int, Any] = {}
        self.streams: list[tuple[torch.Size, object]] = []

    def pin(self, tensor: Tensor) -> Tensor:
        """Mark the memory of a host tensor as page-locked."""
        assert tensor.device.type == "cpu", "only memory of the host can be page-locked"
        storage = tensor.untyped_storage()
        self.pinned[storage._cdata] = storage
        return tensor

    def _check_copy(self, function: object, source: Tensor, target: torch.device, non_blocking: bool) -> None:
        if source.device.type == "cuda" and target.type == "cpu":
            raise HostWaits(f"{function} brings {tuple(source.shape)} to the host, which waits for the device")
        if source.device.type == "cpu" and target.type == "cuda":
            staged = source.untyped_storage()._cdata in self.pinned or source.nbytes <= STAGED_BYTES
            if not (non_blocking and staged):
                raise HostWaits(f"{function} copies {tuple(source.shape)} to the device and the host waits for it")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten._to_copy.default:
            target = torch.device(kwargs.get("device") or args[0].device)
            self._check_copy(func, args[0], target, bool(kwargs.get("non_blocking")))
        elif func is aten.copy_.default:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self._check_copy(func, args[1], args[0].device, bool(non_blocking))
        elif func is aten._fused_sgd_.default:  # has no rule for tensors without values
            tensors = [*args[0], *args[1], *args[2], kwargs.get("found_inf"), kwargs.get("grad_scale")]
            assert all(tensor is None or tensor.device == DEVICE for tensor in tensors), "fused SGD off the device"
            return None
        result = func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None:
            assert result.device.type == generator.device.type, f"{func} on {result.device} draws from another device"
        return result


class Stream:
    """A stream or an event: whatever is asked of it is done."""

    def __init__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: Stream) -> None:
        assert isinstance(event, Stream)

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


_numpy = Tensor.numpy


def _values(tensor: Tensor) -> Any:
    """`tensor.numpy()` of a tensor with values; under the mode it would read past them."""
    with _disable_current_modes():
        return _numpy(tensor)


def _fitted(gradient: Tensor | None, metadata: Any) -> Tensor | None:
    """A gradient as the engine hands it on: of the forward value's shape, dtype and device."""
    if gradient is None:
        return None
    assert gradient.device == metadata.device, f"a gradient on {gradient.device} for a value on {metadata.device}"
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    return gradient.to(metadata.dtype)


def _backward_of(node: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if all(gradient is None for gradient in gradients):
        return (None,) * len(node.next_functions)
    apply = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
    results = apply(*gradients)
    return results if isinstance(results, tuple) else (results,)


def _incoming(root: Any) -> Counter[Any]:
    """How many gradients each node below the root waits for."""
    counts: Counter[Any] = Counter()
    found, seen = [root], {root}
    while found:
        for following, _ in found.pop().next_functions:
            if following is not None:
                counts[following] += 1
                if following not in seen:
                    seen.add(following)
                    found.append(following)
    return counts


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """`loss.backward()` of a scalar, node by node in this thread."""
    root: Any = loss.grad_fn
    waiting = _incoming(root)
    received: dict[Any, dict[int, Tensor]] = {root: {loss.output_nr: torch.ones_like(loss)}}
    ready: list[Any] = [root]
    while ready:
        node = ready.pop()
        parts = received.pop(node, {})
        if hasattr(node, "variable"):
            gradient = _fitted(parts.get(0), node.variable)
            if gradient is not None:
                former = node.variable.grad
                node.variable.grad = gradient.detach() if former is None else former + gradient
            continue
        gradients = [_fitted(parts.get(place), metadata) for place, metadata in enumerate(node._input_metadata)]
        for (following, place), gradient in zip(node.next_functions, _backward_of(node, gradients), strict=False):
            if following is None:
                continue
            if gradient is not None:
                held = received.setdefault(following, {})
                held[place] = held[place] + gradient if place in held else gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


@contextlib.contextmanager
def fake_gpu() -> Iterator[Watch]:
    """Within the block tensors may be on `DEVICE`; within `with` the watch it gives, no copy may make the host wait."""
    watch, current = Watch(), Stream()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(Tensor, "pin_memory", lambda tensor, *_: watch.pin(tensor))
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: watch.streams.append((tensor.shape, stream)))
        patch.setattr(Tensor, "backward", backward)
        patch.setattr(Tensor, "numpy", _values)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        for name in ("Stream", "Event"):
            patch.setattr(torch.cuda, name, Stream)
        patch.setattr(torch.cuda, "current_stream", lambda *_: current)
        patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        yield watch


def on_gpu(module: nn.Module) -> nn.Module:
    """Put fake tensors in place of a module's parameters and buffers; ties between them stay."""
    made: dict[int, Tensor] = {}
    for child in module.modules():
        for held in (child._parameters, child._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
                    learned = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if learned else fake
                held[name] = made[id(tensor)]  # type: ignore[assignment]
    return module
