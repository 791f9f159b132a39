"""Run as if memory held only part of a file: pages are dropped from the page cache in the order in which they came.

A stand-in for a machine with less memory that needs no privileges. A loader touches each record once an epoch, so what
came in first is also what was used least recently; the kernel's own choice is about the same.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
_TICK_S = 0.002


def bytes_read() -> int:
    """Bytes that this process has had fetched from storage so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


class PageLimit:
    """Keeps about `limit` bytes of a file in the page cache while it is entered.

    Args:
        path: the file; nobody else should have it mapped.
        limit: bytes.

    Attributes:
        peak: most bytes of the file that were seen in the page cache at once since `empty` was called last.
    """

    def __init__(self, path: Path, limit: int):
        self.path, self._limit = path.resolve(), limit // PAGE
        self._file = open(path, "rb")
        self._map = np.memmap(path, dtype=np.uint8, mode="r")
        pages = -(-len(self._map) // PAGE)
        self._resident = np.zeros(pages, dtype=np.uint8)
        self._arrived = np.full(pages, -1, dtype=np.int64)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak = 0

    def __enter__(self) -> PageLimit:
        self.empty()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._file.close()

    def empty(self) -> None:
        """Drop the whole file from memory."""
        self._drop(np.arange(len(self._resident)))
        self.peak = 0

    def resident(self) -> np.ndarray:
        """Which pages are in memory, bool (pages,)."""
        if _libc.mincore(self._map.ctypes.data, len(self._map), self._resident.ctypes.data):
            raise OSError(ctypes.get_errno(), "mincore")
        return (self._resident & 1).astype(bool)

    def _run(self) -> None:
        tick = 0
        while not self._stop.wait(_TICK_S):
            tick += 1
            there = self.resident()
            # A page that has gone is new when it comes again.
            self._arrived[~there] = -1
            self._arrived[there & (self._arrived < 0)] = tick
            count = int(there.sum())
            self.peak = max(self.peak, count * PAGE)
            if count > self._limit:
                pages = np.flatnonzero(there)
                # A tenth below the limit, so that dropping is not needed at every tick.
                oldest = pages[np.argsort(self._arrived[pages], kind="stable")[: count - self._limit * 9 // 10]]
                self._arrived[oldest] = tick  # what could not be dropped is young again
                self._drop(np.sort(oldest))

    def _drop(self, pages: np.ndarray) -> None:
        """Take pages (ascending) out of this process's mappings, then out of the page cache."""
        runs = np.split(pages, np.flatnonzero(np.diff(pages) != 1) + 1)
        # A page that a process has mapped stays in the cache, whatever the system is advised.
        mappings = self._mappings()
        for run in runs:
            start, end = int(run[0]) * PAGE, (int(run[-1]) + 1) * PAGE
            for address, first, last in mappings:
                low, high = max(start, first), min(end, last)
                if low < high:
                    _libc.madvise(address + low - first, high - low, mmap.MADV_DONTNEED)
            os.posix_fadvise(self._file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)

    def _mappings(self) -> list[tuple[int, int, int]]:
        """(address, first byte of the file, byte behind the last) of each mapping of the file in this process."""
        found = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] == str(self.path):
                low, high = (int(part, 16) for part in fields[0].split("-"))
                first = int(fields[2], 16)
                found.append((low, first, first + high - low))
        return found
