"""The page about one run, or about several side by side: one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.atomic import write_atomically
from train.errors import UserMistake
from train.record.charts import COLOURS, Series, line_chart
from train.record.evaluations import PROTOCOLS, Measurement, describe, results, unread
from train.record.evaluations import differences as evaluation_differences
from train.record.published import candidates, differences
from train.record.run import Run, chance_level, read_run

if TYPE_CHECKING:
    from train.record.pictures import Picture

_STYLE = Path(__file__).with_name("page.css")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


# --- top of the page -------------------------------------------------------------------------------------------------


def _title(run: Run) -> str:
    settings, recipe = run.config.get("run", {}), run.config.get("recipe", {})
    return f"{settings.get('method', '?')} · {recipe.get('arch', '?')} · {recipe.get('image_size', '?')} px"


def _change(run: Run, kind: str, name: str, form: str) -> tuple[str, str]:
    """Newest value, and a sentence with where it began and its best."""
    _, values = run.values(kind, name)
    if not values:
        return "–", "not measured"
    if len(values) == 1:
        return format(values[0], form), "measured once"
    return format(values[-1], form), f"from {values[0]:{form}} at the first, best {max(values):{form}}"


def _tiles(run: Run) -> str:
    steps, losses = run.values("train", "loss")
    # Of the last twentieth the median: the last row alone is noisy.
    tail = losses[-max(1, len(losses) // 20) :]
    speed = _median(run.values("train", "images_per_s")[1])
    wait = _median(run.values("train", "data_wait_share")[1])
    batch = run.config.get("recipe", {}).get("global_batch", 0)
    seen = f"{int(steps[-1]) * batch:,} images seen" if steps else "no step finished"
    cells = [
        ("Loss, last twentieth", _number(_median(tail)), seen),
        ("k-NN top-1", *_change(run, "knn", "top1", ".1%")),
        ("View retrieval", *_change(run, "health", "view_retrieval", ".1%")),
        ("Effective rank", *_change(run, "health", "effective_rank", ".1f")),
        ("Source images/s", _number(speed, ",.0f"), "median of the run"),
        ("Waiting for data", _number(wait, ".1%"), "median share of the time"),
    ]
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span>{_text(label)}</span><b>{_text(value)}</b><span>{_text(note)}</span></div>'
            for label, value, note in cells
        )
        + "</div>"
    )


# --- results beside the published figures ----------------------------------------------------------------------------


def _beside_published(runs: Sequence[Run]) -> str:
    """Every result of every run, beside the untrained backbone's and what was published for the method."""
    rows = []
    for number, run in enumerate(runs):
        found = results(run)
        trained = {(each.protocol, each.task): each for each in found if not each.untrained}
        baseline = {(each.protocol, each.task): each for each in found if each.untrained}
        # A linear probe is what the methods are known by, so its row is there before it is measured.
        for key in sorted({("linear", ""), *trained, *baseline}, key=_place):
            row = _result_row(run, number, key, trained.get(key), baseline.get(key))
            rows.append((_place(key), number, row))
    head = ("run", "protocol", "here", "untrained", "published", "difference of protocol")
    return _table(head, [row for *_, row in sorted(rows, key=lambda entry: entry[:2])])


def _place(key: tuple[str, str]) -> tuple[int, int, str]:
    """Where a protocol stands in the table; numbers in tasks count as numbers."""
    protocol, task = key
    digits = "".join(character for character in task if character.isdigit())
    known = PROTOCOLS.index(protocol) if protocol in PROTOCOLS else len(PROTOCOLS)
    return known, int(digits or 0), f"{protocol} {task}"


def _result_row(
    run: Run, number: int, key: tuple[str, str], measured: Measurement | None, baseline: Measurement | None
) -> str:
    def cell(found: Measurement | None) -> str:
        if found is None:
            return "–"
        note = f"{found.file}{unread(found.facts)}"
        return f'{_text(describe(found.figures))}<p class="note">{_text(note)}</p>'

    published = candidates(run.config, *key)
    there, apart = [], []
    for row in published:
        epochs = f"{row.epochs} epochs" if row.epochs else "epochs not stated"
        there.append(f"<li>{_text(describe(row.figures))} ({_text(f'{row.arch}, {epochs}; {row.source}')})</li>")
        listed = differences(row, run.config)
        listed += ["not measured here yet"] if measured is None else evaluation_differences(row, measured)
        # Figures of one backbone share most differences; each is listed once.
        apart += [item for item in listed if item not in apart]
    if not published:
        there = ["<li>nothing for this method and protocol</li>"]
    elif not apart:
        apart = ["none known"]
    items = "".join(f"<li>{_text(item)}</li>" for item in apart)
    return (
        f'<tr><td class="name">{_swatch(number)}{_text(run.name)}<p class="note">{_text(_title(run))}</p></td>'
        f"<td>{_text(' '.join(key).strip())}</td><td>{cell(measured)}</td><td>{cell(baseline)}</td>"
        f"<td><ul>{''.join(there)}</ul></td><td><ul>{items}</ul></td></tr>"
    )


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{_text(name)}</th>" for name in head)
    return f'<div class="table"><table><tr>{cells}</tr>{"".join(rows)}</table></div>'


def _swatch(number: int) -> str:
    return f'<i style="color:var(--series-{number % COLOURS})"></i>'


# --- curves ----------------------------------------------------------------------------------------------------------


def _per_run(runs: Sequence[Run], kind: str, name: str, scale: float = 1.0) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        x, y = run.values(kind, name)
        found.append(Series(run.name, x, [value * scale for value in y], colour=number))
    return found


def _loss_terms(runs: Sequence[Run]) -> list[Series]:
    """Every term of a single run; of several runs the instance loss, which all contrastive methods have."""
    if len(runs) > 1:
        return _per_run(runs, "train", "loss/ins")
    names = dict.fromkeys(name for row in runs[0].of_kind("train") for name in row if name.startswith("loss/"))
    return [Series(name, *runs[0].values("train", name), colour=number) for number, name in enumerate(names)]


def _charts(runs: Sequence[Run]) -> str:
    # Runs with queues of one size share a line.
    levels = {round(level, 4): level for run in runs if (level := chance_level(run)) is not None}
    references = [(f"chance, ln(K+1) = {level:.2f}", level) for level in levels.values()]
    percent = 100.0
    figures = [
        line_chart("Loss", "The sum of all terms, as the method weighs them.", _per_run(runs, "train", "loss")),
        line_chart(
            "Loss by term" if len(runs) == 1 else "Instance loss",
            "With a queue the first values are low because its keys are still random; compare later ones with chance.",
            _loss_terms(runs),
            references=references,
        ),
        line_chart(
            "k-NN top-1, percent",
            "Labelled images told apart by their nearest neighbours; the first point is the untrained backbone.",
            _per_run(runs, "knn", "top1", percent),
        ),
        line_chart(
            "View retrieval, percent",
            "Share of images whose second view is nearest to their first; needs no labels, and rises while the "
            "backbone learns. The images are trained on, unless there are --val-data or a --holdout.",
            _per_run(runs, "health", "view_retrieval", percent),
            zero=True,
        ),
        line_chart(
            "Effective rank",
            "How many directions the features use; a fall to a few means collapse.",
            _per_run(runs, "health", "effective_rank"),
            zero=True,
        ),
        line_chart(
            "Feature spread",
            "Standard deviation of unit features, about 1 when spread evenly; near 0 means collapse.",
            _per_run(runs, "health", "feature_std"),
            zero=True,
        ),
        line_chart(
            "Source images per second",
            "Each image counts once, however many views are cut from it.",
            _per_run(runs, "train", "images_per_s"),
            zero=True,
        ),
        line_chart(
            "Waiting for data, percent of the time",
            "Above a few percent the loader limits the run: see tools/doctor.py for what to change.",
            _per_run(runs, "train", "data_wait_share", percent),
            zero=True,
        ),
        line_chart("Gradient norm", "Before clipping.", _per_run(runs, "train", "grad_norm"), zero=True),
        line_chart("Learning rate", "As the schedule gives it.", _per_run(runs, "train", "lr"), zero=True),
        line_chart(
            "EMA coefficient",
            "How much of itself the momentum network keeps at each step.",
            _per_run(runs, "train", "ema_momentum"),
        ),
    ]
    drawn = "".join(figures)
    return f'<div class="charts">{drawn}</div>' if drawn else '<p class="note">No step has been recorded yet.</p>'


# --- pictures, events, configuration ---------------------------------------------------------------------------------


def _pictures(runs: Sequence[Run]) -> str:
    from train.record.pictures import run_pictures

    parts = []
    for run in runs:
        try:
            pictures = run_pictures(run)
        except UserMistake as reason:
            parts.append(f'<p class="note">{_text(run.name)}: no images to show ({_text(reason)})</p>')
            continue
        parts += [_picture(picture, run, runs) for picture in pictures]
    return f'<div class="pictures">{"".join(parts)}</div>'


def _analyses(runs: Sequence[Run]) -> str:
    from train.record.pictures import analysis_pictures

    parts = [_picture(picture, run, runs) for run in runs for picture in analysis_pictures(run.folder)]
    if not parts:
        return '<p class="note">None yet: run tools/analyze.py on the run, then write this page again.</p>'
    return f'<div class="pictures">{"".join(parts)}</div>'


def _picture(picture: Picture, run: Run, runs: Sequence[Run]) -> str:
    title = picture.title if len(runs) == 1 else f"{run.name}: {picture.title}"
    return (
        f'<figure><h3>{_text(title)}</h3><p class="note">{_text(picture.note)}</p>'
        f'<img src="{picture.uri}" width="{picture.width_px}" alt="{_text(title)}"></figure>'
    )


def _events(runs: Sequence[Run]) -> str:
    rows = []
    for number, run in enumerate(runs):
        for row in run.rows:
            # These are in the curves; what is left are starts, stops and accidents.
            if row["kind"] in ("train", "health", "knn", "checkpoint"):
                continue
            rest = {name: value for name, value in row.items() if name not in ("kind", "step", "epoch", "time_s")}
            about = ", ".join(f"{name} {value}" for name, value in rest.items())
            rows.append(
                f'<tr><td class="name">{_swatch(number)}{_text(run.name)}</td><td>{_text(row["kind"])}</td>'
                f'<td class="figure">{row["step"]:,}</td><td class="figure">{row["time_s"]:,.0f} s</td>'
                f"<td>{_text(about)}</td></tr>"
            )
    return _table(("run", "what happened", "step", "after", "details"), rows)


def _flatten(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        flat: dict[str, str] = {}
        for name, inner in value.items():
            flat.update(_flatten(inner, f"{path}.{name}" if path else name))
        return flat
    return {path: json.dumps(value)}


def _configuration(runs: Sequence[Run]) -> str:
    flat = [_flatten(run.config) for run in runs]
    # In the order of the first run that has them; a set would shuffle the table.
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = []
    for name in names:
        values = [settings.get(name, "–") for settings in flat]
        differs = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td><code>{_text(value)}</code></td>" for value in values)
        rows.append(f"<tr{differs}><td><code>{_text(name)}</code></td>{cells}</tr>")
    note = '<p class="note">Rows in which the runs differ are marked.</p>' if len(runs) > 1 else ""
    return note + _table(("field", *(run.name for run in runs)), rows)


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names; with their parents where two are alike."""
    short = [folder.resolve().name for folder in folders]
    if len(set(short)) == len(short):
        return short
    return ["/".join(folder.resolve().parts[-2:]) for folder in folders]


def render(runs: Sequence[Run]) -> str:
    """The whole page about these runs, as HTML that loads nothing from anywhere."""
    sections: list[tuple[str, Callable[[Sequence[Run]], str]]] = [
        ("Results beside the published figures", _beside_published),
        ("Curves", _charts),
        ("What the method sees", _pictures),
        ("Analyses of the backbone", _analyses),
        ("Events", _events),
        ("Configuration", _configuration),
    ]
    tiles = "".join(
        f'<h3 class="name">{_swatch(number)}{_text(run.name)} <span class="note">{_text(_title(run))}</span></h3>'
        f"{_tiles(run)}"
        for number, run in enumerate(runs)
    )
    body = "".join(f"<section><h2>{_text(title)}</h2>{make(runs)}</section>" for title, make in sections)
    title = "Run " + runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main><h1>{_text(title)}</h1>{tiles}{body}</main></body></html>\n"
    )


def build_report(runs: Sequence[Path], out: Path) -> None:
    """Write the page about the runs in these folders to `out`, whole or not at all.

    Raises:
        UserMistake: when a folder holds no run, or `out` cannot be written.
    """
    if not runs:
        raise UserMistake("no run was named; give one or more run folders")
    page = render([read_run(folder, name) for folder, name in zip(runs, _names(runs), strict=True)])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page.encode())
    except OSError as reason:
        raise UserMistake(f"{out}: {reason.strerror or reason}; choose another --out") from None
