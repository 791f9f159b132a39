"""One mistake, one line: of the processes of a run on one machine, the first that has something to say says it.

The same mistake ends every rank, and it may end them before they can talk to one another. So whoever says a line takes
a socket of that name, which the system frees with the process: no file stays behind, and the next run speaks. A rank
that finds the name taken knocks at the socket and keeps quiet. The speaker stays until all have knocked, because under
srun nobody ends the others, and they may be many seconds behind it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import sys
import time
from collections.abc import Mapping

from .slurm import tasks_here

_LAUNCHER_S = 2.0
"""How long the speaker waits for the others where a launcher ends them all soon after it has gone."""
_SRUN_S = 20.0
"""How long it waits under srun. A rank that never comes has not met the mistake, and needs this one's exit code."""
_passed_on: set[str] = set()
_spoken: dict[str, socket.socket] = {}  # name -> the socket that holds it, until the process ends


def say_once(line: str, about: str = "", leaves: bool = True) -> None:
    """Print a line on standard error, unless another process of the run has said it on this machine.

    Args:
        line: what to print.
        about: the line of another process that this one passes on, and that counts as the same; empty for one's own.
        leaves: this process is about to end, and waits here until the others have met the line.
    """
    env = os.environ
    others = _others_here(env)
    if not others:
        print(line, file=sys.stderr, flush=True)
        return
    name = _name(env, about or line)
    if about:
        # A thread of this process may have passed it on already.
        if name in _passed_on:
            return
        _passed_on.add(name)
    held = _taken(name)
    if held is None:
        return
    print(line, file=sys.stderr, flush=True)
    if leaves:
        _wait_for(held, others, _LAUNCHER_S if "WORLD_SIZE" in env else _SRUN_S)


def _others_here(env: Mapping[str, str]) -> int:
    """Processes of the run on this machine beside this one, or at least one where there are several somewhere."""
    if "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        return min(world - 1, max(int(env.get("LOCAL_WORLD_SIZE", world)) - 1, 1))
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return 0
    return tasks_here(env) - 1


def _name(env: Mapping[str, str], line: str) -> str:
    # What the ranks of one machine share: the step under SLURM, which may wrap each in a shell, else the launcher.
    step = f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID')}" if "SLURM_JOB_ID" in env else f"{os.getppid()}"
    return "\0regatta-" + hashlib.sha256(f"{os.getuid()} {step} {line}".encode()).hexdigest()


def _taken(name: str) -> socket.socket | None:
    """The socket of this name; None where another process has it, which is told that this one has met the line too."""
    if name in _spoken:
        return _spoken[name]
    mine = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        mine.bind(name)
    except OSError as reason:
        if reason.errno == errno.EADDRINUSE:
            # Without waiting: a speaker whose queue is full has been knocked at often enough.
            with mine, contextlib.suppress(OSError):
                mine.setblocking(False)
                mine.sendto(b"1", name)
            return None
        # A system without such sockets: better twice than never.
    _spoken[name] = mine
    return mine


def _wait_for(held: socket.socket, others: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    with contextlib.suppress(OSError):  # the time is over, or a socket without a name, at which nobody knocks
        for _ in range(others):
            held.settimeout(max(deadline - time.monotonic(), 0.001))
            held.recv(1)
