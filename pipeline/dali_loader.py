"""DALI in our order with our draws: decoding on the GPU where there is one, on its CPU operators where not.

DALI raises for a whole batch where one record is damaged, and paints over some damage in silence. So it is fed only
what is known to be whole: records whose checksum fits, or files that our own decoder once read to the end. Whatever
else there is in a batch (odd formats, rotated photos, substitutes of bad records) our own decoder serves.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline as DaliGraph
from nvidia.dali import fn
from nvidia.dali import types as _types

from .decoder import ViewDecoder
from .epoch import EpochPipeline
from .geometry import draw_crops
from .interface import Batch, PipelineConfig, ViewSpec
from .prefetch import decoding_threads, prefetch
from .shard_store import open_shards
from .stores import PackedStore, Store, is_shard_pattern, open_store

types: Any = _types  # its constants are filled in by the C++ part, out of a type checker's sight
_UNKNOWN, _WHOLE, _OTHER = 0, 1, 2  # what is known of a record
_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_PROBE = (ViewSpec("probe", 8, kind="whole"),)


def _graph(views: Sequence[ViewSpec], rows: int, threads: int, device: torch.device) -> DaliGraph:
    """One decode, then a crop and an antialiased resize per view; views come out as (rows, size, size, 3) uint8."""
    on_gpu = device.type == "cuda"
    graph = DaliGraph(
        batch_size=rows,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=1,  # our own thread runs ahead
    )
    with graph:
        encoded = fn.external_source(name="encoded", device="cpu", dtype=types.UINT8, ndim=1)
        # Records are upright already, and rotated files are served by our own decoder.
        images = fn.decoders.image(
            encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False
        )
        outputs = []
        for number, spec in enumerate(views):
            start = fn.external_source(name=f"start{number}", device="cpu", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name=f"shape{number}", device="cpu", dtype=types.INT32, ndim=1)
            crop = fn.slice(images, start=start, shape=shape, axes=(0, 1))
            outputs.append(
                fn.resize(crop, size=(spec.size, spec.size), interp_type=_FILTERS[spec.interpolation], antialias=True)
            )
        graph.set_outputs(*outputs)
    graph.build()
    return graph


class DaliPipeline(EpochPipeline):
    """A packed file, folder, list of files or tar shards decoded by DALI."""

    def __init__(self, config: PipelineConfig):
        self.store: Store
        self._shards = None
        if is_shard_pattern(config.data):
            self._shards = open_shards(config.data, config.order, config.world_size, config.shard_window)
            self.store = self._shards
            super().__init__(
                config, self.store.labels, self.store.data_hash, self._shards.index.samples, classes=self.store.classes
            )
        else:
            self.store = open_store(config.data)
            super().__init__(config, self.store.labels, self.store.data_hash, classes=self.store.classes)
        self._threads = decoding_threads(config.workers)
        arguments = (config.seed, self.plan.population, self._threads, self.note_bad)
        self.decoder = ViewDecoder(self.store, config.views, *arguments)
        self._probe = ViewDecoder(self.store, _PROBE, *arguments)
        # What was once read to the end need not be read again in a later epoch.
        self._known = np.full(self.num_samples, _UNKNOWN, dtype=np.uint8)
        self._sizes = np.zeros((self.num_samples, 2), dtype=np.int32)
        self._rows = self.plan.slice.batch_per_device
        self._graph: DaliGraph | None = None
        self._stream = torch.cuda.Stream(config.device) if config.device.type == "cuda" else None

    def _classify(self, index: np.ndarray, records: Sequence[np.ndarray]) -> np.ndarray:
        """Which samples of a batch DALI may decode, bool (B,); their sizes are known afterwards."""
        store = self.store
        # A record whose checksum fits is what the packer wrote, which any decoder reads; its size is in the file.
        if isinstance(store, PackedStore) and store.checksums is not None:
            self._sizes[index, 0], self._sizes[index, 1] = store.reader.heights[index], store.reader.widths[index]
            intact = [
                zlib.crc32(data.data) == int(store.checksums[at]) for at, data in zip(index, records, strict=True)
            ]
            return np.array(intact, dtype=bool)
        intact_or_unchecked = np.array(
            [store.intact(at, data.tobytes()) for at, data in zip(index.tolist(), records, strict=True)], dtype=bool
        )
        unknown = index[self._known[index] == _UNKNOWN]
        if len(unknown):
            status, sizes = self._probe.probe(unknown)
            self._known[unknown] = np.where(status == 0, _WHOLE, _OTHER)
            self._sizes[unknown] = sizes
        return (self._known[index] == _WHOLE) & intact_or_unchecked

    def _read(self, index: np.ndarray) -> list[np.ndarray]:
        """The records' bytes; empty where a file cannot be read."""
        records = []
        for each in index.tolist():
            try:
                records.append(np.frombuffer(self.store.read(each), dtype=np.uint8))
            except OSError:
                records.append(np.zeros(0, dtype=np.uint8))
        return records

    def _run_dali(self, epoch: int, index: np.ndarray, records: list[np.ndarray]) -> list[torch.Tensor]:
        """Views of whole records, (n, size, size, 3) uint8 each, on the device and complete."""
        if self._graph is None:
            self._graph = _graph(self.config.views, self._rows, self._threads, self.config.device)
        graph = self._graph
        graph.feed_input("encoded", records)
        heights, widths = self._sizes[index].T
        for number, spec in enumerate(self.config.views):
            boxes = draw_crops(spec, self.config.seed, epoch, index, heights, widths).astype(np.int32)
            graph.feed_input(f"start{number}", np.ascontiguousarray(boxes[:, :2]))
            graph.feed_input(f"shape{number}", np.ascontiguousarray(boxes[:, 2:]))
        outputs: Any = graph.run()
        if self._stream is None:
            return [torch.from_numpy(np.array(output.as_array())) for output in outputs]
        from nvidia.dali.plugin.pytorch import feed_ndarray

        with torch.cuda.stream(self._stream):
            views = []
            for spec, output in zip(self.config.views, outputs, strict=True):
                shape = (len(index), spec.size, spec.size, 3)
                views.append(torch.empty(shape, dtype=torch.uint8, device=self.config.device))
                feed_ndarray(output.as_tensor(), views[-1], cuda_stream=self._stream)
        self._stream.synchronize()
        return views

    def _decode(self, epoch: int, index: np.ndarray) -> tuple[np.ndarray, list[torch.Tensor]]:
        """Heights and widths (B, 2) of a batch's images, and its views, (B, size, size, 3) uint8 on the device."""
        records = self._read(index)
        whole = self._classify(index, records)
        made: list[torch.Tensor] = []
        if whole.any():
            try:
                made = self._run_dali(epoch, index[whole], [records[at] for at in np.flatnonzero(whole)])
            except RuntimeError:
                # A file changed since it was looked at, or DALI does not take what libjpeg does. The graph is of no
                # use after an error; the batch goes to our own decoder.
                self._graph = None
                whole[:] = False
        sizes = self._sizes[index]
        # The usual case needs no copy.
        if whole.all() and made:
            return sizes, made
        rest = index[~whole]
        arrays = [np.empty((len(rest), spec.size, spec.size, 3), dtype=np.uint8) for spec in self.config.views]
        sizes[~whole] = self.decoder.decode(epoch, rest, arrays)
        if self._stream is None:
            return sizes, self._joined(whole, made, arrays)
        # On the loader's own stream: this thread's default stream is the one that training queues its steps on.
        with torch.cuda.stream(self._stream):
            views = self._joined(whole, made, arrays)
        self._stream.synchronize()
        return sizes, views

    def _joined(self, whole: np.ndarray, made: list[torch.Tensor], arrays: list[np.ndarray]) -> list[torch.Tensor]:
        """Views of a batch from DALI's rows, where `whole`, and from those that our decoder left in host arrays."""
        device = self.config.device
        # Places known on the host: a mask on the device would make the host wait for the number of its rows.
        from_dali, from_host = (torch.from_numpy(np.flatnonzero(rows)).to(device) for rows in (whole, ~whole))
        views = []
        for number, array in enumerate(arrays):
            joined = torch.empty((len(whole), *array.shape[1:]), dtype=torch.uint8, device=device)
            if made:
                joined.index_copy_(0, from_dali, made[number])
            views.append(joined.index_copy_(0, from_host, torch.from_numpy(array).to(device)))
        return views

    def deliver(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Batch]:
        """Generate the batches whose sample indices are given, in order."""
        if self._shards is not None:
            self._shards.expect(batches)

        def work(index: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
            return index, *self._decode(epoch, index)

        with closing(prefetch(work, batches, stats=self._stats)) as ready:  # type: ignore[type-var]
            for index, sizes, arrays in ready:
                if self._stream is not None:
                    for array in arrays:  # taken on the side stream, used on the consumer's
                        array.record_stream(torch.cuda.current_stream(self.config.device))
                views = {
                    spec.name: array.permute(0, 3, 1, 2) for spec, array in zip(self.config.views, arrays, strict=True)
                }
                samples, of_images = torch.from_numpy(index.copy()), torch.from_numpy(sizes.astype(np.int64))
                yield Batch(views, samples, torch.from_numpy(self.labels[index]), of_images)

    def close(self) -> None:
        """Stop workers and release buffers; may be called twice."""
        super().close()
        self._graph = None
        self.decoder.close()
        self._probe.close()
        if self._shards is not None:
            self._shards.files.close()
