"""One, two and four ranks compute the same run, up to the order of floating-point sums."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import TINY, last_wins, rows, run

METHODS = ["moco-v2", "regioncl-m"]
# Groups of four and small steps: BN over a few values per channel doubles a difference in the last bit at every step.
CALM = ("--arch", "resnet10-w16", "--global-batch", "16", "--bn.group-size", "4", "--optim.lr", "0.0004")


def losses(method: str, world_size: int, run_dir: Path, *more: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of ten steps."""
    argv = ["--method", method, "--run-dir", str(run_dir), "--max-steps", "10", *TINY, *CALM, "--log-every", "1", *more]
    log = run_dir.with_suffix(".log")
    assert set(run(last_wins(argv), world_size, log)) == {0}, log.read_text()[-2000:]
    found = rows(run_dir, "train")
    assert len(found) == 10
    return [row["loss"] for row in found], [row["grad_norm"] for row in found]


def assert_same_run(left: tuple[list[float], list[float]], right: tuple[list[float], list[float]]) -> None:
    """Equal up to the order of fp32 sums; tests of the methods in float64 hold the exact equality.

    Gradients of BN over a few values per channel magnify the last bits, but a gradient that was not averaged over
    ranks would be off by much more than the bound.
    """
    assert left[0] == pytest.approx(right[0], rel=1e-3)
    assert left[1] == pytest.approx(right[1], rel=5e-2)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_give_the_losses_of_one_process(tmp_path: Path, method: str) -> None:
    alone = losses(method, 1, tmp_path / "1")
    for world_size in (2, 4):
        assert_same_run(losses(method, world_size, tmp_path / str(world_size)), alone)


def test_gradients_are_averaged_without_deterministic_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default run, whose DDP is set up in another way."""
    monkeypatch.setattr("tests.test_ranks.TINY", [flag for flag in TINY if flag != "--deterministic"])
    alone = losses("regioncl-m", 1, tmp_path / "1")
    assert_same_run(losses("regioncl-m", 2, tmp_path / "2"), alone)


def test_pairs_over_the_global_batch_agree_too(tmp_path: Path) -> None:
    flags = ("--region.pairing-scope", "global", "--region.pairing", "randperm")
    alone = losses("regioncl-m", 1, tmp_path / "1", *flags)
    assert_same_run(losses("regioncl-m", 2, tmp_path / "2", *flags), alone)


def test_group_size_decides_and_not_the_machine(tmp_path: Path) -> None:
    """The equality above is not because nothing matters: other BN groups give other losses."""
    small, _ = losses("moco-v2", 1, tmp_path / "small")
    large, _ = losses("moco-v2", 1, tmp_path / "large", "--bn.group-size", "8")
    assert max(abs(a / b - 1) for a, b in zip(small, large, strict=True)) > 5e-3


def test_micro_batches_change_nothing_but_the_shuffle(tmp_path: Path) -> None:
    """Without key shuffling, groups, pairs and queue are the same for any micro-batch, on any number of ranks."""
    flags = ("--symmetric.enabled", "--no-shuffle-bn")
    alone = losses("regioncl-m", 1, tmp_path / "whole", *flags)
    assert_same_run(losses("regioncl-m", 1, tmp_path / "parts", *flags, "--micro-batch", "4"), alone)
    assert_same_run(losses("regioncl-m", 2, tmp_path / "ranks", *flags, "--micro-batch", "4"), alone)
