"""Fine-tuning a segmenter step by step, and its validation; both resume exactly."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.collectives import average_buffers
from models.norm import running_buffers

from ...errors import NonFinite
from ...measure.features import evaluation_mode
from ...runtime import Runtime, changing_shapes
from ...state import TuningState
from ...stop import EvaluationWatch
from ..tuning import TuningCheckpoints, seed_step
from .feed import TrainBatch, TrainingFeed, validation_pairs
from .inference import predict
from .labels import LabelMap, Pair
from .metrics import Scores, confusion_matrix, scores
from .network import AUXILIARY_WEIGHT, Segmenter
from .protocol import MOMENTUM, Plan, SegmentConfig

Say = Callable[[str], None]


def make_optimizer(network: Segmenter, config: SegmentConfig) -> torch.optim.Optimizer:
    """SGD over all parameters, batch norm decayed like the rest."""
    return torch.optim.SGD(network.parameters(), lr=config.lr, momentum=MOMENTUM, weight_decay=config.weight_decay)


@dataclass
class Trainer:
    """What fine-tuning needs beside its state.

    Attributes:
        config: flags.
        plan: the protocol.
        runtime: this process.
        feed: training batches.
        checkpoints: where the state is kept.
        watch: signals.
        validate: called with the number of steps done; gives plain values for the record.
        say: prints on the first rank.
        after_step: called after each step.
    """

    config: SegmentConfig
    plan: Plan
    runtime: Runtime
    feed: TrainingFeed
    checkpoints: TuningCheckpoints
    watch: EvaluationWatch
    validate: Callable[[int], dict[str, Any]]
    say: Say
    after_step: Callable[[], object] = lambda: None


def train(trainer: Trainer, state: TuningState) -> None:
    """Take steps from `state.step` to the last; the record gets "losses" and "validations".

    Raises:
        NonFinite: the loss is not finite.
        Stopped: after saving, when a signal asked for it.
        CheckpointFailed: a checkpoint could not be written.
    """
    config, last = trainer.config, trainer.plan.steps
    started, counted = time.perf_counter(), 0
    state.model.train()
    for batch in trainer.feed.batches(state.step, last):
        loss = take_step(trainer, state, batch)
        trainer.after_step()
        state.step += 1
        counted += config.global_batch
        if state.step % config.log_every == 0 or state.step == last:
            value = _mean_over_ranks(trainer.runtime, loss)
            # Looked at with the log line: reading the loss at each step would wait for the device.
            if not np.isfinite(value):
                raise NonFinite(f"loss is {value} at step {state.step}; lower --lr {config.lr} or use --precision bf16")
            state.record.setdefault("losses", []).append([state.step, value])
            rate = counted / (time.perf_counter() - started)
            lr = state.optimizer.param_groups[0]["lr"]
            trainer.say(f"step {state.step}/{last}: loss {value:.4f}, lr {lr:.6f}, {rate:.2f} images/s")
            started, counted = time.perf_counter(), 0
        ends = state.step == last
        # Before saving, so that the checkpoint of this step has its validation.
        if ends or (config.eval_every and state.step % config.eval_every == 0):
            state.record.setdefault("validations", []).append([state.step, trainer.validate(state.step)])
        saves = ends or state.step % config.checkpoint_every == 0
        if saves:
            trainer.checkpoints.save(state)
        # Asking the other ranks costs the host a wait, which a CPU run does not notice and a checkpoint costs anyway.
        if not ends and (saves or trainer.runtime.device.type == "cpu" or state.step % config.log_every == 0):
            trainer.checkpoints.save_if_stopped(state, trainer.watch)


def take_step(trainer: Trainer, state: TuningState, batch: TrainBatch) -> Tensor:
    """One optimizer step; returns this rank's loss, detached. Nothing here waits for the device."""
    config, runtime, network = trainer.config, trainer.runtime, state.model
    assert isinstance(network, Segmenter)
    seed_step(config.seed, state.step, 0)  # alike on all ranks: dropout is drawn for the global batch
    for group in state.optimizer.param_groups:
        group["lr"] = trainer.plan.lr_at(state.step, config.lr)
    images, labels = batch.tensors(config.seed, runtime.device)
    with runtime.autocast():
        main, auxiliary = network.losses(images, labels)
    loss = main + AUXILIARY_WEIGHT * auxiliary
    state.optimizer.zero_grad(set_to_none=True)
    (loss if state.scaler is None else state.scaler.scale(loss)).backward()
    # No DDP wrapper: averaged here. Before the scaler looks, so that an overflow on one rank skips the step on all.
    average_buffers([p.grad for p in network.parameters() if p.grad is not None])
    if state.scaler is None:
        state.optimizer.step()
    else:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    if config.bn == "plain":
        average_buffers(running_buffers(network))
    return loss.detach()


def _mean_over_ranks(runtime: Runtime, loss: Tensor) -> float:
    values = runtime.gather_objects(loss.item())
    return float(np.mean(values))


def validate(
    network: Segmenter,
    pairs: Sequence[Pair],
    labels: LabelMap,
    plan: Plan,
    runtime: Runtime,
    threads: int,
    after_image: Callable[[], object] = lambda: None,
) -> Scores:
    """Scores over all pairs, which the ranks share; the confusion matrix is summed over them.

    `after_image` is called after each image of this rank; what it raises ends the pass.
    """

    def logits_of(images: Tensor) -> Tensor:
        with runtime.autocast():
            logits: Tensor = network(images)
        return logits

    device = runtime.device
    # Whole numbers: a float32 counts pixels exactly only up to 16 million.
    confusion = torch.zeros(labels.classes, labels.classes, dtype=torch.int64, device=device)
    with torch.no_grad(), evaluation_mode(network), changing_shapes():
        for image, label in validation_pairs(pairs, labels, runtime.rank, runtime.world_size, threads):
            predicted = predict(logits_of, image, device, plan.geometry.scale, plan.window, plan.stride)
            confusion += confusion_matrix(predicted, torch.from_numpy(label).to(device), labels.classes)
            after_image()
    total = np.sum(runtime.gather_objects(confusion.cpu().numpy()), axis=0)
    return scores(total)
