"""Which errors become one line and an exit code, and which keep their traceback."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest
import torch

from models.key_queue import KeyQueue
from pipeline.sampling import hold_out
from train.errors import (
    EXIT_BAD_IMAGES,
    EXIT_CHECKPOINT,
    EXIT_INTERRUPTED,
    EXIT_USER_MISTAKE,
    RunEnd,
    UserMistake,
    run_to_exit_code,
)


def refuse(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


def full_disk() -> int:
    raise OSError(errno.ENOSPC, "No space left on device", "weights")


@pytest.mark.parametrize(
    ("main", "code", "words"),
    [
        (lambda: int(bool(KeyQueue(0, 4))), EXIT_USER_MISTAKE, "--queue-size 0 must be at least 1"),
        (lambda: len(hold_out(3, 0, 9)), EXIT_USER_MISTAKE, "cannot hold out 9"),
        (refuse(UserMistake("one\n  line")), EXIT_USER_MISTAKE, "regatta: one line"),
        (refuse(RunEnd("bad", EXIT_BAD_IMAGES)), EXIT_BAD_IMAGES, "bad"),
        (lambda: len(open("/nowhere/photos").read()), EXIT_USER_MISTAKE, "check the path, its permissions"),
        (refuse(KeyboardInterrupt()), EXIT_INTERRUPTED, "stopped before it was done"),
        (full_disk, EXIT_USER_MISTAKE, "free space"),
    ],
)
def test_what_the_user_can_mend_is_one_line(capfd, main: Callable[[], int], code: int, words: str) -> None:
    assert run_to_exit_code(main) == code
    said = capfd.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "main",
    [
        lambda: int("x"),
        lambda: len(np.zeros(3) + np.zeros(4)),
        lambda: len(torch.optim.SGD([torch.zeros(1)], lr=-1.0).state),
    ],
)
def test_a_fault_of_the_program_keeps_its_traceback(main: Callable[[], int]) -> None:
    with pytest.raises(ValueError, match="."):
        run_to_exit_code(main)


def test_a_full_disk_ends_training_as_a_failed_checkpoint(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_to_exit_code(full_disk, disk_full=EXIT_CHECKPOINT) == EXIT_CHECKPOINT
    assert "free space" in capfd.readouterr().err


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGATTA_TRACEBACK", "1")
    with pytest.raises(UserMistake):
        run_to_exit_code(refuse(UserMistake("mistake")))
