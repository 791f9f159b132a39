"""Blows that befall a process from within, at a moment that a clock outside could not hit: in a save, at a rename."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree")

Place = Literal["file", "save", "evaluation", "epoch"]


@dataclass(frozen=True)
class Trap:
    """What befalls a process.

    Attributes:
        place: "file" before it changes any file of its folder, "save" before it changes one of a checkpoint that is
            being written, "evaluation" or "epoch" at the beginning of one.
        number: at which such place, from 1.
        signals: sent at this place, and at each one after it, one at a time.
        error: errno with which the change of a file fails instead; 0 for none.
        lasting: whether all changes after it fail as well.
    """

    place: Place
    number: int
    signals: tuple[int, ...] = (signal.SIGKILL,)
    error: int = 0
    lasting: bool = False


class _Counter:
    def __init__(self, trap: Trap) -> None:
        self._trap, self._seen = trap, 0

    def __call__(self) -> None:
        due = self._seen - self._trap.number + 1
        self._seen += 1
        if self._trap.error:
            if due == 0 or (due > 0 and self._trap.lasting):
                raise OSError(self._trap.error, os.strerror(self._trap.error))
        elif 0 <= due < len(self._trap.signals):
            os.kill(os.getpid(), self._trap.signals[due])


def lay(trap: Trap, folder: Path) -> None:
    """Set a trap in this process for the rest of its life.

    Args:
        trap: what shall befall it.
        folder: of its output; other files do not count.
    """
    reached = _Counter(trap)
    if trap.place in ("file", "save"):
        part = "/.step_" if trap.place == "save" else ""
        sys.addaudithook(lambda event, arguments: _watch(event, arguments, str(folder), part, reached))
        return
    import train.inputs
    import train.loop

    if trap.place == "evaluation":
        train.loop._evaluate = _before(train.loop._evaluate, reached)
    else:
        train.inputs.InputStream.epoch = _before(train.inputs.InputStream.epoch, reached)  # type: ignore[method-assign]


def _before(function: Callable[..., Any], reached: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        reached()
        return function(*arguments)

    return wrapped


def count_changes(folder: Path, into: Path) -> None:
    """Append a byte to the file `into` before each change of a file below `folder`, for the rest of the process."""
    counter = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(
        lambda event, arguments: _watch(event, arguments, str(folder), "", lambda: os.write(counter, b".") and None)
    )


def _watch(event: str, arguments: tuple[Any, ...], folder: str, part: str, reached: Callable[[], None]) -> None:
    if event not in _CHANGES and event != "open":
        return
    path = arguments[0]
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    # A number is a descriptor, whose file has been counted when it was opened.
    if not isinstance(path, str | Path) or not str(path).startswith(folder) or part not in str(path):
        return
    if event != "open" or (isinstance(arguments[2], int) and arguments[2] & _WRITING):
        reached()
