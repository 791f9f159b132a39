"""Tar shards with an index, from a folder or streamed from an address, in the order that every other loader has.

Local shards are mapped into memory, so any order can be served. Streamed shards are fetched whole, a window ahead, into
a temporary folder of bounded size; that suits the `sharded` order only, in which a shard is needed for the length of
one window. Every rank reads the index, so all know the same epoch; which of the shards a rank fetches follows from the
samples it is to deliver.
"""

from __future__ import annotations

import numpy as np

from .interface import PipelineConfig
from .native_loader import NativePipeline
from .shard_store import ShardStore, open_shards


class WebDatasetPipeline(NativePipeline):
    """Shards made by `tools/make_webdataset.py`, local or streamed.

    Raises:
        ValueError: see `open_shards`.
    """

    store: ShardStore

    def __init__(self, config: PipelineConfig):
        store = open_shards(config.data, config.order, config.world_size, config.shard_window)
        try:
            super().__init__(config, store, store.index.samples)
        except BaseException:
            # The threads that fetch shards would outlive a pipeline that was never made.
            store.files.close()
            raise

    def _read_ahead(self, epoch: int, batches: list[np.ndarray]) -> None:
        """Tell the shards in which order they are needed; opening one waits for it."""
        self.store.expect(batches)

    def close(self) -> None:
        """Stop workers and release buffers; may be called twice."""
        super().close()
        self.store.files.close()
