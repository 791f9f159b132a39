"""The page about a run, written anew while the run goes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from train.callbacks import Callback, Row, Started
from train.record.page import build_report

SHARE = 0.02
"""Largest share of the time in which the page is drawn: it takes Python's lock, which the steps of a GPU run want."""


class LivePage(Callback):
    """Writes `report.html` into the run's folder from a thread; a browser that shows it loads it again by itself.

    Args:
        every_s: seconds between two pages at the least; more where drawing takes long, so that `SHARE` is kept.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._new, self._ended = threading.Event(), threading.Event()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._draw_again, name="regatta-page", daemon=True)
        self._run_dir = Path()

    def __str__(self) -> str:
        return "--live-report"

    def on_start(self, run: Started) -> None:
        """The first page comes with the first row."""
        self._run_dir = run.run_dir
        self._thread.start()

    def on_row(self, row: Row) -> None:
        """Note that there is something to draw.

        Raises:
            what drawing raised before.
        """
        if self._failed is not None:
            raise self._failed
        self._new.set()

    def on_end(self, outcome: str) -> None:
        """The last page, which no browser loads again: of a run that was stopped, too."""
        self._ended.set()
        self._new.set()
        self._thread.join()
        build_report([self._run_dir], self._run_dir / "report.html", curves_alone=True)

    def _draw_again(self) -> None:
        while self._new.wait() and not self._ended.is_set():
            self._new.clear()
            begun = time.monotonic()
            try:
                build_report([self._run_dir], self._run_dir / "report.html", True, max(round(self._every_s), 1))
            except Exception as reason:  # told by the next row
                self._failed = reason
                return
            took = time.monotonic() - begun
            self._ended.wait(max(self._every_s, took / SHARE) - took)
