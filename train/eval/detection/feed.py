"""Images and targets of a training step, decoded ahead by threads; what they are is a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.images import open_rgb
from pipeline.refusal import ImageRefused

from ...errors import UserMistake
from . import rle
from .records import ImageRecord
from .schedule import Sizes, draw_size_and_flip, epoch_batches, resized

AHEAD = 2


@dataclass(frozen=True)
class Sample:
    """One image for training.

    Attributes:
        image: (3, H, W) uint8 RGB.
        boxes: (n, 4) fp32 x0 y0 x1 y1 in its pixels.
        labels: (n,) int64, class from 0.
        masks: (n, H, W) uint8, or (0, H, W) where there are none.
        draw: address (step, position in the global batch) of what is drawn for it inside the detector.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    draw: tuple[int, int]


def read_image(record: ImageRecord) -> Image.Image:
    """The image in RGB, upright.

    Raises:
        UserMistake: it is missing or damaged, or its size is not the annotated one.
    """
    try:
        image = open_rgb(record.path.read_bytes())
    except (OSError, ImageRefused) as reason:
        raise UserMistake(f"{record.path} cannot be read: {reason}; copy it again") from None
    # An image that EXIF turns, or another file of that name, would have its boxes in the wrong place.
    if image.size != (record.width, record.height):
        raise UserMistake(
            f"{record.path} is {image.size[0]} x {image.size[1]} pixels, annotated as {record.width} x "
            f"{record.height}; its boxes would be in the wrong place, correct the annotations"
        )
    return image


def resize_image(image: Image.Image, height: int, width: int, flip: bool = False) -> Tensor:
    """(3, height, width) uint8: bilinear with antialiasing, as PIL and so detectron2 resize; perhaps mirrored."""
    pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    return (tensor.flip(2) if flip else tensor).contiguous()


def training_sample(record: ImageRecord, side: int, longest: int, flip: bool, draw: tuple[int, int]) -> Sample:
    """An image at a short edge of `side` pixels with its objects."""
    height, width = resized(record.height, record.width, side, longest)
    scale = np.array([width / record.width, height / record.height] * 2, dtype=np.float32)
    # Scaled by the rounded size, in each direction apart: that is where the resized pixels are.
    boxes = record.boxes * scale
    if flip:
        # Mirrored, the right edge becomes the left one, so the columns change places.
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    original = (record.height, record.width)
    masks = [rle.outline_mask(outline, (height, width), original, flip) for outline in record.outlines]
    stacked = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.uint8)
    image = resize_image(read_image(record), height, width, flip)
    return Sample(image, torch.from_numpy(boxes), torch.from_numpy(record.labels), stacked, draw)


@dataclass
class TrainingFeed:
    """The samples of this rank, step by step.

    Attributes:
        records: images with objects.
        sizes: short edges to choose from and the limit of the long edge.
        batch: images of a global batch; a multiple of `world_size`.
        seed: run seed.
        rank: this process.
        world_size: number of processes.
        workers: decoding threads.
    """

    records: Sequence[ImageRecord]
    sizes: Sizes
    batch: int
    seed: int
    rank: int = 0
    world_size: int = 1
    workers: int = 1
    _waiting: dict[int, list[Future[Sample]]] = field(default_factory=dict)
    _epoch: tuple[int, np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.batch > len(self.records) or self.batch % self.world_size:
            raise UserMistake(
                f"--global-batch {self.batch} must be a multiple of {self.world_size} ranks and at most the "
                f"{len(self.records)} training images"
            )
        # Known from the annotations, so grouping by orientation opens no image.
        self._landscape = np.array([record.width > record.height for record in self.records])
        self._pool = ThreadPoolExecutor(self.workers)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return len(self.records) // self.batch

    def images_of(self, step: int) -> np.ndarray:
        """Indices of the step's global batch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        # One epoch's order is kept: it is asked for at every step.
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_batches(self.seed, epoch, self._landscape, self.batch))
        images: np.ndarray = self._epoch[1][within]
        return images

    def samples(self, step: int) -> list[Sample]:
        """This rank's samples of a step; those of the next steps are prepared meanwhile."""
        for ahead in range(step, step + 1 + AHEAD):
            if ahead not in self._waiting:
                self._waiting[ahead] = self._submit(ahead)
        # After a jump, such as to the batches for precise statistics, what was prepared is of no use.
        for other in [known for known in self._waiting if not step <= known <= step + AHEAD]:
            for future in self._waiting.pop(other):
                future.cancel()
        return [future.result() for future in self._waiting.pop(step)]

    def _submit(self, step: int) -> list[Future[Sample]]:
        # Each rank takes a contiguous part, so the global batch is the same on any number of ranks.
        share = self.batch // self.world_size
        first = self.rank * share
        futures = []
        # The address is the position in the global batch: draws do not depend on which rank has the image.
        for position, image in enumerate(self.images_of(step)[first : first + share].tolist(), start=first):
            side, flip = draw_size_and_flip(self.seed, step, position, self.sizes.train)
            futures.append(
                self._pool.submit(
                    training_sample, self.records[image], side, self.sizes.longest, flip, (step, position)
                )
            )
        return futures

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)
