"""Where the time of a step goes: from the loader over augmentation to the step itself, as runs recorded it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from train.record.comparison import images_per_second
from train.record.diagnosis import settled
from train.record.groups import Group
from train.record.markup import number, swatch, table, text
from train.record.run import Run

QUEUE = 2
"""Batches that may wait for the step in our own loaders (`pipeline/prefetch.py`)."""


def stages(groups: Sequence[Group]) -> str:
    """A table of the stages; a full queue with a busy step says that the step is the limit, an empty one the loader."""
    head = (
        "run",
        "images/s",
        "loader busy",
        "batches ready",
        "augmentation on the host's thread",
        "waiting for data",
        "step",
        "limit",
    )
    note = (
        '<p class="note">Medians over the rows, as shares of the time. Batches ready is how many were waiting when the '
        f"step asked for one, of {QUEUE} in our own loaders: near {QUEUE} the step is the limit, near 0 the loader is. "
        "A dash: not recorded by this loader or at that time.</p>"
    )
    return note + table(head, [_row(group) for group in groups])


def _row(group: Group) -> str:
    run = group.first
    busy, augment, wait, ready = (
        _median(run, name) for name in ("loader_busy_share", "augment_share", "data_wait_share", "batches_ready")
    )
    step = None if wait is None else max(1.0 - wait - (augment or 0.0), 0.0)
    cells = [
        number(images_per_second(run), ",.0f"),
        number(busy, ".0%"),
        number(ready, ".1f"),
        number(augment, ".0%"),
        number(wait, ".1%"),
        number(step, ".0%"),
        limit(wait, ready),
    ]
    name = f'<td class="name">{swatch(group.colour)}{text(group.name)}</td>'
    figures = "".join(f'<td class="figure">{text(cell)}</td>' for cell in cells)
    return f"<tr>{name}{figures}</tr>"


def limit(wait: float | None, ready: float | None) -> str:
    """Which stage limits a run, from its share of waiting and the batches that were ready."""
    if wait is None:
        return "–"
    if wait >= 0.05:
        return "loader"
    # A queue that is never full keeps up without a reserve.
    return "step" if ready is None or ready >= 0.5 * QUEUE else "step, the loader just keeps up"


def _median(run: Run, name: str) -> float | None:
    values = settled(run.values("train", name)[1])
    return median(values) if values else None
