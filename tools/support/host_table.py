"""The table of what a step costs the host, drawn from the rows of `tools/bench_host.py` alone."""

from __future__ import annotations

from collections.abc import Sequence

Row = dict[str, str]

_CONTENDERS = ("plain", "ours", "ours + kernels", "ours + kernels + graph")
_FIGURES = ("launches of a step", "bytes of a step", "host time over plain")


def host_table(rows: Sequence[Row]) -> str:
    """Markdown: launches, GB and host time over plain of each method's newest run, in the order they were measured.

    Args:
        rows: of bench_host.csv, oldest first.
    """
    newest: dict[str, dict[tuple[str, str], str]] = {}
    dates: dict[str, str] = {}
    for row in rows:
        method = row["setting"].partition(",")[0]
        if row["date"] != dates.get(method):
            # One run's figures only: those of another belong to another machine or state of the code.
            dates[method], newest[method] = row["date"], {}
        newest[method][row["contender"], row["metric"]] = row["median"]
    lines = [
        "| method | plain | ours, PyTorch's batch norm | ours, with our kernels | the same as a CUDA graph |",
        "|---|---|---|---|---|",
    ]
    for method, figures in sorted(newest.items(), key=lambda item: dates[item[0]]):
        cells = [
            ", ".join(_short(figures[name, figure]) for figure in _FIGURES if (name, figure) in figures) or "none"
            for name in _CONTENDERS
        ]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(figure: str) -> str:
    """Counts whole, all else with three digits."""
    value = float(figure)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
