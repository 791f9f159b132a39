"""Every result of a run beside the untrained backbone's and what was published, with the differences of protocol."""

from __future__ import annotations

from collections.abc import Sequence

from train.record.comparison import title
from train.record.evaluations import Measurement, describe, place, results, unread
from train.record.evaluations import differences as evaluation_differences
from train.record.groups import Group
from train.record.markup import folded, items, swatch, table, text
from train.record.published import candidates, differences
from train.record.run import Run


def beside_published(groups: Sequence[Group]) -> str:
    """Every result of every run, beside the untrained backbone's and what was published for the method."""
    rows = []
    placed = [(group.colour, run) for group in groups for run in group.runs]
    for number, (colour, run) in enumerate(placed):
        found = results(run)
        trained = {(each.protocol, each.task): each for each in found if not each.untrained}
        baseline = {(each.protocol, each.task): each for each in found if each.untrained}
        # A linear probe is what the methods are known by, so its row is there before it is measured.
        for key in sorted({("linear", ""), *trained, *baseline}, key=place):
            row = _result_row(run, colour, key, trained.get(key), baseline.get(key))
            # What was measured comes first: a protocol that was not measured only says what could be.
            rows.append(((key not in trained, place(key)), number, row))
    head = ("run", "protocol", "here", "untrained", "published", "difference of protocol")
    return table(head, [row for *_, row in sorted(rows, key=lambda entry: entry[:2])])


def _result_row(
    run: Run, colour: int, key: tuple[str, str], measured: Measurement | None, baseline: Measurement | None
) -> str:
    def cell(found: Measurement | None) -> str:
        if found is None:
            return "–"
        note = f"{found.file}{unread(found.facts)}"
        return f'{text(describe(found.figures))}<p class="note">{text(note)}</p>'

    published = candidates(run.config, *key)
    there, apart = [], []
    for row in published:
        epochs = f"{row.epochs} epochs" if row.epochs else "epochs not stated"
        there.append(f"<li>{text(describe(row.figures))} ({text(f'{row.arch}, {epochs}; {row.source}')})</li>")
        listed = differences(row, run.config)
        listed += ["not measured here yet"] if measured is None else evaluation_differences(row, measured)
        # Figures of one backbone share most differences; each is listed once.
        apart += [item for item in listed if item not in apart]
    if not published:
        there = ["<li>nothing for this method and protocol</li>"]
    elif not apart:
        apart = ["none known"]
    listed_apart = items(apart) if len(apart) < 2 else folded(f"{len(apart)} differences", items(apart))
    return (
        f'<tr><td class="name">{swatch(colour)}{text(run.name)}<p class="note">{text(title(run))}</p></td>'
        f"<td>{text(' '.join(key).strip())}</td><td>{cell(measured)}</td><td>{cell(baseline)}</td>"
        f"<td><ul>{''.join(there)}</ul></td><td>{listed_apart}</td></tr>"
    )
