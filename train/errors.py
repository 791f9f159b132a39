"""Ways a run ends other than well, each with the exit code that scripts rely on."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

EXIT_USER_MISTAKE = 2
EXIT_BAD_IMAGES = 3
EXIT_NON_FINITE = 4
EXIT_CHECKPOINT = 5
EXIT_REQUEUE = 75


class RunEnd(Exception):
    """Ends the run with `code` after printing its one-line message."""

    code = 1

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class UserMistake(RunEnd, ValueError):
    """A flag, path, data set or checkpoint that cannot be used as given; the message names the remedy.

    A `ValueError` as well, for callers who use these modules from Python.
    """

    code = EXIT_USER_MISTAKE


class NonFinite(RunEnd):
    """The loss or its gradient stayed non-finite."""

    code = EXIT_NON_FINITE


class CheckpointFailed(RunEnd):
    """A checkpoint could not be written."""

    code = EXIT_CHECKPOINT


class Stopped(RunEnd):
    """Stopped by a signal after saving; a scheduler may requeue the same command."""

    code = EXIT_REQUEUE


def run_to_exit_code(main: Callable[[], int]) -> int:
    """Call `main` and turn a `RunEnd` or a failing disk into one line on standard error and its exit code."""
    try:
        return main()
    except RunEnd as end:
        # On one line, whatever line breaks the cause of it has.
        print(f"regatta: {' '.join(str(end).split())}", file=sys.stderr)
        return end.code
    except OSError as reason:
        # What the run itself could not write: a full disk ends it as a failed checkpoint does.
        full = reason.errno == errno.ENOSPC
        remedy = "free space" if full else "check the path and its permissions"
        print(f"regatta: {reason}; {remedy}, then run the same command again", file=sys.stderr)
        return EXIT_CHECKPOINT if full else EXIT_USER_MISTAKE
