"""Learning rate and EMA coefficient as pure functions of the step.

Steps are 0-based optimizer steps t of a run of T = steps_per_epoch * epochs steps; e = t // steps_per_epoch is the
epoch. Every published schedule of the trainer is one setting of `ScheduleConfig`:

| method | warmup_epochs | warmup_start | warmup_offset | decay | cosine_origin | final |
|---|---|---|---|---|---|---|
| MoCo v1 | 0 | | | steps (milestones 120, 160) | | |
| MoCo v2, DenseCL, SimSiam, RegionCL-M | 0 | | | cosine-epoch | | 0 |
| MoCo v3, BYOL, SimCLR | 10 | 0 | 0 | cosine-step | warmup-end | 0 |
| SwAV | 10, or 0 at batch 256 | 0.01875 (scaled) | 0 | cosine-step | warmup-end | 3e-4 (scaled) |
| PixPro | 5 | 0.01 (scaled) | 0 | cosine-step | warmup-end | 2.5e-7 (scaled) |
| Barlow Twins | 10 | 0 | 0 | cosine-step | warmup-end | 2e-4 (scaled) |
| MoCo v3 and BYOL on a ViT | 40 | 0 | 0 | cosine-step | warmup-end | 0 |
| CARE | 10 | 1e-6 | 0 | cosine-step | warmup-end | 0 |
| LEWEL | 10 | 0 | 1 | cosine-epoch | warmup-end | 0 |
| MoBY | 5 | 5e-7 (scaled) | 0 | cosine-step | run-start | 5e-6 (scaled) |

SwAV's code reaches the peak at the last step of the warm-up, one step before this formula does.
"""

from __future__ import annotations

import math

from .config import EmaConfig, OptimConfig, ScheduleConfig


def batch_scale(optim: OptimConfig, global_batch: int) -> float:
    """Factor by which the base learning rate grows with the global batch: 1 where `lr_reference_batch` is 0."""
    return global_batch / optim.lr_reference_batch if optim.lr_reference_batch else 1.0


def scaled_lr(optim: OptimConfig, global_batch: int) -> float:
    """Peak learning rate at this global batch."""
    return optim.lr * batch_scale(optim, global_batch)


def _cosine(progress: float) -> float:
    """1 at 0, 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def lr_at(
    step: int, steps_per_epoch: int, epochs: int, config: ScheduleConfig, optim: OptimConfig, global_batch: int
) -> float:
    """Learning rate of optimizer step `step`.

    Args:
        step: 0-based optimizer step.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: epochs of the run.
        config: the schedule.
        optim: base learning rate and the batch it belongs to.
        global_batch: images of one step over all ranks.

    Raises:
        ValueError: a step before the start, or a run without steps.

    Source: MoCo v2, SimSiam: cosine evaluated each epoch; CARE, LEWEL, MoCo v3 and MoBY: their training code's own
    warm-up and cosine, see the table above. Differs: MoBY's code sets the rate after each step from that step's number,
    so its rate lags the formula by one step; here step t has the formula's value at t.
    """
    if step < 0 or steps_per_epoch < 1 or epochs < 1:
        raise ValueError(f"step {step} of {epochs} epochs of {steps_per_epoch} steps does not exist")
    peak_lr = scaled_lr(optim, global_batch)
    ends_scale = batch_scale(optim, global_batch) if config.scale_ends else 1.0
    warmup_steps = config.warmup_epochs * steps_per_epoch
    # The offset is 1 for LEWEL, whose code counts its warm-up steps from 1.
    if step < warmup_steps:
        # MoBY's end points are given for its reference batch and grow with the batch like the peak.
        start = config.warmup_start * ends_scale
        return start + (peak_lr - start) * (step + config.warmup_offset) / warmup_steps
    if config.decay == "constant":
        return peak_lr
    if config.decay == "steps":
        # Milestones are whole epochs, so the rate falls at the first step of an epoch.
        return float(peak_lr * 0.1 ** sum(step // steps_per_epoch >= milestone for milestone in config.milestones))
    final = config.final * ends_scale
    origin = config.warmup_epochs if config.cosine_origin == "warmup-end" else 0.0
    # "cosine-epoch" holds the rate within an epoch, as the codes do that set it once an epoch.
    epoch = float(step // steps_per_epoch) if config.decay == "cosine-epoch" else step / steps_per_epoch
    # The lower bound serves a run that ends with its warm-up: its cosine has no length.
    return final + (peak_lr - final) * _cosine((epoch - origin) / max(epochs - origin, 1e-12))


def ema_at(step: int, total_steps: int, config: EmaConfig) -> float:
    """EMA coefficient number `step`, 0-based: m0 at 0, (1 + m0) / 2 half-way, 1 at `total_steps`.

    Args:
        step: number of the update.
        total_steps: optimizer steps of the run.
        config: base coefficient and schedule.

    Raises:
        ValueError: a negative step, a run without steps, or a coefficient outside 0..1.

    Source: BYOL, arXiv 2006.07733, appendix A: 1 - (1 - m0) * (cos(pi t / T) + 1) / 2.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"EMA update {step} of a run of {total_steps} steps does not exist")
    if not 0.0 <= config.momentum <= 1.0:
        raise ValueError(f"ema.momentum {config.momentum} is outside 0..1")
    if config.schedule == "constant":
        return config.momentum
    return 1.0 - (1.0 - config.momentum) * _cosine(step / total_steps)
