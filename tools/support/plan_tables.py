"""Tables of what the runs of a plan have learnt, drawn from the rows of `tools/run_results.py` alone."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence

PAIRS = (
    ("moco-v2", "regioncl-m"),
    ("densecl", "regioncl-d"),
    ("simsiam", "regioncl-s"),
    ("byol", "care"),
    ("byol", "lewel-b"),
    ("moco-v2", "lewel-m"),
    ("moco-v3", "regioncl-m3"),
    ("moby", "regioncl-moby"),
    ("moco-v2", "unmix"),
)
"""Baseline and method, as the papers compare them."""
Row = dict[str, str]


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of one plan by what was run, its seeds together: label (method, recipe and flags of its own) -> rows."""
    flags = [shlex.split(row["flags"]) for row in rows]
    # What every run of the plan has stands above the table, once.
    common = _common_start(flags)
    groups: dict[str, list[Row]] = {}
    for row, own in zip(rows, flags, strict=True):
        recipe = [] if row["recipe"] == f"{row['method']}-small" else ["--recipe", row["recipe"]]
        groups.setdefault(shlex.join([row["method"], *recipe, *own[len(common) :]]), []).append(row)
    return groups


def _common_start(lists: Sequence[list[str]]) -> list[str]:
    first, last = min(lists), max(lists)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def mean_and_error(values: Sequence[float]) -> str:
    """The mean of shares in percent, with its standard error where there are several."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: what the runs of one plan have learnt, the best first."""
    columns = ("untrained", "last", "best", "linear", "view_retrieval")
    lines = [
        "| method | seeds | 20-NN, untrained | 20-NN, last | 20-NN, best | linear | view retrieval | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups = sorted(grouped(rows).items(), key=lambda item: -statistics.fmean(float(row["last"]) for row in item[1]))
    for label, runs in groups:
        figures = [mean_and_error([float(row[name]) for row in runs]) for name in columns]
        minutes = f"{statistics.fmean(float(row['minutes']) for row in runs):.0f}"
        lines.append(f"| `{label}` | {len(runs)} | {' | '.join(figures)} | {minutes} |")
    return "\n".join(lines)


def pairs(rows: Sequence[Row]) -> str:
    """Markdown: by how much the papers' methods are ahead of their baselines, seed by seed; empty without a pair."""
    # The first group of a method is the method as it is; further ones are ablations.
    first: dict[str, list[Row]] = {}
    for runs in grouped(rows).values():
        first.setdefault(runs[0]["method"], runs)
    lines = []
    for baseline, method in PAIRS:
        if baseline not in first or method not in first:
            continue
        before = {row["seed"]: row for row in first[baseline]}
        both = [(before[row["seed"]], row) for row in first[method] if row["seed"] in before]
        if both:
            figures = [
                mean_and_error([float(after[name]) - float(then[name]) for then, after in both])
                for name in ("last", "linear")
            ]
            lines.append(f"| `{method}` over `{baseline}` | {len(both)} | {' | '.join(figures)} |")
    return "\n".join(["| pair | seeds | 20-NN | linear |", "|---|---|---|---|", *lines]) if lines else ""


def curve(row: Row) -> list[tuple[int, float]]:
    """20-NN top-1 of a run over its epochs: (epoch, share), the untrained backbone at 0."""
    points = (point.split(":") for point in row["curve"].split())
    return [(int(epoch), float(share)) for epoch, share in points]


def plan_part(rows: Sequence[Row], plan: str) -> str:
    """Markdown: table and pairs of one plan.

    Args:
        rows: of all plans.
        plan: name.

    Raises:
        ValueError: it has no rows.
    """
    own = [row for row in rows if row["plan"] == plan]
    if not own:
        raise ValueError(f"no rows of the plan {plan}")
    return "\n\n".join(filter(None, (table(own), pairs(own))))
