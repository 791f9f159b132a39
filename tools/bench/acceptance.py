"""Parts of an acceptance run, each a process with a time limit: whatever one of them does, the next has its turn.

What is done is kept in `state.json` of the output folder, so that a run that is started again goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.atomic import write_atomically

TRIES = 2
"""How often a part that fails is tried, over all starts."""
_OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "--micro-batch")
_TAIL_BYTES = 20_000


@dataclass(frozen=True)
class Part:
    """One process of the run.

    Attributes:
        name: also of its log and its rows.
        command: from a batch size to the command line.
        seconds: its time limit.
        least_s: what it needs at least; it is not begun with less left.
        missing: why it cannot run here; empty where it can.
    """

    name: str
    command: Callable[[int], Sequence[str]]
    seconds: float
    least_s: float = 20.0
    missing: str = ""


@dataclass
class Outcome:
    """What became of a part: "done", "failed", "no time", "no memory" or "left out", its last line, and its cost."""

    status: str
    end: str = ""
    seconds: float = 0.0
    tries: int = 0
    batch: int = 0


class Progress:
    """The outcomes so far, on disk after each part.

    Args:
        folder: for state, logs and rows.
        device: card and versions; outcomes of another device are not taken over.
    """

    def __init__(self, folder: Path, device: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device = folder, device
        self.outcomes: dict[str, Outcome] = {}
        document = _read(folder / "state.json")
        if document.get("device") == device:
            self.outcomes = {name: Outcome(**held) for name, held in document["parts"].items()}

    def keep(self, name: str, outcome: Outcome) -> None:
        """Record an outcome."""
        self.outcomes[name] = outcome
        document = {"device": self.device, "parts": {name: asdict(each) for name, each in self.outcomes.items()}}
        write_atomically(self.folder / "state.json", json.dumps(document, indent=1).encode())

    def is_open(self, part: Part) -> bool:
        """Whether the part is still to be run."""
        before = self.outcomes.get(part.name)
        return before is None or (before.status not in ("done", "left out") and before.tries < TRIES)

    def rows(self, name: str) -> Path:
        """The CSV file of a part."""
        return self.folder / f"{_file_name(name)}.csv"

    def log(self, name: str) -> Path:
        """The log of a part."""
        return self.folder / f"{_file_name(name)}.log"


def _file_name(name: str) -> str:
    return name.replace(" ", "-").replace(":", "")


def _read(path: Path) -> dict:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def run_parts(parts: Sequence[Part], progress: Progress, batch: int, deadline: float) -> Iterator[tuple[Part, Outcome]]:
    """Run every open part in order until the deadline (`time.monotonic()`), giving each outcome as it comes.

    A part without memory is tried again with half the images.
    """
    for part in parts:
        while progress.is_open(part):
            before = progress.outcomes.get(part.name, Outcome("open", batch=batch))
            images = max(before.batch // 2, 2) if before.status == "no memory" else before.batch or batch
            if part.missing:
                outcome = Outcome("left out", part.missing)
            elif deadline - time.monotonic() < part.least_s:
                break  # a shorter part may still fit
            else:
                limit = min(part.seconds, deadline - time.monotonic())
                outcome = _run(part, images, limit, progress, before.tries + 1, cut=limit < part.seconds)
            progress.keep(part.name, outcome)
            yield part, outcome
            if outcome.status != "no memory":
                break


def _run(part: Part, batch: int, limit: float, progress: Progress, tries: int, cut: bool) -> Outcome:
    # The rows of an earlier try would stand beside the new ones.
    progress.rows(part.name).unlink(missing_ok=True)
    started = time.monotonic()
    with progress.log(part.name).open("wb") as log:
        code = _wait(part.command(batch), log.fileno(), limit)
    seconds = time.monotonic() - started
    tail = progress.log(part.name).read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    if code is None:
        # Cut short by the end of the run, it has not had its try.
        return Outcome("no time", f"no end within {limit:.0f} s", seconds, tries - cut, batch)
    if code == 0:
        return Outcome("done", last, seconds, tries, batch)
    memory = any(sign in tail for sign in _OUT_OF_MEMORY)
    ended = f"signal {-code}" if code < 0 else f"code {code}"
    return Outcome("no memory" if memory else "failed", f"{ended}: {last}", seconds, tries, batch)


def _wait(command: Sequence[str], log: int, limit: float) -> int | None:
    """The exit code of a command; None where it did not end in time."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            # With its children: a benchmark has loaders, a proof has its own process.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def summary(outcomes: Mapping[str, Outcome], parts: Sequence[Part]) -> list[str]:
    """One line a part, in order."""
    width = max(len(part.name) for part in parts)
    lines = []
    for part in parts:
        outcome = outcomes.get(part.name, Outcome("not reached"))
        lines.append(f"{part.name:{width}}  {outcome.status:11}  {outcome.seconds:4.0f} s  {outcome.end[:150]}")
    return lines
