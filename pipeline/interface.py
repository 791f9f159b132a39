"""What every loader takes and gives: all that `train/` may know of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from .kernels.fused_augment import LoadKernels
from .profiles import Profile

if TYPE_CHECKING:
    from .cuts import Cuts


@dataclass(frozen=True)
class ViewSpec:
    """How one view is cut from a decoded image.

    Attributes:
        name: key of the view in `Batch.views`.
        size: side of the square view in pixels.
        kind: "random" is a random resized crop; "center" resizes the short side to `size * resize_ratio` and takes the
            centre; "whole" squeezes the whole image to the square.
        scale: range of the crop's area relative to the image's, for "random".
        ratio: range of the crop's width / height, for "random".
        interpolation: "bilinear" or "bicubic", antialiased as PIL's resize is.
        resize_ratio: short side before the centre crop, relative to `size` (256/224 by default), for "center".
        draw_id: the `view` word of the random address; two views with equal ids get equal crops.
    """

    name: str
    size: int
    kind: str = "random"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    resize_ratio: float = 256 / 224
    draw_id: int = 0


@dataclass(frozen=True)
class PipelineConfig:
    """Everything a loader needs to know.

    Attributes:
        data: path of the packed file, folder, list or shard pattern.
        views: the views to cut from each decoded image.
        global_batch: samples of one step over all ranks.
        seed: run seed of every draw.
        rank: this process among `world_size`.
        world_size: number of processes.
        workers: threads or processes that decode; 0 lets the loader choose.
        device: where the views are wanted.
        order: "global", "sharded" or "sequential" (storage order, for evaluation).
        drop_last: leave out the last, smaller batch.
        population: sorted sample indices to draw from; None is all of them.
        shard_window: how many blocks are mixed with one another in the "sharded" order.
        block_size: samples in a block of the "sharded" order, for stores without shards.
        augment: augmentation profile that the views are to be delivered with, or its name; "" delivers uint8 crops.
        implementation: of the augmentation, one of `augment.IMPLEMENTATIONS`.
        dtype: of augmented views.
        load_kernels: compiles and launches the fused GPU kernel, for implementation "kernel" only.
        classes: number labels by these class names, where the store has names too; empty keeps the store's numbers.
        max_bad: share of the images that may be unreadable; above it the iteration ends with `TooManyBad`. With 1 it
            never does, for callers who judge by themselves.
    """

    data: str
    views: tuple[ViewSpec, ...]
    global_batch: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    order: str = "global"
    drop_last: bool = True
    population: np.ndarray | None = None
    shard_window: int = 16
    block_size: int = 256
    augment: str | Profile = ""
    implementation: str = "auto"
    dtype: torch.dtype = torch.float32
    load_kernels: LoadKernels | None = None
    classes: tuple[str, ...] = ()
    max_bad: float = 1.0


@dataclass
class Batch:
    """One rank's part of a global batch.

    Attributes:
        views: name -> (B, 3, S, S) on the device, channels-last in memory, owned by the receiver: uint8 crops, or
            augmented and normalised in the config's dtype where it names a profile.
        index: (B,) int64 on the CPU: the sample that the order asked for. Its draws are keyed by this index even where
            a damaged record made another sample's pixels take its place.
        label: (B,) int64 on the CPU, -1 where there is none; for probes only.
        sizes: (B, 2) int64 on the CPU, height and width in pixels of the image that each row was cut from: of the
            other sample's where that took the place of a damaged record. None in a batch that no loader made.
        cuts: where in their images the views were cut; None in a batch that no loader made.
    """

    views: dict[str, torch.Tensor]
    index: torch.Tensor
    label: torch.Tensor
    sizes: torch.Tensor | None = None
    cuts: Cuts | None = None


@dataclass
class PipelineStats:
    """Running totals since the pipeline was built.

    Attributes:
        images: source images delivered.
        wait_s: seconds the consumer waited for a batch.
        busy_s: seconds in which the loader's own thread had a batch read, decoded, cropped and, where the decoding
            threads augment, augmented; 0 for loaders of another library, whose threads tell no times.
        augment_s: seconds the consumer's thread took to augment batches, or on a GPU to queue that work.
        asked: batches that the consumer asked for.
        ready: batches that were made and waiting when the consumer asked, summed over `asked`.
        bad_records: sample index -> reason, for records that could not be decoded or whose checksum no longer fits.
    """

    images: int = 0
    wait_s: float = 0.0
    busy_s: float = 0.0
    augment_s: float = 0.0
    asked: int = 0
    ready: int = 0
    bad_records: dict[int, str] = field(default_factory=dict)


class Pipeline(Protocol):
    """A loader: iterating yields the rest of one epoch for this rank."""

    config: PipelineConfig
    """What it was built from."""

    num_samples: int
    """Samples in the store, before `population` is applied."""

    data_hash: str
    """SHA-256 (hex) that identifies the data: equal for equal content."""

    labels: np.ndarray
    """(num_samples,) int64, -1 where there is none."""

    classes: tuple[str, ...]
    """Class names by label; empty where the store keeps numbers only."""

    def __len__(self) -> int:
        """Batches in a whole epoch."""

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch that the next iteration delivers, from its step `first_step` on."""

    def __iter__(self) -> Iterator[Batch]:
        """Deliver the rest of the chosen epoch; may be abandoned early at no cost."""

    def shown(self, epoch: int, index: np.ndarray) -> np.ndarray:
        """(B,) the samples whose pixels were delivered for the samples `index`: others where a record is bad."""

    def stats(self) -> PipelineStats:
        """Running totals."""

    def close(self) -> None:
        """Stop workers and release buffers; may be called twice."""
