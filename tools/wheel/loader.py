"""Images to augmented views for anybody's training loop."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
import torch.distributed as dist

from pipeline.augment import view_specs
from pipeline.interface import Batch, Pipeline, PipelineConfig, ViewSpec
from pipeline.loaders import build_pipeline
from pipeline.profiles import Profile, get_profile, with_views


class Loader:
    """An iterable of batches of views: each image is decoded once and cut, augmented and normalised for all its views.

    One pass of a `for` loop is one epoch, and the next pass is the next epoch. The order and every random draw follow
    from `seed` and the number of the epoch, so that neither the number of threads nor that of processes changes them.
    In a process group of `torch.distributed` each rank gets its own part of every batch.

    Args:
        data: a packed file, a folder, a list of files, or tar shards; with `loader="synthetic"` a number of images.
        views: how many random crops of each image, or what is cut as `ViewSpec`s.
        size: side of a view in pixels, where `views` is a number.
        augment: name of an augmentation profile, such as "mocov2" or "byol", or a `Profile`; None delivers uint8 crops.
            A profile with fewer views than are asked for serves them in turn.
        batch_size: images of a batch in this process.
        scale: range of a random crop's area relative to the image's; None takes the profile's.
        shuffle: a new order each epoch; False delivers the images as they are stored.
        drop_last: leave out the last, smaller batch.
        seed: every random draw follows from it.
        device: where the views are wanted.
        dtype: of augmented views.
        workers: decoding threads; 0 follows from the cores that the process may use.
        order: "global" draws from all images; "sharded" mixes neighbouring blocks, for files larger than memory.
        loader: "auto", "ffcv", "dali", "webdataset", "folder" or "synthetic".

    Attributes:
        num_samples: images in the data.
        labels: (num_samples,) int64, -1 where there is none.
        classes: class names by label; empty where the data keep numbers only.

    Raises:
        ValueError: the data cannot be used as asked for; the message names the remedy.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        views: int | Sequence[ViewSpec] = 2,
        size: int = 224,
        augment: str | Profile | None = "mocov2",
        batch_size: int = 256,
        scale: tuple[float, float] | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        workers: int = 0,
        order: str = "global",
        loader: str = "auto",
    ) -> None:
        count = views if isinstance(views, int) else len(views)
        if count < 1:
            raise ValueError(f"views {count}: at least one view is needed")
        # Crops without a profile are cut as the most common one cuts them.
        profile = with_views(get_profile("mocov2" if augment is None else augment), count)
        specs = view_specs(profile, size) if isinstance(views, int) else tuple(views)
        if scale is not None:
            specs = tuple(dataclasses.replace(spec, scale=scale) for spec in specs)
        together = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if together else 1
        config = PipelineConfig(
            data=os.fspath(data),
            views=specs,
            global_batch=batch_size * world_size,
            seed=seed,
            rank=dist.get_rank() if together else 0,
            world_size=world_size,
            workers=workers,
            device=torch.device(device),
            order=order if shuffle else "sequential",
            drop_last=drop_last,
            augment=profile if augment is not None else "",
            dtype=dtype,
        )
        self.pipeline: Pipeline = build_pipeline(loader, config, quiet=True)
        """What delivers the batches, with its counts of images, waiting and damaged records in `stats()`."""
        self.epoch = 0
        """Number of the epoch that the next pass delivers."""
        self._first_step = 0

    @property
    def num_samples(self) -> int:
        """Images in the data."""
        return self.pipeline.num_samples

    @property
    def labels(self) -> np.ndarray:
        """(num_samples,) int64, -1 where there is none."""
        return self.pipeline.labels

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty where the data keep numbers only."""
        return self.pipeline.classes

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch of the next pass, from its step `first_step` on, to go on where a run was stopped."""
        self.epoch, self._first_step = epoch, first_step

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.pipeline)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch.

        Yields:
            A `Batch`: `views`, a dict from "view1", "view2", ... to (B, 3, S, S) tensors on the device; `index` and
            `label`, (B,) int64 on the CPU.
        """
        self.pipeline.set_epoch(self.epoch, self._first_step)
        # Before the first batch: a pass that is left early counts as well, or the next one would repeat it.
        self.epoch, self._first_step = self.epoch + 1, 0
        yield from self.pipeline

    def close(self) -> None:
        """Stop the threads and give the memory back."""
        self.pipeline.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
