"""How far a long loop of an evaluation is: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")
EVERY_S = 10.0


class Progress:
    """Counts the pieces of one loop; a context manager, which ends its bar.

    Args:
        what: what the loop does, such as "features of val.beton".
        total: pieces of this rank.
        unit: what a piece is, such as "batches".
        shown: whether this process tells, which one of all ranks does.
        check: called before each piece; raises where a signal asked for the end.
        done: pieces of an earlier start.
    """

    def __init__(
        self, what: str, total: int, unit: str, shown: bool, check: Callable[[], None] = lambda: None, done: int = 0
    ) -> None:
        self._what, self._total, self._unit, self._shown = what, total, unit, shown
        self._check = check
        self._first = self._done = done
        self._begun = self._told = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", leave=False) if on_terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self) -> None:
        """One piece is done, and the loop may end here.

        Raises:
            Stopped: a signal has asked for it.
        """
        self.advance()
        self._check()

    def advance(self) -> None:
        """One piece is done, and the loop goes on: it looks for signals itself, because it saves before it ends."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif self._shown and time.monotonic() - self._told > EVERY_S:
            self._told = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """What, share, pieces, time left at the pace so far, clock."""
        pace = (time.monotonic() - self._begun) / max(self._done - self._first, 1)
        left = datetime.timedelta(seconds=round(pace * max(self._total - self._done, 0)))
        share = self._done / max(self._total, 1)
        return (
            f"{self._what}: {share:.0%} ({self._done:,} of {self._total:,} {self._unit}), {left} left at "
            f"{time.strftime('%H:%M:%S')}"
        )


def in_threads(work: Callable[[T], R], items: Iterable[T], threads: int, after_each: Callable[[], object]) -> list[R]:
    """Results of `work` over the items, in order.

    Args:
        work: called in one of the threads.
        items: one call each.
        threads: how many.
        after_each: called here after each result; what it raises ends the work at once.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        results = []
        for each in [pool.submit(work, item) for item in items]:
            results.append(each.result())
            after_each()
        return results
    finally:
        # Not as a `with` block, which waits for all that has been submitted: thousands of images on a slow disk.
        pool.shutdown(cancel_futures=True)
