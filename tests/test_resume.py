"""A run that was stopped anywhere and started again is byte-identical to one that was not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import train.checkpoint
import train.main
from tests.runs import TINY, comparable, finish, last_wins, rows, run, start
from train.errors import EXIT_CHECKPOINT, EXIT_REQUEUE, EXIT_USER_MISTAKE


def argv(run_dir: Path, method: str = "regioncl-m", steps: int = 10, *more: str) -> list[str]:
    return last_wins(["--method", method, "--run-dir", str(run_dir), "--max-steps", str(steps), *TINY, *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run(argv(run_dir)) == [0]
    return run_dir


def assert_same(left: Path, right: Path) -> None:
    kept, state, tensors = comparable(left)
    other_kept, other_state, other_tensors = comparable(right)
    assert kept == other_kept
    assert state == other_state
    for name, data in tensors.items():
        assert data == other_tensors[name], f"{name} differs"


def kill_and_restart(run_dir: Path, kills: int, world_size: int, seed: int, span_s: float) -> None:
    """Kill all ranks at random moments, `kills` times, then let the run end."""
    draw = random.Random(seed)
    for _ in range(kills):
        processes = start(argv(run_dir), world_size)
        time.sleep(draw.uniform(0.1, span_s))
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        finish(processes)
    assert set(run(argv(run_dir), world_size)) == {0}


def test_killed_runs_end_byte_identical(whole: Path, tmp_path: Path) -> None:
    kill_and_restart(tmp_path / "killed", kills=4, world_size=1, seed=1, span_s=3.0)
    assert_same(whole, tmp_path / "killed")


@pytest.mark.slow
def test_twenty_kills_end_byte_identical(whole: Path, tmp_path: Path) -> None:
    kill_and_restart(tmp_path / "killed", kills=20, world_size=1, seed=2, span_s=3.0)
    assert_same(whole, tmp_path / "killed")


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_resume_byte_identical(tmp_path: Path, world_size: int) -> None:
    assert set(run(argv(tmp_path / "whole"), world_size)) == {0}
    # Stopping by --max-steps between two checkpoint steps makes the continuation start from a step of its own.
    assert set(run(argv(tmp_path / "parts", steps=4), world_size)) == {0}
    cut_back(tmp_path / "parts")
    kill_and_restart(tmp_path / "parts", kills=1, world_size=world_size, seed=3, span_s=4.0)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def cut_back(run_dir: Path) -> None:
    """Drop the checkpoint that the end of a shorter run wrote, as a kill just before it would have."""
    shutil.rmtree(run_dir / "checkpoints" / "step_00000004")


def test_sigterm_saves_and_asks_to_be_requeued(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "stopped"
    processes = start(argv(run_dir))
    wait_for_row(run_dir, "train")
    os.kill(processes[0].pid, signal.SIGTERM)
    assert finish(processes) == [EXIT_REQUEUE]
    assert run(argv(run_dir)) == [0]
    assert_same(whole, run_dir)


def wait_for_row(run_dir: Path, kind: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and rows(run_dir, kind):
            return
        time.sleep(0.02)
    raise AssertionError(f"no row of kind {kind} within a minute")


def test_damaged_newest_checkpoint_is_passed_over(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "damaged"
    assert run(argv(run_dir, steps=7)) == [0]
    newest = run_dir / "checkpoints" / "step_00000007" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    assert run(argv(run_dir)) == [0]
    assert [row["step"] for row in rows(run_dir, "resume")] == [6]
    assert_same(whole, run_dir)


def test_a_kill_after_the_last_checkpoint_costs_no_export(whole: Path, tmp_path: Path) -> None:
    """The state of the last step is then saved, and the backbone file is still that of the checkpoint before."""
    run_dir = tmp_path / "late"
    shutil.copytree(whole, run_dir)
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True) if '"end"' not in line))
    (run_dir / "backbone.safetensors").write_bytes(b"of an earlier step")
    assert run(argv(run_dir)) == [0]
    assert_same(whole, run_dir)
    modified = (run_dir / "backbone.safetensors").stat().st_mtime_ns
    assert run(argv(run_dir)) == [0]
    assert (run_dir / "backbone.safetensors").stat().st_mtime_ns == modified, "a run that has ended is left alone"


def test_starting_over_keeps_its_own_checkpoints(whole: Path, tmp_path: Path) -> None:
    """Later checkpoints of the run that was given up must not crowd out the new ones."""
    run_dir = tmp_path / "over"
    shutil.copytree(whole, run_dir)
    assert run([*argv(run_dir, steps=3), "--resume", "never"]) == [0]
    assert [folder.name for folder in (run_dir / "checkpoints").glob("step_*")] == ["step_00000003"]
    assert run(argv(run_dir)) == [0]
    assert [row["step"] for row in rows(run_dir, "resume")] == [3]


def test_what_no_flag_says_goes_on_as_recorded(whole: Path, tmp_path: Path) -> None:
    """As after an update that has other defaults: here --holdout and --optim.lr are given at the start only."""
    run_dir = tmp_path / "recorded"
    assert run(argv(run_dir, steps=4)) == [0]
    cut_back(run_dir)
    line = " ".join(argv(run_dir)).replace(" --holdout 8", "").replace(" --optim.lr 0.05", "")
    assert run(line.split(), log=tmp_path / "log") == [0]
    assert "goes on as recorded" in (tmp_path / "log").read_text()
    assert_same(whole, run_dir)


def forget_momentum_encoder(state) -> None:
    state.method.synchronise_momentum()


def forget_queue(state) -> None:
    state.method.queue.rows.copy_(torch.nn.functional.normalize(torch.randn_like(state.method.queue.rows), dim=1))


def forget_queue_pointer(state) -> None:
    state.method.queue.pointer = 0


def forget_optimizer(state) -> None:
    state.optimizer.state.clear()


def forget_running_statistics(state) -> None:
    for name, buffer in state.method.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(1.0)


def forget_step(state) -> None:
    state.step -= 1


def forget_sums(state) -> None:
    state.sums, state.sum_steps = {}, 0


def forget_length_of_metrics(state) -> None:
    state.metrics_bytes = 0


@pytest.mark.parametrize(
    "forget",
    [
        forget_momentum_encoder,
        forget_queue,
        forget_queue_pointer,
        forget_optimizer,
        forget_running_statistics,
        forget_step,
        forget_sums,
        forget_length_of_metrics,
    ],
)
def test_every_piece_of_state_matters(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget) -> None:
    """Without any one piece of the checkpoint the continued run differs, so the tests above would notice."""
    torch.set_num_threads(1)
    run_dir = tmp_path / "forgetful"
    assert run(argv(run_dir, steps=5)) == [0]
    original = train.checkpoint.restore

    def restore(saved, state, rank, world_size):
        original(saved, state, rank, world_size)
        forget(state)

    monkeypatch.setattr(train.checkpoint, "restore", restore)
    assert train.main.main(argv(run_dir)) == 0
    left, right = comparable(whole), comparable(run_dir)
    assert left != right


def test_another_method_in_the_run_folder_is_refused(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train.main.main(argv(whole, method="moco-v2")) == EXIT_USER_MISTAKE
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "method: regioncl-m -> moco-v2" in line and "--resume never" in line


def test_unwritable_checkpoint_ends_with_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.retry.PAUSES_S", (0.0,))
    monkeypatch.setattr("train.checkpoint.replacing", full_disk)
    assert train.main.main(argv(tmp_path / "full", steps=3)) == EXIT_CHECKPOINT
    assert not list((tmp_path / "full" / "checkpoints").glob("*step_*"))


def test_a_checkpoint_that_fails_on_the_first_rank_ends_them_all(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where a folder is needed")
    assert run(argv(tmp_path / "run"), world_size=2) == [EXIT_CHECKPOINT, EXIT_CHECKPOINT]


def test_a_run_that_starts_over_leaves_no_curves_of_the_one_before(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "again"
    shutil.copytree(whole, run_dir)
    before = {path.name for path in (run_dir / "tensorboard").iterdir()}
    assert before
    assert run(argv(run_dir, "regioncl-m", 2, "--resume", "never")) == [0]
    assert not before & {path.name for path in (run_dir / "tensorboard").iterdir()}
