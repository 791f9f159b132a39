"""Which implementation of fused batch norm runs, and the launches of `batch_norm_act.cu`.

`REGATTA_NORM_KERNEL` or `set_norm_kernel` chooses: "cuda" runs batch norm, residual sum and ReLU as one operator, with
the kernels on CUDA tensors, "definition" the operator's PyTorch definition, "auto" (default) what has been shown to be
right and faster. No one has run the kernels on a GPU yet, so "auto" means PyTorch's own batch norm, sum and ReLU, one
after the other. The choice and its reason are logged once.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .nvrtc import CudaModule, Launcher
from .pool_kernels import STORAGE

SOURCE = Path(__file__).with_name("batch_norm_act.cu")
KERNELS = (
    "batch_norm_statistics",
    "batch_norm_join_statistics",
    "batch_norm_normalise",
    "batch_norm_backward_sums",
    "batch_norm_join_sums",
    "batch_norm_backward_input",
    "batch_norm_move_running",
)
THREADS, JOIN_LANES, JOIN_SLICES = 256, 32, 16  # as in the source
GATE_NONE, GATE_RECOMPUTE, GATE_MASK = 0, 1, 2
MODES = ("auto", "cuda", "definition")

_logger = logging.getLogger(__name__)
_mode = os.environ.get("REGATTA_NORM_KERNEL", "auto")


class Arguments(ctypes.Structure):
    """The structure that every kernel takes; fields as in the source."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x",
                "residual",
                "grad",
                "weight",
                "bias",
                "out",
                "grad_residual",
                "mask",
                "partial",
                "mean",
                "variance",
                "sums",
                "grad_weight",
                "grad_bias",
                "running_mean",
                "running_variance",
                "batches",
            )
        ),
        ("rows", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("channels", "groups", "splits", "views", "gate")),
        *((name, ctypes.c_float) for name in ("eps", "momentum")),
    ]


def set_norm_kernel(mode: str) -> None:
    """Choose the implementation for this process: "auto", "cuda" or "definition".

    Raises:
        ValueError: another mode.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"norm kernel {mode!r} is unknown; choose from {', '.join(MODES)}")
    _mode = mode


def operator_chosen() -> bool:
    """Whether networks call the fused operator at all, rather than batch norm, sum and ReLU one after the other."""
    if _mode not in MODES:
        raise ValueError(f"REGATTA_NORM_KERNEL={_mode!r} is unknown; choose from {', '.join(MODES)}")
    return _mode != "auto"


@functools.cache
def _say_once(message: str, level: int) -> None:
    _logger.log(level, message)


def kernels_for(x: Tensor, *others: Tensor | None) -> NormKernels | None:
    """The kernels, where they are chosen and can serve; None for the definition. Logs why, once.

    Args:
        x: (N, C, H, W) map.
        others: the float32 tensors of the call, where there are any: parameters and statistics.
    """
    reason = why_not(x, *others)
    if reason is None:
        _say_once("fused batch norm: CUDA kernels, as asked for", logging.INFO)
        return cuda_kernels(x.device)
    level = logging.WARNING if _mode == "cuda" else logging.INFO
    _say_once(f"fused batch norm: PyTorch definition, because {reason}", level)
    return None


def why_not(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels do not run for a map and the float32 tensors that go with it; None where they do."""
    if not operator_chosen():
        return "the CUDA kernels have not been run on a GPU yet (REGATTA_NORM_KERNEL=cuda turns them on)"
    if _mode == "definition":
        return "it was asked for"
    if not x.is_cuda:
        return f"the features are on {x.device.type}"
    if x.dtype not in STORAGE:
        return f"the kernels know no {x.dtype}"
    wrong = [other.dtype for other in others if other is not None and other.dtype != torch.float32]
    if wrong:
        return f"the kernels take parameters and statistics of float32, not {wrong[0]}"
    if x.numel() == 0:
        return "there are no features"
    return None


@functools.cache
def cuda_kernels(device: torch.device) -> NormKernels:
    """The kernels on one device."""
    return NormKernels(functools.partial(_load_cuda, device=device))


def _load_cuda(options: tuple[str, ...], device: torch.device) -> Launcher:
    module = CudaModule(SOURCE, options, device)
    module.preload(KERNELS)
    return module


def pack_size(channels: int, dtype: torch.dtype) -> int:
    """Elements that a thread takes at once, and that share a byte of the mask: 16 bytes' worth, or 1."""
    pack = 16 // dtype.itemsize
    return pack if channels % pack == 0 else 1


class NormKernels:
    """Allocates results and launches the kernels; compiles a variant at its first use.

    Args:
        load: compiler options -> a launcher of the kernels compiled with them.
        blocks: about how many blocks a launch should have, enough to fill a GPU. Sums depend on it in the last digits.
        min_rows: rows that each thread should have before the map is cut into more blocks.
    """

    def __init__(self, load: Callable[[tuple[str, ...]], Launcher], blocks: int = 1024, min_rows: int = 4) -> None:
        """Keep the loader; nothing is compiled yet."""
        self._load = functools.cache(load)
        self.blocks, self.min_rows = blocks, min_rows

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        relu: bool,
        keep_mask: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `batch_norm_act_definition`; y is channels-last."""
        x, residual = _readable(x), None if residual is None else _readable(residual)
        launch = _Launch(self._load, x, groups, self.blocks, self.min_rows)
        masked = keep_mask and relu and residual is not None
        y, mean, variance = torch.empty_like(x), launch.per_group(), launch.per_group()
        mask = x.new_empty(x.numel() // launch.pack if masked else 0, dtype=torch.uint8)
        gate = GATE_MASK if masked else GATE_RECOMPUTE if relu else GATE_NONE
        launch.set(x=x, partial=launch.partial(), mean=mean, variance=variance)
        launch.over_rows("batch_norm_statistics")
        launch.joining("batch_norm_join_statistics", groups)
        launch.set(residual=residual, weight=weight, bias=bias, out=y, mask=mask, gate=gate, eps=eps)
        launch.over_rows("batch_norm_normalise")
        return y, mean, variance, mask

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        mask: Tensor,
        eps: float,
        relu: bool,
        residual: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `batch_norm_act_backward_definition`; gradients of maps are channels-last."""
        x, grad = _readable(x), _readable(grad)
        launch = _Launch(self._load, x, mean.shape[0], self.blocks, self.min_rows)
        grad_x = torch.empty_like(x)
        grad_residual = torch.empty_like(x) if residual else None
        grad_weight, grad_bias = (torch.empty_like(mean[0]) for _ in range(2))
        sums = mean.new_empty((2, *mean.shape))
        gate = GATE_NONE if not relu else GATE_MASK if mask.numel() else GATE_RECOMPUTE
        launch.set(x=x, grad=grad, weight=weight, bias=bias, mean=mean, variance=variance, mask=mask, gate=gate)
        launch.set(partial=launch.partial(), sums=sums, grad_weight=grad_weight, grad_bias=grad_bias, eps=eps)
        launch.over_rows("batch_norm_backward_sums")
        launch.joining("batch_norm_join_sums", 1)
        launch.set(out=grad_x, grad_residual=grad_residual)
        launch.over_rows("batch_norm_backward_input")
        return grad_x, x.new_empty(0) if grad_residual is None else grad_residual, grad_weight, grad_bias

    def move_running(
        self,
        running_mean: Tensor,
        running_variance: Tensor,
        batches: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: int,
        views: int,
        momentum: float,
    ) -> None:
        """As `move_running_definition`, in place."""
        groups, channels = mean.shape
        arguments = Arguments(
            running_mean=running_mean.data_ptr(),
            running_variance=running_variance.data_ptr(),
            batches=batches.data_ptr(),
            mean=mean.data_ptr(),
            variance=variance.data_ptr(),
            rows=count,
            channels=channels,
            groups=groups,
            views=views,
            momentum=momentum,
        )
        launcher = self._load(("-DFEATURE=Float32", "-DVECTOR=1"))
        launcher("batch_norm_move_running", (-(-channels // THREADS), 1, 1), (THREADS, 1, 1), arguments)


class _Launch:
    """The shape of the launches for one map, and their arguments so far.

    Args:
        load: compiler options -> a launcher.
        x: (N, C, H, W), channels-last.
        groups: of images.
        blocks: as for `NormKernels`.
        min_rows: likewise.
    """

    def __init__(
        self, load: Callable[[tuple[str, ...]], Launcher], x: Tensor, groups: int, blocks: int, min_rows: int
    ) -> None:
        self.channels, self.groups, self.device = x.shape[1], groups, x.device
        self.pack = pack_size(self.channels, x.dtype)
        self.launcher = load((f"-DFEATURE={STORAGE[x.dtype]}", f"-DVECTOR={self.pack}"))
        packs, rows = -(-self.channels // self.pack), x.numel() // (self.channels * groups)
        self.lanes = min(32, 1 << (packs - 1).bit_length())
        self.slices, self.columns = THREADS // self.lanes, -(-packs // self.lanes)
        wanted = min(blocks // (self.columns * groups), rows // (self.slices * min_rows))
        each = -(-rows // max(wanted, 1))
        self.splits = -(-rows // each)  # none of them empty
        self._arguments = Arguments(rows=rows, channels=self.channels, groups=groups, splits=self.splits)
        self._held: list[Tensor] = []  # memory that is given back too early could become the next result's

    def partial(self) -> Tensor:
        """Room for two results of every block and channel."""
        shape = (2, self.groups, self.splits, self.channels)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def per_group(self) -> Tensor:
        """Room for a value of every group and channel."""
        return torch.empty((self.groups, self.channels), dtype=torch.float32, device=self.device)

    def set(self, **values: Tensor | float | None) -> None:
        """Fill in arguments by name, a tensor by its address."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                self._held.append(value)
                setattr(self._arguments, name, value.data_ptr())
            else:
                setattr(self._arguments, name, value)

    def over_rows(self, kernel: str) -> None:
        """Launch over all rows of the map."""
        self.launcher(kernel, (self.columns, self.splits, self.groups), (self.lanes, self.slices, 1), self._arguments)

    def joining(self, kernel: str, groups: int) -> None:
        """Launch over blocks of channels, for what the blocks of rows have left."""
        grid = (-(-self.channels // JOIN_LANES), groups, 1)
        self.launcher(kernel, grid, (JOIN_LANES, JOIN_SLICES, 1), self._arguments)


def _readable(features: Tensor) -> Tensor:
    """The layout and alignment that the kernels read; a copy where the features are not stored so."""
    features = features.contiguous(memory_format=torch.channels_last)
    return features if features.data_ptr() % 16 == 0 else features.clone(memory_format=torch.channels_last)
