"""What every loader does alike: the batches of an epoch, substitutes for bad records, and counting."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from .augmenter import BATCHES, BatchAugmenter, augmented_by
from .classes import renumbered
from .cuts import Cuts
from .geometry import validate_view
from .interface import Batch, PipelineConfig, PipelineStats
from .refusal import TooManyBad
from .rng import SLOT_SUBSTITUTE, integers, philox
from .sampling import RankSlice, global_order, sharded_order, sharded_windows

ORDERS = ("global", "sharded", "sequential")
SUBSTITUTE_ATTEMPTS = 64
_ENOUGH_TO_JUDGE = 1000  # images: of a share of a quarter, a sample of them is off by 0.014
_told: set[str] = set()  # data of which this process has named a bad record


def substitute(seed: int, epoch: int, index: int, attempt: int, population: np.ndarray) -> int:
    """The sample whose pixels take the place of bad record `index`: number `attempt` of a list drawn for it.

    A loader tries attempts 0, 1, ... until one decodes. The list depends on (seed, epoch, index) only, so every loader,
    rank and resumed run fills the place alike. The crop is still drawn for `index`.
    """
    word = philox(seed, index, epoch, attempt, SLOT_SUBSTITUTE)[:1]
    return int(population[int(integers(word, 0, len(population))[0])])


def even_blocks(num_samples: int, block_size: int) -> np.ndarray:
    """Sizes of consecutive blocks of `block_size` samples that cover the store; the last may be smaller."""
    edges = np.append(np.arange(0, num_samples, block_size), num_samples)
    return np.diff(edges)


class EpochPlan:
    """Which samples this rank delivers at each step: a pure function of the config and the epoch."""

    def __init__(self, config: PipelineConfig, num_samples: int, block_sizes: np.ndarray | None = None):
        if not config.views:
            raise ValueError("no views were asked for; name at least one ViewSpec")
        # Settings are refused when the pipeline is built, before any thread or model depends on it.
        for spec in config.views:
            validate_view(spec)
        if config.order not in ORDERS:
            raise ValueError(f"unknown order {config.order!r}; choose one of {', '.join(ORDERS)}")
        if num_samples < 1:
            raise ValueError(f"{config.data} holds no images; give a folder, list or packed file with at least one")
        self.config = config
        self.slice = RankSlice(config.global_batch, config.rank, config.world_size)
        self.population = np.arange(num_samples) if config.population is None else np.asarray(config.population)
        if len(self.population) and not 0 <= self.population[0] <= self.population[-1] < num_samples:
            raise ValueError(
                f"the population names samples {self.population[0]} to {self.population[-1]}, but {config.data} "
                f"holds {num_samples}; draw it from this data"
            )
        if config.drop_last and len(self.population) < config.global_batch:
            raise ValueError(
                f"{len(self.population)} images are fewer than one global batch of {config.global_batch}; "
                f"choose --global-batch {len(self.population)} or smaller, or give more images"
            )
        self.block_sizes = even_blocks(num_samples, config.block_size) if block_sizes is None else block_sizes

    @property
    def steps(self) -> int:
        """Steps in a whole epoch, the same on every rank."""
        return self.slice.steps(len(self.population), self.config.drop_last)

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's global sequence of samples, int64."""
        config = self.config
        if config.order == "sequential":
            return self.population
        if config.order == "global":
            return global_order(self.population, config.seed, epoch)
        return sharded_order(self.population, config.seed, epoch, self.block_sizes, config.shard_window)

    def batches(self, epoch: int, first_step: int = 0) -> list[np.ndarray]:
        """This rank's sample indices of each step from `first_step` on.

        Without `drop_last` the last batch is smaller and, with fewer samples left than ranks, empty on some of them:
        every rank takes the same number of steps.
        """
        return self._by_step(self.order(epoch), first_step)

    def windows(self, epoch: int, first_step: int = 0) -> list[np.ndarray]:
        """For each sample of `batches` the number of its window in the "sharded" order."""
        config = self.config
        numbers = sharded_windows(self.population, config.seed, epoch, self.block_sizes, config.shard_window)
        return self._by_step(numbers, first_step)

    def _by_step(self, values: np.ndarray, first_step: int) -> list[np.ndarray]:
        """This rank's part of what belongs to the epoch's positions, step by step."""
        picked = self.slice.select(values, first_step, self.config.drop_last)
        size = self.slice.batch_per_device
        return [picked[step * size : (step + 1) * size] for step in range(max(self.steps - first_step, 0))]


class EpochPipeline:
    """Base of the loaders: keeps epoch, plan and totals; a subclass delivers the batches.

    A subclass calls `__init__`, and implements `deliver(epoch, batches)`, a generator of `Batch` that releases what it
    holds when it is closed. It delivers finished views where `augmented_by` is `augmenter.THREADS`, otherwise crops,
    which are finished here.

    Args:
        config: what to deliver.
        labels: (N,) int64 of the store, -1 where there is none.
        data_hash: SHA-256 (hex) of the store.
        block_sizes: blocks of the "sharded" order; None is even blocks.
        compiled_threads: the subclass decodes with threads of the compiled decoder, which can augment as well.
        classes: class names of the store by label, empty where it has numbers only.

    Attributes:
        augmented_by: who augments the views, as `augmenter.augmented_by` says.
    """

    def __init__(
        self,
        config: PipelineConfig,
        labels: np.ndarray,
        data_hash: str,
        block_sizes: np.ndarray | None = None,
        compiled_threads: bool = False,
        classes: tuple[str, ...] = (),
    ):
        self.config = config
        by_name = bool(classes and config.classes)
        self.labels = renumbered(labels, classes, config.classes) if by_name else labels
        self.classes = config.classes if by_name else classes
        self.num_samples = len(labels)
        self.data_hash = data_hash
        self.plan = EpochPlan(config, self.num_samples, block_sizes)
        self._epoch, self._first_step = 0, 0
        self._replaced = 0
        self._stats = PipelineStats()
        # At most one iteration is under way, because iterations share the decoder's threads and buffers.
        self._running: Iterator[Batch] | None = None
        self.augmented_by = augmented_by(config, compiled_threads)
        self._augment_batch = BatchAugmenter(config) if self.augmented_by == BATCHES else None

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.plan.steps

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch that the next iteration delivers, from its step `first_step` on."""
        self._epoch, self._first_step = epoch, first_step

    def deliver(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Batch]:
        """Generate the batches whose sample indices are given, in order."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        """Deliver the rest of the chosen epoch; an iteration that was abandoned is ended first."""
        # An abandoned iteration still has a thread ahead that would go on filling our buffers.
        self._stop_running()
        epoch = self._epoch  # the consumer may choose the next one meanwhile
        running = self.deliver(epoch, self.plan.batches(epoch, self._first_step))
        self._running = running
        try:
            while True:
                # Only the wait for the decoder is counted, not what is queued on a device afterwards.
                started = time.perf_counter()
                batch = next(running, None)
                self._stats.wait_s += time.perf_counter() - started
                if batch is None:
                    return
                self._stats.asked += 1
                if batch.sizes is not None:
                    batch.cuts = Cuts(self.config, epoch, batch.index.numpy(), batch.sizes.numpy())
                if self._augment_batch is not None:
                    started = time.perf_counter()
                    batch = self._augment_batch(batch, epoch)
                    self._stats.augment_s += time.perf_counter() - started
                self._stats.images += len(batch.index)
                self._check_share(batch.index)
                yield batch
                # A second name for the batch would keep its buffers from being used again.
                del batch
        finally:
            running.close()  # type: ignore[attr-defined]

    def _stop_running(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()  # type: ignore[attr-defined]

    def note_bad(self, index: int, reason: str) -> None:
        """Count and name a record that could not be used; the first one is told at once."""
        # At once: the count comes at the end, which may be days away. A run has several pipelines over the same data.
        if self.config.data not in _told:
            _told.add(self.config.data)
            print(f"cannot be used: {reason}; told once for {self.config.data}, counted at the end", file=sys.stderr)
        self._stats.bad_records.setdefault(int(index), reason)

    def _check_share(self, index: torch.Tensor) -> None:
        """Count the images of a delivered batch in whose place others stand.

        Raises:
            TooManyBad: their share of all that were delivered is above the config's.
        """
        limit, bad = self.config.max_bad, self._stats.bad_records
        if limit >= 1 or not bad:
            return
        self._replaced += sum(sample in bad for sample in index.tolist())
        # Of the first few images half may be bad by chance; small data are judged after one pass.
        enough = min(len(self.plan.population), _ENOUGH_TO_JUDGE)
        if self._replaced > limit * max(self._stats.images, enough):
            # `list`, since the decoder's thread may add to the dictionary at this moment.
            raise TooManyBad(
                f"{self._replaced} of {self._stats.images} images of {self.config.data} cannot be used, for example "
                f"{list(bad.values())[0]}; --max-bad {limit:g} allows no more: copy them again, or pack them: the "
                "packer lists what is wrong with each"
            )

    def shown(self, epoch: int, index: np.ndarray) -> np.ndarray:
        """(B,) the samples whose pixels were delivered for the samples `index`: others where a record is bad.

        Args:
            epoch: in which they were delivered.
            index: (B,) int64, samples that have been delivered.
        """
        bad = self._stats.bad_records
        samples = (self._instead(epoch, each) if each in bad else each for each in index.tolist())
        return np.fromiter(samples, dtype=np.int64, count=len(index))

    def _instead(self, epoch: int, index: int) -> int:
        # The decoder took the first of the list that it could decode, and noted those before it as bad.
        drawn = (
            substitute(self.config.seed, epoch, index, attempt, self.plan.population)
            for attempt in range(SUBSTITUTE_ATTEMPTS)
        )
        return next(sample for sample in drawn if sample not in self._stats.bad_records)

    def stats(self) -> PipelineStats:
        """Running totals."""
        return self._stats

    def close(self) -> None:
        """Stop workers and release buffers; may be called twice."""
        self._stop_running()
