"""Where in their images the views of a batch were cut, for methods that compare places of two views.

Crops and flips are pure functions of seed, epoch, sample, view and the image's size, so a batch carries these few
numbers, and the boxes are drawn a second time only where somebody asks for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .augment import COLUMN, draw_table
from .geometry import draw_crops
from .interface import PipelineConfig, ViewSpec
from .profiles import get_profile


@dataclass(frozen=True)
class Cuts:
    """How the views of one batch were cut.

    Attributes:
        config: of the loader: views, augmentation profile and seed.
        epoch: number of the epoch that the batch was delivered in.
        index: (B,) int64, the samples that key the draws.
        sizes: (B, 2) height and width in pixels of the image that each row was cut from.
    """

    config: PipelineConfig
    epoch: int
    index: np.ndarray
    sizes: np.ndarray

    def boxes(self) -> dict[str, np.ndarray]:
        """The box of each view, by the view's name.

        Returns:
            (B, 6) float32 each: left, top, right and bottom edge of the crop and width and height of its image, in
            pixels. Left and right are those of the view: in a flipped one `left` is the larger number.
        """
        return {spec.name: self._boxes(number, spec) for number, spec in enumerate(self.config.views)}

    def _boxes(self, number: int, spec: ViewSpec) -> np.ndarray:
        config, (heights, widths) = self.config, self.sizes.T
        top, left, height, width = draw_crops(spec, config.seed, self.epoch, self.index, heights, widths).T
        edges = np.stack([left, top, left + width, top + height, widths, heights], axis=1).astype(np.float32)
        if config.augment:
            table = draw_table(get_profile(config.augment), config.seed, self.epoch, self.index, number)
            flipped = table[:, COLUMN["flip"]] != 0
            edges[flipped, 0], edges[flipped, 2] = edges[flipped, 2], edges[flipped, 0]
        return edges
