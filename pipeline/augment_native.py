"""The augmentation of `augment.apply` on the CPU as one compiled pass, `native/augment.cpp`."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from .layouts import AUGMENTATION, OUTPUTS, PARAMETERS
from .native_build import try_load


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None after saying once on standard error why there is none and what happens instead."""
    loaded = try_load("augment", instead="augmentation on the CPU runs as PyTorch operations, many times slower")
    if loaded is None:
        return None
    loaded.regatta_augment_scratch.restype = ctypes.c_size_t
    loaded.regatta_augment_scratch.argtypes = (ctypes.c_int, ctypes.c_int)
    # Without a declaration ctypes would cut addresses to 32 bits.
    pointer, number = ctypes.c_void_p, ctypes.c_int
    loaded.regatta_augment.argtypes = (
        pointer,
        ctypes.c_int64,
        number,
        number,
        pointer,
        number,
        number,
        number,
        pointer,
        pointer,
        number,
    )
    loaded.regatta_augment_force_level.argtypes, loaded.regatta_augment_force_level.restype = (ctypes.c_int32,), None
    # A library of another version would read the table at wrong places.
    assert loaded.regatta_augment_columns() == PARAMETERS
    assert loaded.regatta_augment_plan_bytes() == AUGMENTATION.itemsize
    return loaded


@cache
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    """One pool for each process: a fork takes no threads along."""
    return ThreadPoolExecutor(count, thread_name_prefix=f"augment-{process}")


def augment(
    images: Tensor,
    table: Tensor,
    gray_first: bool,
    radius: int,
    dtype: torch.dtype = torch.float32,
    threads: int = 0,
    lanes: int = 0,
) -> Tensor:
    """Augment a batch of views.

    Args:
        images: (B, 3, H, W) uint8 on the CPU; channels-last is read as it is, anything else is copied first.
        table: (B, 14) float32 on the CPU, the columns of `augment.COLUMNS`.
        gray_first: whether the profile greys before it jitters.
        radius: taps on each side of the blur's centre, less than H and W.
        dtype: float32, bfloat16 or float16 for a normalised result, uint8 for grey levels.
        threads: images are divided over so many threads; 0 is what torch uses.
        lanes: floats in a register, 16 (AVX-512), 8 (AVX2) or 4; 0 is the most there are.

    Returns:
        (B, 3, H, W) `dtype`, channels-last.

    Raises:
        ValueError: for a dtype, size or number of lanes that it cannot do.
        RuntimeError: if there is no library.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError("the native augmentation could not be built; see the message before")
    if dtype not in OUTPUTS:
        raise ValueError(f"the native augmentation gives float32, bfloat16, float16 or uint8, not {dtype}")
    batch, channels, height, width = images.shape
    assert images.dtype == torch.uint8 and channels == 3 and table.shape == (batch, PARAMETERS)
    # The pass reads interleaved pixels, as the decoder writes them: then this copies nothing.
    images = images.contiguous(memory_format=torch.channels_last)
    table = table.contiguous()
    result = torch.empty((batch, 3, height, width), dtype=dtype, memory_format=torch.channels_last)

    def work(first: int, count: int) -> int:
        # A scratch for each thread: they run at the same time.
        scratch = torch.empty(loaded.regatta_augment_scratch(height, width), dtype=torch.uint8)
        return loaded.regatta_augment(
            images.data_ptr() + first * height * width * 3,
            count,
            height,
            width,
            table.data_ptr() + first * PARAMETERS * 4,
            int(gray_first),
            radius,
            OUTPUTS[dtype],
            result.data_ptr() + first * height * width * 3 * result.element_size(),
            scratch.data_ptr(),
            lanes,
        )

    threads = min(threads or torch.get_num_threads(), batch)
    # Handing one part to a pool would cost more than it saves on small batches.
    if threads <= 1:
        status = work(0, batch)
    else:
        # Contiguous parts of about equal size; images do not depend on one another, so neither do the bits on the
        # parts.
        edges = [batch * part // threads for part in range(threads + 1)]
        counts = [end - start for start, end in zip(edges, edges[1:], strict=False)]
        # The calls release Python's lock, so threads suffice.
        status = max(_threads(os.getpid(), threads).map(work, edges, counts))
    if status == 2:
        raise ValueError(f"this processor has no registers of {lanes} floats; use lanes=0")
    if status:
        raise ValueError(f"cannot augment images of {height} x {width} px with a blur of {radius} px to each side")
    return result
