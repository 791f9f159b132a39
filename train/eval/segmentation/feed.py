"""Training batches by step and validation images one by one, decoded ahead by threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.images import decode_rgb
from pipeline.refusal import ImageRefused
from pipeline.sampling import global_order

from ...errors import UserMistake
from .augment import Crop, Geometry, blank_padding, change_colours, draw_colours, normalise, random_crop
from .labels import LabelMap, Pair, read_label

AHEAD = 2
"""Steps that are prepared while one is computed."""


def read_pair(pair: Pair, labels: LabelMap) -> tuple[np.ndarray, np.ndarray]:
    """((H, W, 3) uint8 RGB, (H, W) uint8 classes).

    Raises:
        UserMistake: one of them cannot be used.
    """
    try:
        image = decode_rgb(pair.image.read_bytes())
    except (OSError, ImageRefused) as reason:
        raise UserMistake(f"image {pair.image} cannot be read: {reason}; copy it again") from None
    label = read_label(pair.label, labels)
    # Both were inspected at the start; a file may have been replaced since.
    if image.shape[:2] != label.shape:
        raise UserMistake(
            f"label {pair.label} is {label.shape[1]} x {label.shape[0]} pixels, its image {image.shape[1]} x "
            f"{image.shape[0]} upright; they must be equal"
        )
    return image, label


@dataclass(frozen=True)
class TrainBatch:
    """This rank's samples of a step.

    Attributes:
        crops: samples in order.
        samples: (B,) int64 index of each in the data set.
        epochs: (B,) int64 epoch that each belongs to.
    """

    crops: list[Crop]
    samples: np.ndarray
    epochs: np.ndarray

    def tensors(self, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(images (B, 3, H, W) fp32, coloured and normalised, channels-last; labels (B, H, W) int64) on the device."""
        pixels = torch.from_numpy(np.stack([crop.image for crop in self.crops]))
        classes = torch.from_numpy(np.stack([crop.label for crop in self.crops]))
        # Only from page-locked memory does a copy run beside the computation.
        if device.type == "cuda":
            pixels, classes = pixels.pin_memory(), classes.pin_memory()
        images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
        images = normalise(change_colours(images, draw_colours(seed, self.epochs, self.samples)))
        # Last, because colours and normalisation also change the padding.
        images = blank_padding(images, np.array([crop.valid for crop in self.crops]))
        return images.contiguous(memory_format=torch.channels_last), classes.to(device, non_blocking=True).long()


class TrainingFeed:
    """The batches of this rank: position p of an endless sequence is place p mod N in the order of epoch p // N.

    Step t takes positions tG..(t+1)G-1 of that sequence for a global batch of G, rank r the r-th contiguous slice.

    Args:
        pairs: N images with labels.
        labels: their classes.
        geometry: sizes of a sample.
        global_batch: G, a multiple of `world_size`.
        seed: every draw follows from it.
        rank: this process.
        world_size: number of processes.
        threads: that decode.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        labels: LabelMap,
        geometry: Geometry,
        global_batch: int,
        seed: int,
        rank: int,
        world_size: int,
        threads: int,
    ) -> None:
        self.pairs, self.labels, self.geometry, self.seed = pairs, labels, geometry, seed
        self.global_batch, self.share, self.rank = global_batch, global_batch // world_size, rank
        self._pool = ThreadPoolExecutor(threads)
        self._orders: dict[int, np.ndarray] = {}

    def addresses(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples, epochs) of this rank's part of a step, both (B,) int64."""
        first = step * self.global_batch + self.rank * self.share
        epochs, places = np.divmod(np.arange(first, first + self.share), len(self.pairs))
        samples = [int(self._order(int(epoch))[place]) for epoch, place in zip(epochs, places, strict=True)]
        return np.array(samples, dtype=np.int64), epochs.astype(np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # A batch may reach into the next epoch, so two orders are kept.
            self._orders = {old: order for old, order in self._orders.items() if old >= epoch - 1}
            self._orders[epoch] = global_order(np.arange(len(self.pairs)), self.seed, epoch)
        return self._orders[epoch]

    def _sample(self, sample: int, epoch: int) -> Crop:
        return random_crop(*read_pair(self.pairs[sample], self.labels), self.geometry, self.seed, epoch, sample)

    def batches(self, first: int, last: int) -> Iterator[TrainBatch]:
        """Batches of the steps `first` to `last` - 1; the next ones are prepared meanwhile."""
        waiting: list[tuple[np.ndarray, np.ndarray, list[Future[Crop]]]] = []
        # The loop runs past the end, so that the last batches come out as well.
        for step in range(first, last + AHEAD):
            if step < last:
                samples, epochs = self.addresses(step)
                pairs = zip(samples.tolist(), epochs.tolist(), strict=True)
                waiting.append((samples, epochs, [self._pool.submit(self._sample, *pair) for pair in pairs]))
            if step >= first + AHEAD:
                samples, epochs, futures = waiting.pop(0)
                yield TrainBatch([future.result() for future in futures], samples, epochs)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def validation_pairs(
    pairs: Sequence[Pair], labels: LabelMap, rank: int, world_size: int, threads: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Image and label of every `world_size`-th pair from `rank` on, some of them read ahead."""
    # No padding to equal shares: each image counts once in the confusion matrix.
    own = pairs[rank::world_size]
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Future[tuple[np.ndarray, np.ndarray]]] = []
        for pair in own:
            waiting.append(pool.submit(read_pair, pair, labels))
            # A limit: memory must not grow with the number of images.
            if len(waiting) > threads + AHEAD:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
