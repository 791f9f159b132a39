"""The one error regime of all commands: what ends them other than well, with which exit code, and who says so.

Libraries (`pipeline`, `models`) and the modules here raise `ValueError` for what the user can mend, naming the value,
what is accepted and the remedy. Nobody on the way translates it: `run_to_exit_code`, around every command, prints one
line and returns the code. A `ValueError` that no `raise` statement of ours made, such as one of torch or numpy, is a
fault of the program and keeps its traceback; but for batch norm over one value, which depends on a flag alone.
"""

from __future__ import annotations

import contextlib
import dis
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.refusal import SourceBusy, TooManyBad

from .say_once import say_once

EXIT_USER_MISTAKE = 2
EXIT_BAD_IMAGES = 3
EXIT_NON_FINITE = 4
EXIT_CHECKPOINT = 5
EXIT_HUNG = 6
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130

_OURS = ("pipeline", "models", "train", "tools", "regatta", "__main__")
_LONE_VALUE = "Expected more than 1 value per channel when training"
_RAISE = dis.opmap["RAISE_VARARGS"]


class RunEnd(Exception):
    """Ends the run with `code` after printing its one-line message.

    Args:
        message: the line.
        code: exit code; None takes the class's.
        repeats: line of another process that this one passes on; it is not said again on the machine where it was said.
    """

    code = 1

    def __init__(self, message: str, code: int | None = None, repeats: str = "") -> None:
        super().__init__(message)
        self.repeats = repeats
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


def is_refusal(error: BaseException) -> bool:
    """Whether a `raise` statement in our own code made this error, to tell the user something.

    Args:
        error: a caught exception, with its traceback.

    Returns:
        False for an error that came out of another package, or out of a call into C such as `int("x")`.
    """
    at = error.__traceback__
    if at is None:
        return False
    while at.tb_next is not None:
        at = at.tb_next
    package = str(at.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in _OURS and at.tb_frame.f_code.co_code[at.tb_lasti] == _RAISE


def run_to_exit_code(main: Callable[[], int], disk_full: int = EXIT_USER_MISTAKE) -> int:
    """Call a command and give its exit code; what the user can mend becomes one line on standard error.

    With REGATTA_TRACEBACK=1 in the environment everything is raised instead, for whoever looks for a fault here.

    Args:
        main: the command.
        disk_full: code where the disk is full; training says then that no checkpoint could be written.
    """
    try:
        return main()
    except (RunEnd, ValueError, ImportError, OSError) as error:
        told = None if os.environ.get("REGATTA_TRACEBACK") == "1" else text_and_code(error, disk_full)
        if told is None:
            raise
        text, code = told
        line = f"regatta: {text}"
        _leave_for_the_launcher(line)
        say_once(line, getattr(error, "repeats", ""))
        return code
    except KeyboardInterrupt:
        say_once("stopped before it was done; files that have their final name are whole")
        return EXIT_INTERRUPTED


def text_and_code(error: BaseException, disk_full: int = EXIT_USER_MISTAKE) -> tuple[str, int] | None:
    """What is said on one line, and the exit code, for an error that the user can mend; None for a fault of ours.

    Args:
        error: a caught exception, with its traceback.
        disk_full: as `run_to_exit_code` takes it.
    """
    text, code = str(error), EXIT_USER_MISTAKE
    if isinstance(error, RunEnd):
        code = error.code
    elif isinstance(error, SourceBusy):
        code = EXIT_REQUEUE
    elif isinstance(error, TooManyBad):
        code = EXIT_BAD_IMAGES
    elif _LONE_VALUE in text:
        # PyTorch's own batch norm, in a head or where maps have shrunk to one pixel: known only when it runs.
        text = "batch norm needs two values a channel: take a larger --global-batch, two images a process at least"
    elif not is_refusal(error):
        if not isinstance(error, OSError):
            return None
        # The system's own errors name cause and path only.
        full = error.errno == errno.ENOSPC
        remedy = "free space" if full else "check the path, its permissions and the free space"
        text, code = f"{error}; {remedy}, then run the same command again", disk_full if full else EXIT_USER_MISTAKE
    # On one line, whatever line breaks the cause of it has.
    return " ".join(text.split()), code


def _leave_for_the_launcher(line: str) -> None:
    """Write the line where torchrun looks for a process's error, so that its report ends in the line."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    # The form that `torch.distributed.elastic`'s `record` writes; importing it would cost the seconds of PyTorch.
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
