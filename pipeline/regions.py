"""Region swapping of RegionCL: where the region lies, whose it is, and the mixed view.

Every draw is a pure function of (seed, step, direction), so a resumed run repeats it and any rank can derive it.
Source: RegionCL (Xu et al., ECCV 2022), section 3.2; official code Annbless/RegionCL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .rng import SLOT_PAIRING, SLOT_REGION, integers, philox

SAMPLINGS = ("paper", "official")
PAIRINGS = ("flip", "roll", "randperm")
SCOPES = ("group", "global")


@dataclass(frozen=True)
class Region:
    """One box, shared by all images of a batch.

    Attributes:
        top_px: first pixel row that is swapped; the other three likewise in pixels.
        left_px: first pixel column.
        height_px: rows.
        width_px: columns.
        box_cells: (top, left, height, width) of the pooled cells of the feature map.
    """

    top_px: int
    left_px: int
    height_px: int
    width_px: int
    box_cells: tuple[int, int, int, int]

    def boxes(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """`box_cells` once for each image: (batch, 4) int64 on `device`, without a host synchronisation."""
        box = torch.tensor(self.box_cells, dtype=torch.int64)
        if torch.device(device).type == "cuda":
            box = box.pin_memory().to(device, non_blocking=True)
        return box.repeat(batch, 1)


def region_bounds(grid: int) -> tuple[int, int]:
    """Smallest and largest side of a region, in cells, on a feature map of `grid` cells a side: 3 and 5 on 7.

    Raises:
        ValueError: for a grid on which no region leaves any canvas.
    """
    if grid < 2:
        raise ValueError(
            f"region swapping needs at least 2 x 2 feature cells, not {grid} x {grid}; use --image-size 64"
        )
    return max(1, round(3 * grid / 7)), min(grid - 1, round(5 * grid / 7))


def draw_region(
    sampling: str,
    grid: int,
    stride: int,
    seed: int,
    step: int,
    direction: int = 0,
    lower: int | None = None,
    upper: int | None = None,
    rank: int | None = None,
) -> Region:
    """The region of one step.

    Args:
        sampling: "paper" (uniform and aligned to the grid) or "official" (the released code's, see `_official_axis`).
        grid: cells a side of the feature map, 7 at 224 px.
        stride: pixels a side of a cell, 32 for a ResNet or Swin.
        seed: run seed.
        step: optimizer step.
        direction: which of the views is mixed, 0 or 1.
        lower: smallest side in cells; None is `region_bounds`.
        upper: largest side in cells, itself included; None is `region_bounds`.
        rank: give each rank a region of its own; None is one region for all ranks, as in the released run.

    Raises:
        ValueError: for an unknown sampling or bounds that do not fit the grid.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"unknown region sampling {sampling!r}; choose one of {', '.join(SAMPLINGS)}")
    default_lower, default_upper = region_bounds(grid)
    lower = default_lower if lower is None else lower
    upper = default_upper if upper is None else upper
    if not 1 <= lower <= upper < grid:
        raise ValueError(
            f"region sides of {lower} to {upper} cells do not fit; choose 1 <= lower <= upper <= {grid - 1}"
        )
    words = philox(seed, step, direction, 0 if rank is None else rank, SLOT_REGION)
    # The released code draws width, height, x origin and y origin in this order.
    width, height = (int(side) for side in integers(words[:2], lower, upper + 1))
    axis = _paper_axis if sampling == "paper" else _official_axis
    left_px, left = axis(words[2], width, grid, stride)
    top_px, top = axis(words[3], height, grid, stride)
    return Region(top_px, left_px, height * stride, width * stride, (top, left, height, width))


def _paper_axis(word: np.ndarray, cells: int, grid: int, stride: int) -> tuple[int, int]:
    """First pixel and first pooled cell: uniform over the aligned origins that fit."""
    first = int(integers(word, 0, grid - cells + 1))
    return first * stride, first


def _official_axis(word: np.ndarray, cells: int, grid: int, stride: int) -> tuple[int, int]:
    """First pixel and first pooled cell as the released code computes them.

    It rounds a uniform pixel to the grid (Python rounds halves to even), then clamps so that the region ends one pixel
    before the border. A clamped region begins one pixel before a cell, and is pooled a whole cell early.
    """
    side = grid * stride
    aligned = stride * round(int(integers(word, 0, side)) / stride)
    start = min(aligned, side - 1 - cells * stride)
    return start, start // stride


def draw_pairing(
    pairing: str, scope: str, seed: int, step: int, direction: int, global_batch: int, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Whose region each image of the global batch receives.

    Args:
        pairing: "flip" reverses each group; "roll" takes the next image; "randperm" walks each group along one random
            cycle, a random permutation in which no image is its own partner.
        scope: "group" pairs within `group_size` consecutive images, "global" within the whole global batch.
        seed: run seed.
        step: optimizer step.
        direction: which of the views is mixed, 0 or 1.
        global_batch: G.
        group_size: images in a group; ignored for scope "global".

    Returns:
        partner: (G,) int64, composite i holds the region of image partner[i].
        inverse: (G,) int64, image j's region lies in composite inverse[j].

    Raises:
        ValueError: for unknown names, groups that do not divide the batch, or a group in which an image would be
            paired with itself: its intra-image negative would then be its own positive.
    """
    if pairing not in PAIRINGS:
        raise ValueError(f"unknown region pairing {pairing!r}; choose one of {', '.join(PAIRINGS)}")
    if scope not in SCOPES:
        raise ValueError(f"unknown pairing scope {scope!r}; choose one of {', '.join(SCOPES)}")
    size = global_batch if scope == "global" else group_size
    if size < 1 or global_batch % size:
        raise ValueError(f"global batch {global_batch} is not made of groups of {size}; choose a size that divides it")
    if size < 2:
        raise ValueError("region pairing needs at least 2 images in a group; raise the batch or the group size")
    if pairing == "flip" and size % 2:
        raise ValueError(
            f'pairing "flip" pairs the middle of {size} images with itself; use an even group or pairing "roll"'
        )
    first = np.arange(0, global_batch, size, dtype=np.int64)[:, None]
    place = np.arange(size, dtype=np.int64)[None, :]
    if pairing == "flip":
        partner = first + (size - 1 - place)
    elif pairing == "roll":
        partner = first + (place + 1) % size
    else:
        words = philox(seed, np.arange(global_batch), step, direction, SLOT_PAIRING).astype(np.uint64)
        keys = ((words[:, 0] << np.uint64(32)) | words[:, 1]).reshape(-1, size)
        cycle = np.argsort(keys, axis=1, kind="stable")
        partner = np.empty((global_batch // size, size), dtype=np.int64)
        np.put_along_axis(partner, cycle, first + np.roll(cycle, -1, axis=1), axis=1)
    flat = partner.reshape(-1)
    return flat, np.argsort(flat, kind="stable")


def rank_partner(partner: np.ndarray, rank: int, batch_per_device: int, scope: str) -> np.ndarray:
    """One rank's rows of `partner`, (B,) int64: indices into its own batch for scope "group", else into the global one.

    Raises:
        ValueError: if a group reaches over the rank's border.
    """
    first = rank * batch_per_device
    rows = partner[first : first + batch_per_device]
    if scope == "global":
        return rows
    rows = rows - first
    if len(rows) and (rows.min() < 0 or rows.max() >= batch_per_device):
        raise ValueError(
            f"a pairing group spans two ranks of {batch_per_device} images; choose a group size that divides that"
        )
    return rows


def make_mixed(
    view: Tensor, partner: Tensor, region: Region, gather: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The mixed view: each image with the region of its partner pasted over its own, at the same place.

    Args:
        view: (B, 3, S, S), any dtype and device.
        partner: (B,) int64 on the device of `view`: index into `view`, or into the global batch with `gather`.
        region: the box.
        gather: for pairs across ranks: takes this rank's patch (B, 3, h, w), contiguous in channels-last, and returns
            the patches (G, 3, h, w) of all ranks in rank order. Only the region travels, not the whole image.

    Returns:
        (B, 3, S, S) channels-last, newly allocated. The only other allocation is one patch of the region's size.
    """
    rows = slice(region.top_px, region.top_px + region.height_px)
    columns = slice(region.left_px, region.left_px + region.width_px)
    patch = view[:, :, rows, columns]
    if gather is not None:
        patch = gather(patch.contiguous(memory_format=torch.channels_last))
    mixed = torch.empty_like(view, memory_format=torch.channels_last).copy_(view)
    mixed[:, :, rows, columns] = patch.index_select(0, partner)
    return mixed
