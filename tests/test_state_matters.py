"""Negative controls: a run that goes on without any one piece of its checkpoint ends differently.

Here are the networks and queues of methods of each family, and three pieces that matter in special cases alone: best,
non_finite, scaler. Pieces that every run of RegionCL-M has are lost in `tests/test_resume.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

import train.checkpoint
import train.inputs
import train.main
import train.pretrain
from tests.method_cases import make_inputs
from tests.runs import TINY, comparable, last_wins, rows
from tests.test_loop import job_of
from train.errors import EXIT_NON_FINITE
from train.loop import Job, take_step
from train.state import DOCUMENT_FILE, MODEL_FILE, OPTIMIZER_FILE, Saved, TrainState, restore, to_files

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
    # In place of the features their network, by whose steps the accuracy falls.
    monkeypatch.setattr(train.pretrain, "labelled_features", lambda method, data, runtime: method)
    monkeypatch.setattr(
        train.pretrain, "knn_figures", lambda method, runtime: {"top1": 0.9 - 0.01 * _steps_of(method), "k": 20}
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

    def poisoned(self: Any, batch: Any, step: int, epoch: int) -> Any:
        inputs = build(self, batch, step, epoch)
        if 3 <= step < 7:
            inputs[0].view1[0, 0, 0, 0] = torch.nan
        return inputs

    monkeypatch.setattr(train.inputs.InputBuilder, "build", poisoned)
    assert train.main.main(argv(tmp_path / "run", "--max-steps", "5")) == 0
    forgetting(forget)
    assert train.main.main(argv(tmp_path / "run", "--max-steps", "9")) == code
    assert len(rows(tmp_path / "run", "skipped_step")) == 4


def forget_scale(state: TrainState) -> None:
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)


def scaled_run(until: int, saved: dict[str, bytes] | None = None, forget: Forget = nothing) -> dict[str, bytes]:
    """Files of a run with a loss scale that begins far too high, so that its first steps overflow and halve it."""
    job, state = job_of("moco-v2", "cuda")
    # Gradients that are large enough to overflow at the largest scale that fp32 can hold.
    state.method.config = replace(state.method.config, temperature=0.002)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    return taken_on(job, state, until, saved, forget)


def taken_on(
    job: Job, state: TrainState, until: int, saved: dict[str, bytes] | None, forget: Forget
) -> dict[str, bytes]:
    """Files of a run after so many steps, from its beginning or from the files of an earlier step."""
    if saved is not None:
        files = load(saved[MODEL_FILE]), load(saved[OPTIMIZER_FILE])
        restore(Saved(json.loads(saved[DOCUMENT_FILE]), *files), state, 0, 1)
        forget(state)
    while state.step < until:
        take_step(job, state, state.step, [make_inputs(state.method, state.step)])
        state.step += 1
    return to_files(state, [state.rank_part()], {})


@pytest.mark.parametrize(("forget", "same"), [(nothing, True), (forget_scale, False)])
def test_a_lost_loss_scale_changes_the_weights(forget: Forget, same: bool) -> None:
    torch.set_num_threads(1)
    whole = scaled_run(12)
    assert json.loads(whole[DOCUMENT_FILE])["scaler"]["scale"] < 2.0**127, "the scale must have come down"
    parts = scaled_run(12, scaled_run(8), forget)
    weights = [load(files[MODEL_FILE]) for files in (whole, parts)]
    # A step that overflows is seen by the scaler and by the loop, and still must not be taken.
    assert all(torch.isfinite(value).all() for value in weights[0].values())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) == same
    assert (whole[DOCUMENT_FILE] == parts[DOCUMENT_FILE]) == same


# ---------------------------------------------------------------------------------------------------------------------
# Networks, queues and the optimizer


def _after(steps: int, name: str, saved: dict[str, bytes] | None = None, forget: Forget = nothing) -> dict[str, bytes]:
    return taken_on(*job_of(name, "cpu"), steps, saved, forget)


def forget_momentum(state: TrainState) -> None:
    # All of them: at the small rates of a warm-up a single one's part may vanish in a weight's rounding.
    for values in state.optimizer.state.values():
        values["momentum_buffer"].zero_()


def forget_pointers(state: TrainState) -> None:
    state.method.load_host_state(dict.fromkeys(state.method.host_state(), 0))


@pytest.mark.parametrize(
    "name", ["densecl", "regioncl-moby", "byol", "care", "lewel-m", "moco-v3", "simsiam", "simclr"]
)
def test_every_network_and_queue_of_a_checkpoint_matters(name: str) -> None:
    torch.set_num_threads(1)
    saved = _after(2, name)
    whole = _after(3, name, saved)
    assert whole == _after(3, name), "with every piece the end is the same"
    _, fresh = job_of(name, "cpu")
    pieces: dict[str, Forget] = {"momentum": forget_momentum}
    if fresh.method.host_state():
        pieces["write positions"] = forget_pointers
    for child, _ in fresh.method.named_children():
        if fresh.method.get_submodule(child).state_dict():
            pieces[child] = _left_as_it_began(child, fresh)
    unseen = [piece for piece, forget in pieces.items() if _after(3, name, saved, forget) == whole]
    assert not unseen and len(pieces) >= 3, unseen


def _left_as_it_began(child: str, fresh: TrainState) -> Forget:
    def forget(state: TrainState) -> None:
        state.method.get_submodule(child).load_state_dict(fresh.method.get_submodule(child).state_dict())

    return forget
