"""Runs of one configuration that differ in their seed alone, and what their figures are together."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.config import RunConfig
from train.fields import flatten
from train.record.run import Row, Run

_FREE = {field.name for field in dataclasses.fields(RunConfig) if field.metadata.get("free_on_resume")}
_NOT_THE_CONFIGURATION = (_FREE - {"init", "max_steps"}) | {"seed"}
"""Flags of `RunConfig` that do not decide a result, and the seed, over which runs are averaged."""
_T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t of a two-sided confidence of 95% for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Group:
    """Runs of one configuration.

    Attributes:
        name: of the single run; of several the first one's, and how many seeds they have.
        runs: in the order given.
        colour: number of the colour of its curves.
    """

    name: str
    runs: tuple[Run, ...]
    colour: int

    @property
    def first(self) -> Run:
        """The run that stands for all in what they have in common."""
        return self.runs[0]

    def curve(self, kind: str, name: str, at: Callable[[Run, Row], float]) -> Curve:
        """Mean and band of one figure over the runs.

        Args:
            kind: of the rows.
            name: of the figure.
            at: where a row lies on the horizontal axis.
        """
        found = []
        for run in self.runs:
            rows = [row for row in run.of_kind(kind) if isinstance(row.get(name), int | float)]
            found.append({at(run, row): float(row[name]) for row in rows})
        # Only where all runs have a value: a mean over fewer runs would jump where one of them ends.
        shared = sorted(set.intersection(*(set(each) for each in found)))
        table = np.array([[each[x] for x in shared] for each in found], dtype=float).reshape(len(found), len(shared))
        return Curve(shared, table.mean(axis=0).tolist(), *band(table))


@dataclass(frozen=True)
class Curve:
    """One figure over a run or several: positions, means, and the lower and upper end of the band, or none."""

    x: list[float]
    y: list[float]
    low: list[float] | None
    high: list[float] | None


def band(table: np.ndarray) -> tuple[list[float] | None, list[float] | None]:
    """The band around the mean of (runs, points) values: 95% confidence of the mean, of two runs their range.

    Returns:
        Lower and upper ends; None for a single run, which has no spread.
    """
    runs = len(table)
    if runs < 2 or not table.size:
        return None, None
    # Two runs have one degree of freedom: their interval would be nine times as wide as they are apart.
    if runs == 2:
        return table.min(axis=0).tolist(), table.max(axis=0).tolist()
    half = student(runs) * table.std(axis=0, ddof=1) / math.sqrt(runs)
    middle = table.mean(axis=0)
    return (middle - half).tolist(), (middle + half).tolist()


def student(runs: int) -> float:
    """Student's t for a 95% confidence of the mean of `runs` values, at least 2."""
    degrees = runs - 1
    # Beyond the table the approximation 1.96 + 2.4 / degrees is right to 0.01.
    return _T95[degrees] if degrees < len(_T95) else 1.96 + 2.4 / degrees


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs with equal configurations but for the seed together, in the order in which each first appears.

    Two runs of one configuration and one seed are the same run twice (a repetition) and stay apart.
    """
    members: dict[str, list[Run]] = {}
    for number, run in enumerate(runs):
        key = json.dumps(_decisive(run.config), sort_keys=True, default=str)
        seeds = [other.config.get("run", {}).get("seed") for other in members.get(key, [])]
        # A run without a recorded configuration is like no other.
        alone = not run.config or run.config.get("run", {}).get("seed") in seeds
        members.setdefault(f"{key} {number}" if alone else key, []).append(run)
    named = [
        (each[0].name if len(each) == 1 else f"{each[0].name} and {len(each) - 1} more seeds", each)
        for each in members.values()
    ]
    return [Group(name, tuple(each), number) for number, (name, each) in enumerate(named)]


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a `config.json` that decides what is computed, less the seed."""
    run = {name: value for name, value in config.get("run", {}).items() if name not in _NOT_THE_CONFIGURATION}
    parts = {name: config.get(name) for name in ("recipe", "model", "data_images")}
    return {"run": run, **parts}


def fields_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Leaves of a `config.json` as `a.b` -> JSON text."""
    return {name: json.dumps(leaf.value) for name, leaf in flatten(config).items()}


def differing(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Fields of `config.json` in which groups differ -> the value of each group's first run; "–" where it has none."""
    flat = [fields_of(group.first.config) for group in groups]
    names = dict.fromkeys(name for settings in flat for name in settings)
    own = ("run.run_dir", "run.seed", "data_hash")
    found = {name: [settings.get(name, "–") for settings in flat] for name in names if name not in own}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def epochs_at(run: Run, row: Row) -> float:
    """Where a row lies in epochs; in steps where the run does not say how many an epoch has."""
    start = run.first("start") or run.first("resume") or {}
    return float(row["step"] / (start.get("steps_per_epoch") or 1))


def counts_epochs(runs: Sequence[Run]) -> bool:
    """Whether every run says how many steps its epochs have."""
    return all((run.first("start") or run.first("resume") or {}).get("steps_per_epoch") for run in runs)
