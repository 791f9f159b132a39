"""When the kernels of `box_pool.cu` run, and their launches."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .choice import BOX_POOL
from .launcher import Grid, Launcher, loader
from .layout import STORAGE, channels_last

SOURCE = Path(__file__).with_name("box_pool.cu")
KERNELS = ("box_pool_forward", "box_pool_backward")
LANES, SLICES, MAX_POSITIONS = 32, 8, 1024  # as in pooling.h


class Arguments(ctypes.Structure):
    """The structure that both kernels take; fields as in the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("features", "grad", "boxes", "out")),
        *((name, ctypes.c_int) for name in ("channels", "height", "width")),
    ]


def kernels_for(feature_map: Tensor, box_cells: Tensor) -> BoxPoolKernels | None:
    """The kernels, where they are chosen and can serve; None for the definition. Logs why, once."""
    return cuda_kernels(feature_map.device) if BOX_POOL.runs(why_not(feature_map, box_cells)) else None


def why_not(feature_map: Tensor, box_cells: Tensor) -> str | None:
    """Why the kernels do not run for a feature map (B, C, H, W) and boxes (B, 4); None where they do."""
    elsewhere = None if box_cells.device == feature_map.device else f"the boxes are on {box_cells.device}"
    return BOX_POOL.why_not(feature_map) or unfit_features(feature_map) or elsewhere


def unfit_features(features: Tensor) -> str | None:
    """Why the pooling kernels cannot read features (B, C, H, W), which they take in any layout; None where they can."""
    batch, _, height, width = features.shape
    if features.dtype not in STORAGE:
        return f"the kernels know no {features.dtype}"
    # Images are blocks along y of the grid, and the positions of one image must fit into shared memory.
    if batch > 65535 or height * width > MAX_POSITIONS or features.numel() == 0:
        return f"the kernels take 1..65535 images of up to {MAX_POSITIONS} positions, not {batch} of {height}x{width}"
    return None


@functools.cache
def cuda_kernels(device: torch.device) -> BoxPoolKernels:
    """The kernels on one device."""
    return BoxPoolKernels(loader(SOURCE, KERNELS, device))


class BoxPoolKernels:
    """Allocates results and launches the kernels; compiles a variant at its first use.

    Args:
        load: compiler options -> a launcher of the kernels compiled with them.
    """

    def __init__(self, load: Callable[[tuple[str, ...]], Launcher]) -> None:
        """Keep the loader; nothing is compiled yet."""
        self._load = functools.cache(load)

    def forward(self, feature_map: Tensor, box_cells: Tensor) -> Tensor:
        """As `box_pool_definition`."""
        source, boxes = channels_last(feature_map), box_cells.contiguous()
        out = feature_map.new_empty((feature_map.shape[0], 3, feature_map.shape[1]))
        pointers = Arguments(features=source.data_ptr(), boxes=boxes.data_ptr(), out=out.data_ptr())
        self._launch("box_pool_forward", source, out, pointers)
        return out

    def backward(self, grad: Tensor, feature_map: Tensor, box_cells: Tensor) -> Tensor:
        """As `box_pool_backward_definition`; the result is channels-last."""
        grad, boxes = grad.contiguous(), box_cells.contiguous()
        out = torch.empty_like(feature_map, memory_format=torch.channels_last)
        pointers = Arguments(grad=grad.data_ptr(), boxes=boxes.data_ptr(), out=out.data_ptr())
        self._launch("box_pool_backward", out, grad, pointers)
        return out

    def _launch(self, kernel: str, features: Tensor, rows: Tensor, arguments: Arguments) -> None:
        """Launch over a map that is read or written, and rows (B, 3, C) that are the other."""
        vector = vector_size(features.shape[1], features, rows)
        launcher = self._load((f"-DFEATURE={STORAGE[features.dtype]}", f"-DVECTOR={vector}"))
        _, arguments.channels, arguments.height, arguments.width = features.shape
        launcher(kernel, channel_blocks(features, vector), (LANES, SLICES, 1), arguments)


def vector_size(channels: int, *tensors: Tensor) -> int:
    """Channels a thread takes at once: 16 bytes' worth where sizes and addresses allow, 1 otherwise."""
    vector = 16 // tensors[0].element_size()
    fits = channels % vector == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return vector if fits else 1


def channel_blocks(features: Tensor, vector: int) -> Grid:
    """Grid over blocks of channels and images."""
    return -(-features.shape[1] // (LANES * vector)), features.shape[0], 1
