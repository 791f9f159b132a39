"""What went wrong in runs, as parts of a page: collapse, the doctor's findings, skipped steps and replaced files."""

from __future__ import annotations

from collections.abc import Sequence

from train.record.collapse import KIND
from train.record.diagnosis import diagnose
from train.record.evaluations import results, unread
from train.record.markup import folded, items, number, table, text
from train.record.run import Row, Run


def alarms(runs: Sequence[Run]) -> str:
    """A box for each run that collapsed, with its newest announcement and when the first was made; else nothing."""
    return "".join(_alarm(run, rows) for run in runs if (rows := run.of_kind(KIND)))


def _alarm(run: Run, rows: list[Row]) -> str:
    newest = rows[-1]
    steps = f"first at step {rows[0]['step']:,}" + (f", still at {newest['step']:,}" if len(rows) > 1 else "")
    measured = [f"{name} {number(value, '.4g')}" for name, value in newest.get("measured", {}).items()]
    return (
        f'<div class="alarm" role="alert"><b>{text(run.name)} has collapsed</b> ({text(steps)}): '
        f"{text(newest.get('what', ''))}.<br>Probable cause: {text(newest.get('cause', ''))}.<br>"
        f"Look at: {text(newest.get('look_at', ''))}{folded('what was measured', items(measured))}</div>"
    )


def findings(runs: Sequence[Run]) -> str:
    """What the doctor says of each run: symptom and remedy."""
    rows = [
        f'<tr><td class="name">{text(run.name)}</td><td class="{text(found.level)}">{text(found.level)}</td>'
        f"<td>{text(found.text)}</td><td>{text(found.remedy)}</td></tr>"
        for run in runs
        for found in diagnose(run)
    ]
    return table(("run", "level", "found", "what to do"), rows)


def losses_of_data(runs: Sequence[Run]) -> str:
    """Skipped steps, replaced images and images that evaluations could not read, with names where they are known."""
    rows = [f'<tr><td class="name">{text(run.name)}</td>{cells}</tr>' for run in runs for cells in _lost(run)]
    if not rows:
        return '<p class="note">No step was skipped and every image could be read.</p>'
    return table(("run", "what", "number", "which"), rows)


def _lost(run: Run) -> list[str]:
    """Cells behind the run's name, for each kind of loss."""
    found: list[tuple[str, int, list[str]]] = []
    skipped = run.of_kind("skipped_step")
    if skipped:
        # A row of a CUDA run tells of all the steps that were skipped since the row before it.
        count = sum(row.get("steps", 1) for row in skipped)
        found.append(("steps skipped", count, [f"step {row['step']}: {row.get('reason', '')}" for row in skipped]))
    # A run that was extended has several such rows.
    ends = [row for row in run.of_kind("end") if row.get("bad_records")]
    if ends:
        most = max(ends, key=lambda row: row["bad_records"])
        named = [f"{index}: {reason}" for index, reason in most.get("bad", {}).items()]
        found.append(("damaged images replaced by others", most["bad_records"], named))
    for each in results(run):
        if unread(each.facts):
            count = each.facts.get("bad_images", {}).get("--val-data", 0) or each.facts.get("val_bad", 0)
            found.append((f"images that {each.protocol} could not read", count, [each.file]))
    return [_cells(*each) for each in found]


def _cells(what: str, count: int, which: list[str]) -> str:
    listed = items(which[:20]) if len(which) < 4 else folded(f"the first {min(len(which), 20)}", items(which[:20]))
    return f'<td>{text(what)}</td><td class="figure">{count:,}</td><td>{listed}</td>'
