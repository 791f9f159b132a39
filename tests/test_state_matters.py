"""Negative controls for two pieces of a checkpoint that matter in special cases alone: best, non_finite.

The pieces that matter in every run have theirs in `tests/test_resume.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train.checkpoint
import train.inputs
import train.main
import train.pretrain
from tests.runs import TINY, comparable, last_wins, rows
from train.errors import EXIT_NON_FINITE
from train.state import Saved, TrainState

Forget = Callable[[TrainState], None]


def nothing(state: TrainState) -> None:
    """The positive control: with every piece in place the end is the same."""


@pytest.fixture
def forgetting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Forget], None]:
    """Lets the next run that goes on lose a piece of its state after it was restored."""
    original = train.checkpoint.restore

    def arrange(forget: Forget) -> None:
        def restoring(saved: Saved, state: TrainState, rank: int, world_size: int) -> None:
            original(saved, state, rank, world_size)
            forget(state)

        monkeypatch.setattr(train.checkpoint, "restore", restoring)

    return arrange


def argv(run_dir: Path, *more: str) -> list[str]:
    small = ("--arch", "resnet10-w16", "--image-size", "32")
    return last_wins(["--method", "moco-v2", "--run-dir", str(run_dir), *TINY, *small, *more])


def forget_best(state: TrainState) -> None:
    state.best = None


def run_with_falling_accuracy(run_dir: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose k-NN accuracy is highest after its first epoch of four steps."""
    monkeypatch.setattr(
        train.pretrain, "knn_figures", lambda method, data, runtime: {"top1": 0.9 - 0.01 * _steps_of(method), "k": 20}
    )
    data = ("--data", "32", "--holdout", "0", "--val-data", "16", "--knn-every", "1", "--epochs", "4")
    keep = ("--keep-checkpoints", "1", "--checkpoint-every", "100", "--max-steps", str(steps))
    assert train.main.main(argv(run_dir, *data, *keep)) == 0


def _steps_of(method: Any) -> int:
    counter = next(buffer for name, buffer in method.named_buffers() if name.endswith("num_batches_tracked"))
    return int(counter)


@pytest.mark.parametrize(("forget", "same"), [(nothing, True), (forget_best, False)])
def test_the_best_accuracy_so_far_decides_which_checkpoint_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetting: Callable[[Forget], None], forget: Forget, same: bool
) -> None:
    torch.set_num_threads(1)
    run_with_falling_accuracy(tmp_path / "whole", 15, monkeypatch)
    run_with_falling_accuracy(tmp_path / "parts", 6, monkeypatch)
    forgetting(forget)
    run_with_falling_accuracy(tmp_path / "parts", 15, monkeypatch)
    kept = [
        sorted(path.name for path in (tmp_path / name / "checkpoints").glob("step_*")) for name in ("whole", "parts")
    ]
    assert "step_00000004" in kept[0], "the best is kept beside the newest"
    best = [comparable(tmp_path / name)[1]["best"] for name in ("whole", "parts")]
    assert (kept[0] == kept[1], best[0] == best[1]) == (same, same)


def forget_bad_steps(state: TrainState) -> None:
    state.non_finite.zero_()


@pytest.mark.parametrize(("forget", "code"), [(nothing, EXIT_NON_FINITE), (forget_bad_steps, 0)])
def test_the_count_of_bad_steps_in_a_row_outlasts_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetting: Callable[[Forget], None], forget: Forget, code: int
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("train.loop.PATIENCE", 4)
    build = train.inputs.InputBuilder.build

    def poisoned(self: Any, batch: Any, step: int) -> Any:
        inputs = build(self, batch, step)
        if 3 <= step < 7:
            inputs[0].view1[0, 0, 0, 0] = torch.nan
        return inputs

    monkeypatch.setattr(train.inputs.InputBuilder, "build", poisoned)
    assert train.main.main(argv(tmp_path / "run", "--max-steps", "5")) == 0
    forgetting(forget)
    assert train.main.main(argv(tmp_path / "run", "--max-steps", "9")) == code
    assert len(rows(tmp_path / "run", "skipped_step")) == 4
