"""Semi-supervised classification: the whole network fine-tuned on 1% or 10% of the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.collectives import average_buffers
from models.norm import convert_batch_norm, running_buffers
from pipeline.interface import Pipeline

from ..measure.features import center_view, pool
from ..state import TuningState
from .accuracy import Accuracy, accuracy
from .fewshot import labelled_subset
from .linear import HeadRecord, batch_for, common_settings, head_records
from .options import SemiConfig
from .session import (
    Session,
    class_count,
    labels_of_pixels,
    open_session,
    percent,
    result_path,
    table,
)
from .tuning import TuningCheckpoints, discard_state, state_folder

# Peak learning rates (backbone, classifier) of LEWEL's recipe at batch 256, for 1% and for 10% of the labels.
PUBLISHED_LRS = {0.01: (1e-4, 1.0), 0.1: (0.01, 0.1)}
EPOCHS, MILESTONES = 50, (30, 40)


def learning_rates(config: SemiConfig, images: int, total: int, batch: int) -> tuple[float, float]:
    """Peak rates of (backbone, classifier): the flags', else the recipe's for 1% or 10%, scaled to the batch."""
    share = images / total
    # Compared as ratios: 4% is nearer to 1% by difference, but nearer to 10% by ratio.
    nearest = min(PUBLISHED_LRS, key=lambda known: abs(np.log(known / share)))
    backbone, head = (lr * batch / 256 for lr in PUBLISHED_LRS[nearest])
    return config.lr_backbone or backbone, config.lr_head or head


class Classifier(nn.Module):
    """Backbone, global average pooling and a fresh linear layer (N(0, 0.01), bias 0): images -> logits (B, classes)."""

    def __init__(self, encoder: nn.Module, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.fc = nn.Linear(width, classes)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)) * 0.01)
            self.fc.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Logits in fp32."""
        features = pool(self.encoder(images))
        # The pooled features are fp32; under autocast the linear layer would round them to half precision again.
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.fc(features.float())
        return logits


def fine_tune_epoch(
    session: Session,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    pipeline: Pipeline,
    epoch: int,
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """One pass over the labelled images, all parameters moving; what `after_step` raises ends it."""
    device = session.runtime.device
    # A loaded encoder is in eval mode.
    model.train()
    pipeline.set_epoch(epoch)
    for batch in pipeline:
        (images,) = batch.views.values()
        with session.runtime.autocast():
            logits = model(images)
        labels = labels_of_pixels(pipeline, epoch, batch).to(device, non_blocking=True)
        loss = F.cross_entropy(logits.float(), labels)
        # Dropped, not zeroed: backward then writes gradients instead of adding to zeros.
        optimizer.zero_grad(set_to_none=True)
        (loss if scaler is None else scaler.scale(loss)).backward()
        # No DDP wrapper: averaged here. Before the scaler looks, so that an overflow on one rank skips the step on all.
        average_buffers([p.grad for p in model.parameters() if p.grad is not None])
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        # With --bn plain each rank has statistics of its own images; all must validate with, and rank 0 save, the same.
        average_buffers(running_buffers(model))
        after_step()


def _validate(session: Session, model: Classifier, val: Pipeline) -> Accuracy:
    # The centre view draws nothing, but an iteration needs an epoch.
    val.set_epoch(0)
    features = session.extract(model.encoder, val)
    with torch.no_grad():
        return accuracy(model.fc(features.features), features.labels)


def fine_tune(session: Session, config: SemiConfig, population: np.ndarray) -> tuple[HeadRecord, dict[str, Any]]:
    """Fine-tune on the images `population` and validate."""
    batch = batch_for(256, config.global_batch, len(population), session.runtime.world_size)
    session.batch = batch
    train = session.open_training(config.data, batch, population)
    # Opened before training, so that classes which do not fit are refused at once.
    val = session.open(config.val_data, (center_view(session.image_size),))
    try:
        classes = class_count(train.labels[population], val.labels)
        lrs = learning_rates(config, len(population), train.num_samples, batch)
        settings = {
            "lrs": lrs,
            "weight_decay": config.weight_decay,
            "epochs": config.epochs,
            "global_batch": batch,
            "bn": config.bn,
            "eval_every": config.eval_every,
            "classes": classes,
            "data": train.data_hash,
            # Plain batch norm takes statistics from each rank's part, so there the number of ranks changes the result.
            "world_size": session.runtime.world_size if config.bn == "plain" else None,
            **common_settings(session, population, val.data_hash),
        }
        # Before the optimizer is built: it must hold the parameters of the converted layers.
        encoder = convert_batch_norm(session.encoder, config.bn)
        model = Classifier(encoder, encoder.feature_dim, classes, config.seed).to(session.runtime.device)  # type: ignore
        optimizer = torch.optim.SGD(
            [
                {"params": list(model.encoder.parameters()), "lr": lrs[0], "peak": lrs[0]},
                {"params": list(model.fc.parameters()), "lr": lrs[1], "peak": lrs[1]},
            ],
            momentum=0.9,
            weight_decay=config.weight_decay,
        )
        # Of the half-precision types only fp16 has gradients that fall below its range.
        scaler = torch.amp.GradScaler("cuda") if session.runtime.dtype is torch.float16 else None
        session.say(
            f"semi: {len(population)} images, {classes} classes, {config.epochs} epochs of {len(train)} steps of "
            f"{batch}, lr {lrs[0]:g} backbone, {lrs[1]:g} classifier"
        )
        checkpoints = TuningCheckpoints(
            state_folder(result_path(session)), settings, session.runtime, config.resume == "auto", watch=session.watch
        )
        # The figures so far are part of the state, so that a continued run still knows its best epoch.
        state = TuningState(model, optimizer, scaler, record={"history": [[]]})
        checkpoints.restore(state)
        # States are saved at the ends of epochs only, so the division is exact.
        for epoch in range(state.step // len(train), config.epochs):
            factor = 0.1 ** sum(epoch >= milestone * config.epochs / EPOCHS for milestone in MILESTONES)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            with session.progress(f"epoch {epoch + 1}/{config.epochs}", len(train), "steps") as progress:
                fine_tune_epoch(session, model, optimizer, scaler, train, epoch, progress.step)
            # The last epoch always counts: it is the published figure.
            if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
                found = _validate(session, model, val)
                state.record["history"][0].append([epoch + 1, dataclasses.asdict(found)])
                session.say_seldom(f"epoch {epoch + 1}/{config.epochs}: top-1 {percent(found.top1)}")
            state.step = (epoch + 1) * len(train)
            checkpoints.save(state)
        record = head_records([lrs[1]], state)[0]
        # After training, because a damaged record is found when it is decoded.
        session.count_bad(train, "were replaced by others with their labels")
        return record, {
            "data_hash": train.data_hash,
            "val_data_hash": val.data_hash,
            "train_images": len(population),
            "val_images": val.num_samples - session.bad_images.get("--val-data", 0),
            "classes": classes,
            "global_batch": batch,
            "epochs": config.epochs,
            "lr_backbone": lrs[0],
            "lr_head": lrs[1],
        }
    finally:
        train.close()
        val.close()


def run(config: SemiConfig) -> int:
    """The `semi` command."""
    with open_session("semi", config) as session:
        population, facts = labelled_subset(session, config, config.fraction, config.list)
        record, more = fine_tune(session, config, population)
        row = record.as_dict()
        session.say(
            table(
                ["images", "top-1", "top-5", "best top-1", "at epoch"],
                [
                    [
                        str(len(population)),
                        percent(row["top1"]),
                        percent(row["top5"]),
                        percent(row["best_top1"]),
                        str(row["best_epoch"]),
                    ]
                ],
            )
        )
        # Written before the state is dropped: a crash between the two loses nothing.
        session.write({**more, **facts, "results": [row], "top1": row["top1"], "top5": row["top5"]})
        discard_state(result_path(session), session.runtime)
    return 0
