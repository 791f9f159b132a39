"""Published protocols of linear classification as values, and which one belongs to which pre-training method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LinearRecipe:
    """How a linear classifier is trained.

    Attributes:
        source: whose protocol it is.
        optimizer: momentum is 0.9 in all of them.
        lr: peak learning rate at `global_batch`; another batch scales it linearly.
        global_batch: images of a step over all ranks.
        epochs: passes over the training images.
        schedule: how the learning rate falls.
        milestones: epochs at which "steps" multiplies it by 0.1.
        warmup_epochs: of linear warm-up, step by step.
        weight_decay: L2 coupled to the gradient.
        batch_norm: the classifier ends in BatchNorm1d over the logits.
        cosine_from: the step at which the cosine begins: the warm-up's end, or step 0 of the run, so that the warm-up
            ends a little below the peak (timm's scheduler).
        final_factor: what the cosine falls to, as a share of the peak.
        drop_path: drop rate of the last residual branch of a Swin while the head trains; validation drops none.
    """

    source: str
    optimizer: Literal["sgd", "nesterov", "lars", "lbfgs"]
    lr: float
    global_batch: int
    epochs: int
    schedule: Literal["steps", "cosine-epoch", "cosine-step"] = "cosine-epoch"
    milestones: tuple[int, ...] = ()
    warmup_epochs: int = 0
    weight_decay: float = 0.0
    batch_norm: bool = False
    cosine_from: Literal["warmup-end", "run-start"] = "warmup-end"
    final_factor: float = 0.0
    drop_path: float = 0.0


LINEAR_RECIPES: dict[str, LinearRecipe] = {
    "moco-v2": LinearRecipe("MoCo v2, DenseCL", "sgd", 30.0, 256, 100, "steps", (60, 80)),
    "regioncl-m": LinearRecipe("RegionCL-M's log: batch 1024", "sgd", 30.0, 1024, 100, "steps", (60, 80)),
    "simsiam": LinearRecipe("SimSiam: 0.1 for each 256 images", "lars", 1.6, 4096, 90, "cosine-epoch"),
    "moco-v3": LinearRecipe("MoCo v3: 0.1 for each 256 images", "sgd", 0.4, 1024, 90, "cosine-epoch"),
    # SwinTransformer/Transformer-SSL, moby_linear.py: the backbone is in training mode, the rate falls to 5e-6.
    "moby": LinearRecipe(
        "MoBY: drop-path in training",
        "nesterov",
        1.0,
        512,
        100,
        "cosine-step",
        warmup_epochs=5,
        cosine_from="run-start",
        final_factor=5e-6,
        drop_path=0.2,
    ),
    "care": LinearRecipe("CARE: BatchNorm after the linear layer", "sgd", 0.2, 256, 80, "cosine-step", batch_norm=True),
    "lewel-b": LinearRecipe("LEWEL-B", "sgd", 0.4, 256, 50, "steps", (30, 40)),
    "lewel-m": LinearRecipe("LEWEL-M", "lars", 3.2, 4096, 90, "cosine-epoch"),
    "simclr": LinearRecipe("SimCLR", "nesterov", 1.6, 4096, 90, "cosine-step", weight_decay=1e-6),
    "moco-v3-vit": LinearRecipe("MoCo v3 with a ViT", "sgd", 12.0, 1024, 90, "cosine-epoch"),
    "swav": LinearRecipe("SwAV", "sgd", 0.3, 256, 100, "cosine-epoch", weight_decay=1e-6),
    "barlow-twins": LinearRecipe("Barlow Twins", "sgd", 0.3, 256, 100, "cosine-epoch", weight_decay=1e-6),
    # Ours: no augmentation, so features are computed once and the optimum is exact; `lr` is then the L2 strength.
    "logistic": LinearRecipe("multinomial logistic regression on centre views", "lbfgs", 1e-4, 0, 0),
}

RECIPE_OF_METHOD: dict[str, str] = {
    "moco-v2": "moco-v2",
    "densecl": "moco-v2",
    "unmix": "moco-v2",
    "regioncl-m": "regioncl-m",
    "regioncl-d": "regioncl-m",
    "simsiam": "simsiam",
    "regioncl-s": "simsiam",
    "moco-v3": "moco-v3",
    "regioncl-m3": "moco-v3",
    "moby": "moby",
    "regioncl-moby": "moby",
    "byol": "lewel-b",
    "care": "care",
    "lewel-b": "lewel-b",
    "lewel-m": "lewel-m",
    "simclr": "simclr",
    "barlow-twins": "barlow-twins",
    "swav": "swav",
    # Its code has MoCo's rate and batch, with a cosine; no command of it is published.
    "pixpro": "moco-v2",
}
