"""The tables of the results page say what their rows say, and the results page has been drawn from its rows."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from tools import plot_results
from tools.support.host_table import host_table
from tools.support.pages import redraw
from tools.support.plan_tables import Row, curve, grouped, pairs, plan_part, table


def row(method: str, seed: int, last: float, flags: str = "--epochs 2", **more: str) -> Row:
    figures = {"untrained": "0.2", "best": "0.5", "last": f"{last}", "linear": "0.5", "view_retrieval": "0.1"}
    own = {"plan": "p", "method": method, "recipe": f"{method}-small", "flags": flags, "seed": str(seed)}
    return figures | own | {"minutes": "4", "curve": "0:0.2 2:0.4"} | more


ROWS = [
    row("moco-v2", 0, 0.30),
    row("moco-v2", 1, 0.34),
    row("regioncl-m", 0, 0.40, "--epochs 2 --region.lower 1"),
    row("regioncl-m", 1, 0.46, "--epochs 2 --region.lower 1"),
    row("regioncl-m", 0, 0.20, "--epochs 2 --region.lower 2"),
    row("byol", 0, 0.25, recipe="byol"),
]


def test_seeds_stand_together_under_what_is_their_own() -> None:
    assert {label: len(runs) for label, runs in grouped(ROWS).items()} == {
        "moco-v2": 2,
        "regioncl-m --region.lower 1": 2,
        "regioncl-m --region.lower 2": 1,
        "byol --recipe byol": 1,
    }


def test_the_best_comes_first_with_the_standard_error_of_its_seeds() -> None:
    lines = table(ROWS).splitlines()[2:]
    # 0.40 and 0.46: a deviation of 4.24 points, over the root of two.
    assert lines[0].startswith("| `regioncl-m --region.lower 1` | 2 | 20.0 ± 0.0 | 43.0 ± 3.0 |")
    assert lines[2].startswith("| `byol --recipe byol` | 1 | 20.0 | 25.0 |")


def test_a_pair_is_compared_seed_by_seed_and_without_ablations() -> None:
    # 0.10 and 0.12; the errors of the two methods alone would be larger.
    assert pairs(ROWS).splitlines()[2:] == ["| `regioncl-m` over `moco-v2` | 2 | 11.0 ± 1.0 | 0.0 ± 0.0 |"]
    assert pairs(ROWS[:2]) == ""


def test_a_curve_is_read_back() -> None:
    assert curve(ROWS[0]) == [(0, 0.2), (2, 0.4)]


def test_only_what_stands_between_the_marks_is_drawn_anew(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- plan p -->old<!-- end -->\n<!-- note x -->\nafter\n")
    kinds = {"plan": partial(plan_part, ROWS)}
    assert redraw(page, kinds) == ["plan p"]
    text = page.read_text()
    assert text.startswith("before\n<!-- plan p -->\n\n| method")
    assert text.endswith("<!-- end -->\n<!-- note x -->\nafter\n")
    assert "old" not in text and redraw(page, kinds) == ["plan p"] and page.read_text() == text
    with pytest.raises(ValueError, match="no rows"):
        redraw(page, {"plan": partial(plan_part, [])})


def test_the_page_of_results_is_drawn_from_its_rows(tmp_path: Path) -> None:
    committed = plot_results.RESULTS / "README.md"
    drawn = tmp_path / "README.md"
    shutil.copy(committed, drawn)
    assert plot_results.write_tables(drawn)
    assert drawn.read_text() == committed.read_text(), "run python tools/plot_results.py and commit the page"


def host_row(date: str, method: str, contender: str, metric: str, median: str) -> Row:
    setting = f"{method}, resnet50, batch 256"
    return {"date": date, "setting": setting, "contender": contender, "metric": metric, "median": median}


def test_the_host_table_holds_the_newest_run_of_each_method_and_no_older_figure() -> None:
    rows = [
        host_row("1", "byol", "plain", "launches of a step", "7"),
        host_row("1", "byol", "ours", "launches of a step", "9"),
        host_row("2", "byol", "plain", "launches of a step", "1400"),
        host_row("2", "byol", "plain", "bytes of a step", "173.66"),
        host_row("2", "byol", "plain", "host time of a step", "27.1"),
        host_row("3", "care", "ours + kernels", "host time over plain", "0.92991"),
    ]
    assert host_table(rows).splitlines()[2:] == [
        "| `byol` | 1400, 174 | none | none | none |",
        "| `care` | none | none | 0.93 | none |",
    ]
