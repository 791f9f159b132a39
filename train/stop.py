"""Stopping at a signal: training saves after its step, an evaluation ends within seconds, even in the midst of one.

Nothing here imports PyTorch: a signal may come while that is imported.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from pipeline.fetch import stop_waiting

from .errors import EXIT_INTERRUPTED, EXIT_REQUEUE, Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals after which a run saves and ends: of schedulers, of a keyboard, of a terminal or connection that closes."""
GRACE_S = 8.0
"""Seconds that an evaluation has after a signal to end by itself; schedulers leave 30 or more."""
_POLL_S = 0.1
ECHO_S = 2.0
"""Seconds in which one request may arrive again under a launcher: from the scheduler or terminal, and from torchrun."""


class SignalWatch:
    """Remembers that the process was asked to stop; a second request stops it at once.

    A scheduler or a terminal signals every process of a job, and torchrun passes on to its processes what it was sent
    itself. So one request reaches a process twice, and the second must not end it before it has saved.

    Args:
        hears: whether it is told signals. Outside the main thread it never is, since Python calls handlers there only.

    Attributes:
        asked: name of the signal, empty before.
    """

    def __init__(self, hears: bool = True) -> None:
        self.asked: str = ""
        self._asked_at = 0.0
        launched = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_JOB_ID" in os.environ
        self._echo_s = ECHO_S if launched else 0.0
        if hears and _in_main_thread():
            self._hear()

    def _hear(self) -> None:
        # This process may have been asked to stop an earlier run.
        stop_waiting(False)
        for number in STOP_SIGNALS:
            # Started under nohup: a terminal that closes must not stop the run.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._asked_at < self._echo_s:
            return
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            # The default action, not `exit`: the parent then sees which signal ended the process.
            os.kill(os.getpid(), number)
        # A wait for a busy server must not outlast the time that a scheduler leaves for saving.
        stop_waiting()
        self.asked, self._asked_at = signal.Signals(number).name, time.monotonic()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Within the block a watch may take over signals; afterwards they act as before it.

    For work inside a caller's process, such as a notebook: a Ctrl-C after it must interrupt the caller's own code. A
    command does not want this, because the echo of a signal would then end the process before its exit code.
    """
    if not _in_main_thread():
        yield  # no watch can have taken signals over from here
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        # That this piece of work was asked to stop says nothing about the caller's next one.
        stop_waiting(False)
        for number, handler in before.items():
            # None: set by a program that embeds Python, and out of Python's reach; no watch could name it again.
            if handler is not None:
                signal.signal(number, handler)


class EvaluationWatch(SignalWatch):
    """Ends an evaluation at a signal, with the exit code that says whether the same command goes on.

    Attributes:
        saved: where the same command goes on, such as "step 40"; empty where it starts over.
        writing: whether a checkpoint is being written, which is not to be cut short.
    """

    def __init__(self, hears: bool = True) -> None:
        super().__init__(hears)
        self.saved, self.writing = "", False

    @property
    def code(self) -> int:
        """Exit code of an evaluation that is stopped now."""
        return EXIT_REQUEUE if self.saved else EXIT_INTERRUPTED

    def told(self, signal_name: str) -> str:
        """What a stopped evaluation says."""
        rest = f"goes on from {self.saved}" if self.saved else "starts over: nothing was saved yet"
        return f"stopped by {signal_name}; the same command {rest}"

    def check(self) -> None:
        """Called between two pieces of work.

        Raises:
            Stopped: a signal has asked for it.
        """
        if self.asked:
            raise Stopped(self.told(self.asked), self.code)

    @contextlib.contextmanager
    def whole_writing(self) -> Iterator[None]:
        """Within the block the process is not ended however long it takes."""
        self.writing = True
        try:
            yield
        finally:
            self.writing = False


_current: EvaluationWatch | None = None


@contextlib.contextmanager
def watched(leave: bool = False) -> Iterator[EvaluationWatch]:
    """The watch of this evaluation; an inner block has that of the outer one. Afterwards signals act as before.

    Args:
        leave: end the process where it has not ended by itself `GRACE_S` after a signal. For commands: a caller's own
            process is not ours to end.
    """
    global _current
    if _current is not None:
        yield _current
        return
    if not _in_main_thread():
        # Not kept as the current one: the main thread may run an evaluation of its own at the same time.
        yield EvaluationWatch()
        return
    with handlers_kept():
        _current = EvaluationWatch()
        try:
            with _leaving_in_time(_current) if leave else contextlib.nullcontext():
                yield _current
        finally:
            _current = None


@contextlib.contextmanager
def _leaving_in_time(watch: EvaluationWatch) -> Iterator[None]:
    """Within the block a thread ends the process `GRACE_S` after a signal.

    Python's own handlers run between two operations of the main thread, and a backward pass on a CPU may take minutes.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    # Written by the handler in C, at once, whatever the main thread is at.
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    thread = threading.Thread(target=_leave_in_time, args=(watch, heard), name="regatta-stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(told)  # the thread reads the end, and ends
        thread.join(1.0)
        os.close(heard)


def _leave_in_time(watch: EvaluationWatch, heard: int) -> None:
    while number := os.read(heard, 1):
        if number[0] in STOP_SIGNALS:
            break
    else:
        return
    asked_at = time.monotonic()
    while watch.writing or time.monotonic() - asked_at < GRACE_S:
        if not _open(heard):
            return  # the main thread has come to its end
        time.sleep(_POLL_S)
    print(f"regatta: {watch.told(signal.Signals(number[0]).name)}", file=sys.stderr, flush=True)
    # Past handlers and destructors, which would wait for the main thread. Files get their names when they are whole.
    os._exit(watch.code)


def _open(heard: int) -> bool:
    """Whether the other end of a pipe is still open."""
    return not select.select([heard], [], [], 0)[0] or bool(os.read(heard, 1))
