"""Between the decoder and the consumer: buffers that are used again, a thread ahead, a copy to the device ahead."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import torch

from .interface import Batch, PipelineConfig, PipelineStats, ViewSpec

T = TypeVar("T")
R = TypeVar("R")
DEPTH = 2  # decoded batches that wait for the consumer


_sharing_processes = 0
"""Processes on this process's cores, itself included; 0 while nobody has said so."""


def set_sharing_processes(count: int) -> None:
    """Say how many processes decode on this process's cores, itself included."""
    global _sharing_processes
    _sharing_processes = count


def decoding_threads(workers: int) -> int:
    """Threads that decode: `workers`, or for 0 this process's part of the cores that it may use.

    Without `set_sharing_processes` ranks of one machine are taken to share its cores, unless each is bound to a part.
    """
    if workers > 0:
        return workers
    # The affinity counts, not the machine: containers and launchers bind processes to a part of it.
    cores = len(os.sched_getaffinity(0))
    bound = cores < (os.cpu_count() or cores)
    assumed = 1 if bound else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, cores // (_sharing_processes or assumed))


def _references(arrays: list[np.ndarray]) -> int:
    """References to the arrays of a list, counted the same way whatever the interpreter adds of its own."""
    return sum(sys.getrefcount(arrays[at]) for at in range(len(arrays)))


class HostBuffers:
    """Sets of per-view arrays that are handed out and come back by themselves.

    A set is free again when nothing refers to its arrays but this object: a tensor made by `torch.from_numpy`, and
    every view of that tensor, keeps its array referred to. So a receiver may keep a batch as long as it likes, and
    steady running neither allocates nor copies.

    Args:
        views: the arrays of a set, (rows, size, size, 3) each.
        rows: images of a full batch.
        pinned: page-locked memory, for asynchronous copies to a CUDA device.
        keep: how many sets are kept; further ones are made and forgotten where a receiver hoards batches.
        dtype: of the arrays; numpy has no bfloat16, whose bits are kept as int16.

    Attributes:
        made: sets made so far.
    """

    def __init__(
        self,
        views: Sequence[ViewSpec],
        rows: int,
        pinned: bool,
        keep: int = DEPTH + 6,
        dtype: torch.dtype = torch.uint8,
    ):
        self._shapes = [(rows, spec.size, spec.size, 3) for spec in views]
        self._pinned, self._keep = pinned, keep
        self._dtype = torch.int16 if dtype == torch.bfloat16 else dtype
        self.made = 0
        self._sets: list[list[np.ndarray]] = []
        self._unused = _references([np.empty(0) for _ in views])

    def take(self) -> list[np.ndarray]:
        """A free set; its contents are arbitrary."""
        # Counting references finds a free set without the receiver having to hand anything back.
        for arrays in self._sets:
            if _references(arrays) == self._unused:
                return list(arrays)
        # Torch allocates, because only torch can give page-locked memory.
        made = [torch.empty(shape, dtype=self._dtype, pin_memory=self._pinned).numpy() for shape in self._shapes]
        self.made += 1
        # A receiver that hoards batches gets new sets, but does not make us keep them for ever.
        if len(self._sets) < self._keep:
            self._sets.append(made)
        return list(made)


def prefetch(
    work: Callable[[T], R], items: Sequence[T], depth: int = DEPTH, stats: PipelineStats | None = None
) -> Iterator[R]:
    """Results of `work` over the items in order, made by one thread that runs up to `depth` results ahead.

    An exception in `work` is raised here. Closing the generator ends and joins the thread.

    Args:
        work: makes one result.
        items: what it makes them of.
        depth: results that may wait for the consumer.
        stats: is told how long `work` took and how many results were waiting each time that one was asked for.
    """
    stats = stats or PipelineStats()
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    # Not a plain `put`: a consumer that has gone would leave this thread blocked on a full queue.
    def put(entry: tuple[str, Any]) -> None:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                started = time.perf_counter()
                result = work(item)
                stats.busy_s += time.perf_counter() - started
                put(("result", result))
                del result  # while this thread waits in `work`, a name would keep the buffers from being used again
            put(("end", None))
        # Raised in the consumer: an exception that dies with the thread would leave the consumer waiting for ever.
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=run, name="regatta-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            waiting = ready.qsize()
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            stats.ready += waiting
            yield value
            del value  # a name left here would keep the batch's buffers from being used again
    finally:
        # Stopped first, then emptied: a thread that waits for room goes on and sees the stop at once.
        stop.set()
        while True:
            try:
                ready.get_nowait()
            except queue.Empty:
                break
        thread.join()


HostBatch = tuple[np.ndarray, np.ndarray, list[np.ndarray]]
"""Sample indices (B,), heights and widths of their images (B, 2), and per view an array of at least B rows, as
`HostBuffers` makes them."""


def deliver_batches(config: PipelineConfig, labels: np.ndarray, ready: Iterator[HostBatch]) -> Iterator[Batch]:
    """Turn decoded host batches into batches on the device, one copy ahead where the device is not the host."""
    move = _to_cuda if config.device.type == "cuda" else _on_host
    with closing(move(config, labels, ready)) as batches:  # type: ignore[type-var]
        yield from batches


def _tensors(config: PipelineConfig, index: np.ndarray, arrays: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """The filled rows of the arrays as (B, 3, S, S) tensors, channels-last without a copy."""
    # Views of the buffers, not copies: they keep the set in use until the receiver lets go.
    filled = [torch.from_numpy(array[: len(index)]) for array in arrays]
    return {
        spec.name: (rows.view(torch.bfloat16) if rows.dtype == torch.int16 else rows).permute(0, 3, 1, 2)
        for spec, rows in zip(config.views, filled, strict=True)
    }


def _batch(views: dict[str, torch.Tensor], index: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> Batch:
    samples, of_images = (torch.from_numpy(np.array(values, dtype=np.int64)) for values in (index, sizes))
    return Batch(views, samples, torch.from_numpy(labels[index]), of_images)


def _on_host(config: PipelineConfig, labels: np.ndarray, ready: Iterator[HostBatch]) -> Iterator[Batch]:
    try:
        for index, sizes, arrays in ready:
            batch = _batch(_tensors(config, index, arrays), index, labels, sizes)
            del arrays
            # Other devices than CUDA have no asynchronous copy that we could rely on.
            if config.device.type != "cpu":
                batch.views = {name: view.to(config.device) for name, view in batch.views.items()}
            yield batch
            del batch
    finally:
        ready.close()  # type: ignore[attr-defined]


def _to_cuda(config: PipelineConfig, labels: np.ndarray, ready: Iterator[HostBatch]) -> Iterator[Batch]:
    # A stream of its own, so that copies run beside the step's kernels.
    side = torch.cuda.Stream(config.device)
    copying: deque[tuple[torch.cuda.Event, dict[str, torch.Tensor], Batch]] = deque()
    in_flight: deque[tuple[torch.cuda.Event, dict[str, torch.Tensor]]] = deque()

    def start_copy(index: np.ndarray, sizes: np.ndarray, arrays: list[np.ndarray]) -> None:
        host = _tensors(config, index, arrays)
        with torch.cuda.stream(side):
            views = {name: view.to(config.device, non_blocking=True) for name, view in host.items()}
            # Marks the end of this batch's copies; a later copy on the stream does not hold the batch up.
            done = torch.cuda.Event()
            done.record(side)
        copying.append((done, host, _batch(views, index, labels, sizes)))

    def hand_over() -> Batch:
        done, host, batch = copying.popleft()
        current = torch.cuda.current_stream(config.device)
        current.wait_event(done)
        for view in batch.views.values():
            view.record_stream(current)  # its memory was taken on the side stream
        in_flight.append((done, host))  # the page-locked source must outlive the copy
        while in_flight and (len(in_flight) > 2 or in_flight[0][0].query()):
            in_flight.popleft()[0].synchronize()
        return batch

    try:
        for index, sizes, arrays in ready:
            start_copy(index, sizes, arrays)
            del arrays
            # One copy stays ahead of the batch that is handed over.
            if len(copying) > 1:
                yield hand_over()
        while copying:
            yield hand_over()
    finally:
        # The page-locked sources may go only when no copy reads them any more.
        ready.close()  # type: ignore[attr-defined]
        side.synchronize()
