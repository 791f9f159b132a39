"""From a row of a paper's table to the recipe and flags that pre-train it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.hyperparameters import ARCHITECTURES
from tools.reproduction.tables import Backbone, Cell, Table
from train.recipes import RECIPES
from train.record.published import flag_fits


@dataclass(frozen=True)
class Training:
    """Pre-training of one row as `train/main.py` is told it.

    Attributes:
        method: name in `METHODS`, or "supervised", which is not trained here.
        recipe: name in `RECIPES`; empty for "supervised".
        flags: beside the recipe, in pairs of flag and value.
        arch: backbone.
    """

    method: str
    recipe: str
    flags: tuple[str, ...]
    arch: str

    @property
    def name(self) -> str:
        """A folder name: equal for equal pre-training, in whichever table it stands."""
        pairs = zip(self.flags[::2], self.flags[1::2], strict=True)
        return "-".join([self.recipe or self.method, *(f"{flag.lstrip('-')}={value}" for flag, value in pairs)])

    @property
    def missing(self) -> str:
        """Why it cannot be trained here; empty where it can."""
        return "" if self.arch in ARCHITECTURES else f"there is no backbone {self.arch}"


@dataclass(frozen=True)
class Line:
    """A line of the printed table: one pre-training and every measurement on it."""

    training: Training
    cells: tuple[Cell, ...]


def lines(table: Table) -> list[Line]:
    """The lines of a table; rows with equal pre-training are one, and a figure that two sources have stands once."""
    found: dict[Training, list[Cell]] = {}
    for row in table.rows():
        own = found.setdefault(training_of(row.backbone, table), [])
        known = {cell.name for cell in own}
        own += [cell for cell in row.cells if cell.name not in known]
    return [Line(training, tuple(cells)) for training, cells in found.items()]


def training_of(backbone: Backbone, table: Table) -> Training:
    """The recipe that needs the fewest flags to train a backbone, and those flags."""
    if backbone.method == "supervised":
        return Training("supervised", "", (), backbone.arch)
    base = table.recipes.get(backbone.method, backbone.method)
    names = [name for name in RECIPES if _is_variant(name, base, backbone)]
    usual = RECIPES[backbone.method][1]()[0].arch

    def distance(name: str) -> tuple[int, int, int, int]:
        # A ViT has another optimizer than a ResNet: recipes of the very backbone first, then those of the usual one.
        made = RECIPES[name][1]()[0].arch
        other = 0 if made == backbone.arch else 1 if made == usual else 2
        # Fewest changes next, then the nearest length; of two lengths equally near the longer one, whose rate is
        # meant for long runs.
        epochs = RECIPES[name][1]()[0].epochs
        return other, len(_settings(backbone, name)), abs(epochs - backbone.epochs), -epochs

    recipe = min(names, key=distance)
    flags = [*_length_and_arch(backbone, recipe), *_settings(backbone, recipe)]
    # The table's own flags last, and only where the row itself says nothing.
    own = table.flags.get(backbone.method, ())
    for flag, value in zip(own[::2], own[1::2], strict=True):
        flags += [] if flag in flags else [flag, value]
    return Training(backbone.method, recipe, tuple(flags), backbone.arch)


def _is_variant(name: str, base: str, backbone: Backbone) -> bool:
    """Whether a recipe is one of the published ones of this method, made for the row's data."""
    if RECIPES[name][0] != backbone.method or not re.fullmatch(rf"{base}(-.+)?", name):
        return False
    if re.search("-(small|quick)$", name):
        return False
    made = [other for other in RECIPES if re.fullmatch(rf"{base}-in100", other)]
    return (name in made) if backbone.data == "ImageNet-100" and made else name not in made


def _length_and_arch(backbone: Backbone, recipe: str) -> list[str]:
    made, _ = RECIPES[recipe][1]()
    pairs = (("--epochs", backbone.epochs, made.epochs), ("--arch", backbone.arch, made.arch))
    return [part for flag, wanted, there in pairs if wanted != there for part in (flag, str(wanted))]


def _settings(backbone: Backbone, recipe: str) -> list[str]:
    """The flags of the settings that the recipe has otherwise."""
    config = recipe_config(recipe)
    wanted = [(name, values) for name, values in backbone.settings if not flag_fits(config, name, values)]
    return [part for name, values in wanted for part in ("--" + name.replace("_", "-"), values[0])]


def recipe_config(recipe: str) -> Mapping[str, Any]:
    """What a recipe sets, in the form of a run's `config.json`."""
    made, model = RECIPES[recipe][1]()
    return {"recipe": dataclasses.asdict(made), "model": dataclasses.asdict(model)}
