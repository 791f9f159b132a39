"""Line charts as inline SVG: no library, no script, readable on paper and in the dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH_PX, HEIGHT_PX = 560, 260
_LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 56, 14, 10, 38
_MAX_POINTS, _FEWEST_POINTS, _POINTS_OF_ALL = 280, 24, 1400
_MARKER_POINTS = 60
COLOURS = 8
"""Colours that the page's style sheet defines as `--series-0` ...; runs beyond them repeat the first."""


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: its name in the legend.
        x: positions, ascending; any length.
        y: values of the same length; values that are not finite are left out.
        colour: number of its colour.
        dashed: drawn dashed, to tell two lines of one run apart.
        low: lower ends of a band around the line, of the same length; None draws no band.
        high: upper ends.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def thin(x: np.ndarray, y: np.ndarray, points: int = _MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` means of consecutive values, so that a long noisy curve stays small and readable."""
    if len(x) <= points:
        return x, y
    parts = np.array_split(np.arange(len(x)), points)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, about `about` of them, that cover the range from within."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    # Slightly below, because rounding must not skip a step that fits exactly.
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short number for an axis or a tooltip."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1000:g}k" if value % 100 == 0 else f"{value:,.0f}"
    return f"{value:.4g}" if 1e-3 <= size else f"{value:.1e}"


def _limits(values: np.ndarray, zero: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if zero:
        low = min(low, 0.0)
    # A constant curve has no range; without room its line would lie on the frame.
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return (low if zero and low == 0 else low - pad), high + pad


def _clean(series: Series, points: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(series.x, dtype=float), np.asarray(series.y, dtype=float)
    kept = np.isfinite(x) & np.isfinite(y)
    return thin(x[kept], y[kept], points)


_Band = tuple[np.ndarray, np.ndarray, np.ndarray]


def _band(series: Series, points: int) -> _Band | None:
    """Positions, lower and upper ends of a series' band, thinned as its line is; None where it has none."""
    if series.low is None or series.high is None or not len(series.x):
        return None
    x, low, high = (np.asarray(values, dtype=float) for values in (series.x, series.low, series.high))
    kept = np.isfinite(x) & np.isfinite(low) & np.isfinite(high)
    if not kept.any():
        return None
    places, lower = thin(x[kept], low[kept], points)
    return places, lower, thin(x[kept], high[kept], points)[1]


def _rule(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{_LEFT_PX}" x2="{WIDTH_PX - _RIGHT_PX}" y1="{y}" y2="{y}"/>'


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{round(y, 1)}" text-anchor="{anchor}">{html.escape(text)}</text>'


class _Frame:
    """The plot area and its two scales."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x_range, self.y_range = x, y

    def x(self, value: float) -> float:
        low, high = self.x_range
        share = (value - low) / (high - low) if high > low else 0.5
        return round(_LEFT_PX + share * (WIDTH_PX - _LEFT_PX - _RIGHT_PX), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(HEIGHT_PX - _BOTTOM_PX - (value - low) / (high - low) * (HEIGHT_PX - _TOP_PX - _BOTTOM_PX), 1)

    def axes(self, x_label: str) -> list[str]:
        right, bottom = WIDTH_PX - _RIGHT_PX, HEIGHT_PX - _BOTTOM_PX
        parts: list[str] = []
        for value in ticks(*self.y_range):
            parts.append(_rule("grid", self.y(value)))
            parts.append(_text("tick", _LEFT_PX - 8, self.y(value) + 4, number(value), "end"))
        for value in ticks(*self.x_range, about=6):
            parts.append(_text("tick", self.x(value), bottom + 16, number(value), "middle"))
        parts.append(_rule("axis", bottom))
        parts.append(_text("tick", right, HEIGHT_PX - 4, x_label, "end"))
        return parts


def _draw_band(frame: _Frame, series: Series, band: _Band) -> str:
    x, low, high = band
    edge = [(frame.x(a), frame.y(b)) for a, b in zip(x, high, strict=True)]
    edge += [(frame.x(a), frame.y(b)) for a, b in zip(x[::-1], low[::-1], strict=True)]
    points = " ".join(f"{a},{b}" for a, b in edge)
    return f'<polygon class="band" points="{points}" fill="var(--series-{series.colour % COLOURS})"/>'


def _draw(frame: _Frame, series: Series, x: np.ndarray, y: np.ndarray) -> list[str]:
    colour = f"var(--series-{series.colour % COLOURS})"
    points = " ".join(f"{frame.x(a)},{frame.y(b)}" for a, b in zip(x, y, strict=True))
    dash = ' stroke-dasharray="5 4"' if series.dashed else ""
    parts = [f'<polyline class="line" points="{points}" stroke="{colour}"{dash}/>'] if len(x) > 1 else []
    # Every point answers the pointer; only few points are also marked.
    radius = 3 if len(x) <= _MARKER_POINTS else 6
    shown = "" if len(x) <= _MARKER_POINTS else ' fill-opacity="0"'
    for a, b in zip(x, y, strict=True):
        tip = f"{series.label}: {number(float(b))} at {number(round(float(a), 3))}"
        parts.append(
            f'<circle cx="{frame.x(a)}" cy="{frame.y(b)}" r="{radius}" fill="{colour}"{shown}>'
            f"<title>{html.escape(tip)}</title></circle>"
        )
    return parts


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    items = "".join(
        f'<li><i class="{"dashed" if s.dashed else "solid"}" style="color:var(--series-{s.colour % COLOURS})"></i>'
        f"{html.escape(s.label)}</li>"
        for s in series
    )
    return f'<ul class="legend">{items}</ul>'


def line_chart(
    title: str,
    note: str,
    series: Sequence[Series],
    x_label: str = "step",
    references: Sequence[tuple[str, float]] = (),
    zero: bool = False,
) -> str:
    """A figure with a title, a sentence that says how to read it, a legend and the lines.

    Args:
        title: what is drawn, with its unit.
        note: how to read it.
        series: the lines; those without a finite value are left out.
        x_label: what the horizontal axis counts.
        references: (label, value) horizontal lines, such as chance level.
        zero: let the vertical axis begin at zero.

    Returns:
        HTML of the figure; an empty string when there is nothing to draw.
    """
    # Many lines share the points of a few: each point has a tooltip, and a page must stay small.
    points = min(_MAX_POINTS, max(_FEWEST_POINTS, _POINTS_OF_ALL // max(len(series), 1)))
    cleaned = [(s, *_clean(s, points)) for s in series]
    cleaned = [(s, x, y) for s, x, y in cleaned if len(x)]
    if not cleaned:
        return ""
    all_x = np.concatenate([x for _, x, _ in cleaned])
    bands = [(s, band) for s, _, _ in cleaned if (band := _band(s, points)) is not None]
    ends = [end for _, (_, *both) in bands for end in both]
    all_y = np.concatenate([*(y for _, _, y in cleaned), *ends, np.array([v for _, v in references], dtype=float)])
    frame = _Frame((min(0.0, float(all_x.min())), float(all_x.max())), _limits(all_y, zero))
    body = frame.axes(x_label)
    for label, value in references:
        body.append(_rule("reference", frame.y(value)))
        body.append(_text("reference", WIDTH_PX - _RIGHT_PX - 2, frame.y(value) - 5, label, "end"))
    # All bands before all lines: a band must not lie over another run's line.
    body.extend(_draw_band(frame, s, band) for s, band in bands)
    for s, x, y in cleaned:
        body.extend(_draw(frame, s, x, y))
    return (
        f'<figure><label class="zoom"><input type="checkbox"> larger</label><h3>{html.escape(title)}</h3>'
        f'<p class="note">{html.escape(note)}</p>'
        f"{_legend([s for s, _, _ in cleaned])}"
        f'<svg viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(body)}</svg></figure>"
    )
