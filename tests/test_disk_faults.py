"""The short form of failing disks: a packer, an export and an evaluation; and what a failing disk may not end."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import train.retry
from pipeline import atomic
from tests.faults import disks
from tests.faults.jobs import make_inputs
from train import evaluate
from train.eval import session
from train.record.board import Board


@pytest.mark.slow
def test_a_failing_disk_ends_a_command_right_or_in_one_line() -> None:
    chosen = [job for job in disks.chosen_jobs() if job.name in ("pack", "export timm")]
    assert disks.attack(chosen, 4, 0).total() == 4


@pytest.mark.slow
def test_a_failing_disk_under_every_command() -> None:
    assert disks.attack(disks.chosen_jobs(), 27, 1).total() == 27


def test_curves_that_cannot_be_written_end_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    board = Board(tmp_path, 3)
    board.add("train/loss", 1.0, 4)
    board.close()
    said = capfd.readouterr().err
    assert said.startswith("regatta: TensorBoard: ") and said.count("\n") == 1 and "go on" in said


def test_the_board_is_left_out_after_its_thread_has_died(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    board = Board(tmp_path, None)

    def dead(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    writer = board._writer
    writer.add_scalar = dead
    for step in range(3):
        board.add("train/loss", 1.0, step)
    board.close()
    writer.close()
    assert capfd.readouterr().err.count("Stale file handle; its curves end here") == 1


@pytest.mark.parametrize("lasting", [False, True])
def test_a_result_is_written_again_or_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], lasting: bool
) -> None:
    monkeypatch.setattr(train.retry, "PAUSES_S", (0.0, 0.0))
    make_inputs(tmp_path)
    failures = [99 if lasting else 1]

    def failing(path: Path, data: bytes) -> None:
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        atomic.write_atomically(path, data)

    monkeypatch.setattr(session, "write_atomically", failing)
    arguments = "knn --loader synthetic --data 32 --val-data 16 --image-size 32 --device cpu --k 5".split()
    arguments += ["--checkpoint", str(tmp_path / "r18.safetensors"), "--output", str(tmp_path / "out.json")]
    assert evaluate.main(arguments) == (2 if lasting else 0)
    said = capfd.readouterr()
    assert "trying again" in said.err and (tmp_path / "out.json").exists() != lasting
    assert ('"top1":' in said.out) == lasting and ("the result is printed above" in said.err) == lasting


def test_a_place_that_cannot_be_written_is_told_at_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_inputs(tmp_path)
    arguments = "knn --loader synthetic --data 32 --val-data 16 --image-size 32 --device cpu --k 5".split()
    file = tmp_path / "r18.safetensors"
    assert evaluate.main([*arguments, "--checkpoint", str(file), "--output", str(file / "out.json")]) == 2
    said = capfd.readouterr()
    assert "choose another place with --output" in said.err and "weighted top-1" not in said.out
