"""Processes that torchrun starts again meet those of the same start, on one machine or on several.

torchrun keeps its store when it starts processes again. Addresses and last words of the processes that have gone still
stand there, and would be taken for those of the new ones. The launchers of several machines count their restarts apart,
and start their processes again at different moments. So the processes of one start find each other by marks of their
own: each leaves a new one, rank 0 waits until every rank has left one that no start has used, and names the start.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from .errors import EXIT_HUNG, RunEnd

_MARK, _START, _COUNT = "regatta/mark", "regatta/start", "regatta/starts"
_POLL_S = 0.5


@dataclass(frozen=True)
class Start:
    """One start of all processes.

    Attributes:
        store: what only the processes of this start read and write.
        marks: of its processes, by rank.
    """

    store: Any
    marks: list[str]


def may_restart(environment: Mapping[str, str]) -> bool:
    """Whether a torchrun has started this process that may start it again."""
    return environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def meet(store: Any, rank: int, world_size: int, limit_s: float) -> Start:
    """Find the processes of this start.

    Args:
        store: the launcher's, which earlier starts have used too.
        rank: this process.
        world_size: number of processes.
        limit_s: seconds to wait for the others; a machine that is started anew may have to boot.

    Raises:
        RunEnd: they have not come in time; the message says which.
    """
    mine = secrets.token_hex(8)
    store.set(f"{_MARK}/{rank}", mine)
    if rank == 0:
        marks = _unused_marks(store, world_size, limit_s)
        number = store.add(_COUNT, 1)
        for mark in marks:
            # The mark counts as used from now on, and whoever left it learns whom it meets.
            store.set(f"{_START}/{mark}", json.dumps([number, marks]))
    try:
        store.wait([f"{_START}/{mine}"], timedelta(seconds=limit_s))
    except RuntimeError:  # its time is over, or the store has gone
        raise _absent("0", limit_s) from None
    number, marks = json.loads(store.get(f"{_START}/{mine}"))
    return Start(dist.PrefixStore(f"regatta/start_{number}", store), marks)


def _unused_marks(store: Any, world_size: int, limit_s: float) -> list[str]:
    """A mark of each rank that no start has used yet; a process that is still of an earlier start has none."""
    deadline = time.monotonic() + limit_s
    while True:
        marks = [_text(store, f"{_MARK}/{rank}") for rank in range(world_size)]
        late = [rank for rank, mark in enumerate(marks) if not mark or store.check([f"{_START}/{mark}"])]
        if not late:
            return marks
        if time.monotonic() > deadline:
            named = ", ".join(str(rank) for rank in late)
            raise _absent(named, limit_s)
        time.sleep(_POLL_S / 5)


def _absent(ranks: str, limit_s: float) -> RunEnd:
    return RunEnd(f"rank {ranks} has not started within {limit_s:.0f} s; is its machine or launcher gone?", EXIT_HUNG)


def _text(store: Any, key: str) -> str:
    # `get` would wait for a key that is not there.
    return str(store.get(key).decode()) if store.check([key]) else ""


@contextlib.contextmanager
def leaving_if_another_starts_again(
    store: Any, rank: int, start: Start, leave: Callable[[int], Any] = os._exit
) -> Iterator[None]:
    """While all connect to one another, end this process where another one of its start has been started again.

    PyTorch would wait half an hour for the process that has gone. Ended with code 1, this process is started again too,
    and meets the new one.

    Args:
        store: the launcher's.
        rank: this process.
        start: what `meet` has found.
        leave: called with the exit code; another one in tests.
    """
    done = threading.Event()
    # A connection of its own: the main thread holds the other one while it waits.
    own = store.clone()

    def watch() -> None:
        while not done.wait(_POLL_S):
            with contextlib.suppress(RuntimeError):
                marks = [_text(own, f"{_MARK}/{each}") for each in range(len(start.marks))]
                again = [each for each, mark in enumerate(marks) if mark != start.marks[each]]
                if again and not done.is_set():
                    line = f"rank {again[0]} was started again while all were meeting, so rank {rank} starts again too"
                    print(f"regatta: {line}", file=sys.stderr, flush=True)
                    leave(1)
                    return

    thread = threading.Thread(target=watch, name="meeting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
