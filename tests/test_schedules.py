"""Schedules against numbers of released logs and formulas written out."""

from __future__ import annotations

import math

import pytest

from train.config import EmaConfig, OptimConfig, ScheduleConfig
from train.schedules import batch_scale, ema_at, lr_at, scaled_lr

FIXED = OptimConfig(lr=1.0, lr_reference_batch=0)


def peak(lr: float) -> OptimConfig:
    return OptimConfig(lr=lr, lr_reference_batch=0)


def test_linear_scaling_with_the_batch() -> None:
    assert scaled_lr(OptimConfig(lr=0.0375, lr_reference_batch=256), 1024) == pytest.approx(0.15)
    assert scaled_lr(OptimConfig(lr=1e-3, lr_reference_batch=512), 1024) == pytest.approx(2e-3)
    assert scaled_lr(OptimConfig(lr=0.3, lr_reference_batch=0), 8192) == 0.3
    assert batch_scale(OptimConfig(lr_reference_batch=256), 64) == 0.25


def test_cosine_by_epoch_matches_the_regioncl_m_log() -> None:
    """The log of the 200th epoch shows 9.253e-06 for base 0.15."""
    config = ScheduleConfig(decay="cosine-epoch")
    optim = OptimConfig(lr=0.0375, lr_reference_batch=256)
    assert lr_at(199 * 1251 + 700, 1251, 200, config, optim, 1024) == pytest.approx(9.253e-06, rel=1e-4)
    for epoch in (0, 1, 57, 100, 199):
        value = 0.15 * 0.5 * (1 + math.cos(math.pi * epoch / 200))
        for within in (0, 1250):
            assert lr_at(epoch * 1251 + within, 1251, 200, config, optim, 1024) == pytest.approx(value)


def test_lewel_matches_its_log() -> None:
    """The 100-epoch log shows 2.11257 in epoch 50 for peak 3.6."""
    config = ScheduleConfig(decay="cosine-epoch", warmup_epochs=10, warmup_offset=1)
    optim = OptimConfig(lr=0.9, lr_reference_batch=256)
    assert lr_at(50 * 1251 + 3, 1251, 100, config, optim, 1024) == pytest.approx(2.11257, abs=5e-6)
    assert lr_at(0, 1251, 100, config, optim, 1024) == pytest.approx(3.6 / 12510)
    assert lr_at(12509, 1251, 100, config, optim, 1024) == pytest.approx(3.6)
    assert lr_at(12510, 1251, 100, config, optim, 1024) == pytest.approx(3.6)
    assert lr_at(99 * 1251, 1251, 100, config, optim, 1024) == pytest.approx(
        3.6 * 0.5 * (1 + math.cos(math.pi * 89 / 90))
    )


def test_care_starts_at_one_millionth() -> None:
    config = ScheduleConfig(decay="cosine-step", warmup_epochs=10, warmup_start=1e-6)
    optim = OptimConfig(lr=0.05, lr_reference_batch=256)
    steps, epochs = 1251, 100
    warmup, total = 10 * steps, epochs * steps
    assert lr_at(0, steps, epochs, config, optim, 1024) == 1e-6
    for t in (1, 77, warmup, warmup + 1, (warmup + total) // 2, total - 1):
        expected = (
            (0.2 - 1e-6) * t / warmup + 1e-6
            if t <= warmup
            else 0.2 * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup)))
        )
        assert lr_at(t, steps, epochs, config, optim, 1024) == pytest.approx(expected, rel=1e-12)


def test_moco_v3_by_fractional_epoch() -> None:
    config = ScheduleConfig(decay="cosine-step", warmup_epochs=10)
    for epoch, i in ((0, 0), (3, 40), (10, 0), (55, 17), (99, 311)):
        now = epoch + i / 312
        expected = 9.6 * now / 10 if now < 10 else 9.6 * 0.5 * (1 + math.cos(math.pi * (now - 10) / 90))
        assert lr_at(epoch * 312 + i, 312, 100, config, peak(9.6), 4096) == pytest.approx(expected, rel=1e-12)


def test_moby_scales_its_ends_and_starts_its_cosine_with_the_run() -> None:
    config = ScheduleConfig(
        decay="cosine-step", final=5e-6, cosine_origin="run-start", warmup_epochs=5, warmup_start=5e-7, scale_ends=True
    )
    optim = OptimConfig(lr=1e-3, lr_reference_batch=512)
    steps, epochs, factor = 100, 300, 4096 / 512
    assert lr_at(0, steps, epochs, config, optim, 4096) == pytest.approx(5e-7 * factor)
    assert lr_at(250, steps, epochs, config, optim, 4096) == pytest.approx((5e-7 + 1e-3) / 2 * factor)
    for t in (500, 501, 15000, 29999):
        expected = factor * (5e-6 + (1e-3 - 5e-6) * 0.5 * (1 + math.cos(math.pi * t / 30000)))
        assert lr_at(t, steps, epochs, config, optim, 4096) == pytest.approx(expected, rel=1e-12)
    unscaled = ScheduleConfig(decay="cosine-step", warmup_epochs=5, warmup_start=5e-7)
    assert lr_at(0, steps, epochs, unscaled, optim, 4096) == pytest.approx(5e-7)


def test_constant_and_short_runs() -> None:
    constant = ScheduleConfig(decay="constant", warmup_epochs=1)
    assert lr_at(2, 4, 9, constant, FIXED, 8) == 0.5 and lr_at(35, 4, 9, constant, FIXED, 8) == 1.0
    longer_warmup = ScheduleConfig(decay="cosine-step", warmup_epochs=10)
    values = [lr_at(t, 4, 2, longer_warmup, FIXED, 8) for t in range(8)]
    assert values == pytest.approx([t / 40 for t in range(8)])
    assert lr_at(8, 4, 2, ScheduleConfig(decay="cosine-step", warmup_epochs=2), FIXED, 8) == 1.0
    for wrong in ((-1, 4, 2), (0, 0, 2), (0, 4, 0)):
        with pytest.raises(ValueError, match="does not exist"):
            lr_at(*wrong, constant, FIXED, 8)


def test_ema_matches_the_lewel_log() -> None:
    """Epoch 50, iteration 50 of 1251 in a run of 125,100 steps shows 0.99001256 from 0.98."""
    config = EmaConfig(0.98, "cosine")
    assert ema_at(50 * 1251 + 50, 125_100, config) == pytest.approx(0.99001256, abs=5e-9)
    assert ema_at(0, 1000, config) == 0.98
    assert ema_at(500, 1000, config) == pytest.approx(0.99, rel=1e-12)
    assert ema_at(1000, 1000, config) == 1.0 and ema_at(1001, 1000, config) == 1.0
    assert ema_at(3, 1000, EmaConfig(0.999, "constant")) == 0.999
    with pytest.raises(ValueError, match=r"1\.2 is outside"):
        ema_at(0, 10, EmaConfig(1.2, "cosine"))
    with pytest.raises(ValueError, match="does not exist"):
        ema_at(-1, 10, config)


def test_recipes_use_the_published_schedules() -> None:
    """The numbers above, through the recipes that a user names."""
    from train.recipes import RECIPES

    def at(name: str, step: int, steps_per_epoch: int) -> float:
        recipe = RECIPES[name][1]()[0]
        return lr_at(step, steps_per_epoch, recipe.epochs, recipe.schedule, recipe.optim, recipe.global_batch)

    assert at("regioncl-m", 199 * 1251, 1251) == pytest.approx(9.253e-06, rel=1e-4)
    assert at("lewel-b-100ep", 50 * 1251, 1251) == pytest.approx(2.11257, abs=5e-6)
    assert at("care", 0, 1251) == 1e-6 and at("care", 12510, 1251) == pytest.approx(0.2)
    assert at("moco-v3", 3120, 312) == pytest.approx(9.6)
    assert at("moby", 0, 2502) == pytest.approx(5e-7)
    assert at("moby-100ep", 250_199, 2502) == pytest.approx(5e-6, rel=1e-3)
    recipe = RECIPES["lewel-b-100ep"][1]()[0]
    assert ema_at(50 * 1251 + 50, 125_100, recipe.ema) == pytest.approx(0.99001256, abs=5e-9)


def test_moco_v1_falls_to_a_tenth_at_its_milestones() -> None:
    config = ScheduleConfig(decay="steps", milestones=(120, 160))
    optim = OptimConfig(lr=0.03, lr_reference_batch=256)
    rates = {0: 0.03, 119: 0.03, 120: 0.003, 159: 0.003, 160: 0.0003, 199: 0.0003}
    for epoch, rate in rates.items():
        for within in (0, 5003):
            assert lr_at(epoch * 5004 + within, 5004, 200, config, optim, 256) == pytest.approx(rate)
