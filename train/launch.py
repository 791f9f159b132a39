"""The processes of a run on one machine, started without torchrun: their exit code is the run's, nothing is added.

torchrun answers a mistake of one line with a report of forty and always ends with code 1. A run on one machine needs
nothing that torchrun has: the processes get the same environment variables from here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from .errors import EXIT_REQUEUE, UserMistake

STARTED_HERE = "REGATTA_PROCESSES"
"""Environment variable that tells a process that it was started here, and with how many others."""
_POLL_S = 0.1
_GRACE_S = 5.0
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def starts_others(count: int) -> bool:
    """Whether this process is to start the processes of the run, instead of being one.

    Args:
        count: `--processes`.

    Raises:
        UserMistake: a launcher has started several already.
    """
    if count == 1 or STARTED_HERE in os.environ:
        return False
    for launcher, variable in (("torchrun", "WORLD_SIZE"), ("srun", "SLURM_STEP_NUM_TASKS")):
        if int(os.environ.get(variable, 1)) > 1:
            raise UserMistake(
                f"--processes {count}: {launcher} has started the processes already; leave one of them out"
            )
    return True


def run_processes(count: int, script: str, arguments: Sequence[str]) -> int:
    """Run a script in `count` processes until all have ended; signals go on to each of them.

    Args:
        count: how many.
        script: file of the command.
        arguments: of each process.

    Returns:
        0 where all ended well; otherwise the code of the first that did not, 128 plus its number for a signal. The
        others are then ended too: they would wait for the one that has gone.
    """
    port = _free_port()
    follow = functools.partial(_end_with, os.getpid(), _prctl())
    children = [
        subprocess.Popen([sys.executable, script, *arguments], env=_environment(rank, count, port), preexec_fn=follow)
        for rank in range(count)
    ]
    with _forwarding(children):
        try:
            return _wait(children)
        finally:
            _end(children)


def _prctl() -> Callable[[int, int], int] | None:
    """Linux's call for settings of the calling process; None elsewhere."""
    return getattr(ctypes.CDLL(None), "prctl", None)


def _end_with(parent: int, prctl: Callable[[int, int], int] | None) -> None:
    """In a new process: be asked to stop when `parent` ends, also where that is killed and can pass nothing on."""
    if prctl is None:
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGTERM)


def _free_port() -> int:
    # Asked of the system: a fixed one would be in use as soon as two runs share the machine.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",  # as torchrun does: several processes share the cores
        **os.environ,
        STARTED_HERE: str(count),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextlib.contextmanager
def _forwarding(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            # Ended ones are left alone by `send_signal` itself.
            child.send_signal(number)

    # Under nohup a hangup is ignored, here and in the processes.
    heard = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [child.poll() for child in children]
        # A stop by a signal is agreed on: every rank ends by itself, and rank 0 may still be writing.
        bad = [code for code in codes if code not in (None, 0, EXIT_REQUEUE)]
        if bad:
            first = bad[0]
            assert first is not None
            return first if first > 0 else 128 - first
        if None not in codes:
            return EXIT_REQUEUE if EXIT_REQUEUE in codes else 0
        time.sleep(_POLL_S)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs. Files are written under other names first, so that none is left half-written."""
    running = [child for child in children if child.poll() is None]
    for child in running:
        child.terminate()
    last = time.monotonic() + _GRACE_S
    for child in running:
        try:
            child.wait(max(last - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            # It waits in an exchange for the rank that has gone, where Python cannot see a signal.
            child.kill()
            child.wait()
