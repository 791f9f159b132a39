"""What a run is made of: run flags, a recipe, and how the command line resolves to both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models.methods import METHODS
from models.options import option
from models.resnet import BACKBONES
from pipeline.augment import PROFILES

from .errors import UserMistake
from .flags import Leaf, OneLineParser, add_leaf, leaves, parse_flags, replace_leaves
from .optim import OptimConfig, check_optimizer
from .schedules import EmaConfig, ScheduleConfig, ema_at

BnMode = Literal["group", "sync", "plain"]
TWO_VIEW_PROFILES = tuple(name for name, profile in PROFILES.items() if profile.num_views == 2)


@dataclass(frozen=True)
class RunConfig:
    """What varies between runs of one recipe; every field is a flag."""

    method: str = option("", "method to train: " + ", ".join(METHODS))
    data: str = option(
        "", "packed file, folder, list or shard pattern of images; a number of images for --loader synthetic"
    )
    run_dir: str = option("", "folder of the run; runs/METHOD when empty")
    val_data: str = option("", "labelled images for online k-NN, classes as in --data")
    loader: Literal["auto", "ffcv", "dali", "webdataset", "folder", "synthetic"] = option(
        "auto", "where images come from"
    )
    recipe: str = option("", "recipe by name; the method's own when empty")
    max_steps: int = option(0, "stop after this many optimizer steps in total; 0 runs all epochs")
    seed: int = option(0, "every random draw follows from it")
    order: Literal["global", "sharded"] = option("global", "order of samples: any sample next, or blocks in turn")
    init: str = option("", "backbone weights to start from: a run, our backbone file, torchvision or timm weights")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: bf16 from Ampere on, fp16 before, fp32 on CPU"
    )
    compile: bool | None = option(
        None, "compile heads and losses; none: on for CUDA where Triton and a C compiler are there, off for CPU"
    )
    cuda_graph: bool = option(
        False, "replay forward and backward as one CUDA graph, on one GPU; not yet run on a GPU, so off by default"
    )
    deterministic: bool = option(False, "deterministic kernels and a fixed order of summation, for byte-identical runs")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to train")
    workers: int = option(0, "decoding threads of this process; 0 follows from the cores it may use")
    micro_batch: int = option(0, "images per device and forward pass; 0 is the whole batch per device")
    knn_every: int = option(10, "epochs between online k-NN and health figures; 0 only at the start and the end")
    checkpoint_every: int = option(1000, "steps between checkpoints; the end of the run always has one")
    keep_checkpoints: int = option(2, "newest checkpoints kept")
    resume: Literal["auto", "never"] = option("auto", "auto continues from the run folder's newest good checkpoint")
    log_every: int = option(10, "steps between rows of metrics; the only time the host waits for the device")
    holdout: int = option(500, "images held out of training for health figures without --val-data (at most 5 percent)")
    report: bool = option(True, "write report.html into the run's folder at the end")
    dry_run: bool = option(False, "print what would run, and stop")


@dataclass(frozen=True)
class BnConfig:
    """Which images share batch-normalisation statistics (methods.md 1.2)."""

    mode: BnMode = option(
        "group", "group: consecutive images of the global batch; sync: all of it; plain: the rank's batch"
    )
    group_size: int = option(
        0, "images that share statistics in mode group, and that exchange regions in any; 0 is the rank's whole batch"
    )


@dataclass(frozen=True)
class AugmentConfig:
    """Which augmentation profile runs, and what of it is changed."""

    profile: str = option("mocov2", "augmentation profile: " + ", ".join(TWO_VIEW_PROFILES))
    min_scale: float = option(0.0, "smallest crop area relative to the image; 0 keeps the profile's")
    implementation: Literal["auto", "reference", "native", "kernel"] = option(
        "auto", "which code applies the augmentation"
    )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is computed. Values and their sources are in `recipes.py`."""

    arch: str = option("resnet50", "backbone architecture: " + ", ".join(BACKBONES))
    image_size: int = option(224, "side of a view in pixels")
    epochs: int = option(200, "epochs to train")
    global_batch: int = option(256, "images of one optimizer step over all devices and micro-batches")
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    bn: BnConfig = field(default_factory=BnConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class Config:
    """A resolved run: three dataclasses whose fields never collide, so that each is one flat set of flags."""

    run: RunConfig
    recipe: Recipe
    model: Any

    def to_json(self) -> dict[str, Any]:
        """Nested plain values, as in `config.json`."""
        return {part: dataclasses.asdict(getattr(self, part)) for part in ("run", "recipe", "model")}


# May change between a run and its continuation without changing what is computed.
FREE_ON_RESUME = frozenset(
    "data run_dir val_data loader recipe max_steps init compile cuda_graph deterministic device workers knn_every "
    "checkpoint_every keep_checkpoints resume log_every report dry_run".split()
)


def changed_fields(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Names of the fields in which a continued run would compute something else, as `name: saved -> current`.

    An option that either version does not have yet counts at its default, which computes what was computed without it.
    """
    saved, current = _with_defaults(saved), _with_defaults(current)
    changes = []

    def walk(before: Any, now: Any, path: tuple[str, ...]) -> None:
        if isinstance(now, dict):
            for name in sorted(set(now) | set(before if isinstance(before, dict) else {})):
                inner = before.get(name) if isinstance(before, dict) else None
                walk(inner, now.get(name), (*path, name))
        elif now != before and path[-1] not in FREE_ON_RESUME:
            changes.append(f"{'.'.join(path[1:])}: {before} -> {now}")

    for part in ("run", "recipe", "model"):
        walk(saved[part], current[part], (part,))
    return changes


def _with_defaults(document: dict[str, Any]) -> dict[str, Any]:
    """The parts of a `config.json` as plain JSON values, with the default of every option that it does not have."""

    def fill(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        filled = {**defaults, **given}
        nested = [name for name in defaults.keys() & given.keys() if isinstance(defaults[name], dict)]
        return filled | {name: fill(defaults[name], given[name]) for name in nested}

    defaults = Config(RunConfig(), Recipe(), METHODS[document["run"]["method"]].Config()).to_json()
    filled = fill(defaults, {part: document[part] for part in defaults})
    plain: dict[str, Any] = json.loads(json.dumps(filled))
    return plain


def _peek(argv: Sequence[str], name: str) -> str:
    """The value of a flag that decides which other flags exist, before those are known."""
    for position, argument in enumerate(argv):
        if argument == f"--{name}" and position + 1 < len(argv):
            return argv[position + 1]
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]
    return ""


def _from_json(default: Any, saved: dict[str, Any]) -> Any:
    """The dataclass `default` with the values of a `config.json`; unknown names are refused."""
    values = {}
    known = {leaf.path: leaf for leaf in leaves(default)}

    def walk(node: dict[str, Any], path: tuple[str, ...]) -> None:
        for name, value in node.items():
            here = (*path, name)
            if isinstance(value, dict):
                walk(value, here)
            elif here not in known:
                raise UserMistake(
                    f"config field {'.'.join(here)} does not exist in this version; remove it from the file"
                )
            else:
                values[here] = tuple(value) if isinstance(value, list) else value

    walk(saved, ())
    return replace_leaves(default, values)


def _read_config_file(path: str) -> dict[str, Any]:
    try:
        loaded = json.loads(Path(path).read_text())
    except (OSError, ValueError) as reason:
        raise UserMistake(f"--config {path}: {reason}; give the config.json of a run") from None
    if not isinstance(loaded, dict) or not {"run", "recipe", "model"} <= set(loaded):
        raise UserMistake(f"--config {path}: not a run's config.json (needs run, recipe and model)")
    return loaded


def _choose_method(argv: Sequence[str], saved: dict[str, Any]) -> str:
    method = _peek(argv, "method") or saved.get("run", {}).get("method", "")
    if method and method not in METHODS:
        raise UserMistake(f"--method {method}: choose from {', '.join(METHODS)}")
    return method


def _check(config: Config) -> None:
    """Refuse what cannot work, before anything is built."""
    least = {
        "epochs": (config.recipe.epochs, 1),
        "global-batch": (config.recipe.global_batch, 2),  # one image has no statistics and no negatives
        "image-size": (config.recipe.image_size, 8),
        "log-every": (config.run.log_every, 1),
        "checkpoint-every": (config.run.checkpoint_every, 1),
        "keep-checkpoints": (config.run.keep_checkpoints, 1),
    }
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise UserMistake(f"--{name} {value}: must be at least {smallest}")
    for name in ("max_steps", "workers", "micro_batch", "knn_every", "holdout"):
        if getattr(config.run, name) < 0:
            raise UserMistake(f"--{name.replace('_', '-')} {getattr(config.run, name)}: must not be negative")
    if not 0 <= config.run.seed < 2**31:
        raise UserMistake(f"--seed {config.run.seed}: must be 0 to {2**31 - 1}")
    try:
        check_optimizer(config.recipe.optim)
        ema_at(0, 1, config.recipe.ema)
    except ValueError as reason:
        raise UserMistake(f"--{reason}") from None
    _check_schedule(config.recipe.schedule)
    _check_augment(config.recipe.augment)
    for leaf in leaves(config.model):
        if leaf.positive and leaf.default <= 0:
            raise UserMistake(f"{leaf.flag} {leaf.default}: must be above 0")


def _check_schedule(schedule: ScheduleConfig) -> None:
    for name in ("final", "warmup_epochs", "warmup_start", "warmup_offset"):
        value = getattr(schedule, name)
        if value < 0:
            raise UserMistake(f"--schedule.{name.replace('_', '-')} {value}: must not be negative")


def _check_augment(augment: AugmentConfig) -> None:
    if augment.profile not in TWO_VIEW_PROFILES:
        raise UserMistake(
            f"--augment.profile {augment.profile}: has no two views; choose from {', '.join(TWO_VIEW_PROFILES)}"
        )
    if not 0 <= augment.min_scale <= 1:
        raise UserMistake(f"--augment.min-scale {augment.min_scale}: a share of the image's area, give 0 to 1")


def resolve(argv: Sequence[str]) -> Config:
    """The configuration that a command line asks for: recipe, then `--config` file, then flags.

    Raises:
        UserMistake: naming the flag, its value and the remedy.
    """
    from .recipes import RECIPES, default_recipe

    config_file = _peek(argv, "config")
    saved = _read_config_file(config_file) if config_file else {}
    method = _choose_method(argv, saved)
    wants_help = any(argument in ("-h", "--help") for argument in argv)
    if not method and not wants_help:
        raise UserMistake(f"--method is needed: one of {', '.join(METHODS)}")
    recipe_name = (
        _peek(argv, "recipe") or saved.get("run", {}).get("recipe", "") or default_recipe(method or "regioncl-m")
    )
    if recipe_name not in RECIPES:
        fitting = [name for name, (owner, _) in RECIPES.items() if owner == method]
        raise UserMistake(f"--recipe {recipe_name}: choose from {', '.join(fitting)}")
    owner, make = RECIPES[recipe_name]
    if method and owner != method:
        raise UserMistake(f"--recipe {recipe_name} belongs to --method {owner}, not to {method}")
    recipe, model = make()
    run = RunConfig(method=method, recipe=recipe_name)
    if saved:
        run, recipe, model = (
            _from_json(default, saved[part]) for default, part in ((run, "run"), (recipe, "recipe"), (model, "model"))
        )
    return _apply_flags(argv, Config(run, recipe, model), show_model=bool(method))


def _apply_flags(argv: Sequence[str], config: Config, show_model: bool) -> Config:
    parser = OneLineParser(
        prog="train/main.py",
        allow_abbrev=False,
        description="Train a backbone without labels. Give --method to see that method's own flags in this help.",
    )
    parser.add_argument("--config", metavar="RUN.json", default=None, help="start from a run's config.json")
    parts = {"run": config.run, "recipe": config.recipe, "model": config.model}
    fields: list[Leaf] = []
    for part, value in parts.items():
        if part == "model" and not show_model:
            continue
        group = parser.add_argument_group(
            {"run": "run", "recipe": "recipe", "model": f"method {config.run.method}"}[part]
        )
        for leaf in leaves(value):
            add_leaf(group, leaf)
            fields.append(leaf)
    values = parse_flags(parser, _without_config(argv), fields)
    owner = {leaf.path: part for part, value in parts.items() for leaf in leaves(value)}
    parts = {
        part: replace_leaves(value, {path: v for path, v in values.items() if owner[path] == part})
        for part, value in parts.items()
    }
    run = parts["run"]
    if not run.run_dir:
        parts["run"] = dataclasses.replace(run, run_dir=f"runs/{run.method}")
    resolved = Config(**parts)
    _check(resolved)
    return resolved


def _without_config(argv: Sequence[str]) -> list[str]:
    """The arguments less `--config FILE`, which is read before flags are."""
    kept: list[str] = []
    skip = False
    for argument in argv:
        if skip:
            skip = False
        elif argument == "--config":
            skip = True
        elif not argument.startswith("--config="):
            kept.append(argument)
    return kept
