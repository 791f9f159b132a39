"""The pipelines of a run: training, views for the health figures, labelled banks for online k-NN."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from pipeline.interface import Pipeline, PipelineConfig
from pipeline.listing import describe_passed_over
from pipeline.loaders import build_pipeline
from pipeline.sampling import hold_out
from pipeline.stores import FileStore

from .config import Config
from .errors import UserMistake
from .inputs import finished_views, large_views
from .measure.features import center_view
from .measure.health import MAX_RETRIEVAL_IMAGES
from .recipes import RECIPES
from .runtime import Runtime

EVAL_BATCH = 256


def _base_config(config: Config, runtime: Runtime, data: str) -> PipelineConfig:
    return PipelineConfig(
        data=data,
        views=(),
        global_batch=EVAL_BATCH,
        seed=config.run.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        workers=config.run.workers,
        device=runtime.device,
        order="sequential",
        drop_last=False,
    )


def _build(config: Config, settings: PipelineConfig, quiet: bool = True) -> Pipeline:
    return build_pipeline(config.run.loader, settings, quiet)


@dataclass
class RunData:
    """All pipelines of a run.

    Attributes:
        train: random views of the training population.
        health: two random views, with fixed draws, of up to 500 images for the health figures.
        health_source: where those images are from: "validation", "held out" of `--data`, or "training".
        bank: evaluation views of all training images, or None without `--val-data`.
        queries: evaluation views of `--val-data`, or None.
        population: indices that are trained on.
    """

    train: Pipeline
    health: Pipeline
    health_source: str
    bank: Pipeline | None
    queries: Pipeline | None
    population: np.ndarray

    def text(self) -> str:
        """What was found, in one line: images, classes, how many are trained on, and how many only measured."""
        found = f"data: {self.train.num_samples:,} images"
        # Without labels there are none, and with numbers alone they have no names.
        if self.train.classes:
            found += f" of {len(self.train.classes):,} classes"
        kept = self.train.num_samples - len(self.population)
        found += f", {len(self.population):,} trained on and {kept:,} held out" if kept else ", all trained on"
        # A packer has told it already; who trains on a folder hears it only here.
        store = getattr(self.train, "store", None)
        if isinstance(store, FileStore) and store.passed_over:
            found += f"; passed over {describe_passed_over(store.passed_over)}"
        return found + (f"; --val-data: {self.queries.num_samples:,} images" if self.queries is not None else "")

    def close(self) -> None:
        """Close all pipelines."""
        for each in (self.train, self.health, self.bank, self.queries):
            if each is not None:
                each.close()


def training_population(config: Config, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the images that a run trains on, and of those it holds out, among the `total` of `--data`.

    With `--val-data` none are held out.
    """
    count = 0 if config.run.val_data else min(config.run.holdout, total // 20)
    if count < 2:
        count = 0  # the figures compare images with one another
    return hold_out(total, config.run.seed, count)


def _smaller(config: Config, images: int) -> str:
    """What to change where there are fewer images than a batch has."""
    small = f"{config.run.method}-small"
    # The recipe has its own batch, queue and epochs, which a lower --global-batch alone would leave as published.
    if small in RECIPES and RECIPES[small][1]()[0].global_batch <= images and config.run.recipe != small:
        return f"choose --recipe {small}, which is made for few images, or add images"
    return "lower it or add images"


def check_population(config: Config, total: int) -> tuple[np.ndarray, np.ndarray]:
    """`training_population`, refused where it has too few images for one batch.

    Raises:
        UserMistake: with the flag or recipe to choose.
    """
    population, held_out = training_population(config, total)
    if len(population) < config.recipe.global_batch:
        raise UserMistake(
            f"--data {config.run.data}: {len(population)} images to train on are fewer than --global-batch "
            f"{config.recipe.global_batch}; {_smaller(config, len(population))}"
        )
    return population, held_out


def open_data(config: Config, runtime: Runtime) -> RunData:
    """Open every pipeline that the run needs.

    Raises:
        UserMistake: when the data cannot be read, or are too few for one batch.
    """
    base = _base_config(config, runtime, config.run.data)
    # Opened first: the number of images decides the split, and it serves as the bank of k-NN later.
    whole = _build(config, dataclasses.replace(base, views=(center_view(config.recipe.image_size),)))
    total = whole.num_samples
    health_from = config.run.val_data or config.run.data
    population, held_out = check_population(config, total)
    train = _build(
        config,
        dataclasses.replace(
            finished_views(base, config, runtime),
            global_batch=config.recipe.global_batch,
            order=config.run.order,
            drop_last=True,
            population=population,
            max_bad=config.run.max_bad,
        ),
        # The training loader alone tells how it was chosen; the others would repeat it.
        quiet=False,
    )
    bank = queries = None
    if config.run.val_data:
        queries = _build(
            config,
            dataclasses.replace(
                base,
                data=config.run.val_data,
                views=(center_view(config.recipe.image_size),),
                # By name: a class that the validation images lack would shift the numbers of those behind it.
                classes=whole.classes,
            ),
        )
        bank = whole
        # At the start: k-NN looks at labels only after the first epochs have been paid for.
        if not (bank.labels >= 0).all() or not (queries.labels >= 0).all():
            raise UserMistake(
                f"--val-data {config.run.val_data}: k-NN needs labels for every image of --data and --val-data; "
                "pack folders with one sub-folder a class"
            )
        held_out = np.arange(queries.num_samples)
    else:
        # Without k-NN nobody reads it again.
        whole.close()
    source = "validation" if config.run.val_data else "held out"
    if len(held_out) < 2:
        # The published runs train on every image, so by default none is kept out: those that are trained on serve.
        held_out, health_from, source = population, config.run.data, "training"
    # Spread, not the first ones: listings stand class by class.
    chosen = held_out[np.linspace(0, len(held_out) - 1, min(len(held_out), MAX_RETRIEVAL_IMAGES)).astype(np.int64)]
    views = _build(
        config,
        dataclasses.replace(
            base,
            data=health_from,
            views=large_views(config),
            augment=config.recipe.augment.profile,
            population=chosen,
            # Rank 0 alone measures these images, so its pipeline delivers all of them.
            rank=0,
            world_size=1,
        ),
    )
    return RunData(train, views, source, bank, queries, population)
