"""Plans of training runs on one data set: what is to be run, how far it is, and the row that a finished run gives."""

from __future__ import annotations

import re
import shlex
import statistics
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserMistake
from train.record.run import METRICS, Run, read_run

COLUMNS = (
    "date",
    "commit",
    "plan",
    "method",
    "recipe",
    "flags",
    "seed",
    "arch",
    "image_size",
    "epochs",
    "images",
    "untrained",
    "best",
    "last",
    "linear",
    "view_retrieval",
    "curve",
    "minutes",
    "images_per_s",
    "device",
    "cpu",
    "cores",
)
"""Accuracies are shares; the curve is `epoch:20-NN` of each measurement; minutes are those of training alone."""
TIMED = ("date", "minutes", "images_per_s")
"""Columns that two equal runs may have otherwise."""


@dataclass(frozen=True)
class Planned:
    """One run of a plan.

    Attributes:
        plan: the plan's name.
        method: name in `METHODS`.
        recipe: name in `RECIPES`.
        seed: of every draw.
        common: flags beside the recipe that all runs of the plan have.
        own: those of this run.
        linear: flags of the linear protocol.
    """

    plan: str
    method: str
    recipe: str
    seed: int
    common: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags beside the recipe."""
        return (*self.common, *self.own)

    @property
    def name(self) -> str:
        """Folder of the run below that of the plan: recipe, flags of its own, and seed."""
        words = re.findall(r"[\w.]+", " ".join(self.own))
        return "-".join([self.recipe, *words, f"seed{self.seed}"])

    @property
    def key(self) -> tuple[str, ...]:
        """The columns of the table that tell this run from the others."""
        return (self.plan, self.method, self.recipe, shlex.join(self.flags), str(self.seed))


def read_plan(path: Path) -> list[Planned]:
    """The runs of a plan, all runs of the first seed before those of the second.

    Args:
        path: TOML with `flags`, `seeds` and `linear` (flags of the linear protocol) of all runs, and `[[runs]]` with
            `method` and, where they differ, `recipe` (METHOD-small), `flags` (beside the plan's) and `seeds`. `runs_of`
            names a plan beside this one whose `[[runs]]` come before its own.

    Raises:
        UserMistake: the file cannot be read, lacks something or has a run twice.
    """
    try:
        document = _read(path)
        common = tuple(shlex.split(document.get("flags", "")))
        planned = [
            Planned(
                path.stem,
                run["method"],
                run.get("recipe", f"{run['method']}-small"),
                seed,
                common,
                tuple(shlex.split(run.get("flags", ""))),
                tuple(shlex.split(document.get("linear", ""))),
            )
            for run in _runs(document, path)
            for seed in run.get("seeds", document.get("seeds", [0]))
        ]
    except OSError as error:
        raise UserMistake(f"plan {error.filename} cannot be read: {error.strerror}; plans are in tools/plans") from None
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise UserMistake(f"plan {path}: {error}; it needs [[runs]], each with a method") from None
    twice = [name for name, count in Counter(each.name for each in planned).items() if count > 1]
    if twice:
        raise UserMistake(f"plan {path} has {twice[0]} twice; give each run flags or a seed of its own")
    # Every method once before any method twice: a plan that is cut short has told most then.
    return sorted(planned, key=lambda each: each.seed)


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _runs(document: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The runs of a plan that lies at `path`, those of the plan that it names first."""
    if "runs_of" not in document:
        return list(document["runs"])
    return [*_read(path.with_name(f"{document['runs_of']}.toml"))["runs"], *document.get("runs", [])]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: last step that was recorded.
        last_step: step at which it ends; 0 before it has begun.
        seconds_left: at the rate of its last rows; None before there are any.
    """

    step: int
    last_step: int
    seconds_left: float | None


def progress(folder: Path) -> Progress:
    """How far the run in a folder is."""
    if not (folder / METRICS).is_file():
        return Progress(0, 0, None)
    run = read_run(folder, partial=True)
    start, rows = run.last("start"), run.of_kind("train")
    if start is None or not rows:
        return Progress(0, 0 if start is None else start["last_step"], None)
    step, last_step = rows[-1]["step"], start["last_step"]
    # The newest rows: the rate of a busy machine changes.
    rate = statistics.fmean(row["images_per_s"] for row in rows[-5:])
    batch = run.config["recipe"]["global_batch"]
    return Progress(step, last_step, (last_step - step) * batch / rate)


def finished_row(planned: Planned, folder: Path, common: dict[str, str]) -> dict[str, Any]:
    """The row of a finished run.

    Args:
        planned: the run.
        folder: its folder, with the result of the linear protocol.
        common: the columns that say when, with what and on what it ran.
    """
    run = read_run(folder)
    config, recipe = run.config, run.config["recipe"]
    measured = run.of_kind("knn")
    accuracies = [row["top1"] for row in measured]
    health = run.last("health") or {}
    return {
        **common,
        "plan": planned.plan,
        "method": planned.method,
        "recipe": planned.recipe,
        "flags": shlex.join(planned.flags),
        "seed": planned.seed,
        "arch": recipe["arch"],
        "image_size": recipe["image_size"],
        "epochs": recipe["epochs"],
        "images": config["data_images"],
        "untrained": f"{accuracies[0]:.4f}",
        "best": f"{max(accuracies[1:]):.4f}",
        "last": f"{accuracies[-1]:.4f}",
        "linear": f"{run.scores['eval-linear.json']['top1']:.4f}",
        "view_retrieval": f"{health.get('view_retrieval', float('nan')):.4f}",
        "curve": " ".join(f"{row['epoch']}:{row['top1']:.4f}" for row in measured),
        **_times(run),
    }


def _times(run: Run) -> dict[str, str]:
    """Minutes of training and the median rate.

    Intervals are added up, not clocks: a run that was stopped has several clocks, and evaluations are not training.
    """
    rows, batch = run.of_kind("train"), run.config["recipe"]["global_batch"]
    steps = [row["step"] for row in rows]
    spans = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    seconds = sum(span * batch / row["images_per_s"] for span, row in zip(spans, rows, strict=True))
    rate = statistics.median(row["images_per_s"] for row in rows)
    return {"minutes": f"{seconds / 60:.1f}", "images_per_s": f"{rate:.1f}"}
