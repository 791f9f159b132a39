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
    address, port = _place()
    place = f"{address}:{port}"
    try:
        # Under torchrun the launcher itself listens, and rank 0 is a guest like the others.
        if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _wait_for_host(address, port, limit)
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=limit))
        if may_restart(os.environ):
            _join_again(store, backend, rank, world_size, limit)
        else:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    except dist.DistNetworkError as reason:
        raise _network_failed(place, str(reason)) from None
    except dist.DistStoreError as reason:
        raise RunEnd(
            f"not all {world_size} processes have come to {place} within {limit.total_seconds():.0f} s "
            f"({_first_line(str(reason))}); was one of them killed, or never started?",
            EXIT_HUNG,
        ) from None


def _place() -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT.

    Raises:
        UserMistake: a launcher, or whoever set RANK and WORLD_SIZE, has left one out or given no number.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal():
        raise UserMistake(
            f"MASTER_ADDR={address or 'not set'} and MASTER_PORT={port or 'not set'}: several processes need the "
            "address and a free port of rank 0's machine; export both, or start with torchrun"
        )
    return address, int(port)


def _wait_for_host(address: str, port: int, limit: timedelta) -> None:
    """Wait until somebody listens at an address; PyTorch waits too, but up to three times its limit.

    Raises:
        RunEnd: nobody does within `limit`; the message says what the last try met.
    """
    deadline = time.monotonic() + limit.total_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=_ANSWER_S).close()
            return
        except OSError as reason:
            # The name of a machine that starts at this moment may not be known yet either.
            if time.monotonic() > deadline:
                why = f"{reason.strerror or reason}, for {limit.total_seconds():.0f} s"
                raise _nobody_answers(f"{address}:{port}", why) from None
        time.sleep(_POLL_S)


def _nobody_answers(place: str, reason: str) -> RunEnd:
    # It waited as long as a run may stand still. Who starts it again may find rank 0 there.
    return RunEnd(
        f"nobody answers at {place} ({reason}); was rank 0 killed, or never started? Otherwise check MASTER_ADDR, "
        "MASTER_PORT and the network",
        EXIT_HUNG,
    )


def _network_failed(place: str, reason: str) -> RunEnd:
    """The end of a process whose connections PyTorch could not make or keep."""
    first_line = _first_line(reason)
    if "EADDRINUSE" in reason:
        return UserMistake(
            f"port in use: {place}, another run has it; export another MASTER_PORT, or start torchrun with --standalone"
        )
    # The place was right, then: somebody was there, and has gone since. That is no mistake of this process's flags.
    if any(words in reason for words in ("Broken pipe", "Connection reset", "closed by peer")):
        return RunEnd(
            f"another process has left while all were meeting at {place} ({first_line}); its own last line says why"
        )
    if "timed out" in reason:
        return _nobody_answers(place, first_line)
    return UserMistake(
        f"the processes cannot meet at {place} ({first_line}); check MASTER_ADDR, MASTER_PORT and the network"
    )


def _first_line(reason: str) -> str:
    return reason.strip().partition("\n")[0]


def _join_again(store: dist.Store, backend: str, rank: int, world_size: int, limit: timedelta) -> None:
    """As `join`, under a launcher that may have started these processes before; see `restarts`."""
    found = meet(store, rank, world_size, limit.total_seconds())
    with leaving_if_another_starts_again(store, rank, found):
        dist.init_process_group(backend, store=found.store, rank=rank, world_size=world_size, timeout=limit)
