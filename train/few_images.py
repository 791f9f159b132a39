"""Defaults from the data: with fewer images than the published batch, the method's small recipe in sizes that fit.

A published recipe has batches of hundreds or thousands of images. Sixty photos make not one of them. Where nobody chose
a recipe, the run then takes the one for small data sets, with batch, groups, queue and length that follow from the
number of images. A recipe or flag that was given is never changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.stores import count_images

from .config import Config, Recipe
from .flags import given_flags
from .recipes import RECIPES
from .runtime import runs_on_cpu

_FEW_STEPS = 20
"""Steps an epoch under which a published recipe is said to be made for more images."""
_LEAST_STEPS = 300
"""Optimizer steps of the shortest run: fewer epochs of so few images hardly move the weights."""
_SMALL_ARCH, _CPU_ARCH = "resnet18", "resnet10-w32"
"""What the small recipes train, and what takes its place where there is no GPU: a seventh of the arithmetic."""


def fitted(
    arguments: Sequence[str], config: Config, recorded: Mapping[str, Any] | None = None
) -> tuple[Sequence[str], str]:
    """The command line with what the number of images asks for, and a line about it.

    Args:
        arguments: the command line.
        config: what `resolve` makes of it.
        recorded: configuration in the checkpoint that the run goes on from, whose recipe is kept; None for a new run.

    Returns:
        `arguments` and empty text where the images are enough, a recipe was given, or their number is not known before
        they are opened (shards behind an address). `arguments` and advice where they are enough for a batch and few for
        the recipe. Otherwise more arguments, none of which was given.
    """
    given, small = given_flags(arguments), f"{config.run.method}-small"
    if {"recipe", "config"} & given or small not in RECIPES or config.run.loader == "synthetic":
        return arguments, ""
    if recorded is not None:
        # Sizes that were recorded are taken over with the recipe, whatever this version would choose.
        return [*arguments, *([f"--recipe={small}"] if recorded["run"]["recipe"] == small else [])], ""
    batch = config.recipe.global_batch
    images = count_images(config.run.data, _FEW_STEPS * batch)
    if images >= _FEW_STEPS * batch:
        return arguments, ""
    if images >= batch:
        return arguments, (
            f"{images:,} images make {images // batch} steps an epoch with recipe {config.run.recipe}, which is made "
            f"for more; --recipe {small} is made for few images"
        )
    if "global-batch" in given or not images:
        return arguments, ""  # refused in the right words when the data are opened
    recipe, model = RECIPES[small][1]()
    fits: dict[str, int | str] = {**_sizes(images, recipe, model), **_arch(recipe, config.run.device)}
    chosen = {name: value for name, value in fits.items() if name not in given}
    flags = [f"--{name} {value}" for name, value in chosen.items()]
    line = f"{images} images are few and no --recipe was given: takes --recipe {small} {' '.join(flags)}"
    if "arch" in chosen:
        line += f" (on a CPU; --arch {recipe.arch} has more channels and takes several times as long)"
    return [*arguments, f"--recipe={small}", *(flag.replace(" ", "=") for flag in flags)], line


def _arch(recipe: Recipe, device: str) -> dict[str, str]:
    """The backbone that a run of minutes can train on this device, where it is not the recipe's."""
    return {"arch": _CPU_ARCH} if runs_on_cpu(device) and recipe.arch == _SMALL_ARCH else {}


def _sizes(images: int, recipe: Recipe, model: Any) -> dict[str, int]:
    """Flag -> value of what follows from the number of images, for the small recipe of a method."""
    # At least two steps an epoch, so that no two epochs have the same batches.
    batch = max(2, min(recipe.global_batch, 2 ** int(math.log2(max(images // 2, 2)))))
    epochs = max(recipe.epochs, math.ceil(_LEAST_STEPS / max(images // batch, 1)))
    chosen = {"global-batch": batch, "epochs": epochs}
    if recipe.bn.group_size:
        chosen["bn.group-size"] = min(recipe.bn.group_size, batch)
    if getattr(model, "t_bn_group_size", 0):
        chosen["t-bn-group-size"] = min(model.t_bn_group_size, batch)
    if hasattr(model, "queue_size"):
        # Shorter than an epoch: an older key of an image would be a negative of its own next view.
        chosen["queue-size"] = min(model.queue_size, max(batch, (images - batch) // batch * batch))
    if recipe.schedule.warmup_epochs:
        chosen["schedule.warmup-epochs"] = round(epochs * recipe.schedule.warmup_epochs / recipe.epochs)
    return chosen
