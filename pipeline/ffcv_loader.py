"""Packed files through FFCV's Loader, with a decoder operation of our own: one decode, all views.

FFCV maps the file, runs a thread ahead and calls the compiled operation, which hands the batch to the native decoder's
threads by pointer, without Python's lock. What its Loader does otherwise is worked around here, each time with the
reason: it takes an order only from an instance, leaks a thread when an epoch is abandoned, waits for ever after an
exception in an operation, and would write new pixels into a batch that is still in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numba
import numpy as np
import torch
from ffcv.loader import Loader
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.pipeline_spec import PipelineSpec
from ffcv.pipeline.state import State
from ffcv.traversal_order.base import TraversalOrder

from .decoder import image_sizes, native_library
from .endings import is_packed
from .interface import PipelineConfig
from .layouts import JOB, LOW_64, PACKED
from .native_loader import NativePipeline
from .prefetch import HostBatch
from .read_ahead import WindowReader
from .refusal import MAX_PIXELS
from .stores import PackedStore, open_store

_AHEAD = 2  # batches that wait in FFCV's queue
# Batch b is started when b - _AHEAD batches were taken out of the queue, so two more sets of buffers than wait in it
# are written or about to be at any time.
_RING = _AHEAD + 2


class _GivenOrder(TraversalOrder):
    """The order of the rest of an epoch: (samples, 2) int64 rows of sample and batch number.

    FFCV calls `order(loader)` on what it is given, which fails for the abstract class and its subclasses in version
    1.0.2; an instance that returns itself is taken.
    """

    def __init__(self, longest: int):
        # The Loader takes its length from the first order it sees and cuts later ones to it.
        self.rows = np.zeros((longest, 2), dtype=np.int64)

    def __call__(self, loader: Loader) -> _GivenOrder:
        return self

    def sample_order(self, epoch: int) -> np.ndarray:
        """The rows set last, whatever FFCV counts as the epoch."""
        return self.rows


class ViewsOperation(Operation):
    """FFCV's decoder for the image field: decodes a batch once into all views, at addresses kept in a `PACKED` row.

    It never raises: how each image fared is in the job rows, which the consumer reads. Its own output is a mark only.
    """

    def __init__(self, function: Callable[..., int], call_address: int, file_address: int):
        super().__init__()
        self._function, self._call_address, self._file_address = function, call_address, file_address

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """One byte per image: the views go to buffers that the consumer owns."""
        dtype = np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=(1,), dtype=dtype), AllocationQuery((1,), dtype)

    def generate_code(self) -> Callable[..., np.ndarray]:
        """The function that FFCV compiles and calls once per batch."""
        decode_batch, call_address = self._function, np.uint64(self._call_address)
        file_address = np.uint64(self._file_address)  # our mapping, which is advised as the order needs it

        def decode(batch_indices, destination, metadata, storage_state):  # type: ignore[no-untyped-def]
            count = np.uint64(len(batch_indices))
            decode_batch(call_address, file_address, batch_indices.ctypes.data, count)
            return destination[: len(batch_indices)]

        return decode


class FfcvPipeline(NativePipeline):
    """A `.beton` file through FFCV's Loader.

    Raises:
        ValueError: the file is not a packed file.
        NativeUnavailable: our decoder cannot be built here; `--loader folder` reads packed files without it.
    """

    store: PackedStore

    def __init__(self, config: PipelineConfig):
        if not is_packed(config.data):
            raise ValueError(
                f"--loader ffcv reads packed files, not {config.data}; pack the images with "
                "tools/make_ffcv_dataset.py or choose --loader folder"
            )
        store = open_store(config.data)
        if not isinstance(store, PackedStore):
            raise ValueError("--loader ffcv reads one packed file; choose --loader folder, which reads several")
        library = native_library(instead=None)
        assert library is not None
        super().__init__(config, store, ring=_RING)
        rows = self.plan.slice.batch_per_device
        self._sets: list[list[np.ndarray]] = [[] for _ in range(_RING)]
        self._outs = np.zeros((_RING, len(config.views)), dtype=np.uint64)
        self._jobs = np.zeros((_RING, rows), dtype=JOB)
        self._sizes = np.ascontiguousarray(self.store.reader.sizes, dtype=np.int64)
        self._offsets = np.ascontiguousarray(self.store.reader.offsets, dtype=np.int64)
        self._call = self._describe_call()
        self._reader: WindowReader | None = None
        self._order = _GivenOrder(len(self) * rows)
        # FFCV sets torch's thread count to its own worker count, which would slow or crowd training on the CPU; our
        # decoder has its own threads, so the value that changes nothing is given.
        workers = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        mapped = self.store.reader.data.ctypes.data
        operation = ViewsOperation(library.rg_packed_batch, self._call.ctypes.data, mapped)
        self._loader = Loader(
            str(store.reader.path),
            batch_size=rows,
            num_workers=workers,
            os_cache=True,  # the mapped file; `window_reader` keeps its working set small
            order=self._order,
            drop_last=False,
            batches_ahead=_AHEAD,
            pipelines={"image": PipelineSpec("image", decoder=operation), "label": None},
        )

    def _describe_call(self) -> np.ndarray:
        call = np.zeros(1, dtype=PACKED)
        checksums = self.store.checksums
        self._checksums = None if checksums is None else np.ascontiguousarray(checksums, dtype=np.uint32)
        call["pool"] = self.decoder.pool
        call["specs"], call["views"] = self.decoder.specs.ctypes.data, len(self.config.views)
        call["seed"], call["max_pixels"] = self.config.seed & LOW_64, MAX_PIXELS
        call["offsets"], call["sizes"] = self._offsets.ctypes.data, self._sizes.ctypes.data
        call["checksums"] = 0 if self._checksums is None else self._checksums.ctypes.data
        call["jobs"], call["outs"] = self._jobs.ctypes.data, self._outs.ctypes.data
        call["finish"] = 0 if self._augmenter is None else self._augmenter.finishes.ctypes.data
        call["ring"], call["rows"] = _RING, self._jobs.shape[1]
        return call

    def _arm(self, number: int, epoch: int, batches: list[np.ndarray]) -> None:
        """Give batch `number` of the epoch, where there is one, its place in the ring and buffers that nobody uses."""
        turn = number % _RING
        self._sets[turn] = []
        if number >= len(batches):
            return
        if self._reader is not None:
            self._reader.wait(number)
        self._sets[turn] = self._buffers.take()
        self._outs[turn] = [array.ctypes.data for array in self._sets[turn]]
        if self._augmenter is not None:
            self._augmenter.prepare(turn, epoch, batches[number], self._sets[turn])

    def _host_batches(self, epoch: int, batches: list[np.ndarray]) -> Iterator[HostBatch]:
        """The views of each batch in arrays on the host, in the order in which FFCV's thread has them decoded."""
        filled = [batch for batch in batches if len(batch)]
        numbers = np.repeat(np.arange(len(filled)), [len(batch) for batch in filled])
        samples = np.concatenate(filled) if filled else np.zeros(0, dtype=np.int64)
        self._order.rows = np.stack([samples, numbers], axis=1).astype(np.int64)
        self._call["epoch"] = epoch
        self._reader = self._read_ahead(epoch, batches)
        iterator = None
        try:
            for number in range(_RING):
                self._arm(number, epoch, batches)
            iterator = iter(self._loader) if filled else None
            for number, index in enumerate(batches):
                if not len(index):
                    yield index, image_sizes(self._jobs[0, :0]), self._buffers.take()
                    continue
                assert iterator is not None
                self._stats.ready += iterator.output_queue.qsize()
                next(iterator)
                turn = number % _RING
                arrays = self._sets[turn]
                # Before the turn is given away: the threads write the jobs of a later batch over these.
                jobs = self._jobs[turn, : len(index)].copy()
                self.decoder.look_again(jobs, index)
                self._arm(number + _RING, epoch, batches)
                yield index, self._views.repair(epoch, index, jobs, arrays), arrays
                del arrays
        finally:
            if self._reader is not None:
                self._reader.stop()
            if iterator is not None:
                _end(iterator)
            self._sets = [[] for _ in range(_RING)]


def _end(iterator) -> None:  # type: ignore[no-untyped-def]
    """Stop and join the thread of an FFCV epoch.

    Its own `close` leaves the thread blocked on a full queue, and the thread asks whether to stop only after half a
    second of that. So it is given no more work and its queue is emptied until it has ended.
    """
    iterator.iter_ixes = iter(())
    iterator.close()
    while iterator.is_alive():
        while not iterator.output_queue.empty():
            iterator.output_queue.get_nowait()
        iterator.join(timeout=0.005)
    iterator.close()
