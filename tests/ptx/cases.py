"""The project's own kernel tests as cases that take their launcher from outside.

A case is a test of `tests/test_batch_norm_act.py`, `test_masked_pool.py`, `test_box_pool.py` or `test_fused_augment.py`
with its parameters; it compares the kernels' results with their definition. Here the launcher is NVRTC's PTX on the CPU
(`module.py`) or the source on real threads (`threaded.py`), where those files use a shim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from models.ops import batch_norm_act_kernels, box_pool_kernels, masked_pool_kernels
from models.ops.box_pool_kernels import BoxPoolKernels
from models.ops.masked_pool_kernels import MaskedPoolKernels
from pipeline.kernels import fused_augment
from tests import test_batch_norm_act, test_box_pool, test_fused_augment, test_masked_pool

Make = Callable[[Path, tuple[str, ...], Mapping[str, int]], Any]
"""Source, compiler options, dynamic shared memory by kernel -> launcher."""
Case = Callable[[Make], None]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def loader(make: Make, source: Path) -> Callable[[tuple[str, ...]], Any]:
    """Compiler options -> launcher, as the kernels' classes want it."""
    return cache(lambda options: make(source, options, {}))


def norm(shape: tuple[int, ...], dtype: torch.dtype, blocks: int = 4) -> Case:
    """Batch norm, all forms, outputs and gradients; `shape` is N, C, H, W and groups."""

    def run(make: Make) -> None:
        load = loader(make, batch_norm_act_kernels.SOURCE)
        test_batch_norm_act.test_kernels_agree_with_the_definition(load, shape, dtype, blocks)

    return run


def far_from_zero(make: Make) -> None:
    """Statistics of channels whose mean is far larger than their spread."""
    test_batch_norm_act.test_statistics_of_a_channel_far_from_zero(loader(make, batch_norm_act_kernels.SOURCE))


def mask(make: Make) -> None:
    """The mask of the ReLU, bit by bit."""
    load = loader(make, batch_norm_act_kernels.SOURCE)
    test_batch_norm_act.test_kernels_equal_the_definition_bit_by_bit_in_the_mask(load)


def running(make: Make) -> None:
    """Running statistics, two views."""
    test_batch_norm_act.test_running_kernel_agrees_with_the_definition(loader(make, batch_norm_act_kernels.SOURCE), 2)


def layouts(make: Make) -> None:
    """Batch norm of maps that are not channels-last or not aligned."""
    test_batch_norm_act.test_kernels_keep_nan_and_take_other_layouts(loader(make, batch_norm_act_kernels.SOURCE))


def soft(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """Pooling under soft maps; `shape` is B, C, groups, masks, H, W."""

    def run(make: Make) -> None:
        kernels = MaskedPoolKernels(loader(make, masked_pool_kernels.SOURCE))
        test_masked_pool.test_soft_kernels_agree_with_the_definition(kernels, shape, dtype)

    return run


def misaligned(make: Make) -> None:
    """Pooling of a map whose storage starts at an odd place."""
    kernels = MaskedPoolKernels(loader(make, masked_pool_kernels.SOURCE))
    test_masked_pool.test_misaligned_storage_takes_the_scalar_path(kernels)


def box(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """Pooling over boxes; `shape` is B, C, H, W."""

    def run(make: Make) -> None:
        kernels = BoxPoolKernels(loader(make, box_pool_kernels.SOURCE))
        test_box_pool.test_box_kernels_agree_with_the_definition(kernels, shape, dtype)

    return run


def augmented(shape: tuple[int, int], dtype: torch.dtype = F32, profile: str = "byol", batch: int = 4) -> Case:
    """The augmentation of views of H x W pixels; blur, jitter and the rest as the profile draws them."""

    def run(make: Make) -> None:
        launch = make(fused_augment.SOURCE, (), fused_augment.SHARED_BYTES)
        check_augmented(launch, shape, dtype, profile, batch)

    return run


def check_augmented(launch: Any, shape: tuple[int, int], dtype: torch.dtype, profile: str, batch: int) -> None:
    """At most a rounding away from the definition."""
    images = test_fused_augment.sample_images(batch, max(shape))[:, :, : shape[0], : shape[1]]
    params = test_fused_augment.draw(profile, 1, 0, test_fused_augment.np.arange(batch), 0)
    result = test_fused_augment.kernel(launch, images, params, dtype)
    exact = test_fused_augment.apply(images, params, torch.float64)
    tolerance = 1e-4 if dtype == F32 else torch.finfo(dtype).eps * float(exact.abs().max())
    assert (result.double() - exact).abs().max() <= tolerance


DEFAULT: dict[str, Case] = {
    "norm, odd channels": norm((4, 7, 3, 3, 2), F32),
    "norm, vectors of halves": norm((6, 48, 5, 3, 3), BF16),
    "norm, several channel blocks": norm((2, 264, 2, 1, 1), F16),
    "norm, running statistics": running,
    "soft maps, odd channels": soft((3, 7, 1, 2, 3, 3), F32),
    "soft maps, many masks": soft((2, 36, 12, 11, 3, 3), BF16),
    "boxes, vectors": box((2, 264, 7, 7), BF16),
    "boxes, odd": box((6, 7, 3, 5), F16),
    "augmentation, one cut tile": augmented((31, 33), F16, batch=1),
    "augmentation, four tiles": augmented((36, 68), F32, "mocov2", batch=1),
}
"""One choice of cases that launches every kernel; for the default run."""

ALL: dict[str, Case] = {
    **DEFAULT,
    **{
        f"norm {shape} {dtype} {blocks}": norm(shape, dtype, blocks)
        for shape in test_batch_norm_act.CASES
        for dtype in (F32, F16, BF16)
        for blocks in (4, 64)
    },
    "norm, far from zero": far_from_zero,
    "norm, mask": mask,
    "norm, layouts": layouts,
    **{
        f"soft {shape} {dtype}": soft(shape, dtype)
        for shape in test_masked_pool.SOFT_CASES
        for dtype in (F32, F16, BF16)
    },
    "soft maps, misaligned": misaligned,
    **{
        f"box {shape} {dtype}": box(shape, dtype)
        for shape in ((6, 264, 7, 7), (1, 8, 7, 7), (6, 7, 3, 5), (2, 3, 1, 1))
        for dtype in (F32, F16, BF16)
    },
    **{
        f"augmentation {shape} {profile}": augmented(shape, dtype, profile)
        for shape, dtype in (((2, 2), F32), ((5, 5), F16), ((64, 64), BF16), ((65, 66), F32), ((40, 130), F16))
        for profile in ("byol", "mocov2", "mocov1")
    },
}
"""Every kernel test of the project."""
