"""What a long run has found so far, so that it can end at any time and go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class OtherRun(Exception):
    """A journal is of another command or another commit; the message says of which."""


class Journal:
    """Results of pieces of work, each kept as soon as it is known.

    Args:
        path: file of JSON lines, one a piece, behind a first line with the heading; None keeps nothing.
        heading: names the run: its command and commit.

    Raises:
        OtherRun: the file has another heading, so its results say nothing of this run.
    """

    def __init__(self, path: Path | None, heading: str) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        if path is None:
            return
        if not path.exists():
            path.write_text(json.dumps(heading) + "\n")
            return
        first, *rest = path.read_text().splitlines()
        if json.loads(first) != heading:
            raise OtherRun(f"{path} is of {json.loads(first)!r}, not of {heading!r}; remove it to begin anew")
        self.known = dict(json.loads(line) for line in rest)

    def result(self, piece: str, work: Callable[[], Any]) -> Any:
        """What is known of a piece; does the work first where nothing is."""
        if piece not in self.known:
            self.known[piece] = work()
            self._keep(piece)
        return self.known[piece]

    def _keep(self, piece: str) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps([piece, self.known[piece]]) + "\n")

    def remove(self) -> None:
        """Delete the file of a run that has ended."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
