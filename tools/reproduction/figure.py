"""RegionCL's Figure 1: accuracy of a linear classifier against AP of a detector, published and own."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tools.reproduction.commands import Plan
from tools.reproduction.sheet import figures
from tools.reproduction.training import Line
from train.errors import UserMistake

Point = tuple[str, float, float]


def points(lines: Sequence[Line], seeds: Sequence[int], plan: Plan) -> tuple[list[Point], list[Point]]:
    """(method, top-1, box AP) of the lines that have both, as published and as measured here (means over seeds)."""
    published, ours = [], []
    for line in lines:
        found = {figure.name: figure for cell in line.cells for figure in figures(cell, line, seeds, plan)}
        accuracy, precision = found.get("top1"), found.get("box_ap")
        if accuracy is None or precision is None:
            continue
        if accuracy.published is not None and precision.published is not None:
            published.append((line.training.method, accuracy.published, precision.published))
        if accuracy.ours and precision.ours:
            means = statistics.fmean(accuracy.ours), statistics.fmean(precision.ours)
            ours.append((line.training.method, *means))
    return published, ours


def plot(lines: Sequence[Line], seeds: Sequence[int], plan: Plan, file: Path) -> None:
    """Draw the points into an SVG: published ones hollow, own ones filled.

    Raises:
        UserMistake: the table has no line with both figures, or matplotlib is missing.
    """
    published, ours = points(lines, seeds, plan)
    if not published and not ours:
        raise UserMistake("--plot needs lines with a linear accuracy and a box AP; regioncl-figure1 has them")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserMistake("--plot needs matplotlib; run: bash tools/setup.sh --retry") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for found, face, label in ((published, "none", "published"), (ours, "#0b6e4f", "here")):
        axes.scatter(
            [x for _, x, _ in found], [y for _, _, y in found], facecolors=face, edgecolors="#0b6e4f", label=label
        )
        for name, x, y in found:
            axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("linear top-1 on ImageNet, percent")
    axes.set_ylabel("box AP on COCO, Mask R-CNN FPN 1x")
    axes.legend(frameon=False)
    figure.savefig(file)
