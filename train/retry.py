"""Writes that outlast a disk's bad moment, and the one way in which they fail."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from .errors import CheckpointFailed

PAUSES_S = (1.0, 4.0, 15.0)
"""Seconds to wait before each further attempt at a write; the other ranks wait as long, so the sum stays short."""

# What a server, a quota or an administrator may put right within seconds. The rest (a file where a folder should be, a
# name too long) stays as it is however long one waits.
_PASSING = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.EACCES,
        errno.EPERM,
        errno.ESTALE,
        errno.EROFS,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EBUSY,
    )
)

T = TypeVar("T")


def persistently(what: str, write: Callable[[], T]) -> T:
    """The result of `write`, attempted again for a while where the disk refuses it.

    A full or unreachable disk is often somebody else's trouble of a moment; a week of training is not ended for it.

    Args:
        what: what is written, for messages.
        write: may be called several times; raises OSError where the disk refuses.

    Raises:
        CheckpointFailed: when it could not be written in the end, or never can be.
    """
    for pause in PAUSES_S:
        try:
            return write()
        except OSError as reason:
            if reason.errno not in _PASSING:
                raise _failed(what, reason) from None
            print(f"regatta: {what}: {reason}; trying again in {pause:g} s", file=sys.stderr, flush=True)
        time.sleep(pause)
    try:
        return write()
    except OSError as reason:
        raise _failed(what, reason) from None


def _failed(what: str, reason: OSError) -> CheckpointFailed:
    remedy = "free space or fix permissions, then run the same command again"
    return CheckpointFailed(f"{what} could not be written: {reason}; {remedy}")
