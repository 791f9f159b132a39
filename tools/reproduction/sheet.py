"""A table with the published figures and ours: read from result files, averaged over seeds, printed as text."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.reproduction.commands import Plan, result_file
from tools.reproduction.tables import Cell
from tools.reproduction.training import Line
from train.record.evaluations import NAMES, measurements


@dataclass(frozen=True)
class Figure:
    """One figure of a cell.

    Attributes:
        name: key of `NAMES`.
        published: percent; None where the paper has no figure.
        ours: percent of each seed that is there.
    """

    name: str
    published: float | None
    ours: tuple[float, ...]

    def text(self) -> str:
        """For example "top-1 72.1, ours 71.9 +- 0.1 (3 seeds)"."""
        there = "not published" if self.published is None else f"{self.published:g}"
        if not self.ours:
            return f"{NAMES.get(self.name, self.name)} {there}"
        mean = f"{statistics.fmean(self.ours):.2f}"
        # The standard error of a mean needs two values at least.
        error = f" +- {statistics.stdev(self.ours) / math.sqrt(len(self.ours)):.2f}" if len(self.ours) > 1 else ""
        seeds = f" ({len(self.ours)} seeds)" if len(self.ours) > 1 else ""
        return f"{NAMES.get(self.name, self.name)} {there}, ours {mean}{error}{seeds}"


def figures(cell: Cell, line: Line, seeds: Sequence[int], plan: Plan) -> list[Figure]:
    """What was published and measured of a cell."""
    found = [_measured(result_file(cell, line.training, seed, plan), cell) for seed in seeds]
    names = list(cell.figures) or sorted({name for each in found for name in each})
    return [Figure(name, cell.figures.get(name), tuple(each[name] for each in found if name in each)) for name in names]


def _measured(path: Path, cell: Cell) -> Mapping[str, float]:
    if path.suffix != ".json" or not path.is_file():
        return {}
    found = measurements(path.name, json.loads(path.read_text(encoding="utf-8")))
    # A file of k-NN has one result for each number of neighbours.
    fitting = [each for each in found if cell.protocol != "knn" or each.task == cell.task]
    return fitting[0].figures if fitting else {}


def sheet(lines: Mapping[int, Line], seeds: Sequence[int], plan: Plan, costs: bool = False) -> str:
    """The lines of a table as text.

    Args:
        lines: by their numbers.
        seeds: of the runs to average over.
        plan: what all commands share.
        costs: whether parameters and operations of each backbone are named.
    """
    text = []
    for number, line in lines.items():
        text.append(f"{number:3d}  {line.training.name} ({_backbone(line, costs)})")
        for cell in line.cells:
            shown = "; ".join(each.text() for each in figures(cell, line, seeds, plan)) or "no figure"
            text.append(f"       {' '.join(filter(None, [cell.protocol, cell.task]))}: {shown}")
    return "\n".join(text)


def _backbone(line: Line, costs: bool) -> str:
    arch = line.training.arch
    if not costs or line.training.missing:
        return arch
    # Imported here, because only some tables need a model.
    from tools.reproduction.cost import cost

    parameters, operations = cost(arch)
    return f"{arch}, {parameters:.1f} M parameters, {operations:.1f} GFLOPs"
