"""Commands that run for hours, one after the other or a few at once; a signal or a clock stops them without a loss."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from train.errors import EXIT_REQUEUE

ROOT = Path(__file__).resolve().parents[2]


class Commands:
    """Runs commands; on SIGTERM, Ctrl-C or when time is up it asks those that run to save and end.

    Args:
        minutes: time for all of them; 0 for any.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self.asked = False
        if minutes:
            timer = threading.Timer(60 * minutes, self.stop)
            timer.daemon = True
            timer.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())

    def stop(self) -> None:
        """Ask the commands that run to save and end; no other begins."""
        self.asked = True
        # A copy: other threads add and take away while this one goes through them.
        for command in tuple(self._running):
            command.terminate()

    def call(self, command: Sequence[str]) -> int:
        """Run a command in the checkout; several threads may do so at once.

        Returns:
            Its exit code, as shells give it; 75 once a stop was asked for, unless the command was done before.
        """
        if self.asked:
            return EXIT_REQUEUE
        process = subprocess.Popen(command, cwd=ROOT)
        self._running.add(process)
        if self.asked:  # a signal between the lines above
            process.terminate()
        code = process.wait()
        self._running.discard(process)
        if code and self.asked:
            return EXIT_REQUEUE
        return code if code >= 0 else 128 - code
