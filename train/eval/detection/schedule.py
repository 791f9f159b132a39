"""Training lengths, learning rates and image sizes of the published protocols, as pure functions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from pipeline.rng import SLOT_CROP, SLOT_EPOCH_ORDER, SLOT_ORDER, integers, permutation, philox

from .records import Format

WARMUP_FACTOR = 1e-3


@dataclass(frozen=True)
class Schedule:
    """Step schedule with a linear warm-up.

    Attributes:
        steps: optimizer steps.
        milestones: steps after which the learning rate is a tenth of what it was.
        warmup: steps of the warm-up, which starts at a thousandth of the rate.
        batch: images of a step that `lr` belongs to.
        lr: peak learning rate.
    """

    steps: int
    milestones: tuple[int, ...]
    warmup: int
    batch: int
    lr: float

    def scaled_to(self, steps: int) -> Schedule:
        """This schedule with another number of steps; milestones and warm-up move in proportion."""
        share = steps / self.steps
        milestones = tuple(round(milestone * share) for milestone in self.milestones)
        return dataclasses.replace(self, steps=steps, milestones=milestones, warmup=round(self.warmup * share))

    def lr_at(self, step: int, peak: float) -> float:
        """Learning rate of the 0-based step for a given peak."""
        lr = peak * 0.1 ** sum(step >= milestone for milestone in self.milestones)
        if step < self.warmup:
            share = step / self.warmup
            lr *= WARMUP_FACTOR * (1 - share) + share
        return lr


# Source: detectron2's 1x and 2x, MoCo's VOC configuration (24k), RegionCL (arXiv 2111.12309) section 4 for 12k, whose
# milestones it does not give: here those of 1x in proportion.
SCHEDULES = {
    "1x": Schedule(90_000, (60_000, 80_000), 1000, 16, 0.02),
    "2x": Schedule(180_000, (120_000, 160_000), 1000, 16, 0.02),
    "24k": Schedule(24_000, (18_000, 22_000), 100, 16, 0.02),
    "12k": Schedule(12_000, (8_000, 10_667), 1000, 16, 0.02),
}
CITYSCAPES_24K = Schedule(24_000, (18_000,), 1000, 8, 0.01)
RETINANET_LR = 0.01
DEFAULT_SCHEDULE: dict[Format, str] = {"coco": "1x", "voc": "24k", "cityscapes": "24k"}


def schedule_of(name: str, kind: Format, detector: str) -> Schedule:
    """The published schedule of a name for a format and detector."""
    chosen = CITYSCAPES_24K if kind == "cityscapes" and name == "24k" else SCHEDULES[name]
    return dataclasses.replace(chosen, lr=RETINANET_LR) if detector == "retinanet" else chosen


@dataclass(frozen=True)
class Sizes:
    """Sides of images in pixels.

    Attributes:
        train: of the short edge in training, one drawn for each image.
        test: of the short edge at test.
        longest: the most the long edge may have in training.
        test_longest: the most it may have at test.
    """

    train: tuple[int, ...]
    test: int
    longest: int
    test_longest: int


SIZES: dict[Format, Sizes] = {
    "coco": Sizes(tuple(range(640, 801, 32)), 800, 1333, 1333),
    "voc": Sizes(tuple(range(480, 801, 32)), 800, 1333, 1333),
    "cityscapes": Sizes(tuple(range(800, 1025, 32)), 1024, 2048, 2048),
}


def resized(height: int, width: int, side: int, longest: int) -> tuple[int, int]:
    """(height, width) with the short edge at `side`, less where the long edge would exceed `longest`.

    Source: detectron2's ResizeShortestEdge, with its rounding.
    """
    scale = side / min(height, width)
    new_height, new_width = height * scale, width * scale
    if max(new_height, new_width) > longest:
        shrink = longest / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    # Half up, as detectron2 rounds; Python's `round` takes a half to the even number.
    return int(new_height + 0.5), int(new_width + 0.5)


def draw_size_and_flip(seed: int, step: int, position: int, sides: tuple[int, ...]) -> tuple[int, bool]:
    """Short edge and mirroring (half of the time) of the image at a position of a step's global batch."""
    side = sides[int(integers(philox(seed, step, position, 0, SLOT_CROP)[:1], 0, len(sides))[0])]
    return side, bool(philox(seed, step, position, 0, SLOT_ORDER)[1] & 1)


def epoch_batches(seed: int, epoch: int, landscape: np.ndarray, batch: int) -> np.ndarray:
    """The images of each step of an epoch.

    Each global batch holds images of one orientation, so that little is padded (detectron2's aspect-ratio grouping);
    what is left over of both makes mixed batches at the end, and the last N mod B images of the epoch are left out.

    Args:
        seed: run seed.
        epoch: from 0.
        landscape: (N,) bool, whether an image is wider than high.
        batch: images B of a global batch, at most N.

    Returns:
        (N // B, B) int64 indices.
    """
    order = permutation(seed, len(landscape), epoch, 0, SLOT_EPOCH_ORDER)
    groups = [order[landscape[order]], order[~landscape[order]]]
    whole = [group[: len(group) // batch * batch].reshape(-1, batch) for group in groups]
    blocks = np.concatenate(whole)
    # The blocks are mixed, or all wide images would come before all high ones.
    blocks = blocks[permutation(seed, len(blocks), epoch, 1, SLOT_EPOCH_ORDER)]
    rest = np.concatenate([group[len(group) // batch * batch :] for group in groups])
    mixed = rest[permutation(seed, len(rest), epoch, 2, SLOT_EPOCH_ORDER)]
    return np.concatenate([blocks, mixed[: len(mixed) // batch * batch].reshape(-1, batch)])
