"""Which implementation of mask pooling runs, and the launches of `masked_pool.cu`.

`REGATTA_POOL_KERNEL` or `set_pool_kernel` chooses: "cuda" runs the kernels on CUDA tensors, "definition" the PyTorch
definition, "auto" (default) what has been shown to be right and faster. No one has run the kernels on a GPU yet, so
"auto" means the definition until a GPU has run the kernels. The choice and its reason are logged once.
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

SOURCE = Path(__file__).with_name("masked_pool.cu")
KERNELS = (
    "box_pool_forward",
    "box_pool_backward",
    "masked_pool_forward",
    "masked_pool_backward_features",
    "masked_pool_backward_weights",
)
LANES, SLICES, MAX_SUMS, MAX_POSITIONS = 32, 8, 2048, 1024  # as in the source
STORAGE = {torch.float32: "Float32", torch.float16: "Float16", torch.bfloat16: "BFloat16"}
MODES = ("auto", "cuda", "definition")

_logger = logging.getLogger(__name__)
_mode = os.environ.get("REGATTA_POOL_KERNEL", "auto")


class Arguments(ctypes.Structure):
    """The structure that every kernel takes; fields as in the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("features", "weights", "grad", "boxes", "out")),
        *((name, ctypes.c_int) for name in ("channels", "height", "width", "groups", "masks")),
    ]


def set_pool_kernel(mode: str) -> None:
    """Choose the implementation for this process: "auto", "cuda" or "definition".

    Raises:
        ValueError: another mode.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"pool kernel {mode!r} is unknown; choose from {', '.join(MODES)}")
    _mode = mode


@functools.cache
def _say_once(message: str, level: int) -> None:
    _logger.log(level, message)


def kernels_for(features: Tensor, groups: int = 1, masks: int = 3) -> PoolKernels | None:
    """The kernels, where they are chosen and can serve these features; None for the definition. Logs why, once."""
    if _mode not in MODES:
        raise ValueError(f"REGATTA_POOL_KERNEL={_mode!r} is unknown; choose from {', '.join(MODES)}")
    reason = why_not(features, groups, masks)
    if reason is None:
        _say_once("mask pooling: CUDA kernels, as asked for", logging.INFO)
        return cuda_kernels(features.device)
    level = logging.WARNING if _mode == "cuda" else logging.INFO
    _say_once(f"mask pooling: PyTorch definition, because {reason}", level)
    return None


def why_not(features: Tensor, groups: int, masks: int) -> str | None:
    """Why the kernels do not run for features (B, C, H, W) with `groups` x `masks` maps; None where they do."""
    batch, channels, height, width = features.shape
    if _mode == "definition":
        return "it was asked for"
    if not features.is_cuda:
        return f"the features are on {features.device.type}"
    if _mode == "auto":
        return "the CUDA kernels have not been run on a GPU yet (REGATTA_POOL_KERNEL=cuda turns them on)"
    if features.dtype not in STORAGE:
        return f"the kernels know no {features.dtype}"
    if batch > 65535 or height * width > MAX_POSITIONS or features.numel() == 0:
        return f"the kernels take 1..65535 images of up to {MAX_POSITIONS} positions, not {batch} of {height}x{width}"
    if _spanned_groups(channels, groups) * masks > MAX_SUMS:
        return f"{groups} groups of {masks} masks are more than the kernels hold"
    return None


def _spanned_groups(channels: int, groups: int) -> int:
    """The most groups that the channels of one block can touch, at the widest vector."""
    return min(groups, LANES * 8 // (channels // groups) + 2)


@functools.cache
def cuda_kernels(device: torch.device) -> PoolKernels:
    """The kernels on one device."""
    return PoolKernels(functools.partial(_load_cuda, device=device))


def _load_cuda(options: tuple[str, ...], device: torch.device) -> Launcher:
    module = CudaModule(SOURCE, options, device)
    module.preload(KERNELS)
    return module


class PoolKernels:
    """Allocates results and launches the kernels; compiles a variant at its first use.

    Args:
        load: compiler options -> a launcher of the kernels compiled with them.
    """

    def __init__(self, load: Callable[[tuple[str, ...]], Launcher]) -> None:
        """Keep the loader; nothing is compiled yet."""
        self._load = functools.cache(load)

    def _variant(self, vector: int, feature: torch.dtype, weight: torch.dtype, masks: int) -> tuple[Launcher, int]:
        """The launcher for these types, and how many maps it sums together."""
        maps = next(size for size in (1, 2, 4, 8) if size >= min(masks, 8))
        macros = {"FEATURE": STORAGE[feature], "WEIGHT": STORAGE[weight], "VECTOR": vector, "MAPS": maps}
        return self._load(tuple(f"-D{name}={value}" for name, value in macros.items())), maps

    def box_pool(self, feature_map: Tensor, box_cells: Tensor) -> Tensor:
        """As `box_pool_definition`."""
        source = _channels_last(feature_map)
        out = feature_map.new_empty((feature_map.shape[0], 3, feature_map.shape[1]))
        self._launch_boxes("box_pool_forward", source, box_cells, out, source, out)
        return out

    def box_pool_backward(self, grad: Tensor, feature_map: Tensor, box_cells: Tensor) -> Tensor:
        """As `box_pool_backward_definition`; the result is channels-last."""
        grad = grad.contiguous()
        out = torch.empty_like(feature_map, memory_format=torch.channels_last)
        self._launch_boxes("box_pool_backward", out, box_cells, grad, None, out)
        return out

    def _launch_boxes(
        self, kernel: str, like: Tensor, box_cells: Tensor, rows: Tensor, source: Tensor | None, out: Tensor
    ) -> None:
        boxes = box_cells.contiguous()
        vector = _vector(like.shape[1], like, rows)
        launcher, _ = self._variant(vector, like.dtype, like.dtype, 1)
        grad = rows if source is None else None
        _launch(launcher, kernel, _blocks(like, vector), like, 1, 3, source, None, grad, boxes, out)

    def masked_pool(self, features: Tensor, weights: Tensor) -> Tensor:
        """As `masked_pool_definition`."""
        source, maps = _channels_last(features), weights.contiguous()
        groups, masks = weights.shape[1:3]
        out = features.new_empty((features.shape[0], masks, features.shape[1]))
        vector = _vector(features.shape[1] // groups, source, out)
        launcher, together = self._variant(vector, features.dtype, weights.dtype, masks)
        x, y, _ = _blocks(source, vector)
        grid = (x, y, -(-masks // together))
        _launch(launcher, "masked_pool_forward", grid, source, groups, masks, source, maps, None, None, out)
        return out

    def masked_pool_backward(
        self, grad: Tensor, features: Tensor, weights: Tensor, need_features: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor]:
        """As `masked_pool_backward_definition`; the features' gradient is channels-last."""
        source, maps, grad = _channels_last(features), weights.contiguous(), grad.contiguous()
        groups, masks = weights.shape[1:3]
        vector = _vector(features.shape[1] // groups, source, grad)
        launcher, together = self._variant(vector, features.dtype, weights.dtype, masks)
        grad_features, grad_weights = features.new_empty(0), weights.new_empty(0)
        if need_features:
            grad_features = torch.empty_like(source, memory_format=torch.channels_last)
            kernel, grid = "masked_pool_backward_features", _blocks(source, vector)
            _launch(launcher, kernel, grid, source, groups, masks, None, maps, grad, None, grad_features)
        if need_weights:
            grad_weights = torch.empty_like(maps)
            kernel, grid = "masked_pool_backward_weights", (groups, features.shape[0], -(-masks // together))
            _launch(launcher, kernel, grid, source, groups, masks, source, maps, grad, None, grad_weights)
        return grad_features, grad_weights


def _channels_last(features: Tensor) -> Tensor:
    """The layout that the kernels read; a copy where the features are not stored so."""
    return features.contiguous(memory_format=torch.channels_last)


def _vector(channels: int, *tensors: Tensor) -> int:
    """Channels a thread takes at once: 16 bytes' worth where sizes and addresses allow, 1 otherwise."""
    vector = 16 // tensors[0].element_size()
    fits = channels % vector == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return vector if fits else 1


def _blocks(features: Tensor, vector: int) -> tuple[int, int, int]:
    """Grid over blocks of channels and images."""
    return -(-features.shape[1] // (LANES * vector)), features.shape[0], 1


def _launch(
    launcher: Launcher,
    kernel: str,
    grid: tuple[int, int, int],
    like: Tensor,
    groups: int,
    masks: int,
    features: Tensor | None,
    weights: Tensor | None,
    grad: Tensor | None,
    boxes: Tensor | None,
    out: Tensor,
) -> None:
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (features, weights, grad, boxes, out)]
    _, channels, height, width = like.shape
    launcher(kernel, grid, (LANES, SLICES, 1), Arguments(*pointers, channels, height, width, groups, masks))
