"""The augmentation of `augment.apply` on a GPU as two kernels, `augment.cu`.

They are used only where they are asked for: training does so where `train/proving` found them right and faster.

The project has one module that compiles and launches kernels, `models/ops/launcher.py`. `pipeline` and `models` are
libraries that do not import each other, so a caller that has both hands the launcher over, as `load`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("augment.cu")

# These repeat constants of the source; a test compares them.
THREADS = 256
PARTS = 8
REACH = 8
TILE = (32, 64)
COLUMNS = 14
SHARED_FLOATS = 3 * 48 * 81 + 48 * 65 + 33
SHARED_BYTES = {"mean_luma": 4 * THREADS, "augment": 4 * SHARED_FLOATS}

MAX_BATCH = 65535
"""Images are blocks along y of the grid."""

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


class Launch(Protocol):
    """Launches a kernel of the loaded source, which takes one structure by value."""

    def __call__(
        self, kernel: str, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: ctypes.Structure, /
    ) -> None:
        """Launch `kernel` on the device's current stream and return at once."""


LoadKernels = Callable[[Path, Sequence[str], torch.device, Mapping[str, int]], Launch]
"""Compiles a source for a device: source, compiler options, device and, for each kernel by name, the dynamic shared
memory of a block in bytes. `models.ops.launcher.CudaModule` is one."""


@cache
def loaded(load: LoadKernels, device: torch.device) -> Launch:
    """The kernels on one device, compiled once in a process."""
    return load(SOURCE, (), device, SHARED_BYTES)


def _check(images: Tensor, table: Tensor, radius: int, dtype: torch.dtype) -> None:
    """Refuse what the kernels do not have, and a table that they would read past its end."""
    if dtype not in OUTPUTS:
        raise ValueError(f"the fused kernel gives float32, float16 or bfloat16, not {dtype}")
    batch, _, height, width = images.shape
    if not 0 <= radius <= min(REACH, height - 1, width - 1):
        raise ValueError(
            f"the fused kernel blurs with at most {REACH} taps to each side on {height} x {width} px, not {radius}; "
            "use implementation 'reference'"
        )
    if batch > MAX_BATCH:
        raise ValueError(f"the fused kernel takes up to {MAX_BATCH} images, not {batch}; use 'reference'")
    if table.shape != (batch, COLUMNS) or table.dtype != torch.float32 or table.device != images.device:
        given = f"{tuple(table.shape)} {table.dtype} on {table.device}"
        raise ValueError(f"the table must be {(batch, COLUMNS)} torch.float32 on {images.device}, not {given}")


def augment(
    images: Tensor,
    table: Tensor,
    gray_first: bool,
    radius: int,
    dtype: torch.dtype = torch.float16,
    *,
    launch: Launch,
) -> Tensor:
    """Augment a batch of views.

    Args:
        images: (B, 3, H, W) uint8 on a CUDA device; channels-last is read as it is, anything else is copied first.
        table: (B, 14) float32 there, the columns of `augment.COLUMNS`.
        gray_first: whether the profile greys before it jitters.
        radius: taps on each side of the blur's centre, less than H and W, at most 8.
        dtype: float32, float16 or bfloat16.
        launch: of the kernels on the images' device, see `loaded`.

    Returns:
        (B, 3, H, W) `dtype`, channels-last.

    Raises:
        ValueError: for a dtype, blur or batch that the kernels do not have, or a table that is not as said above.
        RuntimeError: if they cannot be compiled or launched.
    """
    _check(images, table, radius, dtype)
    batch, _, height, width = images.shape
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
    tiles = -(-height // TILE[0]) * -(-width // TILE[1])
    launch("mean_luma", (PARTS, batch, 1), (THREADS, 1, 1), arguments)
    launch("augment", (tiles, batch, 1), (THREADS, 1, 1), arguments)
    return view
