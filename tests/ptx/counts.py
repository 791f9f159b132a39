"""Counts of what each kernel asks of memory, from the PTX run: requests of a warp, sectors of 32 bytes, instructions.

    python -m tests.ptx.counts [CONTENDER]    appends rows to tools/results/kernel_counts.csv
    python -m tests.ptx.counts blocks         batch norm with 1024 blocks and with as many as a card runs at once
    python -m tests.ptx.counts views          the augmentation alone

Counts are exact and the same on every machine; they are no times.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests import test_fused_augment as views
from tests.pooling_cases import random_boxes, random_features, random_maps
from tests.test_batch_norm_act import EPS, make_map, normal, parameters
from tools.bench.rows import Report

from .cases import (
    Make,
    batch_norm_act_kernels,
    box_pool_kernels,
    fused_augment,
    loader,
    masked_pool_kernels,
)
from .module import PtxModule, capabilities, watched_tensors

BF16 = torch.bfloat16
UNITS = {"global bytes": "bytes"}


class Counter:
    """A launcher that keeps the counts of each kernel's last launch."""

    def __init__(self, module: PtxModule, counts: dict[str, dict[str, int]]) -> None:
        self.module, self.counts = module, counts

    def __call__(self, kernel: str, grid: Any, block: Any, arguments: ctypes.Structure) -> None:
        with self.module.counting() as counted:
            self.module(kernel, grid, block, arguments)
        self.counts[kernel] = counted


def count_norm(make: Make) -> str:
    """Batch norm with residual and ReLU, forward and backward, in as many blocks as a GPU gets for a large map."""
    x, residual = make_map(4, 64, 16, 16, dtype=BF16), make_map(4, 64, 16, 16, dtype=BF16, seed=3)
    weight, bias = parameters(64, torch.float32)
    grad = normal(4, 64, 16, 16, dtype=BF16, seed=5).to(memory_format=torch.channels_last)
    kernels = batch_norm_act_kernels.BatchNormActKernels(loader(make, batch_norm_act_kernels.SOURCE), 1024, 1)
    results = kernels.forward(x, residual, weight, bias, 1, EPS, True, True)
    kernels.backward(grad, x, weight, bias, *results[1:], EPS, True, True)
    return "4 x 64 x 16 x 16, bfloat16, residual, ReLU"


BLOCKS = {"1024 blocks": 1024, "4 blocks a multiprocessor of an A100": 4 * 108, "of an H200": 4 * 132}
"""Into how many blocks a large map may be cut; `cuda_kernels` takes four for each multiprocessor."""


def count_joins(blocks: int) -> Callable[[Make], str]:
    """Batch norm of a map that is cut into as many parts as a large one: what the joins then ask of memory.

    The map itself is small, so its passes do more work for each part than those of a large one would.
    """

    def run(make: Make) -> str:
        x, (weight, bias) = make_map(8, 64, 64, 64, dtype=BF16), parameters(64, torch.float32)
        kernels = batch_norm_act_kernels.BatchNormActKernels(loader(make, batch_norm_act_kernels.SOURCE), blocks, 1)
        results = kernels.forward(x, None, weight, bias, 1, EPS, False, False)
        kernels.backward(x, x, weight, bias, *results[1:], EPS, False, False)
        return "8 x 64 x 64 x 64, bfloat16"

    return run


def count_soft(make: Make) -> str:
    """Pooling under two soft maps, forward and backward."""
    features, weights = random_features(2, 256, 7, 7, BF16), random_maps(2, 1, 2, 7, 7, torch.float32)
    kernels = masked_pool_kernels.MaskedPoolKernels(loader(make, masked_pool_kernels.SOURCE))
    kernels.backward(kernels.forward(features, weights), features, weights, True, True)
    return "2 x 256 x 7 x 7, 2 maps, bfloat16"


def count_boxes(make: Make) -> str:
    """Pooling over boxes, forward and backward."""
    features, boxes = random_features(2, 256, 7, 7, BF16), random_boxes(2)
    kernels = box_pool_kernels.BoxPoolKernels(loader(make, box_pool_kernels.SOURCE))
    kernels.backward(kernels.forward(features, boxes), features, boxes)
    return "2 x 256 x 7 x 7, bfloat16"


def count_views(make: Make) -> str:
    """The augmentation of four views, some of them blurred."""
    images, params = views.sample_images(4, 64), views.draw("byol", 1, 0, views.np.arange(4), 0)
    launch = make(fused_augment.SOURCE, (), fused_augment.SHARED_BYTES)
    views.kernel(launch, images, params, torch.float16)
    return "4 x 64 x 64, byol, float16"


def count(report: Report, contender: str, capability: tuple[int, int]) -> None:
    """Add the rows of one architecture."""
    for part in (count_norm, count_soft, count_boxes, count_views):
        add_rows(report, part, contender, capability)


def add_rows(report: Report, part: Callable[[Make], str], contender: str, capability: tuple[int, int]) -> None:
    """Add the counts of every kernel that a part launches."""
    counts: dict[str, dict[str, int]] = {}

    def make(source: Path, options: tuple[str, ...], shared: Mapping[str, int]) -> Counter:
        module = PtxModule(source, options, capability=capability, shared_bytes=shared, both_orders=False)
        return Counter(module, counts)

    with watched_tensors():
        shape = part(make)
    for kernel, values in counts.items():
        for metric, value in values.items():
            setting = f"{shape}, sm_{capability[0]}{capability[1]}"
            report.add(f"{kernel}: {contender}", metric, UNITS.get(metric, "count"), [float(value)], setting)


if __name__ == "__main__":
    rows = Report("kernel_counts")
    asked = sys.argv[1] if len(sys.argv) > 1 else "ours"
    for each in capabilities():
        if asked == "blocks":
            for name, number in BLOCKS.items():
                add_rows(rows, count_joins(number), name, each)
        elif asked == "views":
            add_rows(rows, count_views, "one store for four values", each)
        else:
            count(rows, asked, each)
    print(rows.append_csv())
