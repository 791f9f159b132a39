"""Every published recipe against the optimisation table of methods.md 1.5, value by value, and the heads of 1.3."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.methods import METHODS
from train.config import Recipe
from train.errors import UserMistake
from train.recipes import RECIPES
from train.resolve import resolve
from train.schedules import scaled_lr


@dataclass(frozen=True)
class Row:
    """One line of the table; `lr` is the actual learning rate, "sync" batch norm spans the global batch."""

    kind: str
    lr: float
    batch: int
    decay: float
    exclude: str
    warmup: int
    schedule: str
    ema: tuple[float, str]
    epochs: int
    group: int | str
    profile: str
    arch: str = "resnet50"
    model: tuple[tuple[str, Any], ...] = ()


CONSTANT, TO_ONE = (0.999, "constant"), "cosine"
MOCO = (("queue_size", 65536), ("temperature", 0.2), ("dim", 128), ("hidden_dim", 2048))
V3 = (("temperature", 1.0), ("dim", 256), ("hidden_dim", 4096))
MOBY = (("queue_size", 4096), ("temperature", 0.2), ("dim", 256), ("hidden_dim", 4096), ("drop_path", 0.2))
CARE = (
    ("lambda_att", 100.0),
    ("n_blocks", 5),
    ("heads", 4),
    ("pos", "relative"),
    ("t_bn_group_size", 128),
    ("att_loss", "mse_mean"),
    ("t_input", "layer3"),
    ("t_zero_init", False),
)
CONV_STREAM = (("design", "conv"), ("dim", 256), ("hidden_dim", 4096))
LEWEL = (("beta", 0.5), ("h", 4), ("grouping", "contiguous"))
EMAN, OWN = (("momentum_norm", "ema"),), (("momentum_norm", "own"),)
ZERO_INIT = (("zero_init_residual", True),)


def moco(lr: float, batch: int, epochs: int, group: int, model: tuple[tuple[str, Any], ...] = MOCO) -> Row:
    return Row("sgd", lr, batch, 1e-4, "none", 0, "cosine-epoch", CONSTANT, epochs, group, "mocov2", model=model)


def v3(lr: float, decay: float, start: float, epochs: int) -> Row:
    return Row(
        "lars", lr, 4096, decay, "1d", 10, "cosine-step", (start, TO_ONE), epochs, "sync", "byol-mocov3", model=V3
    )


def vit(arch: str, *model: tuple[str, Any]) -> Row:
    shared = ("adamw", 2.4e-3, 4096, 0.1, "none", 40, "cosine-step", (0.99, TO_ONE), 300, "sync", "byol-mocov3")
    return Row(*shared, arch, (("dim", 256), ("hidden_dim", 4096), ("zero_init_residual", False), *model))


VIT_HEADS = (("temperature", 0.2), ("projector_layers", 3), ("predictor_norm", True))


def moby(epochs: int) -> Row:
    return Row(
        "adamw", 1e-3, 512, 0.05, "1d", 5, "cosine-step", (0.99, TO_ONE), epochs, "sync", "byol-moby", "swin-t", MOBY
    )


def care(epochs: int) -> Row:
    return Row(
        "sgd", 0.2, 1024, 1e-4, "none", 10, "cosine-step", (0.99, TO_ONE), epochs, "sync", "byol-care", model=CARE
    )


def byol(lr: float, decay: float, start: float, epochs: int) -> Row:
    return Row(
        "lars",
        lr,
        4096,
        decay,
        "bias_bn",
        10,
        "cosine-step",
        (start, TO_ONE),
        epochs,
        "sync",
        "byol",
        model=OWN + ZERO_INIT,
    )


def eman(decay: float, epochs: int, model: tuple[tuple[str, Any], ...], lr: float = 3.6) -> Row:
    return Row(
        "lars",
        lr,
        1024,
        decay,
        "bias_bn",
        10,
        "cosine-epoch",
        (0.98, TO_ONE),
        epochs,
        128,
        "byol-lewel",
        model=EMAN + model,
    )


SIMSIAM = Row(
    "sgd",
    0.1,
    512,
    1e-4,
    "none",
    0,
    "cosine-epoch",
    CONSTANT,
    100,
    "sync",
    "mocov2",
    model=(("fixed_predictor_lr", True), ("dim", 2048), ("predictor_hidden_dim", 512)),
)
TABLE = {
    "moco-v2": moco(0.03, 256, 200, 32),
    "moco-v1": Row(
        "sgd",
        0.03,
        256,
        1e-4,
        "none",
        0,
        "steps",
        CONSTANT,
        200,
        32,
        "mocov1",
        model=(("queue_size", 65536), ("temperature", 0.07), ("dim", 128), ("mlp", False)),
    ),
    "moco-v2-800ep": moco(0.03, 256, 800, 32),
    "moco-v2-symmetric-800ep": moco(0.03, 256, 800, 32),
    "moco-v2-in100": moco(0.06, 256, 240, 32),
    "regioncl-m": moco(0.15, 1024, 200, 128),
    "regioncl-m-100ep": moco(0.15, 1024, 100, 128),
    "regioncl-m-800ep": moco(0.15, 1024, 800, 128),
    "regioncl-m-symmetric-800ep": moco(0.15, 1024, 800, 128),
    "densecl": moco(0.03, 256, 200, 32, (*MOCO, ("dense_weight", 0.5), ("dense_warmup_steps", 0))),
    "regioncl-d": moco(0.03, 256, 200, 32, (*MOCO, ("dense_weight", 0.5))),
    "unmix": moco(0.03, 256, 200, 32, (*MOCO, ("beta", 1.0), ("global_mixtures", 0.5))),
    "unmix-800ep": moco(0.03, 256, 800, 32, (*MOCO, ("beta", 1.0), ("global_mixtures", 0.5))),
    "simsiam": SIMSIAM,
    "regioncl-s": SIMSIAM,
    "moco-v3": v3(9.6, 1e-6, 0.99, 100),
    "moco-v3-300ep": v3(4.8, 1e-6, 0.99, 300),
    "moco-v3-1000ep": v3(4.8, 1.5e-6, 0.996, 1000),
    "moco-v3-vit-s": vit("vit-s", *VIT_HEADS),
    "moco-v3-vit-b": vit("vit-b", *VIT_HEADS),
    "byol-paper-vit-s": vit("vit-s", *OWN),
    "byol-paper-vit-b": vit("vit-b", *OWN),
    "regioncl-m3": v3(4.8, 1.5e-6, 0.996, 1000),
    "moby": moby(300),
    "moby-100ep": moby(100),
    "regioncl-moby": moby(300),
    "regioncl-moby-100ep": moby(100),
    "byol": eman(1e-6, 200, (("head_bias", False),)),
    "byol-100ep": eman(1e-6, 100, (("head_bias", False),)),
    "byol-in100": eman(1e-6, 240, (("head_bias", False),), 7.2),
    "byol-paper-100ep": byol(7.2, 1e-6, 0.99, 100),
    "byol-paper-300ep": byol(4.8, 1e-6, 0.99, 300),
    "byol-paper-1000ep": byol(3.2, 1.5e-6, 0.996, 1000),
    "care": care(100),
    "care-conv": replace(care(100), model=CONV_STREAM),
    "care-conv-200ep": replace(care(200), model=CONV_STREAM),
    "care-200ep": care(200),
    "care-400ep": care(400),
    "care-800ep": care(800),
    "lewel-m": moco(0.06, 256, 200, 32, (*MOCO, *LEWEL, ("c", 0))),
    "lewel-m-100ep": moco(0.06, 256, 100, 32, (*MOCO, *LEWEL, ("c", 0))),
    "lewel-m-in100": moco(0.12, 256, 240, 32, (*MOCO, *LEWEL)),
    "lewel-b": eman(1.5e-6, 200, (*LEWEL, ("dim", 256), ("c", 0), ("hidden_dim", 4096))),
    "lewel-b-100ep": eman(1e-6, 100, LEWEL),
    "lewel-b-in100": eman(1e-6, 240, LEWEL, 7.2),
    "lewel-b-400ep": Row(
        "lars",
        7.2,
        4096,
        1e-6,
        "bias_bn",
        10,
        "cosine-epoch",
        (0.996, TO_ONE),
        400,
        "sync",
        "byol-lewel",
        model=OWN + LEWEL,
    ),
}


TABLE |= {
    name: Row(
        "lars",
        4.8,
        4096,
        1e-6,
        "bias_bn",
        10,
        "cosine-step",
        CONSTANT,
        epochs,
        "sync",
        "simclr",
        model=(("temperature", 0.1), ("dim", 128), ("hidden_dim", 2048)),
    )
    for name, epochs in (("simclr", 100), ("simclr-1000ep", 1000))
}


TABLE["barlow-twins"] = Row(
    "lars",
    1.6,
    2048,
    1e-6,
    "1d",
    10,
    "cosine-step",
    CONSTANT,
    1000,
    "sync",
    "byol",
    model=(("off_diagonal_weight", 0.0051), ("loss_scale", 1 / 16), ("dim", 8192), ("hidden_dim", 8192)),
)


def swav(lr: float, batch: int, warmup: int, epochs: int, *model: tuple[str, Any]) -> Row:
    shared = (("temperature", 0.1), ("sinkhorn_epsilon", 0.05), ("sinkhorn_iterations", 3), ("prototypes", 3000))
    heads = (("dim", 128), ("hidden_dim", 2048), ("small_size", 96), ("small_scale", (0.05, 0.14)))
    last = ("lars", lr, batch, 1e-6, "none", warmup, "cosine-step", CONSTANT, epochs, "sync", "swav")
    return Row(*last, model=(*shared, *heads, *model))


NO_QUEUE = (("small_crops", 6), ("queue_size", 0), ("freeze_prototypes_steps", 313))
SMALL_BATCH = (
    ("small_crops", 6),
    ("queue_size", 3840),
    ("queue_start_epoch", 15),
    ("freeze_prototypes_steps", 5005),
)
TABLE |= {
    "swav": swav(4.8, 4096, 10, 200, *NO_QUEUE),
    "swav-100ep": swav(4.8, 4096, 10, 100, *NO_QUEUE),
    "swav-400ep": swav(4.8, 4096, 10, 400, *NO_QUEUE),
    "swav-800ep": swav(4.8, 4096, 10, 800, *NO_QUEUE),
    "swav-2x224-400ep": swav(4.8, 4096, 10, 400, ("small_crops", 0), ("queue_size", 0)),
    "swav-bs256-200ep": swav(0.6, 256, 0, 200, *SMALL_BATCH),
    "swav-bs256-400ep": swav(0.6, 256, 0, 400, *SMALL_BATCH),
}


TABLE |= {
    name: Row(
        "lars",
        4.0,
        1024,
        1e-5,
        "1d",
        5,
        "cosine-step",
        (0.99, TO_ONE),
        epochs,
        "sync",
        "byol-moby",
        model=(
            *(("dim", 256), ("hidden_dim", 4096), ("reach", 0.7), ("sharpness", 2.0), ("transform_layers", 1)),
            *(("distance", "sides"), ("unit_values", True), ("loss_scale", 2.0)),
        ),
    )
    for name, epochs in (("pixpro", 100), ("pixpro-400ep", 400))
}


def row_of(recipe: Recipe, model: Any, wanted: Row) -> Row:
    optim, schedule = recipe.optim, recipe.schedule
    return Row(
        optim.kind,
        round(scaled_lr(optim, recipe.global_batch), 9),
        recipe.global_batch,
        optim.weight_decay,
        optim.exclude,
        schedule.warmup_epochs,
        schedule.decay,  # type: ignore[arg-type]
        (recipe.ema.momentum, recipe.ema.schedule),
        recipe.epochs,
        "sync" if recipe.bn.mode == "sync" else recipe.bn.group_size,
        recipe.augment.profile,
        recipe.arch,
        tuple((name, getattr(model, name)) for name, _ in wanted.model),
    )


@pytest.mark.parametrize("name", TABLE)
def test_recipe_is_its_line_of_the_table(name: str) -> None:
    recipe, model = RECIPES[name][1]()
    assert row_of(recipe, model, TABLE[name]) == TABLE[name]
    assert recipe.image_size == 224 and recipe.optim.sgd_momentum == 0.9
    # The learning rate scales linearly with the batch; which batch it belongs to, the table says as well.
    assert recipe.optim.lr_reference_batch == (512 if "moby" in name else 256)


def test_every_published_recipe_has_a_line() -> None:
    assert set(TABLE) == {name for name in RECIPES if not name.endswith(("-small", "-quick"))}


@pytest.mark.parametrize("method", METHODS)
def test_small_recipes_of_all_methods_have_equal_optimizer_schedule_and_images(method: str) -> None:
    recipe, _ = RECIPES[f"{method}-small"][1]()
    # Methods that regress a momentum network are a family of their own, with a higher rate.
    family = "byol" if method in ("byol", "care", "lewel-b", "pixpro") else "moco-v2"
    other, _ = RECIPES[f"{family}-small"][1]()
    same = ("image_size", "epochs", "global_batch", "optim", "schedule")
    assert [getattr(recipe, name) for name in same] == [getattr(other, name) for name in same]
    assert recipe.arch == ("swin-t" if "moby" in method else "resnet18")


@pytest.mark.parametrize("name", TABLE)
def test_ends_of_schedules_and_forms_of_lars(name: str) -> None:
    recipe, model = RECIPES[name][1]()
    schedule = recipe.schedule
    assert schedule.milestones == ((120, 160) if name == "moco-v1" else ())
    ends = (schedule.warmup_start, schedule.final, schedule.scale_ends, schedule.warmup_offset, schedule.cosine_origin)
    lewel = name.startswith("lewel-b") or name in ("byol", "byol-100ep", "byol-in100")
    if "moby" in name:
        assert ends == (5e-7, 5e-6, True, 0, "run-start") and recipe.optim.clip_grad_norm == 5.0
        assert recipe.optim.betas == (0.9, 0.999) and recipe.optim.eps == 1e-8
    elif name.startswith("swav"):
        # At the recipe's own batch: 0.3 (0 without a warm-up), and a thousandth of the peak.
        share = recipe.global_batch / 256
        assert (ends[0] * share, ends[1] * share) == pytest.approx(
            (0.3, 0.0048) if schedule.warmup_epochs else (0, 0.0006)
        )
        assert ends[2:] == (True, 0, "warmup-end") and recipe.optim.clip_grad_norm == 0.0
        assert recipe.augment.min_scale == (0.08 if "2x224" in name else 0.0)
    elif name.startswith("pixpro"):
        # At batch 1024: a hundredth of the peak of 4, and the scheduler's eta_min.
        assert (ends[0] * 4, ends[1] * 4) == pytest.approx((0.04, 1e-6), rel=1e-12)
        assert ends[2:] == (True, 0, "warmup-end") and recipe.optim.clip_grad_norm == 0.0
    elif name == "barlow-twins":
        assert ends == (0.0, 2e-4, True, 0, "warmup-end") and recipe.optim.clip_grad_norm == 0.0
    else:
        start = 1e-6 if name.startswith("care") else 0.0
        assert ends == (start, 0.0, False, int(lewel), "warmup-end") and recipe.optim.clip_grad_norm == 0.0
    assert recipe.optim.lars.lr_in_buffer == (lewel or name.startswith("simclr")) and recipe.optim.lars.trust == 1e-3
    assert recipe.optim.excluded_lr_share * recipe.optim.lr == pytest.approx(
        0.0048 if name == "barlow-twins" else recipe.optim.lr
    )
    assert recipe.optim.lars.denominator == {"simclr": "joint", "swav": "larc"}.get(name.partition("-")[0], "auto")
    if hasattr(model, "symmetric"):
        wanted = ("symmetric" in name, "sum", "both")
        assert (model.symmetric.enabled, model.symmetric.reduce, model.symmetric.enqueue) == wanted


def test_the_zero_started_norms_are_those_of_the_papers_that_have_them() -> None:
    """The codes of these methods do so; LEWEL's code base, MoCo and CARE do not."""
    started = {name for name in TABLE if getattr(RECIPES[name][1]()[1], "zero_init_residual", False)}
    bases = ("simsiam", "regioncl-s", "moco-v3", "regioncl-m3", "byol-paper", "simclr", "barlow-twins", "pixpro")
    assert started == {name for name in TABLE if name.startswith(bases) and "vit" not in name}


@pytest.mark.parametrize(("method", "dim"), [("lewel-b", 64), ("lewel-b", 512), ("lewel-m", 64)])
def test_the_aligned_width_follows_the_projectors_unless_it_is_given(method: str, dim: int) -> None:
    """LEWEL section 3.3: d = c by default, so that Table 7's rows are `--dim` alone."""

    def width(*flags: str) -> int:
        config = resolve(["--method", method, "--dim", str(dim), *flags])
        with torch.device("meta"):
            made: Any = METHODS[method](config.model, arch="resnet18", image_size=64)
        return int(made.projector.aligned_projector[-1].out_features)

    assert width() == dim and width("--c", "32") == 32


@pytest.mark.parametrize("flags", [["--schedule.decay", "steps"], ["--schedule.milestones", "3"]])
def test_milestones_and_the_decay_that_has_them_go_together(flags: list[str]) -> None:
    with pytest.raises(UserMistake, match="milestones"):
        resolve(["--method", "moco-v2", *flags])
    both = ["--method", "moco-v2", "--schedule.decay", "steps", "--schedule.milestones", "3,5"]
    assert resolve(both).recipe.schedule.milestones == (3, 5)


# Equations, tables and figures that the three papers, and PixPro's, have.
NUMBERED = {
    "RegionCL": {"Eq.": 3, "Table": 10, "Fig.": 4},
    "CARE": {"Eq.": 5, "Table": 8, "Fig.": 4},
    "LEWEL": {"Eq.": 5, "Table": 7, "Fig.": 3},
    "PixPro": {"Eq.": 5},
}
ELSEWHERE = "MoCo|DenseCL|SimSiam|SimCLR|SwAV|BYOL|EMAN|Swin|Selvaraju|Barlow|Un-Mix|" + "|".join(NUMBERED)


def citations() -> list[tuple[str, str, str, int]]:
    """(place, paper, kind, number) of each numbered thing of those papers that a `Source:` in the code names."""
    root = Path(__file__).resolve().parents[1]
    found = []
    for path in sorted(path for folder in ("models", "train", "pipeline") for path in (root / folder).rglob("*.py")):
        for source in re.findall(r"Source: (.+?)(?:\n\s*\n|\"\"\"|\n\s*Differs)", path.read_text(), re.DOTALL):
            # A citation belongs to the paper named last before it.
            for paper, text in re.findall(rf"({ELSEWHERE})\b(.*?)(?=(?:{ELSEWHERE})\b|$)", source, re.DOTALL):
                numbers = re.findall(r"(Eq\.|Tables?|Fig\.) ((?:\d+(?:, | and | to |-)?)+)", text)
                found += [
                    (f"{path.relative_to(root)}", paper, kind.rstrip("s"), int(number))
                    for kind, listed in numbers
                    for number in re.findall(r"\d+", listed)
                    if paper in NUMBERED
                ]
    return found


def test_citations_name_equations_and_tables_that_the_papers_have() -> None:
    found = citations()
    assert [each for each in found if each[3] > NUMBERED[each[1]].get(each[2], 0)] == []
    assert {paper for _, paper, _, _ in found} == set(NUMBERED) and len(found) > 20
