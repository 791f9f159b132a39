"""One, two and four ranks compute the same run, up to the order of floating-point sums."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import TINY, rows, run

METHODS = ["moco-v2", "regioncl-m"]
# Groups of four and small steps: BN over a few values per channel doubles a difference in the last bit at every step.
CALM = ("--global-batch", "16", "--bn.group-size", "4", "--optim.lr", "0.0004")


def losses(method: str, world_size: int, run_dir: Path, *more: str) -> list[float]:
    argv = ["--method", method, "--run-dir", str(run_dir), "--max-steps", "10", *TINY, *CALM, "--log-every", "1", *more]
    log = run_dir.with_suffix(".log")
    assert set(run(argv, world_size, log)) == {0}, log.read_text()[-2000:]
    # The gradient's norm shows at once whether gradients are averaged over ranks as they should be.
    return [figure for row in rows(run_dir, "train") for figure in (row["loss"], row["grad_norm"] / 10)]


@pytest.mark.parametrize("method", METHODS)
def test_ranks_give_the_losses_of_one_process(tmp_path: Path, method: str) -> None:
    alone = losses(method, 1, tmp_path / "1")
    assert len(alone) == 20
    for world_size in (2, 4):
        together = losses(method, world_size, tmp_path / str(world_size))
        # Sums in another order differ in the last bits, which ten steps of training amplify.
        assert together == pytest.approx(alone, rel=5e-4), world_size


def test_pairs_over_the_global_batch_agree_too(tmp_path: Path) -> None:
    flags = ("--region.pairing-scope", "global", "--region.pairing", "randperm")
    alone = losses("regioncl-m", 1, tmp_path / "1", *flags)
    assert losses("regioncl-m", 2, tmp_path / "2", *flags) == pytest.approx(alone, rel=5e-4)


def test_group_size_decides_and_not_the_machine(tmp_path: Path) -> None:
    """The equality above is not because nothing matters: other BN groups give other losses."""
    small = losses("moco-v2", 1, tmp_path / "small")
    large = losses("moco-v2", 1, tmp_path / "large", "--bn.group-size", "8")
    assert small[:6] != pytest.approx(large[:6], rel=1e-3)


def test_micro_batches_change_nothing_but_the_shuffle(tmp_path: Path) -> None:
    """Without key shuffling, groups, pairs and queue are the same for any micro-batch, on any number of ranks."""
    flags = ("--symmetric.enabled", "--no-shuffle-bn")
    alone = losses("regioncl-m", 1, tmp_path / "whole", *flags)
    assert losses("regioncl-m", 1, tmp_path / "parts", *flags, "--micro-batch", "4") == pytest.approx(alone, rel=5e-4)
    assert losses("regioncl-m", 2, tmp_path / "ranks", *flags, "--micro-batch", "4") == pytest.approx(alone, rel=5e-4)
