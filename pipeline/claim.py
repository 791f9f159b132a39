"""One writer at a time: a run's folder, a result or a packed file is claimed by the process that writes it.

Two commands that write the same place at once (a job that was submitted twice, or requeued while the old one still
ends) would mix their rows and remove each other's unfinished files, and both could end with a word of success.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .atomic import remove_leftovers

WAIT_S = 10.0
"""How long a claim waits for another process of this machine: one that was stopped may just be ending."""
ELSEWHERE_S = 150.0
"""How long it waits for one of another machine: a file server keeps the locks of a lost machine for about 90 s."""
_POLL_S = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Claimed(ValueError):
    """Another process writes what this one was to write; the message names it and the remedy."""


@contextlib.contextmanager
def claimed(lock: Path, what: str, finals: Sequence[Path] = ()) -> Iterator[None]:
    """Within the block no other process that asks has the same claim.

    The system ends a claim with its process, killed or not. Where the disk knows no locks nothing is claimed.

    Args:
        lock: a file to lock, made here and removed at the end; all who write the same thing must name the same file.
        what: what is written, for the message.
        finals: files and folders that are written; what killed processes left of them is removed before the block.

    Raises:
        Claimed: another process has the claim and keeps it.
        OSError: the file cannot be made.
    """
    descriptor = _locked(lock, what)
    try:
        for final in finals:
            remove_leftovers(final)
        yield
    finally:
        # Removed before it is let go: later it could be the file of the next one.
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _locked(lock: Path, what: str) -> int:
    started = time.monotonic()
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # A lock of the process, not of the open file: what it forks must not keep the claim after its death.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as reason:
            if reason.errno in _NO_LOCKS:
                return descriptor
            pid, _, host = os.pread(descriptor, 300, 0).decode("utf-8", "replace").strip().partition(" ")
            os.close(descriptor)
            elsewhere = host not in ("", socket.gethostname())
            if time.monotonic() - started > (ELSEWHERE_S if elsewhere else WAIT_S):
                raise Claimed(_refusal(lock, what, pid, host if elsewhere else "")) from None
            time.sleep(_POLL_S)
            continue
        # The holder before may have removed the file between the opening and the lock.
        if _same_file(descriptor, lock):
            with contextlib.suppress(OSError):  # on a full disk the claim has no name, but holds
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _refusal(lock: Path, what: str, pid: str, host: str) -> str:
    holder = f"process {pid or 'of unknown number'}" + (f" of {host}" if host else "")
    gone = f"; where that machine is gone, remove {lock}" if host else ""
    return f"{what} is being written by {holder}; wait for it, stop it, or choose another place{gone}"
