"""The augmentation of `augment.apply` on a GPU as two kernels, `augment.cu`, the mixed view of RegionCL included.

Nobody has run them on a GPU yet: their source is compiled for three architectures and its arithmetic is checked on the
host, but they are used only where they are asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("augment.cu")

# These repeat constants of the source; a test compares them.
THREADS = 256
PARTS = 8
REACH = 8
TILE = (32, 64)
SHARED_FLOATS = 3 * 48 * 81 + 48 * 65 + 33
SHARED_BYTES = {"mean_luma": 4 * THREADS, "augment": 4 * SHARED_FLOATS}

OUTPUTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Arguments(ctypes.Structure):
    """`Arguments` of the source: pointers first, then integers."""

    _fields_ = [
        ("images", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("mixed", ctypes.c_void_p),
        ("inverse", ctypes.c_void_p),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("gray_first", ctypes.c_int),
        ("radius", ctypes.c_int),
        ("output", ctypes.c_int),
        ("region_top", ctypes.c_int),
        ("region_left", ctypes.c_int),
        ("region_height", ctypes.c_int),
        ("region_width", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Mixing:
    """How the mixed view is made.

    Attributes:
        box_px: top, left, height, width of the region in pixels of the finished view.
        inverse: (B,) int64 on the device: image j's region goes into composite inverse[j].
    """

    box_px: tuple[int, int, int, int]
    inverse: Tensor


Launch = Callable[[str, tuple[int, int], int, ctypes.Structure], None]


@cache
def _module(device: torch.device) -> Launch:
    from .launcher import Module

    return Module(SOURCE, device, SHARED_BYTES).launch


def augment(
    images: Tensor,
    table: Tensor,
    gray_first: bool,
    radius: int,
    dtype: torch.dtype = torch.float16,
    mixing: Mixing | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Augment a batch of views, and make the mixed view of it where that is wanted.

    Args:
        images: (B, 3, H, W) uint8 on a CUDA device; channels-last is read as it is, anything else is copied first.
        table: (B, 14) float32 there, the columns of `augment.COLUMNS`.
        gray_first: whether the profile greys before it jitters.
        radius: taps on each side of the blur's centre, less than H and W, at most 8.
        dtype: float32, float16 or bfloat16.
        mixing: region and pairs of the mixed view.
        launch: runs a kernel by name, grid, threads and arguments; the tests' host program. None is the GPU.

    Returns:
        view and mixed view, both (B, 3, H, W) `dtype`, channels-last; None without `mixing`.

    Raises:
        ValueError: for a dtype or blur that the kernels do not have.
        RuntimeError: if they cannot be compiled or launched.
    """
    if dtype not in OUTPUTS:
        raise ValueError(f"the fused kernel gives float32, float16 or bfloat16, not {dtype}")
    batch, _, height, width = images.shape
    if not 0 <= radius <= min(REACH, height - 1, width - 1):
        raise ValueError(
            f"the fused kernel blurs with at most {REACH} taps to each side on {height} x {width} px, not {radius}; "
            "use implementation 'reference'"
        )
    images = images.contiguous(memory_format=torch.channels_last)
    table = table.contiguous()
    view = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    mixed = torch.empty_like(view) if mixing is not None else None
    if batch == 0:
        return view, mixed
    partial = torch.empty((batch, PARTS), dtype=torch.float32, device=images.device)
    inverse = mixing.inverse.contiguous() if mixing is not None else None
    arguments = Arguments(
        images=images.data_ptr(),
        table=table.data_ptr(),
        partial=partial.data_ptr(),
        out=view.data_ptr(),
        mixed=None if mixed is None else mixed.data_ptr(),
        inverse=None if inverse is None else inverse.data_ptr(),
        height=height,
        width=width,
        gray_first=int(gray_first),
        radius=radius,
        output=OUTPUTS[dtype],
    )
    if mixing is not None:
        names = ("region_top", "region_left", "region_height", "region_width")
        for name, value in zip(names, mixing.box_px, strict=True):
            setattr(arguments, name, value)
    launch = launch or _module(images.device)
    tiles = -(-height // TILE[0]) * -(-width // TILE[1])
    launch("mean_luma", (PARTS, batch), THREADS, arguments)
    launch("augment", (tiles, batch), THREADS, arguments)
    return view, mixed
