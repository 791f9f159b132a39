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


@dataclass(frozen=True)
class Run:
    """What the page knows of one run.

    Attributes:
        name: what it is called on the page.
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

    def values(self, kind: str, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one figure."""
        rows = [row for row in self.of_kind(kind) if isinstance(row.get(name), int | float)]
        return [row["step"] for row in rows], [row[name] for row in rows]


def read_run(folder: Path, name: str | None = None) -> Run:
    """The run in a folder.

    A last line of the metrics that a kill cut short is left out.

    Raises:
        UserMistake: when the folder holds no run.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as reason:
        raise UserMistake(f"{folder}: {reason}; give a run's folder, with config.json and metrics.jsonl") from None
    rows: list[Row] = []
    for position, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if position != len(lines) - 1:
                where = f"{folder / 'metrics.jsonl'}: line {position + 1}"
                raise UserMistake(f"{where} is no JSON; restore the file") from None
    return Run(name or folder.resolve().name, folder, config, rows, read_results(folder.glob("*.json")))


def chance_level(run: Run) -> float | None:
    """Loss of a guess among the positive and the queue, ln(K + 1); None for a method without one queue."""
    size = run.config.get("model", {}).get("queue_size")
    return math.log(size + 1) if isinstance(size, int) and size > 0 else None


def read_results(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """File name -> content, of those JSON files that name a protocol."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(paths):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and isinstance(content.get("protocol"), str):
            found[path.name] = content
    return found
