"""`--micro-batch auto`: by the estimate, then by a trial; recorded, kept on resume, and the same as by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import TINY, last_wins
from train import micro_batch
from train.errors import UserMistake
from train.main import main
from train.micro_batch import bytes_of, micro_batches, settle_micro_batch, with_micro_batch
from train.resolve import resolve
from train.runtime import Runtime

CPU = torch.device("cpu")
ALONE = Runtime(0, 1, CPU, torch.float32, False)
# Few weights and many images: with more weights than activations, two passes, which need room for gradients beside the
# second one's activations, take more than one does.
SMALL = (
    "--epochs 1 --data 48 --holdout 0 --arch resnet10-w16 --image-size 32 --global-batch 16 --method moco-v2".split()
)
FLAGS = last_wins([*TINY, *SMALL])


def configured(*more: str):
    return resolve(last_wins([*FLAGS, *more]))


def free(monkeypatch: pytest.MonkeyPatch, size: int, *more: str) -> None:
    """As much memory is free as micro-batches of this size need."""
    needed = bytes_of(with_micro_batch(configured(*more), 0), 1, size, CPU, torch.float32)
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device, sharing: needed)


def test_candidates_keep_groups_whole() -> None:
    config = configured("--global-batch", "24", "--bn.group-size", "4", "--queue-size", "64")
    assert list(micro_batches(config, 1, 24)) == [24, 12, 8, 4]
    assert list(micro_batches(config, 2, 24)) == [12, 4]
    assert list(micro_batches(config, 1, 11)) == [8, 4]


@pytest.mark.parametrize(("size", "recorded"), [(16, 0), (4, 4)])
def test_the_largest_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch, size: int, recorded: int) -> None:
    free(monkeypatch, size)
    settled, line = settle_micro_batch(configured("--micro-batch", "auto"), ALONE, None)
    assert settled.run.micro_batch == recorded
    assert f"micro-batch {size} of 16 images a device" in line and "estimated" in line


def test_the_smallest_free_memory_of_all_ranks_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 4)
    ranks = replace(ALONE, world_size=2)
    monkeypatch.setattr(Runtime, "gather_objects", lambda self, value: [value, 2 if isinstance(value, int) else value])
    settled, _ = settle_micro_batch(configured("--micro-batch", "auto"), ranks, None)
    assert settled.run.micro_batch == 2


def test_none_that_fits_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device, sharing: 1000)
    with pytest.raises(UserMistake, match="the least, 2 images, needs more than the 0.0 MiB.*--image-size"):
        settle_micro_batch(configured("--micro-batch", "auto"), ALONE, None)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_trial_that_runs_out_of_memory_leads_to_the_next(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    """The CPU stands in for a GPU here; what a GPU's allocator or library raises is raised in its place."""
    free(monkeypatch, 16)
    monkeypatch.setattr(micro_batch, "TRIED", {"cpu"})
    taken, step = [], micro_batch._take_step

    def limited(config, runtime):
        taken.append(config.run.micro_batch)
        if config.run.micro_batch > 2:
            raise error
        step(config, runtime)

    monkeypatch.setattr(micro_batch, "_take_step", limited)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    settled, line = settle_micro_batch(configured("--micro-batch", "auto"), ALONE, None)
    assert taken == [16, 8, 4, 2] and settled.run.micro_batch == 2 and "tried" in line
    assert torch.equal(torch.rand(3), wanted), "the trial has drawn from the run's generator"


def test_another_fault_of_the_trial_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 16)
    monkeypatch.setattr(micro_batch, "TRIED", {"cpu"})

    def broken(config, runtime):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(micro_batch, "_take_step", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        settle_micro_batch(configured("--micro-batch", "auto"), ALONE, None)


def test_a_run_is_the_same_as_with_the_number_by_hand_and_keeps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free(monkeypatch, 4)

    def train(name: str, *more: str) -> Path:
        assert main(last_wins([*FLAGS, "--run-dir", str(tmp_path / name), *more])) == 0
        return tmp_path / name

    train("auto", "--micro-batch", "auto", "--max-steps", "2")
    assert "micro-batch 4 of 16 images a device" in capsys.readouterr().out
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device, sharing: pytest.fail("looked for again on resume"))
    automatic, by_hand = train("auto", "--micro-batch", "auto"), train("hand", "--micro-batch", "4")
    assert "micro-batch 4: as recorded" in capsys.readouterr().out
    assert json.loads((automatic / "config.json").read_text())["run"]["micro_batch"] == 4
    ours, theirs = (load_file(run / "backbone.safetensors") for run in (automatic, by_hand))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_what_does_not_depend_on_micro_batches_does_not_depend_on_auto(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without key shuffling, groups, pairs and queue are the same for any micro-batch, and so are the losses."""

    def losses(size: int) -> list[float]:
        more = ["--symmetric.enabled", "--no-shuffle-bn", "--log-every", "1"]
        free(monkeypatch, size, *more)
        assert main(last_wins([*FLAGS, "--micro-batch", "auto", *more, "--run-dir", str(tmp_path / str(size))])) == 0
        rows = [json.loads(line) for line in (tmp_path / str(size) / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if row["kind"] == "train"]

    assert losses(2) == pytest.approx(losses(16), rel=1e-4)


def test_elsewhere_a_number_is_asked_for() -> None:
    from train.inputs import check_batch

    with pytest.raises(UserMistake, match="--micro-batch auto is for train/main.py"):
        check_batch(configured("--micro-batch", "auto"), 1)
    with pytest.raises(UserMistake, match="--micro-batch many: give a whole number or auto"):
        configured("--micro-batch", "many")
    with pytest.raises(UserMistake, match="--micro-batch -1 is negative"):
        configured("--micro-batch", "-1")
