"""The page about one run, or about several side by side: one HTML file that loads nothing from anywhere.

A page is a function of the folders of its runs alone (`render`), so it can be written at any moment of a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from pipeline.atomic import write_atomically
from train.errors import UserMistake
from train.record.beside import beside_published
from train.record.collapse import KIND
from train.record.comparison import (
    best_knn,
    comparison,
    environment,
    images_per_second,
    last_knn,
    title,
    untrained_knn,
    wall_seconds,
    with_error,
)
from train.record.curves import curves
from train.record.groups import Group, fields_of, grouped
from train.record.markup import duration, folded, number, swatch, table, text
from train.record.run import CURVES, Row, Run, read_run
from train.record.stages import stages
from train.record.trouble import alarms, findings, losses_of_data

if TYPE_CHECKING:
    from train.record.pictures import Picture

_STYLE = Path(__file__).with_name("page.css")
MOST_PICTURES = 3_000_000
"""Characters of a page that pictures may take; curves and tables of many runs take less than the rest of 5 MB."""
MOST_EVENTS = 60
"""Events of a run that are listed: the first and the last ones."""

# --- top of the page -------------------------------------------------------------------------------------------------


def _tiles(run: Run) -> str:
    """The figures of a single run, the accuracy that was measured first."""
    steps, losses = run.values("train", "loss")
    # Of the last twentieth the median: the last row alone is noisy.
    tail = losses[-max(1, len(losses) // 20) :]
    wait = run.values("train", "data_wait_share")[1]
    batch = run.config.get("recipe", {}).get("global_batch", 0)
    seen = f"{int(steps[-1]) * batch:,} images seen" if steps else "no step finished"
    cells = [
        ("k-NN top-1", *_knn_tile(run)),
        ("View retrieval", *_change(run, "health", "view_retrieval", ".1%")),
        ("Effective rank", *_change(run, "health", "effective_rank", ".1f")),
        ("Source images/s", number(images_per_second(run), ",.0f"), "median of the run"),
        ("Waiting for data", number(median(wait) if wait else None, ".1%"), "median share of the time"),
        ("Wall time", duration(wall_seconds(run)), environment(run)),
        ("Loss", number(median(tail) if tail else None), f"median of the last rows; {seen}"),
    ]
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span>{text(label)}</span><b>{text(value)}</b><span>{text(note)}</span></div>'
            for label, value, note in cells
        )
        + "</div>"
    )


def _knn_tile(run: Run) -> tuple[str, str]:
    """The newest k-NN accuracy with its standard error, whoever measured it, and what it began with and reached."""
    last, first, best = last_knn(run), untrained_knn(run), best_knn(run)
    if last is None:
        return ("–", "not measured") if first is None else ("–", f"untrained {with_error([first[0]], first[1])}")
    parts = [f"untrained {with_error([first[0]], first[1])}"] if first else []
    parts += [f"best {best[0]:.1f}"] if best and best[0] > last[0] else []
    return f"{with_error([last[0]], last[1])} %", ", ".join(parts) or "measured once"


def _change(run: Run, kind: str, name: str, form: str) -> tuple[str, str]:
    """Newest value, and a sentence with where it began and its best."""
    _, values = run.values(kind, name)
    if not values:
        return "–", "not measured"
    if len(values) == 1:
        return format(values[0], form), "measured once"
    return format(values[-1], form), f"from {values[0]:{form}} at the first, best {max(values):{form}}"


# --- pictures, events, configuration ---------------------------------------------------------------------------------


def _pictures(runs: Sequence[Run], room: _Room) -> str:
    from train.record.pictures import run_pictures

    parts = []
    for run in runs:
        try:
            pictures = run_pictures(run)
        except UserMistake as reason:
            parts.append(f'<p class="note">{text(run.name)}: no images to show ({text(reason)})</p>')
            continue
        parts += [room.take(_picture(picture, run, runs), run) for picture in pictures]
    return f'<div class="pictures">{"".join(parts)}</div>'


def _analyses(runs: Sequence[Run], room: _Room) -> str:
    from train.record.pictures import analysis_pictures

    found = [(run, picture) for run in runs for picture in analysis_pictures(run.folder)]
    parts = [room.take(_picture(picture, run, runs), run) for run, picture in found]
    if not parts:
        return '<p class="note">None yet: run tools/analyze.py on the run, then write this page again.</p>'
    return f'<div class="pictures">{"".join(parts)}</div>'


@dataclass
class _Room:
    """Characters that pictures may still take, so that a page of many runs opens at once."""

    left: int = MOST_PICTURES

    def take(self, figure: str, run: Run) -> str:
        """The figure where there is room for it, else a sentence that says how to see it."""
        if len(figure) > self.left:
            return (
                f'<p class="note">{text(run.name)}: a picture is left out to keep the page small; '
                f"tools/report.py {text(run.folder)} shows it</p>"
            )
        self.left -= len(figure)
        return figure


def _picture(picture: Picture, run: Run, runs: Sequence[Run]) -> str:
    title = picture.title if len(runs) == 1 else f"{run.name}: {picture.title}"
    return (
        f'<figure><h3>{text(title)}</h3><p class="note">{text(picture.note)}</p>'
        f'<img{" class=plotted" if picture.plotted else ""} src="{picture.uri}" width="{picture.width_px}" '
        f'alt="{text(title)}"></figure>'
    )


def _events(groups: Sequence[Group]) -> str:
    rows = []
    # These are in the curves or in parts of their own; what is left are starts, stops and accidents.
    shown = (*CURVES, "checkpoint", KIND)
    for colour, run in ((group.colour, run) for group in groups for run in group.runs):
        found = [each for each in zip(run.rows, run.elapsed(), strict=True) if each[0]["kind"] not in shown]
        half = MOST_EVENTS // 2
        # A run of weeks may have skipped thousands of steps.
        listed = found if len(found) <= MOST_EVENTS else [*found[:half], *found[-half:]]
        rows += [_event(run, colour, *each) for each in listed]
        if len(listed) < len(found):
            rows.append(
                f'<tr><td>{text(run.name)}</td><td colspan="4">and {len(found) - len(listed)} between</td></tr>'
            )
    return table(("run", "what happened", "step", "after", "details"), rows)


def _event(run: Run, colour: int, row: Row, seconds: float) -> str:
    rest = {name: value for name, value in row.items() if name not in ("kind", "step", "epoch", "time_s")}
    about = ", ".join(f"{name} {value}" for name, value in rest.items())
    return (
        f'<tr><td class="name">{swatch(colour)}{text(run.name)}</td><td>{text(row["kind"])}</td>'
        f'<td class="figure">{row["step"]:,}</td><td class="figure">{duration(seconds)}</td><td>{text(about)}</td></tr>'
    )


def _configuration(runs: Sequence[Run]) -> str:
    flat = [fields_of(run.config) for run in runs]
    # In the order of the first run that has them; a set would shuffle the table.
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = []
    for name in names:
        values = [settings.get(name, "–") for settings in flat]
        differs = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td><code>{text(value)}</code></td>" for value in values)
        rows.append(f"<tr{differs}><td><code>{text(name)}</code></td>{cells}</tr>")
    note = '<p class="note">Rows in which the runs differ are marked.</p>' if len(runs) > 1 else ""
    return note + folded(f"all {len(names)} fields", table(("field", *(run.name for run in runs)), rows))


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names; with their parents where two are alike."""
    short = [folder.resolve().name for folder in folders]
    if len(set(short)) == len(short):
        return short
    return ["/".join(folder.resolve().parts[-2:]) for folder in folders]


def render(runs: Sequence[Run], curves_alone: bool = False, reload_s: int = 0) -> str:
    """The whole page about these runs, as HTML that loads nothing from anywhere.

    Args:
        runs: what it is about.
        curves_alone: leave out what needs images, published figures or the doctor: a page that is drawn often.
        reload_s: seconds after which a browser loads the page again; 0: never.
    """
    groups, room = grouped(runs), _Room()
    # Heading, whether a page that is drawn often has it, and what makes it.
    sections: list[tuple[str, bool, Callable[[], str]]] = [
        ("Curves", True, lambda: curves(groups)),
        ("Beside the published figures", False, lambda: beside_published(groups)),
        ("What the doctor says", False, lambda: findings(runs)),
        ("Where the time goes", True, lambda: stages(groups)),
        ("Skipped steps and replaced files", True, lambda: losses_of_data(runs)),
        ("What the method sees", False, lambda: _pictures(runs, room)),
        ("Analyses of the backbone", False, lambda: _analyses(runs, room)),
        ("Events", True, lambda: _events(groups)),
        ("Configuration", True, lambda: _configuration(runs)),
    ]
    again, written = "", ""
    if reload_s:
        again = f'<meta http-equiv="refresh" content="{reload_s}">'
        written = f'<p class="note">Written at {time.strftime("%H:%M:%S")} while the run goes on.</p>'
    body = "".join(
        f"<section><h2>{text(name)}</h2>{make()}</section>"
        for name, often, make in sections
        if often or not curves_alone
    )
    heading = "Run " + runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{again}"
        f"<title>{text(heading)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main><h1>{text(heading)}</h1>{written}{alarms(runs)}{_top(groups)}{body}</main></body></html>\n"
    )


def _top(groups: Sequence[Group]) -> str:
    """What was measured: tiles for a single run, the table of comparison for several."""
    if len(groups) == 1 and len(groups[0].runs) == 1:
        return f'<p class="note">{text(title(groups[0].first))}</p>{_tiles(groups[0].first)}'
    return f"<section>{comparison(groups)}</section>"


def build_report(runs: Sequence[Path], out: Path, curves_alone: bool = False, reload_s: int = 0) -> None:
    """Write the page about the runs in these folders to `out`, whole or not at all; the rest is as for `render`.

    Raises:
        UserMistake: when a folder holds no run, or `out` cannot be written.
    """
    if not runs:
        raise UserMistake("no run was named; give one or more run folders")
    read = [read_run(folder, name) for folder, name in zip(runs, _names(runs), strict=True)]
    page = render(read, curves_alone, reload_s)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page.encode())
    except OSError as reason:
        raise UserMistake(f"{out}: {reason.strerror or reason}; choose another --out") from None
