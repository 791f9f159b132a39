"""The training of a detector: one step, the loop with exact resumption, and precise batch-norm statistics after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.collectives import average_buffers
from models.norm import running_buffers

from ...errors import NonFinite
from ...optim import with_momentum_buffers
from ...runtime import Runtime
from ...state import TuningState
from ...stop import EvaluationWatch
from ..tuning import TuningCheckpoints, seed_step
from .feed import Sample, TrainingFeed
from .losses import mean_over_ranks
from .models import weight_decay_groups
from .schedule import Schedule

SGD_MOMENTUM = 0.9


@dataclass(frozen=True)
class Course:
    """How a detector is trained.

    Attributes:
        schedule: steps, milestones and warm-up.
        peak: learning rate after the warm-up.
        weight_decay: of all but norm layers.
        seed: run seed.
        checkpoint_every: steps between checkpoints; the last step always has one.
        log_every: steps between lines and rows of losses.
    """

    schedule: Schedule
    peak: float
    weight_decay: float
    seed: int
    checkpoint_every: int
    log_every: int


def build_state(model: nn.Module, course: Course, runtime: Runtime) -> TuningState:
    """A fresh state: SGD with momentum 0.9, and a loss scale in fp16."""
    launch = {"fused": True} if runtime.device.type == "cuda" else {"foreach": True}
    # Norm layers are not decayed, as in detectron2's configurations.
    groups = weight_decay_groups(model, course.weight_decay)
    optimizer = with_momentum_buffers(torch.optim.SGD(groups, lr=course.peak, momentum=SGD_MOMENTUM, **launch))
    scaler = torch.amp.GradScaler("cuda") if runtime.dtype is torch.float16 else None
    return TuningState(model, optimizer, scaler, 0, {"history": []})


def to_device(samples: list[Sample], device: torch.device) -> list[Sample]:
    """The samples with their tensors on the device."""
    moved = []
    for sample in samples:
        tensors = {name: getattr(sample, name) for name in ("image", "boxes", "labels", "masks")}
        moved.append(dataclasses.replace(sample, **{n: t.to(device, non_blocking=True) for n, t in tensors.items()}))
    return moved


def train_step(
    state: TuningState, wrapped: nn.Module, samples: list[Sample], lr: float, runtime: Runtime
) -> dict[str, Tensor]:
    """One optimizer step on this rank's samples; returns this rank's losses, detached.

    Args:
        state: its model in training mode; `step` is counted up.
        wrapped: the model, or DDP around it.
        samples: on the device.
        lr: learning rate of this step.
        runtime: device, precision and rank.

    Raises:
        NonFinite: a loss of any rank is not finite; the weights are then as before.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    with runtime.autocast():
        losses: dict[str, Tensor] = wrapped(samples)
    # The published protocols weigh all losses alike.
    loss = torch.stack(list(losses.values())).sum()
    # All ranks end together: one that left alone would leave the others in the exchange of gradients.
    if runtime.agree(not bool(torch.isfinite(loss))):
        raise NonFinite(
            f"the loss is not finite at step {state.step} ({', '.join(f'{n} {v.item():g}' for n, v in losses.items())} "
            "on this rank); lower --lr or use --precision fp32"
        )
    state.optimizer.zero_grad(set_to_none=True)
    if state.scaler is None:
        loss.backward()
        state.optimizer.step()
    else:
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
    if runtime.world_size > 1:
        # Each rank has seen other images; rank 0 saves the statistics, and all ranks test with them.
        average_buffers(running_buffers(state.model))
    state.step += 1
    return {name: value.detach() for name, value in losses.items()}


def train(
    state: TuningState,
    wrapped: nn.Module,
    feed: TrainingFeed,
    course: Course,
    runtime: Runtime,
    checkpoints: TuningCheckpoints,
    watch: EvaluationWatch | None,
    say: Callable[[str], None],
    after_step: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Train from where `state` is to the last step; returns the rows of losses of the whole run.

    Raises:
        NonFinite: a loss is not finite.
        Stopped: a signal asked for it; the state is saved.
    """
    state.model.train()
    steps = course.schedule.steps
    while state.step < steps:
        step = state.step
        # The samplers have their own draws; whatever else might draw is a function of the step as well.
        seed_step(course.seed, step, runtime.rank)
        samples = to_device(feed.samples(step), runtime.device)
        lr = course.schedule.lr_at(step, course.peak)
        losses = train_step(state, wrapped, samples, lr, runtime)
        after_step()
        if state.step % course.log_every == 0 or state.step == steps:
            # Only at these steps: reading a loss waits for the device.
            row = {name: mean_over_ranks(value).item() for name, value in losses.items()}
            state.record["history"].append({"step": state.step, "lr": lr, "loss": sum(row.values()), **row})
            parts = ", ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in row.items())
            say(f"step {state.step}/{steps}: loss {sum(row.values()):.4f} ({parts}), lr {lr:.3g}")
        if state.step % course.checkpoint_every == 0 or state.step == steps:
            checkpoints.save(state)
        if watch is not None and state.step < steps:
            checkpoints.save_if_stopped(state, watch)
    history: list[dict[str, Any]] = state.record["history"]
    return history


@torch.no_grad()
def precise_statistics(
    model: nn.Module,
    feed: TrainingFeed,
    first: int,
    steps: int,
    runtime: Runtime,
    after_batch: Callable[[], object] = lambda: None,
) -> int:
    """Replace running statistics by their mean over training batches, with the weights as they are.

    Args:
        model: a detector; left in training mode.
        feed: training samples.
        first: step whose samples are the first.
        steps: batches.
        runtime: device, precision and rank.
        after_batch: called after each batch; what it raises ends the pass.

    Returns:
        How many layers were measured; 0 where all norms are frozen, and then nothing is done.

    Source: Wu and Johnson, arXiv 2105.07576, section 3; detectron2's PreciseBN.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms or steps == 0:
        return 0
    momenta = [norm.momentum for norm in norms]
    # Batch norm gathers statistics in training mode only.
    model.train()
    for norm in norms:
        # A cumulative mean must start from nothing.
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    for step in range(first, first + steps):
        with runtime.autocast():
            # With targets, since the heads' layers see the regions of training.
            model(to_device(feed.samples(step), runtime.device))
        after_batch()
    if runtime.world_size > 1:
        average_buffers(running_buffers(model))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return len(norms)
