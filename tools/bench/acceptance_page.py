"""One page from the rows of an acceptance run: a verdict on each lever, and how far the step is from its bounds."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

GAIN, LOSS = 1.02, 0.98
"""Ratios between which two rates count as equal."""
OFFICIAL, AIM, END_TO_END = 2450.0, 3300.0, 97.0
"""Images a second of the released run on eight A100, which one H200 is to reach; the roofline; % of synthetic."""
Rows = Sequence[Mapping[str, str]]


def read_rows(path: Path) -> Rows:
    """The rows of a part; none where it wrote none."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _figures(rows: Rows, metric: str) -> dict[str, float]:
    return {row["contender"]: float(row["median"]) for row in rows if row["metric"] == metric}


def _own(rates: Mapping[str, float]) -> str | None:
    """Our step without levers: with compiled heads where they were measured."""
    return next((name for name in ("ours", "ours, not compiled") if name in rates), None)


def lever_line(lever: str, rows: Rows) -> str:
    """The verdict on a lever, from rows of a run that measured our step with it and without."""
    rates = _figures(rows, "throughput")
    own = _own(rates)
    tried = next((name for name in rates if name.startswith("ours + ")), None)
    if own is None or tried is None:
        return f"{lever}: not measured"
    ratio = rates[tried] / rates[own]
    verdict = "pays" if ratio >= GAIN else "costs" if ratio <= LOSS else "changes nothing"
    memory = _figures(rows, "peak memory")
    held = f", peak {memory[own]:.0f} -> {memory[tried]:.0f} MiB" if {own, tried} <= memory.keys() else ""
    return f"{lever}: {verdict}, {ratio:.2f}x ({rates[own]:.4g} -> {rates[tried]:.4g} images/s{held})"


def step_lines(rows: Rows) -> list[str]:
    """Our step beside the port of the released one and beside strong eager, and its share of the compute bound."""
    rates = _figures(rows, "throughput")
    own = _own(rates)
    if own is None:
        return ["step: not measured"]
    lines = [f"step: {rates[own]:.4g} images/s"]
    for other in ("official port", "strong eager"):
        if other in rates:
            lines.append(f"  {rates[own] / rates[other]:.2f} x {other} ({rates[other]:.4g})")
    bound = next((value for value in _figures(rows, "throughput bound").values()), None)
    if bound is not None:
        lines.append(f"  {100 * rates[own] / bound:.0f}% of the rate of its products alone at the data sheet's peak")
    return lines


def best_line(rows_of_levers: Iterable[Rows], h200: bool) -> str:
    """The fastest step of all levers, and on an H200 its distance to the bar and to the roofline."""
    rates = [
        rate for rows in rows_of_levers for name, rate in _figures(rows, "throughput").items() if name[:4] == "ours"
    ]
    if not rates:
        return "best step: not measured"
    line = f"best step: {max(rates):.4g} images/s"
    if h200:
        line += (
            f", {max(rates) / OFFICIAL:.2f} of the bar {OFFICIAL:.0f}, {max(rates) / AIM:.2f} of the roofline {AIM:.0f}"
        )
    return line


def end_to_end_line(rows: Rows) -> str:
    """The rate from stored photos, as a share of the rate with synthetic ones."""
    shares = _figures(rows, "share of synthetic rate")
    if not shares:
        return "end to end: not measured"
    rates = _figures(rows, "throughput")
    name, share = next(iter(shares.items()))
    verdict = "reaches" if share >= END_TO_END else "misses"
    return f"{name}: {rates[name]:.4g} images/s, {share:.0f}% of synthetic, {verdict} {END_TO_END:.0f}%"


def method_lines(named: Mapping[str, Rows]) -> list[str]:
    """Every method's step, and what the levers that were tried on it are worth."""
    return [f"  {method}: {_method_text(_figures(rows, 'throughput'))}" for method, rows in named.items()]


def _method_text(rates: Mapping[str, float]) -> str:
    own = _own(rates)
    if own is None:
        return "not measured"
    tried = {name.removeprefix("ours + "): rate for name, rate in rates.items() if name.startswith("ours + ")}
    return ", ".join([f"{rates[own]:.4g} images/s", *(f"{n} {rate / rates[own]:.2f}x" for n, rate in tried.items())])
