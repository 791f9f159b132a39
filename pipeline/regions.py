"""Region swapping of RegionCL: where the region lies, whose it is, and the mixed view.

`RegionSampler` is the one place that draws regions and pairs. Every draw is a pure function of (seed, step, direction),
so a resumed run repeats it and any rank can derive it.
Source: RegionCL (Xu et al., ECCV 2022), section 3.1; official code Annbless/RegionCL.
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
            # Only a copy from page-locked memory leaves the host free.
            box = box.pin_memory().to(device, non_blocking=True)
        return box.repeat(batch, 1)


@dataclass(frozen=True)
class RegionDraw:
    """What the mixed view of one rank's batch is made of.

    Attributes:
        region: the box that is swapped.
        partner: (B,) int64: composite i holds the region of image `partner[i]`, an index into this rank's batch, or
            into the global batch where `across_ranks`.
        across_ranks: the pairs span all ranks.
    """

    region: Region
    partner: np.ndarray
    across_ranks: bool


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


@dataclass(frozen=True)
class RegionSampler:
    """Draws the region and the pairs of a step, with all settings bound.

    Attributes:
        grid: cells a side of the feature map, 7 at 224 px.
        stride: pixels a side of a cell, 32 for a ResNet or Swin.
        seed: run seed.
        sampling: "paper" (uniform and aligned to the grid) or "official" (the released code's, see `_official_axis`).
        lower: smallest side of a region in cells; 0 is that of `region_bounds`.
        upper: largest side in cells, itself included; 0 is that of `region_bounds`.
        per_rank: give each rank a region of its own; otherwise all ranks share one, as in the released run.
        pairing: "flip" reverses each group; "roll" takes the next image; "randperm" walks each group along one random
            cycle, a random permutation in which no image is its own partner.
        scope: "group" pairs within `group_size` consecutive images, "global" within the whole global batch.
        group_size: images in a group; 0 is a rank's whole batch. Ignored for scope "global".

    Raises:
        ValueError: for an unknown name or bounds that do not fit the grid.
    """

    grid: int
    stride: int
    seed: int = 0
    sampling: str = "paper"
    lower: int = 0
    upper: int = 0
    per_rank: bool = False
    pairing: str = "flip"
    scope: str = "group"
    group_size: int = 0

    def __post_init__(self) -> None:
        for what, value, known in (
            ("region sampling", self.sampling, SAMPLINGS),
            ("region pairing", self.pairing, PAIRINGS),
            ("pairing scope", self.scope, SCOPES),
        ):
            if value not in known:
                raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(known)}")
        lower, upper = self.bounds
        if not 1 <= lower <= upper < self.grid:
            raise ValueError(
                f"region sides of {lower} to {upper} cells do not fit; choose 1 <= lower <= upper <= {self.grid - 1}"
            )

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest side of a region in cells."""
        lower, upper = region_bounds(self.grid)
        return self.lower or lower, self.upper or upper

    def draw(
        self, step: int, direction: int, batch: int, rank: int = 0, world_size: int = 1, forward_pass: int | None = None
    ) -> RegionDraw:
        """The region and the partners of one rank's batch.

        Args:
            step: optimizer step, which keys the region: all micro-batches of a step share it.
            direction: which of the views is mixed, 0 or 1.
            batch: images of this rank in one forward pass.
            rank: of the rank.
            world_size: number of ranks.
            forward_pass: keys random pairs, so that the micro-batches of a step differ; None is `step`.

        Raises:
            ValueError: as for `partners`, or a group that reaches over the rank's border.
        """
        key = step if forward_pass is None else forward_pass
        partner = self.partners(key, direction, batch * world_size, self.group_size or batch)
        return RegionDraw(
            self.region(step, direction, rank),
            rank_partner(partner, rank, batch, self.scope),
            self.scope == "global" and world_size > 1,
        )

    def region(self, step: int, direction: int = 0, rank: int = 0) -> Region:
        """The region of one step; `rank` counts only where each rank has a region of its own."""
        lower, upper = self.bounds
        words = philox(self.seed, step, direction, rank if self.per_rank else 0, SLOT_REGION)
        # The released code draws width, height, x origin and y origin in this order.
        width, height = (int(side) for side in integers(words[:2], lower, upper + 1))
        axis = _paper_axis if self.sampling == "paper" else _official_axis
        left_px, left = axis(words[2], width, self.grid, self.stride)
        top_px, top = axis(words[3], height, self.grid, self.stride)
        return Region(top_px, left_px, height * self.stride, width * self.stride, (top, left, height, width))

    def partners(self, step: int, direction: int, global_batch: int, group_size: int) -> np.ndarray:
        """Whose region each image of the global batch receives.

        Args:
            step: keys random pairs.
            direction: which of the views is mixed, 0 or 1.
            global_batch: G.
            group_size: images in a group; ignored for scope "global".

        Returns:
            (G,) int64, a permutation without fixed points: composite i holds the region of image partner[i].

        Raises:
            ValueError: for groups that do not divide the batch, or a group in which an image would be paired with
                itself: its intra-image negative would then be its own positive.
        """
        size = global_batch if self.scope == "global" else group_size
        _check_group(self.pairing, global_batch, size)
        first = np.arange(0, global_batch, size, dtype=np.int64)[:, None]
        place = np.arange(size, dtype=np.int64)[None, :]
        if self.pairing == "flip":
            partner = first + (size - 1 - place)
        elif self.pairing == "roll":
            partner = first + (place + 1) % size
        else:
            # Sorting random keys gives a random order of each group; each image is paired with the next in that order,
            # which makes one cycle and therefore pairs no image with itself.
            words = philox(self.seed, np.arange(global_batch), step, direction, SLOT_PAIRING).astype(np.uint64)
            keys = ((words[:, 0] << np.uint64(32)) | words[:, 1]).reshape(-1, size)
            cycle = np.argsort(keys, axis=1, kind="stable")
            partner = np.empty((global_batch // size, size), dtype=np.int64)
            np.put_along_axis(partner, cycle, first + np.roll(cycle, -1, axis=1), axis=1)
        return partner.reshape(-1)

    def __str__(self) -> str:
        lower, upper = self.bounds
        return f"{lower} to {upper} cells a side on a {self.grid} x {self.grid} grid, {self.sampling} sampling"


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


def _check_group(pairing: str, global_batch: int, size: int) -> None:
    if size < 1 or global_batch % size:
        raise ValueError(f"global batch {global_batch} is not made of groups of {size}; choose a size that divides it")
    if size < 2:
        raise ValueError("region pairing needs at least 2 images in a group; raise the batch or the group size")
    if pairing == "flip" and size % 2:
        raise ValueError(
            f'pairing "flip" pairs the middle of {size} images with itself; use an even group or pairing "roll"'
        )


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
    # A view of the pixels: nothing is copied where the pairs are on this rank.
    patch = view[:, :, rows, columns]
    if gather is not None:
        patch = gather(patch.contiguous(memory_format=torch.channels_last))
    # Copied once; pasting into the view itself would overwrite regions that are still to be read.
    mixed = torch.empty_like(view, memory_format=torch.channels_last).copy_(view)
    mixed[:, :, rows, columns] = patch.index_select(0, partner)
    return mixed
