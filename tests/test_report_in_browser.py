"""The report in a browser: it opens from disk, overflows nowhere, and can be read light and dark, wide and narrow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.browser import browser, look
from tests.test_report import write_results, write_run
from train.record.collapse import KIND
from train.record.page import build_report

MOST_BYTES = 5_000_000

pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two configurations, one of three seeds, with everything that a page can show, a collapse included."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / f"regioncl-m-with-a-rather-long-name-seed-{seed}", seed=seed) for seed in range(3)]
    runs.append(write_run(folder / "other", method="moco-v2", seed=0, steps=900, optim={"lr": 0.5}))
    write_results(runs[0], "linear", top1=0.6, top5=0.9, recipe="care", epochs=80, val_images=50_000)
    row = {"kind": KIND, "step": 200, "epoch": 6, "time_s": 100.0, "what": "all images are given nearly one embedding"}
    row |= {"cause": "steps are far too large", "look_at": "--optim.lr", "measured": {"embedding_std": 0.001}}
    end = {
        "kind": "end",
        "step": 300,
        "epoch": 10,
        "time_s": 160.0,
        "bad_records": 2,
        "bad": {"3": "cut", "9": "empty"},
    }
    with (runs[3] / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n" + json.dumps(end) + "\n")
    build_report(runs, folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [380, 1400])
def test_it_can_be_read(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    found = look(page, tmp_path, width, dark)
    assert found.dark == dark and abs(found.width - width) <= 20 and found.texts > 300
    assert found.needs <= found.width, f"the page needs {found.needs} pixels of {found.width}"
    assert not found.low, found.low
    assert not found.console and not found.broken


def test_it_is_small(page: Path) -> None:
    assert page.stat().st_size < MOST_BYTES


def test_the_look_sees_what_it_looks_for(tmp_path: Path) -> None:
    """A page that is wrong in each way: grey on grey, too wide, a broken picture, an error on the console."""
    (tmp_path / "bad.html").write_text(
        '<!doctype html><body style="background:#fff"><p style="color:#bbb">pale</p><div style="width:900px">wide</div>'
        '<img src="data:image/png;base64,AAAA"><script>console.error("broken")</script>'
    )
    found = look(tmp_path / "bad.html", tmp_path, 380, False)
    assert found.needs > 800 and found.low[0][0] == "pale" and found.broken == 1 and found.console
