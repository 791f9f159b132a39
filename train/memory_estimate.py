"""How much memory the steps of a run take, from shapes alone: no step is computed and no GPU is needed.

The method's own forward and backward pass runs on tensors that have shapes and no values, while every piece of memory
that it would take is counted from its first to its last use. So a new method or backbone needs no formula here.
"""

from __future__ import annotations

import functools
import os
import resource
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.methods.base import Method, StepInputs
from models.running import moved_together
from pipeline.prefetch import DEPTH
from pipeline.read_ahead import memory_bytes

from .build import build_method, feature_grid
from .config import Config
from .errors import UserMistake
from .inputs import InputBuilder, batch_per_device, images_per_forward, made_up_batch, train_views
from .runtime import Runtime

_GIB = 2**30
_HOST_SETS = DEPTH + 3
"""Sets of decoded views on the host: those that wait, one being made, one before a full queue, one in use."""
_SHARE = {"cuda": 0.92, "cpu": 0.85}
"""Share of the free memory to plan for: an allocator loses some of it to gaps, and libraries take workspaces."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that one process takes while it trains.

    Attributes:
        parameters: weights, heads and running statistics of what is trained.
        momentum: the momentum network.
        queue: rows of keys.
        optimizer: its state.
        gradients: of the parameters.
        inputs: on the device: views and composites of the steps that are there at a time, and crops on their way.
        activations: what a forward pass keeps for its backward pass.
        passing: what lives for a moment beside all of these when most memory is taken; negative where activations are
            freed before all gradients are there.
        loader: on the host: decoded views that wait for the step.
    """

    parameters: int
    momentum: int
    queue: int
    optimizer: int
    gradients: int
    inputs: int
    activations: int
    passing: int
    loader: int

    @property
    def device(self) -> int:
        """Bytes on the device at the moment when most are taken."""
        return self.lasting + self.inputs + self.activations + self.passing

    @property
    def lasting(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.parameters + self.momentum + self.queue + self.optimizer + self.gradients

    def total(self, device: torch.device) -> int:
        """Bytes on `device`, with those of the loader where that is the host itself."""
        return self.device + (self.loader if device.type == "cpu" else 0)

    def __str__(self) -> str:
        parts = {
            "weights": self.parameters,
            "momentum network": self.momentum,
            "queue": self.queue,
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            "views": self.inputs,
            "kept for the backward pass": self.activations,
            "in passing": self.passing,
            "loader (host)": self.loader,
        }
        return ", ".join(f"{name} {shown(size)}" for name, size in parts.items() if size > 0)


# cuBLAS, cuDNN and the driver take memory past PyTorch's allocator, and tell the lack of it in errors of their own.
_LACK = ("_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "CUDA_ERROR_OUT_OF_MEMORY")


def is_lack_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device's memory ran out, whichever library raised it."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _LACK)


def shown(size: float) -> str:
    """A number of bytes as people read it."""
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.1f} MiB"


def _batch_norm(images: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = images.new_empty(images.shape[1], dtype=torch.float32)
    return torch.empty_like(images), statistics, torch.empty_like(statistics)


def _batch_norm_backward(gradient: Tensor, images: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(images)


def _batch_norm_into(*_: Any, out: Tensor, save_mean: Tensor, save_invstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return out, save_mean, save_invstd


# PyTorch works out the shapes of these by taking them apart into a dozen operations each, which made batch norm nine
# tenths of an estimate's time.
_RULES: dict[Any, Any] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_batch_norm.out: _batch_norm_into,
    torch.ops.aten.native_batch_norm_backward.default: _batch_norm_backward,
}


class LiveBytes(TorchDispatchMode):
    """Within the block, counts the bytes of all tensors that operations make, as long as anything holds them.

    Attributes:
        now: bytes that are held at the moment.
        peak: the most that were held at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        result = rule(*args, **(kwargs or {})) if rule is not None else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the memory of these tensors, which were there before."""
        for tensor in tensors:
            self._note(tensor.untyped_storage(), size=0)

    def _note(self, storage: torch.UntypedStorage, size: int | None = None) -> None:
        # Views and in-place operations give a storage that is known; it has one Python object for its whole life.
        key = id(storage)
        if key in self._known:
            return
        taken = storage.nbytes() if size is None else size

        def free(_: object) -> None:
            self.now -= taken
            del self._known[key]

        self._known[key] = weakref.ref(storage, free)
        self.now += taken
        self.peak = max(self.peak, self.now)


@functools.lru_cache(maxsize=64)
def estimate(config: Config, world_size: int, device: torch.device, dtype: torch.dtype) -> Footprint:
    """What one process of a run takes on its device.

    Kernels that keep less than PyTorch's own operators are not counted on, so a run that proves and uses them takes
    less. What cuDNN takes as workspace, and the context of CUDA itself, come on top.

    Args:
        config: of the run; `--micro-batch` is a number.
        world_size: number of processes.
        device: its type tells how many steps' views are there at a time.
        dtype: that autocast computes in; float32 means no autocast.

    Raises:
        UserMistake: a backbone of another library whose shapes follow from values.
    """
    images, local = images_per_forward(config, world_size), batch_per_device(config, world_size)
    # Gradients that are there when the forward pass begins: of the micro-batch before, or in the buckets of DDP.
    several = images < local or world_size > 1
    method = _without_init(config)
    lasting = _lasting(method, config)
    live, counted = LiveBytes(), Runtime(0, 1, torch.device("cpu"), dtype, compile=False)
    with _without_values(method):
        inputs = _inputs(config, method, counted, images)
        live.leave_out([*inputs.tensors(), *_held(method)])
        mixed = sum(view.nbytes for view in inputs.mixed.values())
        views, largest = sum(view.nbytes for view in inputs.views()), inputs.view1.nbytes
        if several:
            _add_gradients(method)
        try:
            with live:
                kept = _step(method, inputs, counted, live)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as reason:
            raise UserMistake(
                f"--arch {config.recipe.arch}: its memory cannot be estimated from shapes alone ({reason}); give "
                "--micro-batch as a number"
            ) from None
    gradients = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    rounds = local // images
    return Footprint(
        **lasting,
        gradients=gradients,
        inputs=_inputs_held(device, views * rounds, largest * rounds, mixed * rounds, dtype),
        activations=kept,
        # At its peak the backward pass has made a part of the gradients and freed a part of the activations.
        passing=live.peak - kept - (0 if several else gradients),
        loader=_HOST_SETS * views * rounds // (1 if device.type == "cpu" else dtype.itemsize),
    )


def _without_init(config: Config) -> Method:
    """The method with any weights: their file is no matter of memory."""
    # Whoever asks in the middle of a run must not change what it draws next.
    with torch.random.fork_rng(devices=[]):
        method = build_method(
            replace(config, run=replace(config.run, init="")), Runtime(0, 1, torch.device("cpu"), torch.float32, False)
        )
    method.train()
    return method


def _lasting(method: Method, config: Config) -> dict[str, int]:
    """Bytes of weights, momentum network, queue and optimizer state."""
    momentum = {id(t) for _, network in method.momentum_pairs() for t in _held(network)}
    tensors = {id(t): t for t in _held(method)}
    queue = sum(t.nbytes for name, t in method.named_buffers() if "queue" in name and name.endswith("rows"))
    followed = sum(t.nbytes for key, t in tensors.items() if key in momentum)
    trained = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    optim = config.recipe.optim
    # AdamW keeps two averages of each gradient, the others one where they have a momentum.
    averages = 2 if optim.kind == "adamw" else int(optim.sgd_momentum > 0)
    return {
        "parameters": sum(t.nbytes for t in tensors.values()) - followed - queue,
        "momentum": followed,
        "queue": queue,
        "optimizer": averages * trained,
    }


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def _without_values(method: Method) -> Iterator[None]:
    """Within the block operations compute shapes alone, and so the method's own tensors have no values any more."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        made: dict[int, Tensor] = {}
        for module in method.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        # By identity: a weight that two modules share stays one.
                        held[name] = made.setdefault(id(tensor), _shape_of(tensor))  # type: ignore[assignment]
        yield


def _add_gradients(method: Method) -> None:
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)


def _shape_of(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _inputs(config: Config, method: Method, runtime: Runtime, images: int) -> StepInputs:
    """The inputs of one forward pass of `images` images."""
    size = config.recipe.image_size
    alone = replace(config, recipe=replace(config.recipe, global_batch=images), run=replace(config.run, micro_batch=0))
    views = {
        spec.name: torch.empty(images, 3, spec.size, spec.size, dtype=runtime.dtype).to(
            memory_format=torch.channels_last
        )
        for spec in train_views(config)
    }
    builder = InputBuilder(alone, method, runtime, feature_grid(method, size))
    return builder.build(made_up_batch(views, config), 0)[0]


def _step(method: Method, inputs: StepInputs, runtime: Runtime, live: LiveBytes) -> int:
    """One forward and backward pass; the bytes that were held between the two."""
    with runtime.autocast(), moved_together():
        output = method(inputs)
    kept = live.now
    output.loss.backward()
    return kept


def _inputs_held(device: torch.device, views: int, largest: int, mixed: int, dtype: torch.dtype) -> int:
    """Bytes of the views on a device, from those of a step's views, of the largest of them and of its composites."""
    if device.type == "cpu":
        return mixed  # the views lie where the loader has put them
    step, crops = views + mixed, views // dtype.itemsize
    # This step's and the next one's, made beside it from one of three sets of crops; the augmentation works in float32
    # on one view at a time, with a copy of it before and behind each of its operations.
    return 2 * step + 3 * crops + 3 * (largest // dtype.itemsize * 4)


def free_bytes(device: torch.device, sharing: int = 1) -> int:
    """Bytes on a device that this process can still take or has taken in advance.

    Args:
        device: a GPU, or the host.
        sharing: processes that take their memory from the same device at the same time, this one included.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch's allocator holds and nobody uses is free for the next tensors.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = _free_of_host()
    return int(free * _SHARE[device.type]) // sharing


def capacity_bytes(device: torch.device) -> int:
    """Bytes on a GPU for this process alone: what is free, and all that its allocator holds, used or not."""
    free, _ = torch.cuda.mem_get_info(device)
    return int((free + torch.cuda.memory_reserved(device)) * _SHARE["cuda"])


def _free_of_host() -> int:
    """Bytes of RAM that can be had: the machine's, within the limits of the control group and of the process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    of_machine = int(fields["MemAvailable"].split()[0]) * 1024
    pages, resident = (int(word) for word in Path("/proc/self/statm").read_text().split()[:2])
    page = os.sysconf("SC_PAGE_SIZE")
    limits = [of_machine, memory_bytes() - resident * page]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space - pages * page)
    return max(0, min(limits))
