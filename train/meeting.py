"""The processes of a run meet at MASTER_ADDR and MASTER_PORT; what keeps them apart ends each with one line."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

from torch import distributed as dist

from .errors import EXIT_HUNG, RunEnd, UserMistake
from .restarts import leaving_if_another_starts_again, may_restart, meet

_POLL_S = 0.2
_ANSWER_S = 5.0
"""Most patience with one connection: a machine that has gone does not refuse it, it says nothing."""


def join(backend: str, rank: int, world_size: int, limit: timedelta) -> None:
    """Meet the other processes and form the process group with them.

    Args:
        backend: of the process group.
        rank: this process.
        world_size: number of processes.
        limit: how long to wait for the others, now and in an exchange.

    Raises:
        UserMistake: the place to meet cannot be used.
        RunEnd: another process was there and has left, or has not come in time.
    """
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        # Under torchrun the launcher itself listens, and rank 0 is a guest like the others.
        if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _wait_for_host(limit)
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=limit))
        if may_restart(os.environ):
            _join_again(store, backend, rank, world_size, limit)
        else:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    except TimeoutError as reason:
        # It waited as long as a run may stand still. Who starts it again may find rank 0 there.
        raise RunEnd(
            f"nobody answers at {place} ({reason}); was rank 0 killed, or never started? Otherwise check MASTER_ADDR, "
            "MASTER_PORT and the network",
            EXIT_HUNG,
        ) from None
    except dist.DistNetworkError as reason:
        raise _network_failed(place, str(reason)) from None
    except dist.DistStoreError as reason:
        raise RunEnd(
            f"not all {world_size} processes have come to {place} within {limit.total_seconds():.0f} s "
            f"({_first_line(str(reason))}); was one of them killed, or never started?",
            EXIT_HUNG,
        ) from None


def _wait_for_host(limit: timedelta) -> None:
    """Wait until somebody listens at MASTER_ADDR and MASTER_PORT.

    PyTorch waits too, but up to three times its limit.

    Raises:
        TimeoutError: nobody does within `limit`; the message says what the last try met.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + limit.total_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=_ANSWER_S).close()
            return
        except OSError as reason:
            # The name of a machine that starts at this moment may not be known yet either.
            if time.monotonic() > deadline:
                raise TimeoutError(f"{reason.strerror or reason}, for {limit.total_seconds():.0f} s") from None
        time.sleep(_POLL_S)


def _network_failed(place: str, reason: str) -> RunEnd:
    """The end of a process whose connections PyTorch could not make or keep."""
    if "EADDRINUSE" in reason:
        return UserMistake(
            f"port in use: {place}, another run has it; export another MASTER_PORT, or start torchrun with --standalone"
        )
    # The place was right, then: somebody was there, and has gone since. That is no mistake of this process's flags.
    if any(words in reason for words in ("Broken pipe", "Connection reset", "closed by peer", "timed out")):
        return RunEnd(
            f"another process has left while all were meeting at {place} ({_first_line(reason)}); its own last line "
            "says why"
        )
    return UserMistake(
        f"the processes cannot meet at {place} ({_first_line(reason)}); check MASTER_ADDR, MASTER_PORT and the network"
    )


def _first_line(reason: str) -> str:
    return reason.strip().partition("\n")[0]


def _join_again(store: dist.Store, backend: str, rank: int, world_size: int, limit: timedelta) -> None:
    """As `join`, under a launcher that may have started these processes before; see `restarts`."""
    found = meet(store, rank, world_size)
    with leaving_if_another_starts_again(store, rank, found):
        dist.init_process_group(backend, store=found.store, rank=rank, world_size=world_size, timeout=limit)
