"""The first images that a run trained on, as its method saw them: finished views, and mixed views with their regions.

A run's order, crops, augmentation, regions and pairs are pure functions of its configuration, so they are read again
here, for a few images of each step, by the code that training uses: its population, its loader's order and its sampler.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.resnet import build_backbone
from pipeline.endings import is_packed
from pipeline.interface import Pipeline, PipelineConfig
from pipeline.loaders import build_pipeline
from pipeline.regions import Region, make_mixed
from train.config import Config
from train.data import training_population
from train.errors import UserMistake
from train.inputs import VIEWS, grid_cells, large_views, micro_batch, region_sampler

_BLOCK = 8  # images that are decoded at a time


@dataclass(frozen=True)
class MixedStep:
    """The mixed first view of one optimizer step, its first images only.

    Attributes:
        images: (n, 3, S, S) float32, normalised as the method takes them.
        region: the box, one for all images of a rank.
        grid: cells a side of the feature map that the box is pooled from.
    """

    images: Tensor
    region: Region
    grid: int


def first_views(config: Config, count: int) -> dict[str, Tensor]:
    """Both views of the first `count` images of the first step, each (n, 3, S, S) float32, normalised.

    Raises:
        UserMistake: when the run's data cannot be read, or hold fewer images than one batch.
    """
    with _training_images(config) as (pipeline, steps):
        _check_steps(config, steps)
        return _views_at(pipeline, np.arange(min(count, config.recipe.global_batch)))


def mixed_steps(config: Config, world_size: int, count: int, steps: int) -> list[MixedStep]:
    """The mixed views of the first rank in the first steps of a run; empty where its method mixes none.

    Args:
        config: the run's configuration.
        world_size: ranks that the run had, which share each batch.
        count: images of each step at most.
        steps: steps at most; fewer where the first epoch has fewer.

    Raises:
        UserMistake: when the run's data cannot be read, or hold fewer images than one batch.
    """
    region = getattr(config.model, "region", None)
    if region is None or not region.mixed_views(VIEWS[:1]):
        return []
    with _training_images(config) as (pipeline, in_epoch):
        _check_steps(config, in_epoch)
        return [_mixed_step(config, pipeline, world_size, count, step) for step in range(min(steps, in_epoch))]


def _check_steps(config: Config, steps: int) -> None:
    if not steps:
        raise UserMistake(f"{config.run.data} holds fewer images than one batch of the run")


def _mixed_step(config: Config, pipeline: Pipeline, world_size: int, count: int, step: int) -> MixedStep:
    # On the meta device the backbone costs neither memory nor time; only its stride is wanted.
    with torch.device("meta"):
        stride = build_backbone(config.recipe.arch, "torch").stride
    sampler = region_sampler(config, grid_cells(stride, config.recipe.image_size))
    batch = config.recipe.global_batch
    local = batch // world_size
    rows = micro_batch(config) or local  # of one forward pass
    drawn = sampler.draw(step, 0, rows, 0, world_size, step * (local // rows))
    partner = drawn.partner[:count].astype(np.int64)
    # A partner on another rank stands in that rank's part of the batch, at the same place of its first forward pass.
    places = np.concatenate([np.arange(len(partner)), partner // rows * local + partner % rows])
    views = _views_at(pipeline, step * batch + places)[VIEWS[0]]
    mixed = make_mixed(views, torch.arange(len(views)).roll(-len(partner)), drawn.region)
    return MixedStep(mixed[: len(partner)], drawn.region, sampler.grid)


@contextmanager
def _training_images(config: Config) -> Iterator[tuple[Pipeline, int]]:
    """The run's training images in the order of its epochs, finished, and the steps of its epoch."""
    try:
        whole = _open(config, None)
        total = whole.num_samples
        whole.close()
        population, _ = training_population(config, total)
        pipeline = _open(config, population)
        try:
            yield pipeline, len(population) // config.recipe.global_batch
        finally:
            pipeline.close()
    except (ValueError, OSError, ImportError, StopIteration) as reason:
        raise UserMistake(f"{config.run.data or 'no data'}: {reason}") from None


def _open(config: Config, population: np.ndarray | None) -> Pipeline:
    run = config.run
    # Our own reader opens a packed file at once; FFCV's would first compile its pipeline. All read in the same order.
    loader = "folder" if is_packed(run.data) else run.loader
    settings = PipelineConfig(
        data=run.data,
        views=large_views(config),
        global_batch=_BLOCK,
        seed=run.seed,
        workers=1,
        order=run.order,
        drop_last=False,
        population=population,
        augment=config.recipe.augment.profile,
    )
    return build_pipeline(loader, settings, quiet=True)


def _views_at(pipeline: Pipeline, positions: np.ndarray) -> dict[str, Tensor]:
    """The finished views of the images at these positions of the first epoch, in the order of `positions`."""
    blocks = {}
    for block in np.unique(positions // _BLOCK).tolist():
        # An epoch's order does not depend on the batch, so small batches reach single positions of a large one.
        pipeline.set_epoch(0, block)
        blocks[block] = next(iter(pipeline)).views
    rows = [(blocks[block], row) for block, row in zip(*np.divmod(positions, _BLOCK), strict=True)]
    return {name: torch.stack([views[name][int(row)] for views, row in rows]) for name in VIEWS}
