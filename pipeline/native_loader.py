"""The loaders that decode with our compiled threads, and the order in which an image passes through them.

    record      the store gives its address, and reads ahead what is not in memory            stores, shard_store
    decode      one pass of the JPEG decoder, only the rows that some view needs              decoder, native/
    crop        every view is cut and resized from that one decode                            decoder, geometry
    augment     on the same thread, or later on the device: `augmenter.augmented_by`          host_augment, augment
    buffers     arrays that come back by themselves; one thread runs a few batches ahead      prefetch
    device      the copy to a GPU runs one batch ahead of its use                             prefetch

The mixed views of RegionCL are made of the finished views by `train/inputs.py`, because pairs may span ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch

from . import decoder
from .augmenter import THREADS
from .decoder import ViewDecoder
from .epoch import EpochPipeline
from .host_augment import HostAugmenter
from .interface import Batch, PipelineConfig
from .prefetch import DEPTH, HostBatch, HostBuffers, decoding_threads, deliver_batches, prefetch
from .read_ahead import WindowReader, window_reader
from .stores import Store

_SPARE = 6  # sets of buffers beyond those that are being filled: what a consumer may hold before new ones are made


class NativePipeline(EpochPipeline):
    """A store decoded by a pool of native threads, a few batches ahead.

    Args:
        config: what to deliver.
        store: where the records are.
        block_sizes: blocks of the "sharded" order; None is even blocks.
        native: False decodes with PIL, the reference that every loader is tested against. Without a compiler the loader
            says so once and does the same work with PIL.
        ring: batches that the native decoder may have under way at a time.

    Attributes:
        store: where the records are.
        decoder: turns records into crops.
    """

    def __init__(
        self,
        config: PipelineConfig,
        store: Store,
        block_sizes: np.ndarray | None = None,
        native: bool = True,
        ring: int = 1,
    ):
        self.store = store
        # Known before the decoder is made: the base class decides with it who augments.
        compiled = native and decoder.native_library() is not None
        super().__init__(config, store.labels, store.data_hash, block_sizes, compiled, store.classes)
        self.decoder = ViewDecoder(
            store,
            config.views,
            config.seed,
            self.plan.population,
            decoding_threads(config.workers),
            self.note_bad,
            native=native,
        )
        rows = self.plan.slice.batch_per_device
        by_threads = self.augmented_by == THREADS
        self._augmenter = HostAugmenter(config, self.decoder, rows, ring) if by_threads else None
        # What the threads write: finished views where they augment, uint8 crops otherwise.
        self._buffers = HostBuffers(
            config.views,
            rows,
            pinned=config.device.type == "cuda",
            keep=max(ring, DEPTH) + _SPARE,
            dtype=config.dtype if by_threads else torch.uint8,
        )

    @property
    def _views(self) -> HostAugmenter | ViewDecoder:
        """What turns the records of a batch into its views."""
        return self._augmenter or self.decoder

    def deliver(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Batch]:
        """Generate the batches whose sample indices are given, in order."""
        ready = self._host_batches(epoch, batches)
        with closing(deliver_batches(self.config, self.labels, ready)) as delivered:  # type: ignore[type-var]
            yield from delivered

    def _host_batches(self, epoch: int, batches: list[np.ndarray]) -> Iterator[HostBatch]:
        """The views of each batch in arrays on the host, made by a thread that runs ahead."""
        reader = self._read_ahead(epoch, batches)

        # Runs on the thread ahead; it waits for the reader, decodes with all threads, and takes no part in the
        # consumer's time.
        def work(step: int) -> HostBatch:
            if reader is not None:
                reader.wait(step)
            arrays = self._buffers.take()
            sizes = self._views.decode(epoch, batches[step], arrays)
            return batches[step], sizes, arrays

        try:
            with closing(prefetch(work, range(len(batches)), stats=self._stats)) as ready:  # type: ignore[type-var]
                yield from ready
        finally:
            if reader is not None:
                reader.stop()

    def _read_ahead(self, epoch: int, batches: list[np.ndarray]) -> WindowReader | None:
        """Start reading what the batches need, before they need it; the result is what they wait for, if anything."""
        return window_reader(self.plan, self.store, epoch, batches)

    def close(self) -> None:
        """Stop workers and release buffers; may be called twice."""
        super().close()
        self.decoder.close()
