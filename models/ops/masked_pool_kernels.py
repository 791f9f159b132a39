"""When the kernels of `masked_pool.cu` run, and their launches."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .box_pool_kernels import LANES, SLICES, channel_blocks, unfit_features, vector_size
from .choice import MASKED_POOL
from .launcher import Grid, Launcher, loader
from .layout import STORAGE, channels_last

SOURCE = Path(__file__).with_name("masked_pool.cu")
KERNELS = ("masked_pool_forward", "masked_pool_backward_features", "masked_pool_backward_weights")
MAX_SUMS = 2048  # as in the source


class Arguments(ctypes.Structure):
    """The structure that every kernel takes; fields as in the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("features", "weights", "grad", "out")),
        *((name, ctypes.c_int) for name in ("channels", "height", "width", "groups", "masks")),
    ]


def kernels_for(features: Tensor, weights: Tensor) -> MaskedPoolKernels | None:
    """The kernels, where they are chosen and can serve; None for the definition. Logs why, once."""
    return cuda_kernels(features.device) if MASKED_POOL.runs(why_not(features, weights)) else None


def why_not(features: Tensor, weights: Tensor) -> str | None:
    """Why the kernels do not run for features (B, C, H, W) under maps (B, G, M, H, W); None where they do."""
    return MASKED_POOL.why_not(features) or unfit_features(features) or _unfit_weights(features, weights)


def _unfit_weights(features: Tensor, weights: Tensor) -> str | None:
    groups, masks = weights.shape[1:3]
    if weights.dtype not in STORAGE:
        return f"the kernels know no weights of {weights.dtype}"
    # Masks are blocks along z of the grid, and each block keeps the sum of every mask of its groups.
    if not 1 <= _spanned_groups(features.shape[1], groups) * masks <= MAX_SUMS:
        return f"{groups} groups of {masks} masks are none or more than the kernels hold"
    if weights.device != features.device:
        return f"the weights are on {weights.device}, the features on {features.device}"
    return None


def _spanned_groups(channels: int, groups: int) -> int:
    """The most groups that the channels of one block can touch, at the widest vector."""
    return min(groups, LANES * 8 // (channels // groups) + 2)


@functools.cache
def cuda_kernels(device: torch.device) -> MaskedPoolKernels:
    """The kernels on one device."""
    return MaskedPoolKernels(loader(SOURCE, KERNELS, device))


class MaskedPoolKernels:
    """Allocates results and launches the kernels; compiles a variant at its first use.

    Args:
        load: compiler options -> a launcher of the kernels compiled with them.
    """

    def __init__(self, load: Callable[[tuple[str, ...]], Launcher]) -> None:
        """Keep the loader; nothing is compiled yet."""
        self._load = functools.cache(load)

    def _variant(self, vector: int, feature: torch.dtype, weight: torch.dtype, masks: int) -> tuple[Launcher, int]:
        """The launcher for these types, and how many maps it sums together."""
        # Each number of maps is a variant of its own, since a thread keeps their sums in registers.
        maps = next(size for size in (1, 2, 4, 8) if size >= min(masks, 8))
        macros = {"FEATURE": STORAGE[feature], "WEIGHT": STORAGE[weight], "VECTOR": vector, "MAPS": maps}
        return self._load(tuple(f"-D{name}={value}" for name, value in macros.items())), maps

    def forward(self, features: Tensor, weights: Tensor) -> Tensor:
        """As `masked_pool_definition`."""
        source, maps = channels_last(features), weights.contiguous()
        groups, masks = weights.shape[1:3]
        out = features.new_empty((features.shape[0], masks, features.shape[1]))
        vector = vector_size(features.shape[1] // groups, source, out)
        launcher, together = self._variant(vector, features.dtype, weights.dtype, masks)
        x, y, _ = channel_blocks(source, vector)
        _launch(launcher, "masked_pool_forward", (x, y, -(-masks // together)), source, maps, None, out)
        return out

    def backward(
        self, grad: Tensor, features: Tensor, weights: Tensor, need_features: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor]:
        """As `masked_pool_backward_definition`; the features' gradient is channels-last."""
        source, maps, grad = channels_last(features), weights.contiguous(), grad.contiguous()
        groups, masks = weights.shape[1:3]
        vector = vector_size(features.shape[1] // groups, source, grad)
        launcher, together = self._variant(vector, features.dtype, weights.dtype, masks)
        grad_features, grad_weights = features.new_empty(0), weights.new_empty(0)
        if need_features:
            grad_features = torch.empty_like(source, memory_format=torch.channels_last)
            kernel, grid = "masked_pool_backward_features", channel_blocks(source, vector)
            _launch(launcher, kernel, grid, source, maps, grad, grad_features)
        if need_weights:
            grad_weights = torch.empty_like(maps)
            kernel, grid = "masked_pool_backward_weights", (groups, features.shape[0], -(-masks // together))
            _launch(launcher, kernel, grid, source, maps, grad, grad_weights)
        return grad_features, grad_weights


def _launch(
    launcher: Launcher, kernel: str, grid: Grid, features: Tensor, weights: Tensor, grad: Tensor | None, out: Tensor
) -> None:
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (features, weights, grad, out)]
    sizes = (*features.shape[1:], *weights.shape[1:3])  # channels, height, width, groups, masks
    launcher(kernel, grid, (LANES, SLICES, 1), Arguments(*pointers, *sizes))
