"""Where the bytes of shards come from: mapped from a folder, or fetched ahead into a bounded temporary folder."""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import numpy as np

from .fetch import fetch, member_url
from .refusal import SourceBusy
from .shards import ShardIndex

_FETCHERS = 4


class ShardFiles(Protocol):
    """Where the bytes of the shards are."""

    def open(self, shard: int) -> np.ndarray:
        """The bytes of a shard, uint8; raises OSError."""

    def expect(self, sequence: list[int]) -> None:
        """Which shards will be opened next, in this order."""

    def close(self) -> None:
        """Release everything."""


class LocalShards:
    """Shards in a folder, mapped on first use.

    Raises:
        ValueError: a shard is missing or has another size than the index says.
    """

    def __init__(self, folder: Path, index: ShardIndex):
        self._paths = [folder / name for name in index.names]
        self._maps: dict[int, np.ndarray] = {}
        # A shard cut by a copy would otherwise show as bad records hours later.
        for path, expected in zip(self._paths, index.shard_bytes.tolist(), strict=True):
            if not path.exists():
                raise ValueError(f"shard {path} is missing; copy it again or name the shards that are there")
            if path.stat().st_size != expected:
                raise ValueError(
                    f"shard {path} has {path.stat().st_size} bytes, the index says {expected}; copy it again"
                )

    def open(self, shard: int) -> np.ndarray:
        """The bytes of a shard, uint8."""
        # Thousands of shards would be too many open mappings for some systems if all were made at once.
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._paths[shard], dtype=np.uint8, mode="r")
        return self._maps[shard]

    def expect(self, sequence: list[int]) -> None:
        """Local shards need no preparation."""

    def close(self) -> None:
        """Release the mappings."""
        self._maps = {}


class StreamedShards:
    """Shards behind an address, fetched whole into a temporary folder, at most `capacity` of them at a time.

    A few threads fetch ahead along the plan, up to `ahead` shards beyond the one that was opened last for the first
    time, so that what is still in use is not pushed out. Whoever needs a shard that is not there fetches it itself.
    """

    def __init__(self, base: str, index: ShardIndex, ahead: int, capacity: int):
        self._base, self._index, self._ahead, self._capacity = base, index, ahead, capacity
        # Closing must not fail where a thread writes its last file into the folder meanwhile.
        self._folder = tempfile.TemporaryDirectory(prefix="regatta-shards-", ignore_cleanup_errors=True)
        # In the order of last use; the first is let go when there are too many.
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._plan: list[int] = []
        self._reached = 0
        # Tells errors of the epoch before from those of this one.
        self._generation = 0
        # Guards everything below: fetchers, the decoder's thread and `close` all change it.
        self._changed = threading.Condition()
        self._fetching: set[int] = set()
        self._errors: dict[int, Exception] = {}
        self._closed = False
        self.fetched = 0
        # Daemons: a fetch that hangs must not keep the process from ending.
        for _ in range(_FETCHERS):
            threading.Thread(target=self._run, name="regatta-shards", daemon=True).start()

    def expect(self, sequence: list[int]) -> None:
        """Fetch these shards next, in this order."""
        with self._changed:
            self._plan, self._reached, self._generation = list(sequence), 0, self._generation + 1
            # A new epoch tries again what failed in the last one.
            self._errors = {}
            self._changed.notify_all()

    def open(self, shard: int) -> np.ndarray:
        """The bytes of a shard, uint8; waits for it.

        Raises:
            SourceBusy: it did not arrive in time.
            SourceClosed: it is not there or may not be read.
        """
        with self._changed:
            # Only a shard's first use moves the window on; later uses of it say nothing about what comes next.
            if shard in self._plan[self._reached :]:
                self._reached = self._plan.index(shard, self._reached) + 1
                self._changed.notify_all()
            # Somebody fetches it already; a second copy would waste the connection.
            while shard in self._fetching:
                self._changed.wait()
            if shard in self._maps:
                self._maps.move_to_end(shard)
                return self._maps[shard]
            # A thread has waited for it as long as is allowed already.
            if isinstance(self._errors.get(shard), SourceBusy):
                raise self._errors.pop(shard)
            # Entered under the lock, fetched outside it: a fetch takes seconds, and others must go on.
            self._fetching.add(shard)
        return self._fetch(shard)

    def _fetch(self, shard: int) -> np.ndarray:
        """Fetch a shard that the caller has entered in `_fetching`."""
        name = self._index.names[shard]
        path = Path(self._folder.name, name)
        mapped: np.ndarray | None = None
        try:
            # The server has sent the index: what fails from now on may pass.
            fetch(member_url(self._base, name), path, int(self._index.shard_bytes[shard]), persistent=True)
            mapped = np.memmap(path, dtype=np.uint8, mode="r")
            # The mapping keeps the bytes for whoever uses them; the name is not needed.
            path.unlink()
            return mapped
        finally:
            with self._changed:
                self._fetching.discard(shard)
                # After `close` nobody would release it any more.
                if mapped is not None and not self._closed:
                    self._maps[shard] = mapped
                    self.fetched += 1
                    # Whoever still decodes from a shard holds its mapping; letting it go here only drops our reference.
                    while len(self._maps) > self._capacity:
                        self._maps.popitem(last=False)
                self._changed.notify_all()

    def _next(self) -> int | None:
        """The next shard of the plan to fetch, None where enough is there."""
        for shard in self._plan[self._reached : self._reached + self._ahead]:
            if shard not in self._maps and shard not in self._fetching and shard not in self._errors:
                return shard
        return None

    def _run(self) -> None:
        while True:
            with self._changed:
                # Asleep until the plan or the window moves.
                while not self._closed and self._next() is None:
                    self._changed.wait()
                if self._closed:
                    return
                shard, generation = self._next(), self._generation
                assert shard is not None
                self._fetching.add(shard)
            try:
                self._fetch(shard)
            except Exception as error:
                # Whoever opens the shard tries again and gets the error; this thread must not give up on the others.
                with self._changed:
                    # A late failure of an old plan must not mark the shard in the new one.
                    if generation == self._generation:
                        self._errors[shard] = error

    def close(self) -> None:
        """Stop fetching and remove the temporary folder."""
        with self._changed:
            self._closed = True
            # Sleeping fetchers wake and end.
            self._changed.notify_all()
        self._maps.clear()
        self._folder.cleanup()
