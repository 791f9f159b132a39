"""Linear classification on a frozen backbone: every published recipe by name, several learning rates in one pass."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.collectives import average_buffers
from models.norm import convert_batch_norm
from models.swin import SwinTrunk, draw_branch_scale
from pipeline.interface import Pipeline

from ..errors import UserMistake
from ..fields import check
from ..measure.features import Features, evaluation_mode, pool
from ..optim import Lars
from ..state import TuningState
from .accuracy import Accuracy, accuracy, read_real_labels
from .linear_recipes import LINEAR_RECIPES, RECIPE_OF_METHOD, LinearRecipe
from .options import LinearConfig
from .session import (
    Session,
    class_count,
    labels_of_pixels,
    linear_views,
    open_session,
    percent,
    result_path,
    table,
)
from .splits import source_names
from .tuning import TuningCheckpoints, discard_state, fingerprint, state_folder

# ---------------------------------------------------------------------------------------------------------------------
# Training heads on features: pure of data sets, so that tests feed it tables


class LinearHeads(nn.Module):
    """Classifiers that see the same features and never each other's gradient: (B, C) -> one (B, classes) per head.

    All start from the same weights: N(0, 0.01), biases 0.
    """

    def __init__(self, features: int, classes: int, count: int, batch_norm: bool, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        # One start for all heads, so that their results differ by the learning rate alone.
        start = torch.randn(classes, features, generator=generator) * 0.01
        self.heads = nn.ModuleList()
        for _ in range(count):
            linear = nn.Linear(features, classes)
            with torch.no_grad():
                linear.weight.copy_(start)
                linear.bias.zero_()
            # Statistics over the global batch, so that the number of ranks changes nothing.
            norm = convert_batch_norm(nn.BatchNorm1d(classes), "sync") if batch_norm else nn.Identity()
            self.heads.append(nn.Sequential(linear, norm))

    def forward(self, features: Tensor) -> list[Tensor]:
        """Logits of each head."""
        return [head(features) for head in self.heads]


def lr_factor(recipe: LinearRecipe, epochs: int, step: int, steps_per_epoch: int) -> float:
    """Learning rate of 0-based step `step` relative to its peak; milestones move with `epochs` over the recipe's."""
    if recipe.schedule == "steps":
        # Whole epochs, as the published scripts count: they set the rate at the start of each epoch.
        epoch = step // steps_per_epoch
        return 0.1 ** sum(epoch >= milestone * epochs / recipe.epochs for milestone in recipe.milestones)
    total = epochs * steps_per_epoch
    warmup = total * recipe.warmup_epochs / recipe.epochs
    if step < warmup:
        return step / warmup
    # "cosine-epoch" keeps the rate of the epoch's first step, as MoCo v3 and SimSiam do for their linear probe.
    at = step if recipe.schedule == "cosine-step" else step // steps_per_epoch * steps_per_epoch
    start = warmup if recipe.cosine_from == "warmup-end" else 0
    cosine = 0.5 * (1 + math.cos(math.pi * (at - start) / (total - start)))
    return recipe.final_factor + (1 - recipe.final_factor) * cosine


def head_optimizer(heads: LinearHeads, recipe: LinearRecipe, lrs: Sequence[float]) -> torch.optim.Optimizer:
    """One parameter group for each head, with its own peak learning rate in "peak"."""
    groups: list[dict[str, Any]] = [
        {"params": list(head.parameters()), "lr": lr, "peak": lr, "weight_decay": recipe.weight_decay}
        for head, lr in zip(heads.heads, lrs, strict=True)
    ]
    if recipe.optimizer == "lars":
        return Lars(groups, lr=lrs[0], momentum=0.9)
    return torch.optim.SGD(groups, lr=lrs[0], momentum=0.9, nesterov=recipe.optimizer == "nesterov")


FeatureBatches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]


def train_heads(
    heads: LinearHeads,
    batches: FeatureBatches,
    steps_per_epoch: int,
    epochs: int,
    recipe: LinearRecipe,
    lrs: Sequence[float],
    after_epoch: Callable[[int], None] = lambda epoch: None,
    optimizer: torch.optim.Optimizer | None = None,
    first_epoch: int = 0,
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """Train every head with cross-entropy at its own learning rate.

    Args:
        heads: on the device of the features; left in training mode between epochs.
        batches: epoch -> (features (B, C) fp32, labels (B,) int64) of this rank for each step of the epoch.
        steps_per_epoch: how many of them an epoch has.
        epochs: passes.
        recipe: optimizer and schedule.
        lrs: peak learning rate of each head.
        after_epoch: called with the number of epochs done, `first_epoch` + 1 to `epochs`.
        optimizer: that of a run which goes on, from `head_optimizer`; None makes a fresh one.
        first_epoch: epochs already done.
        after_step: called after each step; what it raises ends the training.
    """
    # A run that goes on brings an optimizer whose momentum has been restored; a fresh one would change its next steps.
    optimizer = optimizer or head_optimizer(heads, recipe, lrs)
    step = first_epoch * steps_per_epoch
    for epoch in range(first_epoch, epochs):
        heads.train()
        for features, labels in batches(epoch):
            factor = lr_factor(recipe, epochs, step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            # A sum, not a mean: each head then gets the very gradient it would get alone.
            loss = torch.stack([F.cross_entropy(logits, labels) for logits in heads(features)]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            # The heads are in no DDP wrapper, so the ranks' gradients are averaged here.
            average_buffers([p.grad for p in heads.parameters() if p.grad is not None])
            optimizer.step()
            step += 1
            after_step()
        after_epoch(epoch + 1)


def _lbfgs(parameters: list[Tensor], iterations: int) -> torch.optim.LBFGS:
    """A solver that stops at a gradient of 1e-7 or after `iterations`."""
    return torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        # The line search evaluates more than once an iteration; PyTorch's default of 1.25 would end the search early.
        max_eval=2 * iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
    )


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    l2: float,
    iterations: int = 500,
    after_pass: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Exact multinomial logistic regression: (weight (classes, C), bias (classes,)), both fp64.

    Minimises mean cross-entropy + l2 / 2 * |weight|^2 with the bias left free, by L-BFGS in fp64. scikit-learn's
    `LogisticRegression(C=1 / (l2 * N))` has the same optimum. `after_pass` is called after each pass over the features,
    at most 2 * `iterations` times; what it raises ends the search.
    """
    # fp32 has too few digits for a gradient tolerance of 1e-7: the line search would stall before it.
    x, y = features.double(), labels.to(features.device)
    # The problem is convex, so the start decides only how many iterations it takes.
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = _lbfgs([weight, bias], iterations)

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, y) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        after_pass()
        return loss

    solver.step(objective)
    return weight.detach(), bias.detach()


# ---------------------------------------------------------------------------------------------------------------------
# The protocol


@dataclass
class HeadRecord:
    """Validation figures of one head over the epochs."""

    lr: float
    history: list[tuple[int, Accuracy]]

    def as_dict(self) -> dict[str, Any]:
        """Last and best epoch."""
        # Of equal figures the earliest epoch counts.
        best_epoch, best = max(self.history, key=lambda item: (item[1].top1, -item[0]))
        return {
            "lr": self.lr,
            "epoch": self.history[-1][0],
            **self.history[-1][1].as_dict(),
            "best_epoch": best_epoch,
            "best_top1": best.top1,
            "best_top5": best.top5,
        }


def choose_recipe(config: LinearConfig, method: str) -> tuple[str, LinearRecipe]:
    """The recipe's name and the recipe with the flags applied.

    Raises:
        UserMistake: for an unknown name or a value outside its range.
    """
    check(config)
    name = config.recipe or RECIPE_OF_METHOD.get(method, "moco-v2")
    if name not in LINEAR_RECIPES:
        raise UserMistake(f"--recipe {name}: choose from {', '.join(LINEAR_RECIPES)}")
    recipe = LINEAR_RECIPES[name]
    # The solver knows neither steps nor batches: taking the flags and ignoring them would mislead.
    if recipe.optimizer == "lbfgs" and (config.epochs or config.global_batch or config.head_bn == "yes"):
        raise UserMistake("--recipe logistic is solved exactly: leave out --epochs, --global-batch and --head-bn")
    if config.weight_decay >= 0:
        recipe = dataclasses.replace(recipe, weight_decay=config.weight_decay)
    if config.head_bn != "recipe":
        recipe = dataclasses.replace(recipe, batch_norm=config.head_bn == "yes")
    return name, recipe


def head_records(lrs: Sequence[float], state: TuningState) -> list[HeadRecord]:
    """The validation figures that a run has recorded, one record a head."""
    histories = state.record["history"]
    return [
        HeadRecord(lr, [(epoch, Accuracy(**figures)) for epoch, figures in history])
        for lr, history in zip(lrs, histories, strict=True)
    ]


def common_settings(session: Session, population: np.ndarray, val_hash: str) -> dict[str, Any]:
    """Settings that decide the outcome of any classification run: backbone, images, their size, seed, precision."""
    return {
        "arch": session.arch,
        "backbone": fingerprint(session.encoder),
        "image_size": session.image_size,
        "images": hashlib.sha256(population.astype(np.int64).tobytes()).hexdigest(),
        "val_data": val_hash,
        "seed": session.config.seed,
        "dtype": str(session.runtime.dtype),
    }


def batch_for(recipe_batch: int, wanted: int, images: int, world_size: int) -> int:
    """The global batch: as wanted or the recipe's, but no more than the images, and a multiple of the ranks.

    Raises:
        UserMistake: a wanted batch that does not fit.
    """
    batch = wanted or min(recipe_batch, images // world_size * world_size)
    if batch < 1 or batch > images or batch % world_size:
        raise UserMistake(
            f"--global-batch {batch} with {images} training images on {world_size} ranks; choose a multiple of "
            f"{world_size} up to {images}"
        )
    return batch


def drop_path_of(encoder: nn.Module, recipe: LinearRecipe) -> float:
    """The recipe's drop-path rate, 0 for a backbone that has none."""
    return recipe.drop_path if isinstance(encoder, SwinTrunk) else 0.0


def _frozen_features(session: Session, images: Tensor, drop_path: float, step: int) -> Tensor:
    """Features (B, C) fp32 of one rank's images, with the residual branches that drop-path leaves at this step."""
    encoder, runtime = session.encoder, session.runtime
    if not drop_path:
        return pool(encoder(images))
    assert isinstance(encoder, SwinTrunk)
    # Drawn for the global batch from (seed, step): neither a restart nor the number of ranks changes the masks.
    rows = slice(runtime.rank * len(images), (runtime.rank + 1) * len(images))
    total = runtime.world_size * len(images)
    scale = draw_branch_scale(encoder.num_blocks, drop_path, session.config.seed, step, 0, rows, total)
    return pool(encoder(images, scale.to(images.device)))


def epoch_features(
    session: Session, pipeline: Pipeline, drop_path: float = 0.0
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """Epoch -> features (B, C) fp32 and labels of freshly augmented images through the frozen backbone.

    Args:
        session: the backbone, and where and in which precision it runs.
        pipeline: training images, one view each.
        drop_path: drop rate of the last residual branch; above 0 for a `SwinTrunk` only.
    """
    device, encoder = session.runtime.device, session.encoder

    def deliver(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        # Crops and flips follow from (seed, epoch, image), so an epoch can be repeated after a stop.
        pipeline.set_epoch(epoch)
        for step, batch in enumerate(pipeline, epoch * len(pipeline)):
            (images,) = batch.views.values()
            # In training mode batch norm would move its statistics, and the backbone would no longer be frozen. A Swin
            # has none: with drop-path's factors its evaluation mode computes what its training mode would.
            with torch.no_grad(), evaluation_mode(encoder), session.runtime.autocast():
                features = _frozen_features(session, images, drop_path, step)
            # Outside the block above: `no_grad` in a suspended generator would also hold in the caller's training step.
            yield features, labels_of_pixels(pipeline, epoch, batch).to(device, non_blocking=True)

    return deliver


def probe(
    session: Session, config: LinearConfig, population: np.ndarray | None = None
) -> tuple[list[HeadRecord], dict[str, Any]]:
    """Train and validate the recipe's heads; `population` restricts the training images.

    Returns:
        (one record for each learning rate, what the result file says beside them).
    """
    name, recipe = choose_recipe(config, session.method)
    # Validation images have one fixed view and the backbone is frozen: their features are computed once for all epochs.
    val, val_hash = session.features_of(config.val_data)
    facts = {"recipe": name, "recipe_source": recipe.source, "val_data_hash": val_hash, "val_images": len(val.labels)}
    if recipe.optimizer == "lbfgs":
        records, more = _solve_exactly(session, config, recipe, population, val)
    else:
        records, more = _train_by_steps(session, config, recipe, population, val, val_hash)
    return records, {**facts, **more}


def _real_labels(config: LinearConfig, val: Features, classes: int) -> list[list[int]] | None:
    if not config.real_labels:
        return None
    names = source_names(config.val_data)
    real = read_real_labels(config.real_labels, names, len(val.labels) + val.bad, classes)
    return [real[sample] for sample in val.samples.tolist()]


def _solve_exactly(
    session: Session, config: LinearConfig, recipe: LinearRecipe, population: np.ndarray | None, val: Features
) -> tuple[list[HeadRecord], dict[str, Any]]:
    # Without augmentation the training features are a fixed table, which an exact solver can take whole.
    train, train_hash = session.features_of(config.data, population)
    classes = class_count(train.labels.numpy(), val.labels.numpy())
    real = _real_labels(config, val, classes)
    # One scale for all strengths: without it the L2 term would weigh a feature by its unit.
    mean, std = train.features.mean(dim=0), train.features.std(dim=0).clamp_min(1e-6)
    records = []
    for l2 in config.lrs or (recipe.lr,):
        # The solver ends by itself where it has converged, so the total is the most that it may take.
        with session.progress(f"logistic regression, l2 {l2:g}", 1000, "passes at most") as progress:
            weight, bias = fit_logistic(
                (train.features - mean) / std, train.labels, classes, l2, after_pass=progress.step
            )
        logits = ((val.features - mean) / std).double() @ weight.T + bias
        records.append(HeadRecord(l2, [(0, accuracy(logits, val.labels, real))]))
    return records, {"data_hash": train_hash, "train_images": len(train.labels), "classes": classes}


def _train_by_steps(
    session: Session,
    config: LinearConfig,
    recipe: LinearRecipe,
    population: np.ndarray | None,
    val: Features,
    val_hash: str,
) -> tuple[list[HeadRecord], dict[str, Any]]:
    runtime = session.runtime
    if population is None:
        # Only for the number of images: the batch and the population are needed before the real pipeline is made.
        counted = session.open(config.data, linear_views(session.image_size))
        population = np.arange(counted.num_samples)
        counted.close()
    batch = batch_for(recipe.global_batch, config.global_batch, len(population), runtime.world_size)
    session.batch = batch
    pipeline = session.open_training(config.data, batch, population)
    try:
        # Before the first step: other classes in the validation images would be noticed only after an epoch.
        classes = class_count(pipeline.labels[population], val.labels.numpy())
        real = _real_labels(config, val, classes)
        epochs = config.epochs or recipe.epochs
        scale = batch / recipe.global_batch
        # A rate that the user gives is taken as it is; the recipe's belongs to the recipe's batch and grows with it.
        lrs = [lr * (scale if not config.lrs else 1.0) for lr in config.lrs or (recipe.lr,)]
        session.say(
            f"linear: {recipe.source}; {len(population)} images, {classes} classes, {epochs} epochs of {len(pipeline)} "
            f"steps of {batch}, {recipe.optimizer}, lr {', '.join(f'{lr:g}' for lr in lrs)}"
        )
        drop_path = drop_path_of(session.encoder, recipe)
        width = val.features.shape[1]
        heads = LinearHeads(width, classes, len(lrs), recipe.batch_norm, config.seed).to(runtime.device)
        # The figures so far are part of the state, so that a continued run still knows its best epoch.
        state = TuningState(heads, head_optimizer(heads, recipe, lrs), record={"history": [[] for _ in lrs]})
        # Whatever changes the result: a saved state is continued only where all of this is equal.
        settings = {
            "recipe": dataclasses.asdict(recipe),
            "lrs": lrs,
            "epochs": epochs,
            "global_batch": batch,
            "eval_every": config.eval_every,
            "real_labels": config.real_labels,
            "classes": classes,
            "data": pipeline.data_hash,
            **common_settings(session, population, val_hash),
        }
        checkpoints = TuningCheckpoints(
            state_folder(result_path(session)), settings, runtime, config.resume == "auto", watch=session.watch
        )
        checkpoints.restore(state)

        def validate(done: int) -> None:
            # The last epoch always counts: it is the published figure.
            if done % config.eval_every == 0 or done == epochs:
                # A head that ends in batch norm must use its running statistics; `train_heads` resets the mode.
                heads.eval()
                with torch.no_grad():
                    for history, logits in zip(state.record["history"], heads(val.features), strict=True):
                        history.append([done, dataclasses.asdict(accuracy(logits, val.labels, real))])
                # The progress line names one head; the result file has them all.
                best = max(head_records(lrs, state), key=lambda record: record.history[-1][1].top1)
                session.say_seldom(
                    f"epoch {done}/{epochs}: top-1 {percent(best.history[-1][1].top1)} at lr {best.lr:g}"
                )
            # Saved at the ends of epochs only, so continuing never starts within one.
            state.step = done * len(pipeline)
            checkpoints.save(state)

        with session.progress("training", epochs * len(pipeline), "steps", done=state.step) as progress:
            train_heads(
                heads,
                epoch_features(session, pipeline, drop_path),
                len(pipeline),
                epochs,
                recipe,
                lrs,
                validate,
                state.optimizer,
                state.step // len(pipeline),
                progress.step,
            )
        records = head_records(lrs, state)
        # After training, because a damaged record is found when it is decoded.
        session.count_bad(pipeline, "were replaced by others with their labels")
        facts = {
            "data_hash": pipeline.data_hash,
            "train_images": len(population),
            "classes": classes,
            "global_batch": batch,
            "epochs": epochs,
            "batch_norm": recipe.batch_norm,
            "optimizer": recipe.optimizer,
            "weight_decay": recipe.weight_decay,
            **({"drop_path": drop_path} if recipe.drop_path else {}),
        }
        return records, facts
    finally:
        pipeline.close()


def report(session: Session, records: list[HeadRecord], facts: dict[str, Any]) -> None:
    """Print the table and write the result file."""
    rows = [record.as_dict() for record in records]
    best = max(rows, key=lambda row: row["top1"])
    header = ["lr" if facts["recipe"] != "logistic" else "L2", "top-1", "top-5", "ReaL", "best top-1", "at epoch"]
    session.say(
        table(
            header,
            [
                [
                    f"{row['lr']:g}",
                    percent(row["top1"]),
                    percent(row["top5"]),
                    percent(row.get("real_top1")),
                    percent(row["best_top1"]),
                    str(row["best_epoch"]),
                ]
                for row in rows
            ],
        )
    )
    if len(rows) > 1:
        session.say("the best row was chosen on the validation images")
    # Written before the state is dropped: a crash between the two loses nothing.
    session.write({**facts, "results": rows, "best": best, "top1": best["top1"], "top5": best["top5"]})
    discard_state(result_path(session), session.runtime)


def run(config: LinearConfig) -> int:
    """The `linear` command."""
    # Flags are refused here, before the backbone is loaded and the validation features are computed.
    choose_recipe(config, "")
    with open_session("linear", config) as session:
        report(session, *probe(session, config))
    return 0
