"""Packed files that are larger than memory: windows of its order are read before they are used.

What a rank needs of a window is read in the order of the file, one window ahead, into the system's page cache, from
where the decoder takes it through the mapped file. Two windows are all that needs to fit into memory, and each page is
read about once an epoch. A window of the `sharded` order is a few long sequential reads, which the ranks of one machine
share. One of the `global` order is some steps' records, each a read of its own; left alone, the system reads far around
every page that is touched.
"""

from __future__ import annotations

import bisect
import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from .beton import BetonReader
from .epoch import EpochPlan
from .stores import JoinedStore, PackedStore, Store

# Reading what lies between two records is cheaper than another read where the gap is shorter than this.
MAX_GAP = 512 << 10
RECORD_GAP = 64 << 10  # the same for records all over the file, where joined reads gain less
PIECE = 4 << 20
STEPS_A_WINDOW = 2  # of the global order
ROOMY = 0.5
"""Share of memory up to which a file is left to the system: it stays in memory after the first epoch."""
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def extents(offsets: np.ndarray, sizes: np.ndarray, max_gap: int = MAX_GAP) -> np.ndarray:
    """Stretches of a file that cover some records.

    Args:
        offsets: (N,) int64, first byte of each record, in any order.
        sizes: (N,) int64 bytes.
        max_gap: stretches with fewer bytes between them are joined.

    Returns:
        (M, 2) int64 first byte and byte behind the last, ascending and apart.
    """
    # Read in the order of the file: a disk's arm or a network store's block is used once.
    order = np.argsort(offsets, kind="stable")
    starts = offsets[order]
    ends = np.maximum.accumulate(starts + sizes[order])
    apart = np.flatnonzero(starts[1:] - ends[:-1] > max_gap)
    first, last = np.append(0, apart + 1), np.append(apart, len(starts) - 1)
    return np.stack([starts[first], ends[last]], axis=1) if len(starts) else np.zeros((0, 2), dtype=np.int64)


def advise_random(mapped: np.memmap) -> None:
    """Tell the system not to read around what is touched in a mapped file: what is needed has been read already."""
    base = mapped.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
        base.madvise(mmap.MADV_RANDOM)


class WindowReader:
    """Reads the windows of one epoch by a thread of its own, at most one beyond the window that is in use.

    Args:
        files: (first address, path) of each packed file, ascending; its bytes are addressed from there on.
        offsets: (N,) int64, address of the first byte of each record.
        sizes: (N,) int64 bytes.
        batches: this rank's samples of each step.
        windows: of each step, the numbers of the windows its samples belong to, (B,) int64 ascending over the epoch.
        max_gap: reads with fewer bytes between them are joined.
    """

    def __init__(
        self,
        files: Sequence[tuple[int, Path]],
        offsets: np.ndarray,
        sizes: np.ndarray,
        batches: list[np.ndarray],
        windows: list[np.ndarray],
        max_gap: int = MAX_GAP,
    ):
        samples = np.concatenate(batches) if batches else np.zeros(0, dtype=np.int64)
        window_of = np.concatenate(windows) if windows else np.zeros(0, dtype=np.int64)
        # Positions in this array are what is counted below; the samples of a window follow one another.
        self._windows, first = np.unique(window_of, return_index=True)
        members = np.split(samples, first[1:])
        self._extents = [extents(offsets[each], sizes[each], max_gap) for each in members]
        # A step may span two windows; it waits for the later one.
        self._last = [int(np.searchsorted(self._windows, each[-1])) if len(each) else -1 for each in windows]
        self._bases, self._paths = [base for base, _ in files], [path for _, path in files]
        self._changed = threading.Condition()
        self._entered, self._read, self._stopped = 0, 0, False
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="regatta-read-ahead", daemon=True)
        self._thread.start()

    def wait(self, step: int) -> None:
        """Return when all that this step and those before it need has been read.

        Raises:
            OSError: the file could not be read.
        """
        with self._changed:
            self._entered = max(self._entered, self._last[step])
            self._changed.notify_all()
            while self._read <= self._last[step] and not self._stopped and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error

    def stop(self) -> None:
        """End the thread; may be called twice."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            with ExitStack() as opened:
                files = [opened.enter_context(open(path, "rb", buffering=0)) for path in self._paths]
                piece = memoryview(bytearray(PIECE))
                for number, stretches in enumerate(self._extents):
                    with self._changed:
                        # One window beyond the one in use: more would push out pages that are still needed.
                        while number > self._entered + 1 and not self._stopped:
                            self._changed.wait()
                    for start, end in stretches.tolist():
                        at = bisect.bisect_right(self._bases, start) - 1
                        base = self._bases[at]
                        self._read_stretch(files[at].fileno(), start - base, end - base, piece)
                    with self._changed:
                        if self._stopped:
                            return
                        self._read = number + 1
                        self._changed.notify_all()
        except OSError as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read_stretch(self, descriptor: int, start: int, end: int, piece: memoryview) -> None:
        while start < end and not self._stopped:
            # Reading into one buffer again and again leaves the bytes in the page cache, which is all that is wanted.
            count = os.preadv(descriptor, [piece[: min(PIECE, end - start)]], start)
            if count == 0:
                return  # a file cut short is the decoder's to report
            start += count


def memory_bytes() -> int:
    """Bytes of memory that this process may fill: the machine's, or its control group's limit where that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for file in (each / name for each in (folder, *folder.parents)):
            if file.is_file() and file.read_text().strip().isdigit():
                limits.append(int(file.read_text()))
    return min(limits)


def window_reader(plan: EpochPlan, store: Store, epoch: int, batches: list[np.ndarray]) -> WindowReader | None:
    """What reads the rest of an epoch ahead; None for other stores than packed files and where all fits into memory.

    Args:
        plan: whose order the batches have.
        store: where the records are; its mappings are told that they are touched at random.
        epoch: epoch number.
        batches: this rank's samples of the last `len(batches)` steps of the epoch.
    """
    readers = _packed_files(store)
    if not readers or not batches:
        return None
    files_bytes = [reader.path.stat().st_size for reader in readers]
    if plan.config.order == "sharded":
        windows, max_gap = plan.windows(epoch, plan.steps - len(batches)), MAX_GAP
    elif sum(files_bytes) > ROOMY * memory_bytes():
        windows = [np.full(len(batch), step // STEPS_A_WINDOW) for step, batch in enumerate(batches)]
        max_gap = RECORD_GAP
    else:
        return None
    for reader in readers:
        advise_random(reader.data)
    # So far apart that no read is joined across the end of a file.
    bases = np.cumsum([0, *(size + MAX_GAP + 1 for size in files_bytes[:-1])]).tolist()
    offsets = np.concatenate([base + reader.offsets for base, reader in zip(bases, readers, strict=True)])
    sizes = np.concatenate([reader.sizes for reader in readers])
    files = [(base, reader.path) for base, reader in zip(bases, readers, strict=True)]
    return WindowReader(files, offsets, sizes, batches, windows, max_gap)


def _packed_files(store: Store) -> list[BetonReader]:
    """The packed files of a store in the order of its records; none where it also holds records of another kind."""
    if isinstance(store, PackedStore):
        return [store.reader]
    if not isinstance(store, JoinedStore):
        return []
    several = [_packed_files(each) for each in store.stores]
    return [reader for readers in several for reader in readers] if all(several) else []
