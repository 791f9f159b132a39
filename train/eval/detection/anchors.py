"""Anchors as detectron2 lays them: exact sizes at the exact strides."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

ASPECT_RATIOS = (0.5, 1.0, 2.0)


class Anchors(AnchorGenerator):
    """Boxes of several sizes and shapes around the upper left corner of each cell, the same for each image.

    Differs from torchvision: corners are not rounded to whole pixels, and the stride is the level's own rather than the
    padded image's side divided by the map's, which is off where one does not divide the other.

    Args:
        sizes: for each level the square roots of the areas, in pixels.
        strides: of each level in pixels.
    """

    def __init__(self, sizes: tuple[tuple[float, ...], ...], strides: tuple[int, ...]) -> None:
        super().__init__(sizes, (ASPECT_RATIOS,) * len(sizes))
        self.strides = strides

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - torchvision's signature
    ) -> Tensor:
        """(len(scales) * len(aspect_ratios), 4) boxes around 0; an aspect ratio is height over width."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        widths, heights = (sides / root).reshape(-1), (sides * root).reshape(-1)
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """(A, 4) anchors of all levels, one entry an image."""
        first = feature_maps[0]
        self.set_cell_anchors(torch.float32, first.device)
        grids = [list(level.shape[-2:]) for level in feature_maps]
        steps = [[torch.tensor(stride, device=first.device)] * 2 for stride in self.strides]
        laid = torch.cat(self.grid_anchors(grids, steps))
        return [laid] * len(image_list.image_sizes)
