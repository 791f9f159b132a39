"""The augmentation of `augment.apply` on a GPU as two kernels, `augment.cu`.

Nobody has run them on a GPU yet: their source is compiled for three architectures and its arithmetic is checked on the
host, but they are used only where they are asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
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
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("gray_first", ctypes.c_int),
        ("radius", ctypes.c_int),
        ("output", ctypes.c_int),
    ]


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
    launch: Launch | None = None,
) -> Tensor:
    """Augment a batch of views.

    Args:
        images: (B, 3, H, W) uint8 on a CUDA device; channels-last is read as it is, anything else is copied first.
        table: (B, 14) float32 there, the columns of `augment.COLUMNS`.
        gray_first: whether the profile greys before it jitters.
        radius: taps on each side of the blur's centre, less than H and W, at most 8.
        dtype: float32, float16 or bfloat16.
        launch: runs a kernel by name, grid, threads and arguments; the tests' host program. None is the GPU.

    Returns:
        (B, 3, H, W) `dtype`, channels-last.

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
    if batch == 0:
        return view
    partial = torch.empty((batch, PARTS), dtype=torch.float32, device=images.device)
    arguments = Arguments(
        images=images.data_ptr(),
        table=table.data_ptr(),
        partial=partial.data_ptr(),
        out=view.data_ptr(),
        height=height,
        width=width,
        gray_first=int(gray_first),
        radius=radius,
        output=OUTPUTS[dtype],
    )
    launch = launch or _module(images.device)
    tiles = -(-height // TILE[0]) * -(-width // TILE[1])
    launch("mean_luma", (PARTS, batch), THREADS, arguments)
    launch("augment", (tiles, batch), THREADS, arguments)
    return view
