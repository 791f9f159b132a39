"""How large a reproduction is: the papers' size, ImageNet-100, or a size at which a CPU runs a table in minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from models.hyperparameters import CONFIGS
from tools.reproduction.training import Training, recipe_config

Scale = Literal["full", "in100", "tiny"]
SCALES: dict[Scale, str] = {
    "full": "as published",
    "in100": "pre-training on ImageNet-100 with LEWEL's rule for it: twice the rate, 240 epochs where there were 200",
    "tiny": "one step of each on drawn pictures with a narrow ResNet: shows that each row runs, figures mean nothing",
}
_IN100_EPOCHS = 240 / 200
_TINY_TRAINING = (
    "--global-batch 8 --max-steps 1 --log-every 1 --knn-every 0 --checkpoint-every 1 --holdout 0 "
    "--device cpu --workers 1 --no-report"
).split()
_TINY_MODEL = {"queue-size": "16", "hidden-dim": "32", "predictor-hidden-dim": "16", "t-bn-group-size": "4"}
"""Sizes of heads and queues in proportion to a batch of 8, for the methods that have them."""
# Transformers have recipes and heads of their own, so their rows keep one; the smaller ViT stands for both.
_TINY_ARCHITECTURES = {"swin-t": "swin-t", "vit-s": "vit-s", "vit-b": "vit-s"}
_TINY_EVALUATION: dict[str, str] = {
    "knn": "--image-size 32",
    "linear": "--image-size 32 --epochs 1 --global-batch 32",
    "fewshot": "--image-size 32 --epochs 1 --global-batch 16",
    "semi": "--image-size 32 --epochs 1 --global-batch 16",
    "detect": "--steps 1 --global-batch 2 --train-sides 64 --test-side 64 --longest-side 96 --precise-bn-steps 1",
    "segment": "--steps 1 --global-batch 2 --crop 64,64 --scale 96,64 --channels 16",
    "analyze": "--images 4",
}


@dataclass(frozen=True)
class Sources:
    """Where a reproduction finds its data; an empty place is one the user did not name.

    Attributes:
        imagenet: training and validation images of ImageNet.
        imagenet100: the same of ImageNet-100.
        coco, voc, cityscapes: their folders.
        supervised: file with a supervised classifier's weights, for the rows of that name.
        real_labels: ImageNet-ReaL's real.json.
        boxes: COCO-format boxes of training images, by any detector.
    """

    imagenet: tuple[str, ...] = ()
    imagenet100: tuple[str, ...] = ()
    coco: str = ""
    voc: str = ""
    cityscapes: str = ""
    supervised: str = ""
    real_labels: str = ""
    boxes: str = ""


def training_flags(training: Training, scale: Scale) -> list[str]:
    """Flags beside recipe, data, folder and seed."""
    if scale == "full":
        return list(training.flags)
    if scale == "in100":
        return _on_imagenet100(training)
    return _tiny(training)


def _on_imagenet100(training: Training) -> list[str]:
    if training.recipe.endswith("-in100"):
        return list(training.flags)
    recipe = recipe_config(training.recipe)["recipe"]
    flags = _replaced(training.flags, ())
    epochs = int(flags.pop("--epochs", recipe["epochs"]))
    rate = float(flags.pop("--optim.lr", recipe["optim"]["lr"]))
    flags |= {"--epochs": str(round(_IN100_EPOCHS * epochs)), "--optim.lr": f"{2 * rate:g}"}
    return _flat(flags)


def _tiny(training: Training) -> list[str]:
    fields = CONFIGS[training.method].__dataclass_fields__
    model = {f"--{name}": size for name, size in _TINY_MODEL.items() if name.replace("-", "_") in fields}
    shared = dict(zip(_TINY_TRAINING[:-1:2], _TINY_TRAINING[1::2], strict=True))
    arch = {"--arch": _TINY_ARCHITECTURES.get(training.arch, "resnet10-w16")}
    group = recipe_config(training.recipe)["recipe"]["bn"]["group_size"]
    # What the row itself says stays, except for the sizes that a batch of 8 cannot have.
    own = _replaced(training.flags, ("--epochs", "--arch", "--hidden-dim"))
    # Regions of a given size need a map of seven cells of 32 px; everything else is faster on small pictures.
    side = {"--image-size": "224" if {"--region.lower", "--region.upper"} & set(own) else "64"}
    small = model | own | shared | arch | side | ({"--bn.group-size": "4"} if group else {})
    return [*_flat(small), _TINY_TRAINING[-1]]


def _replaced(flags: Sequence[str], dropped: Sequence[str]) -> dict[str, str]:
    """The flags and values, less those that are dropped."""
    return {flag: value for flag, value in zip(flags[::2], flags[1::2], strict=True) if flag not in dropped}


def _flat(flags: Mapping[str, str]) -> list[str]:
    return [part for pair in flags.items() for part in pair]


def evaluation_flags(protocol: str, scale: Scale) -> list[str]:
    """Flags that make a measurement small; none at the papers' size."""
    return _TINY_EVALUATION[protocol].split() if scale == "tiny" else []
