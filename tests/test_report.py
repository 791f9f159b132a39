"""The report: whole from a run's folder, offline, beside the published figures, and honest about what is missing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from models.methods import METHODS
from tests.runs import last_wins
from tools import report
from train.build import build_method, feature_grid
from train.data import open_data
from train.errors import UserMistake
from train.inputs import InputBuilder, InputStream
from train.record import charts
from train.record.comparison import standard_error, wall_seconds, with_error
from train.record.evaluations import NAMES, PROTOCOLS
from train.record.groups import differing, epochs_at, grouped, student
from train.record.page import build_report, render
from train.record.pictures import Picture
from train.record.published import DATA_IMAGES, PUBLISHED, candidates, differences, nearest_task
from train.record.run import read_run
from train.record.seen import first_views, mixed_steps
from train.record.stages import limit, stages
from train.record.trouble import losses_of_data
from train.resolve import resolve
from train.runtime import Runtime


def write_run(folder: Path, method: str = "regioncl-m", steps: int = 300, seed: int = 0, **recipe: object) -> Path:
    """A run's folder as the contract describes it, with plausible figures and data that are not there."""
    folder.mkdir(parents=True)
    config = {
        "run": {"method": method, "data": "absent.beton", "seed": seed, "loader": "auto"},
        "recipe": {"arch": "resnet18", "image_size": 64, "epochs": 10, "global_batch": 64, **recipe},
        "model": {**resolve(["--method", method]).to_json()["model"], "queue_size": 4096, "temperature": 0.1},
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
    build_report([folder], folder / "report.html")
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
    two = write_run(tmp_path / "second" / "regioncl-m", method="moco-v2", seed=1, optim={"lr": 0.5})
    out = tmp_path / "deep" / "both.html"
    build_report([one, two], out)
    text = out.read_text()
    assert "first/regioncl-m" in text and "second/regioncl-m" in text
    # RegionCL-M at 200 epochs and MoCo v2 at its nearest schedule; the latter's 20-NN was published too.
    assert "top-1 69.4, top-5 89.6" in text and "top-1 64.5, top-5 86.1" in text and "top-1 49.3" in text
    assert "data: ImageNet-1K there, 9,469 images here" in text
    assert "backbone: resnet50 there, resnet18 here" in text
    assert "not measured here yet" in text
    assert "changed from recipe moco-v2: " in text and "optim.lr 0.5, not 0.03" in text
    assert 'class="differs"' in text
    # What was measured comes first; protocols stand together, the runs one below the other.
    cells = re.findall(r"<td>((?:linear|knn)[^<]*)</td>", text)
    assert cells == ["knn 20-NN", "knn 20-NN", "linear", "linear"]


def write_results(folder: Path, protocol: str, untrained: bool = False, **facts: object) -> None:
    name = f"eval-{protocol}{'-untrained' if untrained else ''}.json"
    (folder / name).write_text(json.dumps({"protocol": protocol, "untrained": untrained, **facts}))


def shown(page: str, protocol: str) -> list[str]:
    """The cells of the one row of the table of results that is about a protocol, without tags."""
    (row,) = [row for row in re.findall(r"<tr>.*?</tr>", page) if f"<td>{protocol}</td>" in row]
    return [re.sub(r"<[^>]+>", " ", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]


def test_every_evaluation_stands_beside_its_published_figure(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", arch="resnet50", image_size=224, epochs=200, global_batch=1024)
    rows = [{"k": 20, "top1": 0.5, "top1_majority": 0.48}, {"k": 100, "top1": 0.4, "top1_majority": 0.39}]
    write_results(folder, "knn", results=rows, top1=0.5, val_images=3925)
    write_results(folder, "linear", top1=0.617, top5=0.9, recipe="care", epochs=80, val_images=50_000)
    write_results(folder, "linear", untrained=True, top1=0.1, top5=0.3, recipe="care", val_images=50_000)
    write_results(folder, "fewshot", fraction=0.1, top1=0.3, top5=0.5, recipe="regioncl-m", epochs=7, val_images=50_000)
    write_results(folder, "semi", share=12811 / 1_281_167, top1=0.2, top5=0.4, epochs=50, global_batch=256)
    metrics = {"box_ap": 0.3, "box_ap50": 0.5, "mask_ap": 0.25}
    write_results(folder, "detect", task="COCO Mask R-CNN C4 1x", metrics=metrics)
    write_results(folder, "segment", task="own data UPerNet 60 steps", miou=0.5)
    page = render([read_run(folder)])
    _, _, here, untrained, published, apart = shown(page, "linear")
    assert "top-1 61.7" in here and "eval-linear.json" in here and "top-1 10.0" in untrained
    assert "top-1 69.4, top-5 89.6, ReaL top-1 78.7" in published and "RegionCL-M&#x27;s log" in published
    assert "recipe regioncl-m is the method&#x27;s own, care here" in apart and "measured on" not in apart
    assert "top-1 60.4, top-5 83.5" in shown(page, "fewshot 10%")[4]
    assert "classifier&#x27;s epochs: 100 there, 7 here" in shown(page, "fewshot 10%")[5]
    assert shown(page, "knn 20-NN")[2].split()[:2] == ["top-1", "50.0,"]
    assert "top-1 54.7" in shown(page, "knn 20-NN")[4] and "top-1 52.7" in shown(page, "knn 100-NN")[4]
    assert "top-1 20.0" in shown(page, "semi 1%")[2] and "nothing for this method" in shown(page, "semi 1%")[4]
    assert "box AP 39.8, box AP50 59.8" in shown(page, "detect COCO Mask R-CNN C4 1x")[4]
    assert "box AP 30.0" in shown(page, "detect COCO Mask R-CNN C4 1x")[2]
    assert "mIoU 78.1" in shown(page, "segment own data UPerNet 60 steps")[4]
    apart = shown(page, "segment own data UPerNet 60 steps")[5]
    assert "task: Cityscapes UPerNet 40k there, own data UPerNet 60 steps here" in apart


def test_the_online_knn_is_shown_with_its_start(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    _, _, here, untrained, _, apart = shown(render([read_run(folder)]), "knn 20-NN")
    assert "top-1 41.0" in here and "top-1 35.0" in untrained and "metrics.jsonl" in here
    assert "3 other images here" in apart


def test_published_table_is_consistent() -> None:
    for row in PUBLISHED:
        assert all(15 < value < 98 for value in row.figures.values()), row
        if "top5" in row.figures:
            assert row.figures["top5"] > row.figures["top1"] + 10
        for kind in ("box", "mask"):
            if f"{kind}_ap50" in row.figures:
                assert row.figures[f"{kind}_ap50"] > row.figures[f"{kind}_ap"] + 10
        assert row.method in (*METHODS, "supervised") and row.data in DATA_IMAGES
        assert row.protocol in (*PROTOCOLS, "pose") and set(row.figures) <= {*NAMES, "ap"}
    keys = [(r.method, r.arch, r.epochs, r.data, r.protocol, r.task, str(r.flags), r.source) for r in PUBLISHED]
    assert len(set(keys)) == len(keys)
    # Longer schedules of one source and setting are never worse in linear probes; transfer figures are noisy.
    for row in PUBLISHED:
        for other in PUBLISHED:
            same = all(
                getattr(row, name) == getattr(other, name)
                for name in ("method", "arch", "data", "protocol", "task", "flags", "source")
            )
            if same and row.protocol == "linear" and row.epochs < other.epochs:
                for name in row.figures.keys() & other.figures.keys():
                    assert row.figures[name] <= other.figures[name], (row, other)


def test_flags_of_published_figures_exist() -> None:
    used = {(row.method, flag, value) for row in PUBLISHED for flag, values in row.flags.items() for value in values}
    for method, flag, value in sorted(used):
        if value != "none":  # a run of before the flag existed
            resolve(["--method", method, f"--{flag.replace('_', '-')}", value])


def run_config(method: str, arch: str = "resnet50", epochs: int = 100, *flags: str) -> dict:
    arguments = ["--method", method, "--arch", arch, "--epochs", str(epochs), *flags]
    return {**json.loads(json.dumps(resolve(last_wins(arguments)).to_json())), "data_images": 1_281_167}


def test_nearest_published_schedule() -> None:
    assert {row.epochs for row in candidates(run_config("care", "resnet101", 180), "linear", "")} == {200}
    assert {row.arch for row in candidates(run_config("care", "resnet101", 180), "linear", "")} == {"resnet101"}
    assert {row.arch for row in candidates(run_config("care", "resnet18"), "linear", "")} == {"resnet50"}
    assert candidates({"run": {"method": "no-such-method"}}, "linear", "") == []
    (row, _) = candidates(run_config("regioncl-m", epochs=200), "linear", "")
    config = run_config("regioncl-m", epochs=200)
    assert differences(row, config) == []
    config["recipe"]["image_size"] = 128
    assert differences(row, config) == ["image size: 224 there, 128 here"]
    config = run_config("regioncl-m", "resnet50", 200, "--queue-size", "4096")
    assert differences(row, config) == ["changed from recipe regioncl-m: queue_size 4096, not 65536"]
    # Another size of the regions is an ablation of the paper, which has no figure of this size.
    assert candidates(run_config("regioncl-m", "resnet50", 200, "--region.lower", "2"), "linear", "") == []


@pytest.mark.parametrize("method", ["moco-v2", "lewel-m", "byol", "lewel-b"])
def test_imagenet_100_has_recipes_of_its_own(method: str) -> None:
    assert {row.epochs for row in PUBLISHED if row.data == "ImageNet-100"} == {240}
    config = run_config(method, "resnet50", 240, "--recipe", f"{method}-in100")
    config["data_images"] = 126_689
    (row,) = candidates(config, "linear", "")
    assert differences(row, config) == []


def test_tasks_are_matched_by_their_words() -> None:
    tasks = ["COCO RetinaNet FPN 1x", "COCO Mask R-CNN FPN 1x", "COCO Mask R-CNN FPN 2x", "VOC12 FCN"]
    assert nearest_task("COCO Mask R-CNN FPN 2x", tasks) == "COCO Mask R-CNN FPN 2x"
    assert nearest_task("COCO Mask R-CNN FPN 60 steps", tasks) == "COCO Mask R-CNN FPN 1x"
    assert nearest_task("own data FCN 20 steps", tasks) == "VOC12 FCN"
    assert nearest_task("something else", tasks) == nearest_task("x", []) == ""


def test_ablations_are_told_apart() -> None:
    def top1(protocol: str, task: str, *config) -> list[float]:
        return [row.figures["top1"] for row in candidates(run_config(*config), protocol, task)]

    region = ("regioncl-m", "resnet50", 100)
    assert top1("knn", "20-NN", *region) == [54.7]
    assert top1("knn", "20-NN", *region, "--region.lower", "3", "--region.upper", "4") == [55.1]
    assert top1("knn", "100-NN", *region, "--region.use-paste", "false", "--region.intra-negative", "false") == [50.0]
    assert top1("knn", "20-NN", *region, "--region.lower", "4", "--region.upper", "6") == []
    symmetric = ("moco-v2", "resnet50", 800, "--symmetric.enabled", "true")
    assert top1("linear", "", *symmetric) == [72.3] and top1("linear", "", *symmetric[:3]) == [71.1]
    assert top1("linear", "", "care", "resnet50", 100, "--pos", "relative") == [72.06]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    whole = len(read_run(folder).rows)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')
    assert len(read_run(folder).rows) == whole
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('\n{"kind": "end", "step": 1, "epoch": 0, "time_s": 1}\n')
    with pytest.raises(UserMistake, match="line .* is no JSON"):
        read_run(folder)


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<b>&'quoted'")
    build_report([folder], tmp_path / "out.html")
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


def test_the_mixed_views_are_those_of_training() -> None:
    flags = "--method regioncl-m --loader synthetic --data 96 --arch resnet18 --image-size 64 --global-batch 16"
    more = "--holdout 8 --bn.group-size 0 --region.sampling official --region.pairing randperm --micro-batch 8"
    config = resolve([*flags.split(), *more.split(), "--device", "cpu"])
    runtime = Runtime(0, 1, torch.device("cpu"), torch.float32, False)
    method = build_method(config, runtime)
    data = open_data(config, runtime)
    builder = InputBuilder(config, method, runtime, feature_grid(method, 64))
    shown = mixed_steps(config, 1, 8, 3)
    assert len(shown) == 3
    for (_, trained), step in zip(InputStream(builder, data.train).epoch(0, 0, 0), shown, strict=False):
        torch.testing.assert_close(step.images, trained[0].mixed["view1"], rtol=0, atol=1e-6)
        assert trained[0].box_cells["view1"][0].tolist() == list(step.region.box_cells)
    first = next(InputStream(builder, data.train).epoch(0, 0, 0))[1][0]
    for name, view in first_views(config, 8).items():
        torch.testing.assert_close(view, getattr(first, name), rtol=0, atol=1e-6)
    data.close()


def test_a_partner_on_another_rank_is_found() -> None:
    flags = "--method regioncl-m --loader synthetic --data 96 --arch resnet18 --image-size 64 --global-batch 16"
    config = resolve([*flags.split(), "--holdout", "0", "--bn.group-size", "0", "--region.pairing-scope", "global"])
    alone, of_two = (mixed_steps(config, world_size, 8, 1)[0] for world_size in (1, 2))
    # Pairs over the whole batch do not depend on how it is shared out.
    torch.testing.assert_close(alone.images, of_two.images, rtol=0, atol=0)
    apart = resolve([*flags.split(), "--holdout", "0", "--bn.group-size", "0", "--region.pairing-scope", "group"])
    assert not torch.equal(mixed_steps(apart, 1, 8, 1)[0].images, mixed_steps(apart, 2, 8, 1)[0].images)


def test_no_mixed_view_is_shown_where_none_is_trained_on() -> None:
    config = resolve(["--method", "moco-v2", "--loader", "synthetic", "--data", "512"])
    assert mixed_steps(config, 1, 8, 3) == []


# --- several runs ----------------------------------------------------------------------------------------------------


def test_seeds_of_one_configuration_are_a_mean_with_a_band(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"s{seed}", seed=seed)) for seed in range(3)]
    other = read_run(write_run(tmp_path / "other", seed=0, epochs=20))
    again = read_run(write_run(tmp_path / "again", seed=0))
    groups = grouped([runs[0], other, runs[1], runs[2], again])
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("s0 and 2 more seeds", 3),
        ("other", 1),
        ("again", 1),
    ]
    curve = groups[0].curve("train", "loss", epochs_at)
    losses = np.array([run.values("train", "loss")[1] for run in runs])
    np.testing.assert_allclose(curve.y, losses.mean(axis=0))
    # 4.303 is Student's t for two degrees of freedom.
    half = 4.303 * losses.std(axis=0, ddof=1) / math.sqrt(3)
    assert curve.low is not None and curve.high is not None
    np.testing.assert_allclose(curve.low, losses.mean(axis=0) - half)
    np.testing.assert_allclose(curve.high, losses.mean(axis=0) + half)
    assert curve.x[0] == pytest.approx(10 / 30), "epochs"
    page = render([runs[0], runs[1], runs[2], other])
    assert 'class="band"' in page and "95% confidence of the mean" in page
    text = re.sub(r"<[^>]+>", " ", page)
    assert "s0 and 2 more seeds" in text and "0, 1, 2" in text
    assert set(differing(groups[:2])) == {"recipe.epochs"}


def test_a_mean_ends_where_the_shortest_run_ends(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"s{seed}", seed=seed, steps=100 + 100 * seed)) for seed in range(2)]
    curve = grouped(runs)[0].curve("train", "loss", epochs_at)
    assert curve.x[-1] == pytest.approx(100 / 30) and len(curve.x) == 10
    assert curve.low is not None and curve.high is not None
    values = [run.values("train", "loss")[1][0] for run in runs]
    assert (curve.low[0], curve.high[0]) == (min(values), max(values)), "two runs have a range, not an interval"
    assert student(30) == pytest.approx(2.045, abs=0.01)


def test_accuracy_has_the_error_of_the_images_that_were_classified(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    # 3 images: the error is 28 points, and the page says so.
    assert standard_error(41.0, 3) == pytest.approx(100 * math.sqrt(0.41 * 0.59 / 3))
    text = re.sub(r"<[^>]+>", " ", render([run]))
    assert "41.0 ± 28.4 %" in text and "untrained 35.0 ± 27.5" in text
    assert with_error([40.0, 44.0], 3) == "42.0 ± 2.0", "over seeds where there are several"


def test_an_evaluation_stands_on_the_tile_where_no_knn_was_measured_in_training(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rows = [line for line in (folder / "metrics.jsonl").read_text().splitlines(True) if '"knn"' not in line]
    (folder / "metrics.jsonl").write_text("".join(rows))
    found = [{"k": 20, "top1": 0.26, "top1_majority": 0.25}]
    write_results(folder, "knn", results=found, top1=0.26, val_images=200)
    assert "26.0 ± 3.1 %" in re.sub(r"<[^>]+>", " ", render([read_run(folder)]))


def test_a_run_of_two_parts_has_one_wall_time(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=100)
    more = [{"kind": "resume", "step": 100, "epoch": 3, "time_s": 0.2}, {"kind": "end", "step": 100, "time_s": 7.0}]
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"epoch": 3, "bad_records": 0, **row}) + "\n" for row in more)
    run = read_run(folder)
    seconds = run.elapsed()
    assert seconds == sorted(seconds) and seconds[-1] == pytest.approx(100.0 + 7.0, abs=0.2)
    assert wall_seconds(run) == seconds[-1]


def test_lost_data_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    row = {"kind": "end", "step": 300, "epoch": 10, "time_s": 1.0, "bad_records": 2, "bad": {"7": "cut", "9": "empty"}}
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    write_results(folder, "linear", top1=0.5, val_images=90, bad_images={"--val-data": 10})
    text = re.sub(r"<[^>]+>", " ", losses_of_data([read_run(folder)]))
    assert "7: cut" in text and "9: empty" in text and "step 200: non-finite loss" in text
    assert "images that linear could not read" in text
    clean = read_run(write_run(tmp_path / "clean"))
    clean.rows[:] = [each for each in clean.rows if each["kind"] != "skipped_step"]
    assert "every image could be read" in losses_of_data([clean])


def test_the_stages_tell_which_is_the_limit(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            line.update(loader_busy_share=0.97, batches_ready=0.1, data_wait_share=0.4)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    text = re.sub(r"<[^>]+>", " ", stages(grouped([run])))
    assert "97%" in text and "40.0%" in text and "60%" in text and "loader" in text.split()[-1]
    assert limit(0.001, 2.0) == "step" and limit(None, None) == "–"
    assert "Batches ready" in render([run])


def test_a_page_of_many_long_runs_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [read_run(write_run(tmp_path / f"r{number}", steps=20_000, seed=number)) for number in range(12)]
    for number, run in enumerate(runs):
        run.config["recipe"]["epochs"] = 10 + number  # no two of one configuration
        accident = {"kind": "skipped_step", "step": 9, "epoch": 0, "time_s": 1.0, "reason": "loss"}
        run.rows.extend([accident] * 4000)
    big = Picture("t", "n", "data:image/png;base64," + "A" * 900_000, 10)
    monkeypatch.setattr("train.record.pictures.run_pictures", lambda run: [big])
    page = render(runs)
    assert len(page.encode()) < 5_000_000
    assert page.count("<img") == 3 and page.count("a picture is left out") == 9
    assert page.count("between</td>") == 12
