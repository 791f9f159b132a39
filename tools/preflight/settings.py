"""Whether batch, ranks, groups, queue, method and backbone fit together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from train.build import build_method, check_fit
from train.inputs import check_batch
from train.record.diagnosis import Finding
from train.schedules import scaled_lr

from .examination import Examination

_SMALL_BATCH = 16


def batch(examination: Examination) -> Iterator[Finding]:
    """Sizes that must divide; batches and groups too small for batch norm; rates and warm-ups that cannot be meant."""
    check_batch(examination.whole, examination.world_size)
    recipe = examination.config.recipe
    local = recipe.global_batch // examination.world_size
    if recipe.bn.mode == "plain" and local < _SMALL_BATCH:
        yield Finding(
            "note",
            f"batch norm has the statistics of {local} images (--bn.mode plain)",
            "give --bn.mode sync or a larger --global-batch",
        )
    if 0 < recipe.bn.group_size < 4 and recipe.bn.mode == "group":
        yield Finding(
            "note",
            f"--bn.group-size {recipe.bn.group_size}: statistics of so few images are noise",
            "give 16 or more, or 0 for the batch of a device",
        )
    if recipe.schedule.warmup_epochs >= recipe.epochs:
        yield Finding(
            "note",
            f"the warm-up of {recipe.schedule.warmup_epochs:g} epochs lasts as long as the run's {recipe.epochs}",
            f"give --schedule.warmup-epochs {recipe.epochs / 10:g}",
        )
    if recipe.optim.kind == "adamw" and scaled_lr(recipe.optim, recipe.global_batch) > 0.05:
        yield Finding(
            "note",
            f"a learning rate of {scaled_lr(recipe.optim, recipe.global_batch):g} is far too high for adamw",
            "give --optim.lr 0.001, or the rate of the recipe",
        )


def built(examination: Examination) -> Iterator[Finding]:
    """The method with its backbone, `--init` and `--freeze`; regions and sizes."""
    config, whole = examination.config, examination.whole
    # The backbone first: what is wrong with it is said by its own flag.
    method = build_method(whole, examination.runtime)
    planned = replace(examination.runtime, world_size=examination.world_size)
    check_fit(whole, planned, method)
    examination.method = method
    weights = sum(p.numel() for p in method.parameters() if p.requires_grad)
    yield Finding(
        "ok",
        f"{config.run.method} on {config.recipe.arch}: {weights / 1e6:.1f} million weights to train, recipe "
        f"{config.run.recipe}, lr {scaled_lr(config.recipe.optim, config.recipe.global_batch):.4g}",
    )
