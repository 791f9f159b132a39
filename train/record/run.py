"""Reading what a run left behind: its configuration, its rows and what was measured on its backbone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserMistake

Row = dict[str, Any]
CONFIG, METRICS = "config.json", "metrics.jsonl"
"""Names of the files in a run's folder that this module reads."""
CURVES = ("train", "health", "knn", "probe")
"""Kinds of rows whose figures are drawn as curves, on the page and by TensorBoard; the others tell events."""


@dataclass(frozen=True)
class Run:
    """What one run left behind.

    Attributes:
        name: what it is called on a page.
        folder: the run's folder.
        config: its `config.json`.
        rows: its `metrics.jsonl`, in order.
        scores: file name -> what `train/evaluate.py` measured.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    rows: list[Row]
    scores: dict[str, Any]

    def of_kind(self, kind: str) -> list[Row]:
        """The rows of one kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def last(self, kind: str) -> Row | None:
        """The newest row of one kind, None where there is none."""
        return next((row for row in reversed(self.rows) if row["kind"] == kind), None)

    def first(self, kind: str) -> Row | None:
        """The oldest row of one kind, None where there is none."""
        return next((row for row in self.rows if row["kind"] == kind), None)

    def elapsed(self) -> list[float]:
        """Seconds from the start for each row, in order; the parts of a run that was stopped follow one another."""
        seconds, before, offset = [], 0.0, 0.0
        for row in self.rows:
            # Each process has a clock of its own, which begins again when the run goes on.
            if row["kind"] == "resume" or row["time_s"] < before:
                offset += before
            before = row["time_s"]
            seconds.append(offset + before)
        return seconds

    def values(self, kind: str, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one figure."""
        # A row need not have every figure.
        rows = [row for row in self.of_kind(kind) if isinstance(row.get(name), int | float)]
        return [row["step"] for row in rows], [row[name] for row in rows]


def read_run(folder: Path, name: str | None = None, partial: bool = False) -> Run:
    """The run in a folder.

    A last line of the metrics that a kill cut short is left out.

    Args:
        folder: the run's folder.
        name: what to call it; the folder's name when not given.
        partial: take a missing file for an empty one, as beside a backbone that was copied without its run.

    Raises:
        UserMistake: when the folder holds no run, or a file is damaged.
    """
    absent = [file for file in (CONFIG, METRICS) if not (folder / file).is_file()]
    if absent and not partial:
        raise UserMistake(f"{folder} has no {absent[0]}; give a run's folder, with {CONFIG} and {METRICS}")
    scores = read_results(folder.glob("*.json"))
    return Run(name or folder.resolve().name, folder, read_config(folder), _read_rows(folder / METRICS), scores)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` in a folder; empty where there is none.

    Raises:
        UserMistake: when the file is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise UserMistake(f"{path} is damaged: {reason}; restore it, or give backbone.safetensors instead") from None
    return loaded if isinstance(loaded, dict) else {}


def _read_rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as reason:
        raise UserMistake(f"{path}: {reason}; restore the file") from None
    rows: list[Row] = []
    for position, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            # Only the last line can be one that a kill cut short; any other is damage that would falsify a curve.
            if position != len(lines) - 1:
                raise UserMistake(f"{path}: line {position + 1} is no JSON; restore the file") from None
    return rows


def has_ended(folder: Path) -> bool:
    """Whether the run in a folder came to its end: its last row is the one that is written after everything else."""
    rows = _read_rows(folder / METRICS)
    return bool(rows) and rows[-1]["kind"] == "end"


def chance_level(run: Run) -> float | None:
    """Loss of a guess among the positive and the queue, ln(K + 1); None for a method without one queue."""
    size = run.config.get("model", {}).get("queue_size")
    return math.log(size + 1) if isinstance(size, int) and size > 0 else None


def read_results(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """File name -> content, of those JSON files that name a protocol."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(paths):
        # What a killed evaluation was writing has not got its name yet; a glob finds it all the same.
        if path.name.startswith("."):
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        # Other JSON files, such as those of analyses, lie in the folder as well.
        if isinstance(content, dict) and isinstance(content.get("protocol"), str):
            found[path.name] = content
    return found
