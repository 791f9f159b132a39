"""The committed plots show what the rows say, and no run is mixed with another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import plot_results

pytest.importorskip("matplotlib", reason="the plots are drawn by matplotlib (extra eval)")


def words(svg: Path) -> list[str]:
    """The texts of a plot in their order: labels, ticks and figures."""
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg.read_text())


def paths(svg: Path) -> list[str]:
    """The shapes of a plot: bars, lines and ticks."""
    return re.findall(r' d="([^"]+)"', svg.read_text())


@pytest.mark.parametrize("name", plot_results.PLOTS_BY_NAME)
def test_the_committed_plot_is_drawn_from_the_rows_of_today(name: str, tmp_path: Path) -> None:
    drawn, committed = plot_results.write_plot(name, tmp_path), plot_results.PLOTS / f"{name}.svg"
    assert words(drawn) == words(committed), "run python tools/plot_results.py and commit the plots"
    assert paths(drawn) == paths(committed), "run python tools/plot_results.py and commit the plots"


def test_the_loaders_plot_prints_the_figures_of_one_run() -> None:
    names = [name for name, _, _ in plot_results.LOADERS]
    run = plot_results.newest_run(plot_results.rows_of("bench_pipeline.csv"), names)
    figures = [f"{float(run[name]['median']):,.0f}" for name in names]
    assert [word for word in words(plot_results.PLOTS / "loaders.svg") if word in figures] == figures


def row(contender: str, date: str, median: str) -> plot_results.Row:
    return {"contender": contender, "date": date, "cpu": "x", "metric": "throughput", "median": median}


def test_only_a_complete_run_is_compared() -> None:
    rows = [row("a", "2026-01-01T10:00Z", "1"), row("b", "2026-01-01T10:00Z", "2"), row("a", "2026-01-02T10:00Z", "9")]
    assert plot_results.newest_run(rows, ["a", "b"])["a"]["median"] == "1"
    with pytest.raises(ValueError, match="no run"):
        plot_results.newest_run(rows, ["a", "c"])


def test_a_changed_recipe_is_no_part_of_a_curve() -> None:
    setting = "byol-small, resnet18, 64 px, seed 0"
    line = {"contender": "byol", "metric": "20-NN top-1, epoch 4", "median": "0.5", "setting": setting}
    changed = {**line, "median": "0.9", "setting": f"{setting}, optim.lr 0.001"}
    assert plot_results.learning_curve([line, changed], "byol", "byol-small") == [(4, 50.0)]
