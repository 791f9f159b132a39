"""When the kernels of `batch_norm_act.cu` run, and their launches."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import batch_norm_act_host as host
from .choice import NORM, unreadable
from .launcher import MAX_GRID, Launcher, loader
from .layout import STORAGE, channels_last

SOURCE = Path(__file__).with_name("batch_norm_act.cu")
KERNELS = (*host.KERNELS, "batch_norm_move_running")
THREADS, JOIN_LANES, JOIN_SLICES = 256, 32, 16  # as in the source
_logger = logging.getLogger(__name__)
GATE_NONE, GATE_RECOMPUTE, GATE_MASK, ADDED = "", "_recompute", "_mask", "_added"
"""Ends of a kernel's name: what decides about the ReLU, and that a residual takes part."""
BLOCKS_A_MULTIPROCESSOR = 4
"""Blocks of a pass over a map for each multiprocessor; as many run at a time, three in the last pass backward."""


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
        *((name, ctypes.c_int) for name in ("channels", "groups", "splits", "views")),
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


def launched_from_host(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`batch_norm_act` in C++; None where the kernels do not run, or for a map that `plan_from_host` has not seen."""
    launch = _launches.get((x.shape, x.dtype, x.device, groups))
    if launch is None or NORM.mode != "cuda" or not (_fits(weight, x) and _fits(bias, x)):
        return None
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return None
    operator, address = launch
    return operator(x, residual, weight, bias, address, eps, relu)


_launches: dict[tuple, tuple[host.Operator, int]] = {}
"""Shape, dtype, device and groups of a map -> operator and plan: what a call looks up, since a step has 159 of them."""


def plan_from_host(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int) -> bool:
    """Let C++ launch for such maps from now on; false where it cannot. Shapes and groups must have been checked."""
    # To ask for the library starts the compiler, which only those kernels are worth.
    operator = host.operator() if NORM.why_not(x) is None else None
    kernels = None if operator is None else kernels_for(x, weight, bias, groups)
    address = None if kernels is None else kernels.host_plan(x.shape, x.dtype, groups)
    if operator is None or address is None:
        return False
    _launches[x.shape, x.dtype, x.device, groups] = operator, address
    return True


def _fits(parameter: Tensor | None, x: Tensor) -> bool:
    """Whether C++ can read a parameter (C,) by its address; the slower `unreadable` tells why not."""
    return parameter is None or (
        parameter.dtype is torch.float32
        and parameter.is_contiguous()
        and parameter.numel() == x.shape[1]
        and parameter.device == x.device
    )


@functools.cache
def cuda_kernels(device: torch.device) -> BatchNormActKernels:
    """The kernels on one device, in as many blocks as run there at once.

    With more a last few would run while most of the GPU waits, and each is one more partial result to join.
    """
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return BatchNormActKernels(loader(SOURCE, KERNELS, device), BLOCKS_A_MULTIPROCESSOR * multiprocessors)


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

        def plan(shape: torch.Size, dtype: torch.dtype, groups: int) -> _Plan:
            return _Plan(self._load, shape, dtype, groups, blocks, min_rows)

        self._plan = functools.cache(plan)

    def host_plan(self, shape: torch.Size, dtype: torch.dtype, groups: int) -> int | None:
        """Address of the plan for `batch_norm_act.cpp`, valid as long as this object; None where C++ cannot launch."""
        return self._plan(shape, dtype, groups).host_address

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
        plan = self._plan(x.shape, x.dtype, groups)
        masked = keep_mask and relu and residual is not None
        gate = GATE_MASK if masked else GATE_RECOMPUTE if relu else GATE_NONE
        y, partial = torch.empty_like(x), plan.partial(x.device)
        # Two allocations: autograd takes no views, and to make tensors of views costs as much again.
        mean, variance = (torch.empty(plan.per_group, dtype=torch.float32, device=x.device) for _ in range(2))
        mask = torch.empty(x.numel() // plan.pack if masked else 0, dtype=torch.uint8, device=x.device)
        arguments = Arguments(
            x=x.data_ptr(),
            residual=_address(residual),
            weight=_address(weight),
            bias=_address(bias),
            out=y.data_ptr(),
            mask=mask.data_ptr(),
            partial=partial.data_ptr(),
            mean=mean.data_ptr(),
            variance=variance.data_ptr(),
            eps=eps,
            **plan.sizes,
        )
        plan.over_rows("batch_norm_statistics", arguments)
        plan.joining("batch_norm_join_statistics", groups, arguments)
        plan.over_rows(f"batch_norm_normalise{gate}{ADDED if residual is not None else ''}", arguments)
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
        """As `batch_norm_act_backward_definition`; gradients of maps are channels-last.

        Raises:
            ValueError: a residual's gradient without a mask. It is `grad` itself where there is no ReLU.
        """
        gate = GATE_NONE if not relu else GATE_MASK if mask.numel() else GATE_RECOMPUTE
        if residual and gate != GATE_MASK:
            raise ValueError("the gradient of a residual behind a ReLU needs the mask of the forward pass")
        x, grad = _readable(x), _readable(grad)
        plan = self._plan(x.shape, x.dtype, mean.shape[0])
        grad_x, partial = torch.empty_like(x), plan.partial(x.device)
        grad_residual = torch.empty_like(x) if residual else None
        grad_weight, grad_bias = torch.empty((2, mean.shape[1]), dtype=mean.dtype, device=mean.device).unbind()
        sums = torch.empty((2, *plan.per_group), dtype=mean.dtype, device=mean.device)
        arguments = Arguments(
            x=x.data_ptr(),
            grad=grad.data_ptr(),
            weight=_address(weight),
            bias=_address(bias),
            out=grad_x.data_ptr(),
            grad_residual=_address(grad_residual),
            mask=mask.data_ptr(),
            partial=partial.data_ptr(),
            mean=mean.data_ptr(),
            variance=variance.data_ptr(),
            sums=sums.data_ptr(),
            grad_weight=grad_weight.data_ptr(),
            grad_bias=grad_bias.data_ptr(),
            eps=eps,
            **plan.sizes,
        )
        plan.over_rows(f"batch_norm_backward_sums{gate}", arguments)
        plan.joining("batch_norm_join_sums", 1, arguments)
        plan.over_rows(f"batch_norm_backward_input{gate}{ADDED if residual else ''}", arguments)
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


class _Plan:
    """The launches for maps of one shape, worked out once: at each of hundreds of calls a step it would cost the host.

    Args:
        load: compiler options -> a launcher.
        shape: (N, C, H, W).
        dtype: of the map.
        groups: of images.
        blocks: as for `BatchNormActKernels`.
        min_rows: as for `BatchNormActKernels`.

    Attributes:
        pack: elements that a thread takes at once.
        sizes: the arguments that follow from the shape.
        per_group: shape of one value for every group and channel.
    """

    def __init__(
        self,
        load: Callable[[tuple[str, ...]], Launcher],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        groups: int,
        blocks: int,
        min_rows: int,
    ) -> None:
        channels = shape[1]
        self.pack = pack_size(channels, dtype)
        self._launcher = load((f"-DFEATURE={STORAGE[dtype]}", f"-DVECTOR={self.pack}"))
        packs, rows = -(-channels // self.pack), math.prod(shape) // (channels * groups)
        lanes = min(32, 1 << (packs - 1).bit_length())
        slices, columns = THREADS // lanes, -(-packs // lanes)
        # Blocks enough to fill a GPU, but each thread with rows enough to pay for joining the blocks' sums.
        wanted = min(blocks // (columns * groups), rows // (slices * min_rows))
        each = -(-rows // max(wanted, 1))
        splits = -(-rows // each)  # none of them empty
        self.sizes = {"rows": rows, "channels": channels, "groups": groups, "splits": splits}
        self.per_group = (groups, channels)
        self._partial = (2, groups, splits, channels)
        self._grid, self._block = (columns, splits, groups), (lanes, slices, 1)

    @functools.cached_property
    def host_address(self) -> int | None:
        """Address of the plan for C++; None where the driver or PyTorch lack what it calls."""
        columns, (lanes, slices, _) = self._grid[0], self._block
        try:
            addresses = self._launcher.addresses()  # type: ignore[attr-defined]
        except (OSError, AttributeError) as error:
            _logger.warning("batch norm's kernels are launched from Python: %s", error)
            return None
        sizes = {**self.sizes, "columns": columns, "lanes": lanes, "slices": slices, "pack": self.pack}
        self._host_plan = host.plan_of(addresses, **sizes)  # held: the address is used as long as this plan
        return ctypes.addressof(self._host_plan)

    def partial(self, device: torch.device) -> Tensor:
        """Room for two results of every block and channel."""
        return torch.empty(self._partial, dtype=torch.float32, device=device)

    def over_rows(self, kernel: str, arguments: Arguments) -> None:
        """Launch over all rows of the map."""
        self._launcher(kernel, self._grid, self._block, arguments)

    def joining(self, kernel: str, groups: int, arguments: Arguments) -> None:
        """Launch over blocks of channels, for what the blocks of rows have left."""
        grid = (-(-self.sizes["channels"] // JOIN_LANES), groups, 1)
        self._launcher(kernel, grid, (JOIN_LANES, JOIN_SLICES, 1), arguments)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _readable(features: Tensor) -> Tensor:
    """The layout and alignment that the kernels read; a copy where the features are not stored so."""
    features = channels_last(features)
    return features if features.data_ptr() % 16 == 0 else features.clone(memory_format=torch.channels_last)
