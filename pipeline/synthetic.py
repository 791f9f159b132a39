"""Images made on the device: for tests and for the ceiling of a benchmark. Never touches the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from .epoch import EpochPipeline
from .geometry import draw_crops
from .interface import Batch, PipelineConfig

CLASSES = 10
DEFAULT_IMAGES = 100_000
_GRID = 8  # cells of colour along each side of an image
_IMAGE_PX = 256  # nominal side that the crops are drawn for
_MASK = 0xFFFFFFFF


def _hash_uniform(seed: int, rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Uniforms in [0, 1), float32 (B, columns), a function of (seed, row, column) on the rows' device.

    A 32-bit integer mixer in int64 arithmetic: equal on every device, and the products stay below 2**63.
    """
    column = torch.arange(columns, device=rows.device)
    state = (rows[:, None] * 0x9E3779B1 + column * 0x85EBCA77 + (seed & _MASK)) & _MASK
    for multiplier in (0x7FEB352D, 0x846CA68B & 0x7FFFFFFF):
        state = ((state ^ (state >> 16)) * multiplier) & _MASK
    state = state ^ (state >> 15)
    return (state >> 8).float() * 2.0**-24


class SyntheticPipeline(EpochPipeline):
    """Coloured cells, half of them shared by a class, cropped as photographs are.

    `config.data` gives the number of images as text; where it is empty there are 100,000.

    Raises:
        ValueError: the data are named by anything but a number, and would be left aside without a word.
    """

    def __init__(self, config: PipelineConfig):
        if config.data and not (config.data.isdecimal() and int(config.data)):
            raise ValueError(f"--loader synthetic takes a number of images, as 1000; it reads no {config.data}")
        count = int(config.data) if config.data else DEFAULT_IMAGES
        labels = np.arange(count, dtype=np.int64) % CLASSES
        digest = hashlib.sha256(f"synthetic {config.seed} {count}".encode()).hexdigest()
        super().__init__(config, labels, digest)

    def _grids(self, index: np.ndarray) -> torch.Tensor:
        """Float (B, 3, 8, 8) in 0..255: the images that the views are cut from."""
        device, cells = self.config.device, 3 * _GRID * _GRID
        samples = torch.from_numpy(index).to(device)
        # Half of the colour belongs to the image, half to its class, so that features can tell both.
        own = _hash_uniform(self.config.seed, samples, cells)
        shared = _hash_uniform(self.config.seed + 1, samples % CLASSES, cells)
        return ((own + shared) * 127.5).view(-1, 3, _GRID, _GRID)

    def deliver(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Batch]:
        """Generate the batches whose sample indices are given, in order."""
        for index in batches:
            grids = self._grids(index)
            sides = np.full(len(index), _IMAGE_PX)
            views = {}
            for spec in self.config.views:
                boxes = draw_crops(spec, self.config.seed, epoch, index, sides, sides) / _IMAGE_PX
                top, left, height, width = boxes.T
                zero = np.zeros_like(top)
                # grid_sample's coordinates run from -1 to 1 over the image.
                theta = np.stack([width, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1], axis=1)
                matrix = torch.from_numpy(theta.reshape(-1, 2, 3).astype(np.float32)).to(self.config.device)
                points = F.affine_grid(matrix, [len(index), 3, spec.size, spec.size], align_corners=False)
                pixels = F.grid_sample(grids, points, padding_mode="border", align_corners=False)
                views[spec.name] = pixels.round().to(torch.uint8).contiguous(memory_format=torch.channels_last)
            sizes = torch.full((len(index), 2), _IMAGE_PX)
            yield Batch(views, torch.from_numpy(index.copy()), torch.from_numpy(self.labels[index]), sizes)
