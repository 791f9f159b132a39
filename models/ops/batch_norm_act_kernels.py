"""When the kernels of `batch_norm_act.cu` run, and their launches."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .choice import NORM, unreadable
from .launcher import MAX_GRID, Launcher, loader
from .layout import STORAGE, channels_last

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


def kernels_for(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int) -> BatchNormActKernels | None:
    """The kernels, where they are chosen and can serve; None for the definition. Logs why, once."""
    return cuda_kernels(x.device) if NORM.runs(why_not(x, weight, bias, groups)) else None


def why_not(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int) -> str | None:
    """Why the kernels do not run for a map (N, C, H, W) and its parameters (C,); None where they do."""
    reason = NORM.why_not(x)
    if reason is not None:
        return reason
    if x.dtype not in STORAGE:
        return f"the kernels know no {x.dtype}"
    if x.numel() == 0:
        return "there are no features"
    if groups > MAX_GRID[2]:  # groups are blocks along z of the grid
        return f"the kernels take up to {MAX_GRID[2]} groups, not {groups}"
    channels = (x.shape[1],)
    parameters = (("a weight", weight, channels, torch.float32), ("a bias", bias, channels, torch.float32))
    return unreadable(x, parameters)


def kernels_to_move(
    running_mean: Tensor, running_variance: Tensor, batches: Tensor, mean: Tensor, variance: Tensor
) -> BatchNormActKernels | None:
    """As `kernels_for`, for `move_running`: running statistics (C,), their counter () and statistics (G, C)."""
    groups_channels, channels = tuple(mean.shape), (mean.shape[1],)
    tensors = (
        ("a running mean", running_mean, channels, torch.float32),
        ("a running variance", running_variance, channels, torch.float32),
        ("a counter of batches", batches, (), torch.int64),
        ("means", mean, groups_channels, torch.float32),
        ("variances", variance, groups_channels, torch.float32),
    )
    return cuda_kernels(mean.device) if NORM.runs(NORM.why_not(mean) or unreadable(mean, tensors)) else None


@functools.cache
def cuda_kernels(device: torch.device) -> BatchNormActKernels:
    """The kernels on one device."""
    return BatchNormActKernels(loader(SOURCE, KERNELS, device))


def pack_size(channels: int, dtype: torch.dtype) -> int:
    """Elements that a thread takes at once, and that share a byte of the mask: 16 bytes' worth, or 1."""
    pack = 16 // dtype.itemsize
    return pack if channels % pack == 0 else 1


class BatchNormActKernels:
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
        blocks: as for `BatchNormActKernels`.
        min_rows: as for `BatchNormActKernels`.
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
        # Blocks enough to fill a GPU, but each thread with rows enough to pay for joining the blocks' sums.
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
                value = value.data_ptr()
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
    features = channels_last(features)
    return features if features.data_ptr() % 16 == 0 else features.clone(memory_format=torch.channels_last)
