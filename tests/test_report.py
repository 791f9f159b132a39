"""The report: whole from a run's folder, offline, beside the published figures, and honest about what is missing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tools import charts, report
from tools.published import PUBLISHED, candidates, differences
from train.errors import UserMistake


def write_run(folder: Path, method: str = "regioncl-m", steps: int = 300, seed: int = 0, **recipe: object) -> Path:
    """A run's folder as the contract describes it, with plausible figures and data that are not there."""
    folder.mkdir(parents=True)
    config = {
        "run": {"method": method, "data": "absent.beton", "seed": seed, "loader": "auto"},
        "recipe": {"arch": "resnet18", "image_size": 64, "epochs": 10, "global_batch": 64, **recipe},
        "model": {"queue_size": 4096, "temperature": 0.1},
        "data_hash": "0" * 64,
        "data_images": 9469,
        "versions": {"torch": "2.15.0", "commit": "0123456789ab"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(seed)
    rows: list[dict[str, object]] = [{"kind": "start", "world_size": 1, "steps_per_epoch": 30, "last_step": steps}]
    rows[0].update(step=0, epoch=0, time_s=0.1)
    for step in range(0, steps + 1, 10):
        common = {"step": step, "epoch": step // 30, "time_s": step * 0.5}
        if step % 150 == 0:
            health = {"feature_std": 0.5, "effective_rank": 20 + step / 10, "view_retrieval": 0.1 + step / 1500}
            rows.append({"kind": "health", **common, **health})
            rows.append(
                {"kind": "knn", **common, "top1": 0.35 + step / 5000, "k": 20, "train_images": 9, "val_images": 3}
            )
        if step:
            ins = 8.3 - 1.5 * (1 - math.exp(-step / 200)) + random.normal(0, 0.05)
            parts = {"loss": 2 * ins, "loss/ins": ins, "loss/region": ins + 0.02, "lr": 1e-3, "ema_momentum": 0.99}
            speed = {"images_per_s": 140 + random.normal(0, 5), "data_wait_share": 0.02, "grad_norm": 1.0}
            rows.append({"kind": "train", **common, **parts, **speed})
    rows.append({"kind": "skipped_step", "step": 200, "epoch": 6, "time_s": 100.0, "reason": "non-finite loss"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class _Page(HTMLParser):
    """Tags must nest, and every address on the page is collected."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


@pytest.mark.smoke
def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a run")
    report.build_report([folder], folder / "report.html")
    text = (folder / "report.html").read_text()
    page = _Page(text)
    assert not page.open
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?://|url\(|@import|<script", text)
    # Loss, its terms, k-NN, three health figures, speed, waiting, gradient, rate, EMA.
    assert page.count["svg"] == 11
    for words in (
        "Loss by term",
        "k-NN top-1",
        "View retrieval",
        "Waiting for data",
        "chance, ln(K+1) = 8.32",
        "skipped_step",
    ):
        assert words in text
    assert "no images to show" in text
    assert not list(folder.glob("*.partial"))


def test_a_curve_is_drawn_where_its_values_are() -> None:
    figure = charts.line_chart("t", "n", [charts.Series("a", [0, 50, 100], [1.0, 3.0, 2.0])])
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', figure)[1].split()]  # type: ignore[index]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 < y2 < y0, "larger values lie higher"
    assert (y0 - y2) == pytest.approx(y2 - y1, abs=0.2)
    assert charts.line_chart("t", "n", [charts.Series("a", [1], [math.nan])]) == ""


def test_long_curves_are_thinned_without_bias() -> None:
    x, y = charts.thin(np.arange(10_000.0), np.tile([0.0, 2.0], 5000))
    assert len(x) == len(y) == 280
    np.testing.assert_allclose(y.mean(), 1.0, atol=0.02)
    assert y.max() < 1.1


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (8.1, 8.4), (-3.0, 250.0), (1e-6, 3e-6)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 3 <= len(found) <= 11
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def test_runs_side_by_side_with_published_figures(tmp_path: Path) -> None:
    one = write_run(tmp_path / "first" / "regioncl-m", arch="resnet50", image_size=224, epochs=200, global_batch=1024)
    two = write_run(tmp_path / "second" / "regioncl-m", method="moco-v2", seed=1)
    out = tmp_path / "deep" / "both.html"
    report.build_report([one, two], out)
    text = out.read_text()
    assert "first/regioncl-m" in text and "second/regioncl-m" in text
    # RegionCL-M at 200 epochs and MoCo v2 at its nearest schedule.
    assert "69.4% / 89.6%" in text and "64.5% / 86.1%" in text
    assert "data: ImageNet-1K there, 9,469 images here" in text
    assert "backbone: resnet50 there, resnet18 here" in text
    assert "measured: linear there, 20-NN here" in text
    assert 'class="differs"' in text


def test_the_linear_probe_of_a_run_takes_the_place_of_its_knn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert report.measured_figure(report.read_run(folder)) == ("20-NN", "41.0% top-1")
    (folder / "eval-linear-untrained.json").write_text(
        json.dumps({"protocol": "linear", "untrained": True, "top1": 0.1})
    )
    assert report.measured_figure(report.read_run(folder))[0] == "20-NN", "an untrained backbone's is not the run's"
    (folder / "eval-linear.json").write_text(json.dumps({"protocol": "linear", "untrained": False, "top1": 0.617}))
    run = report.read_run(folder)
    assert report.measured_figure(run) == ("linear", "61.7% top-1")
    page = report.render([run])
    assert "top-1 61.7%" in page and "top-1 10.0%" in page and "eval-linear-untrained.json" in page


def test_published_table_is_consistent() -> None:
    for row in PUBLISHED:
        assert 30 < row.top1 < 80
        assert row.top5 is None or row.top5 > row.top1 + 10
    keys = [(row.method, row.arch, row.epochs, row.source, row.protocol) for row in PUBLISHED]
    assert len(set(keys)) == len(keys)
    # Longer schedules of one source and protocol are never worse.
    for row in PUBLISHED:
        for other in PUBLISHED:
            same = (row.method, row.arch, row.source, row.protocol) == (
                other.method,
                other.arch,
                other.source,
                other.protocol,
            )
            assert not same or row.epochs >= other.epochs or row.top1 <= other.top1


def test_nearest_published_schedule() -> None:
    assert {row.epochs for row in candidates("care", "resnet101", 180)} == {200}
    assert {row.arch for row in candidates("care", "resnet101", 180)} == {"resnet101"}
    assert {row.arch for row in candidates("care", "resnet18", 100)} == {"resnet50"}
    assert candidates("no-such-method", "resnet50", 100) == []
    row = candidates("regioncl-m", "resnet50", 200)[0]
    config = {"recipe": {"arch": "resnet50", "epochs": 200, "image_size": 224, "global_batch": 1024}}
    assert differences(row, config, 1_281_167, "linear") == []
    config["recipe"]["image_size"] = 128
    assert differences(row, config, 1_281_167, "linear") == ["image size: 224 there, 128 here"]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    whole = len(report.read_run(folder).rows)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')
    assert len(report.read_run(folder).rows) == whole
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('\n{"kind": "end", "step": 1, "epoch": 0, "time_s": 1}\n')
    with pytest.raises(UserMistake, match="line .* is no JSON"):
        report.read_run(folder)


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<b>&'quoted'")
    report.build_report([folder], tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text()
    assert "<b>&" not in text and "&lt;b&gt;&amp;" in text


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert report.main([]) == 2
    assert report.main(["--ot", "x"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "config.json" in errors[0]
    assert "--out" in errors[2], "the nearest valid flag is named"
