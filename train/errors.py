"""The one error regime of all commands: what ends them other than well, with which exit code, and who says so.

Libraries (`pipeline`, `models`) and the modules here raise `ValueError` for what the user can mend, naming the value,
what is accepted and the remedy. Nobody on the way translates it: `run_to_exit_code`, around every command, prints one
line and returns the code. A `ValueError` that no `raise` statement of ours made, such as one of torch or numpy, is a
fault of the program and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import dis
import errno
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.refusal import SourceBusy, TooManyBad

EXIT_USER_MISTAKE = 2
EXIT_BAD_IMAGES = 3
EXIT_NON_FINITE = 4
EXIT_CHECKPOINT = 5
EXIT_HUNG = 6
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130

_HELD_S = 2.0
_OURS = ("pipeline", "models", "train", "tools", "regatta", "__main__")
_RAISE = dis.opmap["RAISE_VARARGS"]


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
        if os.environ.get("REGATTA_TRACEBACK") == "1":
            raise
        if isinstance(error, RunEnd):
            return _tell(str(error), error.code)
        if isinstance(error, SourceBusy):
            return _tell(str(error), EXIT_REQUEUE)
        if isinstance(error, TooManyBad):
            return _tell(str(error), EXIT_BAD_IMAGES)
        if is_refusal(error):
            return _tell(str(error), EXIT_USER_MISTAKE)
        if not isinstance(error, OSError):
            raise
        # The system's own errors name cause and path only.
        full = error.errno == errno.ENOSPC
        remedy = "free space" if full else "check the path, its permissions and the free space"
        return _tell(f"{error}; {remedy}, then run the same command again", disk_full if full else EXIT_USER_MISTAKE)
    except KeyboardInterrupt:
        print("stopped before it was done; files that have their final name are whole", file=sys.stderr)
        return EXIT_INTERRUPTED


def _tell(message: str, code: int) -> int:
    # On one line, whatever line breaks the cause of it has.
    line = f"regatta: {' '.join(message.split())}"
    _leave_for_the_launcher(line)
    with _first_to_say(line) as first:
        if first:
            print(line, file=sys.stderr, flush=True)
    return code


def _leave_for_the_launcher(line: str) -> None:
    """Write the line where torchrun looks for a process's error, so that its report ends in the line."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    # The form that `torch.distributed.elastic`'s `record` writes; importing it would cost the seconds of PyTorch.
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))


@contextlib.contextmanager
def _first_to_say(line: str) -> Iterator[bool]:
    """Whether this process is the first of its run on this machine that has this to say; true without other processes.

    The same mistake ends every rank, and it may end them before they can talk to one another. So whoever says a line
    holds a socket of that name, which the system frees with the process: no file stays behind, and the next run speaks.
    """
    env = os.environ
    if max(int(env.get("WORLD_SIZE", 1)), int(env.get("SLURM_STEP_NUM_TASKS", 1))) == 1:
        yield True
        return
    # What the ranks of one machine share: the step under SLURM, which may wrap each in a shell, else the launcher.
    step = f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID')}" if "SLURM_JOB_ID" in env else f"{os.getppid()}"
    name = hashlib.sha256(f"{os.getuid()} {step} {line}".encode()).hexdigest()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as held:
        try:
            held.bind(f"\0regatta-{name}")
        except OSError as reason:
            # Any other reason than a taken name, such as a system without such sockets: better twice than never.
            yield reason.errno != errno.EADDRINUSE
            return
        yield True
        # Ranks that reach the mistake a little later still find the name taken.
        time.sleep(_HELD_S)
