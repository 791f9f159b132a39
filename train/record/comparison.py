"""Several runs beside each other: what each is, what was measured on it, and in what their configurations differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median, stdev

from train.record.evaluations import Measurement, describe, place, results, unread
from train.record.groups import Group, differing
from train.record.markup import duration, folded, items, number, swatch, table, text
from train.record.run import Run


def title(run: Run) -> str:
    """Method, backbone and image size of a run."""
    settings, recipe = run.config.get("run", {}), run.config.get("recipe", {})
    return f"{settings.get('method', '?')} · {recipe.get('arch', '?')} · {recipe.get('image_size', '?')} px"


def comparison(groups: Sequence[Group]) -> str:
    """The table of all configurations, and what differs between them."""
    head = (
        "run",
        "recipe",
        "seeds",
        "k-NN untrained",
        "k-NN best",
        "k-NN last",
        "other evaluations",
        "images/s",
        "wall time",
        "ran on",
    )
    rows = [_row(group) for group in groups]
    note = (
        '<p class="note">Percent, ± one standard error: over seeds where a configuration has several, otherwise of '
        "the number of images that were classified.</p>"
    )
    return note + table(head, rows) + _differences(groups)


def _row(group: Group) -> str:
    recipe = group.first.config.get("run", {}).get("recipe") or "the method's own"
    measured = [_knn(group.runs, pick) for pick in (untrained_knn, best_knn, last_knn)]
    speed = [number(_mean(group.runs, images_per_second), ",.0f"), duration(_mean(group.runs, wall_seconds))]
    name = f'{swatch(group.colour)}{text(group.name)}<p class="note">{text(title(group.first))}</p>'
    return (
        f'<tr><td class="name">{name}</td>{_cells([recipe, ", ".join(_seed(run) for run in group.runs), *measured])}'
        f'<td class="words">{items(_others(group))}</td>{_cells(speed)}'
        f'<td class="words">{text(environment(group.first))}</td></tr>'
    )


def _cells(values: Sequence[str]) -> str:
    return "".join(f'<td class="figure">{text(value)}</td>' for value in values)


def _seed(run: Run) -> str:
    return str(run.config.get("run", {}).get("seed", "?"))


def _mean(runs: Sequence[Run], figure: Callable[[Run], float | None]) -> float | None:
    found = [value for run in runs if (value := figure(run)) is not None]
    return fmean(found) if found else None


# --- figures of one run ----------------------------------------------------------------------------------------------


def images_per_second(run: Run) -> float | None:
    """Median over the rows of a run; None before the first."""
    speeds = run.values("train", "images_per_s")[1]
    return median(speeds) if speeds else None


def wall_seconds(run: Run) -> float | None:
    """Seconds from the start to the newest row, over all parts of a run that was stopped; None without rows."""
    seconds = run.elapsed()
    return seconds[-1] if seconds else None


def untrained_knn(run: Run) -> tuple[float, int] | None:
    """k-NN top-1 in percent before the first step, and the number of images that were classified."""
    found = [each for each in _knn_results(run) if each.untrained]
    return _share(found[0]) if found else None


def last_knn(run: Run) -> tuple[float, int] | None:
    """The newest k-NN top-1 in percent of the trained backbone, and the number of images."""
    found = [each for each in _knn_results(run) if not each.untrained]
    return _share(found[0]) if found else None


def best_knn(run: Run) -> tuple[float, int] | None:
    """The highest k-NN top-1 in percent of the trained backbone while training or after, and the number of images."""
    online = [(100 * row["top1"], row.get("val_images", 0)) for row in run.of_kind("knn") if row["step"]]
    last = last_knn(run)
    return max([*online, *([last] if last else [])], default=None)


def _knn_results(run: Run) -> list[Measurement]:
    """k-NN results, those of 20 neighbours first, since the online figure has as many."""
    found = [each for each in results(run) if each.protocol == "knn" and "top1" in each.figures]
    return sorted(found, key=lambda each: each.task != "20-NN")


def _share(found: Measurement) -> tuple[float, int]:
    return found.figures["top1"], int(found.facts.get("val_images") or 0)


def standard_error(percent: float, images: int) -> float | None:
    """Of a share in percent of so many images that were right; None where their number is not known."""
    return math.sqrt(max(percent * (100 - percent), 0.0) / images) if images else None


def environment(run: Run) -> str:
    """The machine, processes, and versions of Python, torch and this program, as far as they were recorded."""
    start = run.first("start") or {}
    versions = run.config.get("versions", {})
    machine = start.get("machine", "")
    processes = start.get("world_size") or run.config.get("world_size", 1)
    named = [f"{name} {versions[name]}" for name in ("torch", "python", "commit") if versions.get(name)]
    return ", ".join([*([machine] if machine else []), f"{processes} process{'es' if processes > 1 else ''}", *named])


# --- figures of a group ----------------------------------------------------------------------------------------------


def _knn(runs: Sequence[Run], pick: Callable[[Run], tuple[float, int] | None]) -> str:
    found = [share for run in runs if (share := pick(run)) is not None]
    return "–" if not found else with_error([percent for percent, _ in found], found[0][1])


def with_error(percents: Sequence[float], images: int) -> str:
    """A mean with its standard error: over several values, or of one from the number of images."""
    error = stdev(percents) / math.sqrt(len(percents)) if len(percents) > 1 else standard_error(percents[0], images)
    return f"{fmean(percents):.1f}" + ("" if error is None else f" ± {error:.1f}")


def _others(group: Group) -> list[str]:
    """Every measured protocol but k-NN, a line each: means over the runs that have it."""
    found: dict[tuple[str, str], list[Measurement]] = {}
    for run in group.runs:
        for each in results(run):
            if each.protocol != "knn" and not each.untrained:
                found.setdefault((each.protocol, each.task), []).append(each)
    return [_line(" ".join(key).strip(), found[key]) for key in sorted(found, key=place)] or ["none"]


def _line(name: str, measured: Sequence[Measurement]) -> str:
    shared = [figure for figure in measured[0].figures if all(figure in each.figures for each in measured)]
    means = {figure: fmean(each.figures[figure] for each in measured) for figure in shared}
    seeds = f" (mean of {len(measured)})" if len(measured) > 1 else ""
    return f"{name}: {describe(means)}{unread(measured[0].facts)}{seeds}"


def _differences(groups: Sequence[Group]) -> str:
    """The fields of the configurations that differ, folded where there are many."""
    if len(groups) < 2:
        return ""
    found = differing(groups)
    if not found:
        return '<p class="note">Their configurations are equal.</p>'
    rows = [
        f"<tr><td><code>{text(name)}</code></td>"
        + "".join(f"<td><code>{text(value)}</code></td>" for value in values)
        + "</tr>"
        for name, values in found.items()
    ]
    content = table(("field", *(group.name for group in groups)), rows)
    return folded(f"{len(found)} fields of the configuration differ", content)
