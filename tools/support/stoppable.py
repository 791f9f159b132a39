"""Commands that run one after the other for hours, and that a signal or a clock stops without losing anything."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from train.errors import EXIT_REQUEUE

ROOT = Path(__file__).resolve().parents[2]


class Commands:
    """Runs one command after the other; on SIGTERM, Ctrl-C or when time is up it asks the current one to save and end.

    Args:
        minutes: time for all of them; 0 for any.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        self._current: subprocess.Popen[bytes] | None = None
        self.asked = False
        if minutes:
            timer = threading.Timer(60 * minutes, self.stop)
            timer.daemon = True
            timer.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())

    def stop(self) -> None:
        """Ask the current command to save and end; no other begins."""
        self.asked = True
        if self._current is not None:
            self._current.terminate()

    def call(self, command: Sequence[str]) -> int:
        """Run a command in the checkout.

        Returns:
            Its exit code, as shells give it; 75 once a stop was asked for, unless the command was done before.
        """
        if self.asked:
            return EXIT_REQUEUE
        self._current = subprocess.Popen(command, cwd=ROOT)
        if self.asked:  # a signal between the two lines above
            self._current.terminate()
        code = self._current.wait()
        if code and self.asked:
            return EXIT_REQUEUE
        return code if code >= 0 else 128 - code
