"""The quickstart: its photographs, its split, its plan of the time, and the whole of it on a few images (slow)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_report import write_run
from tools import quickstart
from tools.support import sample_photos
from train.errors import UserMistake
from train.record.run import read_run


def test_photographs_are_there_and_their_parts_are_disjoint() -> None:
    pytest.importorskip("skimage")
    found = sample_photos.find_photos()
    assert len(found) >= 8
    train = sample_photos.Part("train", 0.0, 0.62, 0, 200)
    validation = sample_photos.Part("val", 0.7, 1.0, 1, 200)
    for number, path in enumerate(found):
        with Image.open(path) as photo:
            size = photo.size
        boxes = {part.name: sample_photos.crop_boxes(size, part, 0, number) for part in (train, validation)}
        for left, top, right, bottom in boxes["train"] + boxes["val"]:
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            assert right - left == bottom - top >= 64
        assert max(box[2] for box in boxes["train"]) < min(box[0] for box in boxes["val"]), path.name
        assert len(set(boxes["train"])) > 150, "crops differ"


def test_crops_are_written_by_class_and_depend_on_the_seed(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    train, validation = sample_photos.cut_photos(tmp_path / "a", 3, 2, seed=1)
    assert sorted(p.name for p in train.iterdir()) == sorted(p.name for p in validation.iterdir())
    assert len(list(train.rglob("*.jpg"))) == 3 * len(sample_photos.find_photos())
    again, _ = sample_photos.cut_photos(tmp_path / "b", 3, 2, seed=1)
    other, _ = sample_photos.cut_photos(tmp_path / "c", 3, 2, seed=2)
    name = Path("coffee") / "0001.jpg"
    assert (train / name).read_bytes() == (again / name).read_bytes() != (other / name).read_bytes()


def test_split_keeps_every_class_on_both_sides() -> None:
    labels = np.repeat([0, 1, 2, 3], [40, 9, 2, 1])
    train, validation = quickstart.split(labels)
    assert not set(train) & set(validation)
    assert set(labels[train]) == set(labels[validation]) == {0, 1, 2}, "a class of one image cannot be on both"
    assert [int((labels[validation] == label).sum()) for label in range(3)] == [4, 1, 1]
    for unlabelled in (np.full(5, -1), np.zeros(5, dtype=np.int64)):
        train, validation = quickstart.split(unlabelled)
        assert len(train) == 5 and len(validation) == 0


@pytest.mark.parametrize("step_s", [0.05, 0.45, 2.0])
@pytest.mark.parametrize("images", [500, 2800, 9000])
def test_the_plan_fits_into_the_time(step_s: float, images: int) -> None:
    timing = quickstart.Timing(step_s=step_s, fixed_s=30.0, figures_s=5.0)
    plan = quickstart.make_plan(timing, 280.0, images, 64)
    steps_per_epoch = images // 64
    inside = (plan.epochs - 1) // plan.figures_every if plan.figures_every else 0
    took = timing.fixed_s + plan.steps * step_s + inside * timing.figures_s
    assert took <= 280
    assert plan.steps <= plan.epochs * steps_per_epoch
    assert plan.epochs == 1 or plan.steps == plan.epochs * steps_per_epoch, "the schedule ends with the run"
    if steps_per_epoch * step_s < 100:
        assert took > 150, "most of the time is used"


def test_a_fast_machine_does_not_train_for_ever() -> None:
    plan = quickstart.make_plan(quickstart.Timing(0.001, 10.0, 1.0), 280.0, 2800, 64)
    assert plan.steps * 64 <= 500_000


def test_timing_counts_what_knn_will_cost(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=20))
    without, with_labels = quickstart.read_timing(run, 60.0, 0), quickstart.read_timing(run, 60.0, 10_000)
    speed = run.of_kind("train")[-1]["images_per_s"]
    assert without.step_s == pytest.approx(64 / speed)
    assert without.fixed_s == pytest.approx(60 - 20 * 64 / speed)
    assert with_labels.fixed_s - without.fixed_s == pytest.approx(2 * 10_000 / speed * 0.2)


def test_what_is_said_of_a_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    rows = {label: (before, after) for label, before, after in quickstart.comparison(run)}
    assert rows["20-NN top-1"] == ("35.0%", "41.0%") and rows["view retrieval"] == ("10.0%", "30.0%")
    expected = np.mean([row["loss/ins"] for row in run.of_kind("train")[-5:]])
    assert quickstart.instance_loss(run) == pytest.approx(expected)
    # 250 steps of 64 images came before the last 50, and the queue has 4096 keys.
    assert quickstart.queue_filled_twice(run)
    assert not quickstart.queue_filled_twice(read_run(write_run(tmp_path / "short", steps=170)))


def test_the_verdict_asks_for_twice_the_standard_error(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    # 35 to 41% of 400 images: a standard error of 3.4 points; 10 to 30%: of 2.7.
    for row in run.of_kind("knn"):
        row["val_images"] = 400
    said = quickstart.verdict(run)
    assert "ahead by more than twice the standard error in view retrieval (2.7 points)." in said
    assert "not clearly ahead in 20-NN top-1 (3.4 points)" in said
    for row in run.of_kind("knn"):
        row["val_images"] = 4000
    said = quickstart.verdict(run)
    assert "20-NN top-1 (1.1 points) and view retrieval" in said and "not clearly" not in said


def test_images_of_view_retrieval_are_those_of_training() -> None:
    from train.measure.health import MAX_RETRIEVAL_IMAGES

    assert quickstart._HEALTH_IMAGES == MAX_RETRIEVAL_IMAGES


def test_only_its_own_run_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserMistake, match="did not make"):
        quickstart.prepare_run_dir(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    quickstart.prepare_run_dir(tmp_path / "run")
    (tmp_path / "run" / "old").touch()
    quickstart.prepare_run_dir(tmp_path / "run")
    assert not (tmp_path / "run" / "old").exists()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main([str(tmp_path / "absent")]) == 2
    assert quickstart.main(["--minutes", "nan"]) == 2
    assert quickstart.main(["--minute", "3"]) == 2
    assert quickstart.main([str(tmp_path), "--run-dir", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and "--minutes" in errors[2] and "no image" in errors[3]


@pytest.mark.slow
def test_the_whole_of_it_on_a_folder_of_photos(photos, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "a run"
    assert quickstart.main([str(photos(20)), "--run-dir", str(run_dir), "--minutes", "1"]) == 0
    said = capfd.readouterr().out
    for words in (
        "20-NN top-1",
        "view retrieval",
        "nats under chance",
        "report.html",
        "backbone.safetensors",
        "cannot show",
        "standard error",
    ):
        assert words in said
    assert (run_dir / "backbone.safetensors").is_file()
    page = (run_dir / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2, "views and mixed views"
    assert "no images to show" not in page
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "knn"][0] == 0
    assert all(math.isfinite(row["loss"]) for row in rows if row["kind"] == "train")
