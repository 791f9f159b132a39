"""Small pieces of HTML that the parts of the page share: escaped text, numbers, tables, folded lists, colour marks."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from train.record.charts import COLOURS


def text(value: Any) -> str:
    """A value with HTML's own characters escaped."""
    return html.escape(str(value))


def number(value: float | None, form: str = ".3f") -> str:
    """A figure in a format; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls sideways in itself where the page is narrow; `rows` are finished `<tr>` elements."""
    cells = "".join(f"<th>{text(name)}</th>" for name in head)
    # A focusable region, so that the keyboard can scroll it.
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{text(", ".join(head))}">'
        f"<table><tr>{cells}</tr>{''.join(rows)}</table></div>"
    )


def items(lines: Sequence[str]) -> str:
    """A list of sentences."""
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>"


def folded(summary: str, content: str) -> str:
    """Content that opens when its summary is chosen."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def swatch(colour: int) -> str:
    """A dot in a run's colour."""
    return f'<i style="color:var(--series-{colour % COLOURS})"></i>'


def duration(seconds: float | None) -> str:
    """A time in the units that fit it: "42 s", "3.5 min", "2.1 h"."""
    if seconds is None:
        return "–"
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
