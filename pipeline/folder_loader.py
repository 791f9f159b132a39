"""Plain files, or a packed file without FFCV: read and decoded by our own threads, or by PIL as the slow reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch

from .decoder import ViewDecoder
from .epoch import EpochPipeline
from .host_augment import HostAugmenter, augments_on_host
from .interface import Batch, PipelineConfig
from .prefetch import HostBatch, HostBuffers, decoding_threads, deliver_batches, prefetch
from .read_ahead import window_reader
from .stores import open_store


class FolderPipeline(EpochPipeline):
    """A store with random access, decoded by a pool of native threads one or two batches ahead.

    Args:
        config: what to deliver; `config.data` is a folder (nested; class folders become labels), a list file with one
            path a line, or a `.beton` file.
        decoder: "native", or "pil" for the reference that every loader is tested against. Without a compiler "native"
            says so once and does the same work with PIL.
    """

    def __init__(self, config: PipelineConfig, decoder: str = "native"):
        self.store = open_store(config.data)
        super().__init__(config, self.store.labels, self.store.data_hash)
        self.decoder = ViewDecoder(
            self.store,
            config.views,
            config.seed,
            self.plan.population,
            decoding_threads(config.workers),
            self.note_bad,
            native=decoder == "native",
        )
        rows = self.plan.slice.batch_per_device
        self.augments_itself = augments_on_host(config, self.decoder)
        self._views = HostAugmenter(config, self.decoder, rows) if self.augments_itself else self.decoder
        dtype = config.dtype if self.augments_itself else torch.uint8
        self._buffers = HostBuffers(config.views, rows, config.device.type == "cuda", dtype=dtype)

    def deliver(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Batch]:
        """Generate the batches whose sample indices are given, in order."""
        reader = window_reader(self.plan, self.store, epoch, batches)

        def work(step: int) -> HostBatch:
            if reader is not None:
                reader.wait(step)
            arrays = self._buffers.take()
            self._views.decode(epoch, batches[step], arrays)
            return batches[step], arrays

        ready = prefetch(work, range(len(batches)))
        with closing(deliver_batches(self.config, self.labels, ready)) as delivered:  # type: ignore[type-var]
            try:
                yield from delivered
            finally:
                if reader is not None:
                    reader.stop()

    def close(self) -> None:
        """Stop workers and release buffers; may be called twice."""
        super().close()
        self.decoder.close()
