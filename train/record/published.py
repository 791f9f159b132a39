"""Published figures of the methods, to put beside a run, and what keeps the two from being comparable.

The figures are in `published.csv`: those of the papers and their repositories, none is a result of this project.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TABLE = Path(__file__).with_name("published.csv")
DATA_IMAGES = {"ImageNet-1K": 1_281_167, "ImageNet-100": 126_689}
"""Training images of the data sets that published backbones were trained on."""
_COMPARED_APART = ("arch", "epochs", "image_size", "global_batch")
_WORDY = ("detect", "segment")
"""Protocols whose tasks are words, so that one can be like another."""
_NAMED_BOX_HEADS = ("4conv1fc",)
"""Box heads that the name of a task contains: another head is another detector, never a similar one."""
_NO_DIFFERENCE = ("augment.implementation",)
"""Which code computes a value is no difference of protocol."""


@dataclass(frozen=True)
class Published:
    """Figures of one backbone under one protocol.

    Attributes:
        method: method name as in `METHODS`, or "supervised".
        arch: backbone.
        epochs: length of pre-training, 0 where it was not stated.
        data: what it was pre-trained on, a key of `DATA_IMAGES`.
        protocol: protocol of `train/evaluate.py` ("pose" has none).
        task: which of the protocol's variants: neighbours, share of the labels, or data set and model; may be empty.
        flags: settings of the run that belong to the figure, each with the values that mean it.
        figures: name -> percent.
        source: who reported it, and what is special.
    """

    method: str
    arch: str
    epochs: int
    data: str
    protocol: str
    task: str
    flags: Mapping[str, tuple[str, ...]]
    figures: Mapping[str, float]
    source: str


def read_published(path: Path = _TABLE) -> tuple[Published, ...]:
    """The rows of the table.

    `flags` and `figures` are `name=value` pairs apart by blanks; alternatives of a flag's value are apart by `|`.
    """

    def pairs(text: str) -> dict[str, str]:
        return dict(pair.split("=") for pair in text.split())

    with path.open(newline="", encoding="utf-8") as stream:
        return tuple(
            Published(
                row["method"],
                row["arch"],
                int(row["epochs"]),
                row["data"],
                row["protocol"],
                row["task"],
                {name: tuple(value.split("|")) for name, value in pairs(row["flags"]).items()},
                {name: float(value) for name, value in pairs(row["figures"]).items()},
                row["source"],
            )
            for row in csv.DictReader(stream)
        )


PUBLISHED = read_published()


def _setting(config: Mapping[str, Any], flag: str) -> Any:
    """The value of a flag such as `region.lower` in a run's `config.json`, None where the run has no such flag."""
    for part in ("model", "recipe"):
        value: Any = config.get(part, {})
        for name in flag.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _means(value: Any, text: str) -> bool:
    # A bool is an int in Python, so `float("1") == True` would hold.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).lower() == text
    try:
        return float(text) == value
    except ValueError:
        return False


def flag_fits(config: Mapping[str, Any], flag: str, values: Sequence[str]) -> bool:
    """Whether a run's setting has one of the values that a published figure belongs to.

    Args:
        config: a run's `config.json`; "recipe" and "model" are enough.
        flag: name of the setting, such as `region.lower`.
        values: as `published.csv` writes them.
    """
    return any(_means(_setting(config, flag), value) for value in values)


def _trained_on(images: int | None) -> str:
    """The published data set that a run's number of images is nearest to being."""
    small = DATA_IMAGES["ImageNet-100"]
    # With a twentieth of tolerance, since a copy may lack images.
    return "ImageNet-100" if images is not None and abs(images - small) < 0.05 * small else "ImageNet-1K"


def _box_head(task: str) -> str:
    """The box head that a detector's task names; empty for the plain one of two linear layers, which has no name."""
    return next((head for head in _NAMED_BOX_HEADS if head in task.split()), "")


def candidates(config: Mapping[str, Any], protocol: str, task: str, method: str = "") -> list[Published]:
    """The published figures nearest to a run under one protocol: its backbone where there are any, then its schedule.

    Figures of other settings than the run's, such as other region sizes or a symmetric loss, are none of its.

    Args:
        config: the run's `config.json`.
        protocol: protocol whose figures are wanted.
        task: its variant, empty where it has none; of a detector or segmenter the most similar one counts, but only
            one with the same box head.
        method: whose figures; the run's own method when empty.

    Returns:
        All figures of the chosen backbone and schedule; empty where nothing was published.
    """
    recipe = config.get("recipe", {})
    method = method or config.get("run", {}).get("method", "")
    asked = (method, protocol, _trained_on(config.get("data_images")))
    rows = [row for row in PUBLISHED if (row.method, row.protocol, row.data) == asked]
    rows = [row for row in rows if all(flag_fits(config, flag, values) for flag, values in row.flags.items())]
    # Before the nearest task is sought: that looks for the most words in common, and the head is only one of them.
    rows = [row for row in rows if _box_head(row.task) == _box_head(task)]
    wanted = nearest_task(task, [row.task for row in rows]) if protocol in _WORDY else task
    rows = [row for row in rows if row.task == wanted]
    # Without the same backbone the papers' usual one stands there, and the page says that it differs.
    rows = [row for row in rows if row.arch == recipe.get("arch")] or [
        row for row in rows if row.arch in ("resnet50", "swin-t")
    ]
    if not rows:
        return []
    return _nearest_schedule(rows, recipe.get("epochs", 0))


def _nearest_schedule(rows: Sequence[Published], epochs: int) -> list[Published]:
    """The rows of the schedule whose length is nearest to `epochs`."""
    # Of two schedules equally near the shorter one, so that the order of the table does not decide.
    nearest = min({row.epochs for row in rows}, key=lambda schedule: (abs(schedule - epochs), schedule))
    return [row for row in rows if row.epochs == nearest]


def nearest_task(task: str, tasks: Sequence[str]) -> str:
    """The one of `tasks` that shares most words with `task`, the first of equals; empty where none shares any."""

    def shared(other: str) -> int:
        return len(set(task.split()) & set(other.split()))

    best = task if task in tasks else max(tasks, key=shared, default="")
    return best if best and shared(best) else ""


def differences(row: Published, config: Mapping[str, Any]) -> list[str]:
    """Differences between a run's pre-training and that of a published figure, in words.

    Args:
        row: the published figure.
        config: the run's `config.json`.
    """
    recipe, images = config.get("recipe", {}), config.get("data_images")
    found = []
    if images != DATA_IMAGES[row.data]:
        here = "an unknown number of images" if images is None else f"{images:,} images"
        found.append(f"data: {row.data} there, {here} here")
    name, reference = _reference(row)
    pairs: list[tuple[str, Any, Any]] = [
        ("backbone", row.arch, recipe.get("arch")),
        ("epochs", row.epochs or None, recipe.get("epochs")),
        ("image size", 224, recipe.get("image_size")),
        ("global batch", reference.get("global_batch"), recipe.get("global_batch")),
    ]
    found += [f"{what}: {there} there, {ours} here" for what, there, ours in pairs if there not in (None, ours)]
    changed = [
        f"{flag} {ours}, not {there}"
        for flag, there in reference.items()
        if flag not in (*_COMPARED_APART, *_NO_DIFFERENCE)
        and (ours := _setting(config, flag)) is not None
        and ours != there
    ]
    if changed:
        found.append(f"changed from recipe {name}: {'; '.join(changed)}")
    return found


def _reference(row: Published) -> tuple[str, dict[str, Any]]:
    """Name and flat settings of our recipe for a published figure: most of its flags right, then the schedule."""
    # Recipes bring PyTorch with them, which the table alone does not need.
    from train.config import Config, RunConfig
    from train.fields import flatten
    from train.recipes import RECIPES

    found: list[tuple[tuple[int, int], str, dict[str, Any]]] = []
    for name, (method, make) in RECIPES.items():
        if method != row.method:
            continue
        # Through JSON, as the run's own: tuples become lists.
        made = json.loads(json.dumps(Config(RunConfig(), *make()).to_json()))
        wrong = sum(not flag_fits(made, flag, values) for flag, values in row.flags.items())
        if made["recipe"]["image_size"] == 224:
            settings = {**flatten(made["model"]), **flatten(made["recipe"])}
            plain = {flag: leaf.value for flag, leaf in settings.items()}
            found.append(((wrong, abs(made["recipe"]["epochs"] - row.epochs)), name, plain))
    _, name, settings = min(found, key=lambda entry: entry[0], default=((0, 0), "", {}))
    return name, {flag: value for flag, value in settings.items() if flag not in row.flags}
