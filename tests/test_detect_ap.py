"""Average precision: COCO's against pycocotools, VOC's and Cityscapes' against slow definitions and cases by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from tests.detection_cases import found
from tools.support.drawn_sets import write_cityscapes
from train.eval.detection import rle
from train.eval.detection.cityscapes_ap import cityscapes_ap, curve_area
from train.eval.detection.coco_ap import METRICS, coco_ap, coco_results
from train.eval.detection.data import read_data
from train.eval.detection.inference import Detections
from train.eval.detection.voc_ap import THRESHOLDS, interpolated, voc_ap

Kind = Literal["bbox", "segm"]


# --- COCO ---


def pycocotools_ap(ground_truth: dict[str, Any], results: list[dict[str, Any]], kind: Kind) -> list[float]:
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        run = evaluation.COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [float(value) for value in run.stats[: len(METRICS)]]


@pytest.fixture(scope="module")
def sample_truth(shared_data: Path) -> dict[str, Any]:
    with tarfile.open(shared_data / "detection-sample.tar") as archive:
        member = archive.extractfile("detection-sample/annotations/instances_val.json")
        assert member is not None
        truth: dict[str, Any] = json.load(member)
    return truth


def guesses(truth: dict[str, Any], with_masks: bool) -> list[Detections]:
    """Boxes near the true ones, crowds included, doubled, of wrong classes, and some where there is nothing."""
    rng = np.random.default_rng(0)
    ids = [category["id"] for category in truth["categories"]]
    detections = []
    for image in truth["images"]:
        rows, masks = [], []
        own = [entry for entry in truth["annotations"] if entry["image_id"] == image["id"]]
        for entry in [*own, *own[::2], {"bbox": [5, 5, 40, 30], "category_id": 1}]:
            box = np.array(entry["bbox"]) + rng.normal(0, 4, 4)
            x0, y0 = np.maximum(box[:2], 0)
            x1, y1 = min(x0 + max(box[2], 2), image["width"]), min(y0 + max(box[3], 2), image["height"])
            label = ids.index(entry["category_id"]) if rng.random() > 0.1 else 0
            # Scores of two decimals: ties.
            rows.append((label, round(float(rng.random()), 2), (x0, y0, x1, y1)))
            if with_masks:
                mask = np.zeros((image["height"], image["width"]), dtype=bool)
                mask[int(y0) : int(y1), int(x0) : int(x1)] = True
                masks.append(mask)
        detections.append(found(image["id"], rows, masks))
    return detections


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_coco_s_figures_equal_pycocotools_on_real_annotations(sample_truth: dict[str, Any], kind: Kind) -> None:
    assert any(entry["iscrowd"] for entry in sample_truth["annotations"])
    ids = [category["id"] for category in sample_truth["categories"]]
    results = coco_results(guesses(sample_truth, kind == "segm"), ids, kind)
    ours = coco_ap(sample_truth, results, kind)
    assert 0.05 < (ours["AP"] or 0) < 0.95
    np.testing.assert_allclose([ours[name] for name in METRICS], pycocotools_ap(sample_truth, results, kind), atol=1e-6)


def test_coco_s_figures_equal_pycocotools_with_an_empty_image_and_unseen_sizes(sample_truth: dict[str, Any]) -> None:
    truth = copy.deepcopy(sample_truth)
    kept = {truth["images"][0]["id"]}
    truth["images"] = truth["images"][:2]  # the second has no object now
    truth["annotations"] = [e for e in truth["annotations"] if e["image_id"] in kept and e["area"] > 32**2]
    ids = [category["id"] for category in truth["categories"]]
    results = coco_results(guesses(truth, False), ids, "bbox")
    ours, theirs = coco_ap(truth, results, "bbox"), pycocotools_ap(truth, results, "bbox")
    assert ours["APs"] is None and theirs[METRICS.index("APs")] == -1
    for name, value in zip(METRICS, theirs, strict=True):
        assert value == -1 or ours[name] == pytest.approx(value, abs=1e-6)


def test_without_detections_precision_is_zero(sample_truth: dict[str, Any]) -> None:
    assert coco_ap(sample_truth, [], "bbox")["AP"] == 0


def test_perfect_detections_have_precision_one(sample_truth: dict[str, Any]) -> None:
    results = [
        {"image_id": e["image_id"], "category_id": e["category_id"], "bbox": e["bbox"], "score": 0.9}
        for e in sample_truth["annotations"]
        if not e["iscrowd"]
    ]
    assert coco_ap(sample_truth, results, "bbox")["AP"] == pytest.approx(1, abs=1e-9)


# --- VOC ---


def slow_voc_class(detections: list[Detections], truth: Any, label: int, threshold: float, rule: str) -> float | None:
    """The devkit's procedure for one class, a detection at a time, in plain Python."""
    objects = [
        {"image": image, "box": box, "difficult": bool(flag), "taken": False}
        for (image, own), (boxes, flags) in truth.items()
        if own == label
        for box, flag in zip(boxes.tolist(), flags, strict=True)
    ]
    positives = sum(not entry["difficult"] for entry in objects)
    if not positives:
        return None
    rows = []
    for detection in detections:
        for row in range(len(detection.scores)):
            if detection.labels[row] == label:
                x0, y0, x1, y1 = (float(v) for v in detection.boxes[row])
                box = [float(f"{v:.1f}") for v in (x0 + 1, y0 + 1, x1, y1)]
                rows.append((float(f"{detection.scores[row]:.3f}"), detection.image_id, box))
    curve, right, wrong = [], 0, 0
    for _, image, (x0, y0, x1, y1) in sorted(rows, key=lambda row: -row[0]):
        best, nearest = -1.0, None
        for entry in objects:
            if entry["image"] != image:
                continue
            gx0, gy0, gx1, gy1 = entry["box"]
            width, height = min(x1, gx1) - max(x0, gx0) + 1, min(y1, gy1) - max(y0, gy0) + 1
            shared = max(width, 0) * max(height, 0)
            union = (x1 - x0 + 1) * (y1 - y0 + 1) + (gx1 - gx0 + 1) * (gy1 - gy0 + 1) - shared
            if shared / union > best:
                best, nearest = shared / union, entry
        if best > threshold:
            assert nearest is not None
            if not nearest["difficult"]:
                right, wrong = right + (not nearest["taken"]), wrong + nearest["taken"]
                nearest["taken"] = True
        else:
            wrong += 1
        curve.append((right / positives, right / max(right + wrong, 1e-16)))
    if rule == "11 points":
        levels = [max((p for r, p in curve if r >= level), default=0.0) for level in np.arange(0.0, 1.1, 0.1)]
        return sum(levels) / 11
    area, before = 0.0, 0.0
    for number, (recall, _) in enumerate(curve):
        area += (recall - before) * max(p for _, p in curve[number:])
        before = recall
    return area


def voc_case() -> tuple[list[Detections], dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]]:
    rng = np.random.default_rng(3)
    truth, detections = {}, []
    for image in range(12):
        rows = []
        for label in range(3):
            count = int(rng.integers(0, 4))
            if not count:
                continue
            corner = rng.integers(1, 60, (count, 2))
            boxes = np.concatenate([corner, corner + rng.integers(10, 40, (count, 2))], axis=1).astype(np.float64)
            truth[image, label] = (boxes, rng.random(count) < 0.3)
            for box in [*boxes, *boxes[:1]]:
                moved = box + rng.normal(0, 3, 4) - [1, 1, 0, 0]
                rows.append((label, float(rng.random()), tuple(moved.tolist())))
        rows.append((0, float(rng.random()), (1.0, 1.0, 9.0, 9.0)))
        detections.append(found(image, rows))
    return detections, truth


@pytest.mark.parametrize("rule", ["11 points", "area"])
def test_voc_s_precision_equals_the_devkit_s_procedure(rule: str) -> None:
    detections, truth = voc_case()
    slow = [[slow_voc_class(detections, truth, label, t, rule) for label in range(3)] for t in THRESHOLDS]
    ours = voc_ap(detections, truth, 5, rule)  # two classes without an object
    assert ours["AP"] == pytest.approx(np.mean(slow), abs=1e-9)
    assert ours["AP50"] == pytest.approx(np.mean(slow[0]), abs=1e-9)
    assert ours["AP75"] == pytest.approx(np.mean(slow[5]), abs=1e-9)
    assert 0.1 < (ours["AP"] or 0) < (ours["AP50"] or 0) < 1


def test_eleven_points_by_hand() -> None:
    # Two objects; right, wrong, right: precision 1 up to recall 0.5, then 2/3 up to 1.
    recall, precision = np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 2 / 3])
    assert interpolated(recall, precision, "11 points") == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert interpolated(recall, precision, "area") == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert interpolated(np.zeros(0), np.zeros(0), "11 points") == 0


def test_difficult_objects_count_neither_way() -> None:
    truth = {(0, 0): (np.array([[1.0, 1, 10, 10], [21, 21, 30, 30]]), np.array([False, True]))}
    easy, hard = (0, 0.5, (0.0, 0.0, 10.0, 10.0)), (0, 0.9, (20.0, 20.0, 30.0, 30.0))
    assert voc_ap([found(0, [easy, hard])], truth, 1, "11 points")["AP"] == pytest.approx(1)
    assert voc_ap([found(0, [easy, hard, hard])], truth, 1, "11 points")["AP"] == pytest.approx(1)
    doubled = voc_ap([found(0, [easy, (0, 0.9, (40.0, 40.0, 45.0, 45.0))])], truth, 1, "11 points")
    assert doubled["AP50"] == pytest.approx(0.5)
    assert voc_ap([found(0, [hard])], {(0, 0): (truth[0, 0][0], np.array([True, True]))}, 1, "area")["AP"] is None


# --- Cityscapes ---


def city(tmp_path: Path, ids: np.ndarray) -> Any:
    write_cityscapes(tmp_path, "val", {"ulm_000001": ids})
    return read_data(str(tmp_path), "val", True, 1)


def test_cityscapes_precision_by_hand(tmp_path: Path) -> None:
    ids = np.full((60, 80), 7)
    ids[:20] = 1  # void
    ids[25:45, 5:25], ids[25:45, 30:50] = 26000, 26001  # two cars of 400 pixels
    ids[50:58, 60:80] = 26  # a group of cars
    ids[50:55, 0:10] = 26002  # 50 pixels: too small to count
    data = city(tmp_path, ids)
    car = data.names.index("car")

    def score(*masks: tuple[float, np.ndarray]) -> float | None:
        rows = [(car, confidence, (0.0, 0.0, 1.0, 1.0)) for confidence, _ in masks]
        return cityscapes_ap(data, [found(0, rows, [mask for _, mask in masks])])["AP"]

    first, second, elsewhere = ids == 26000, ids == 26001, np.zeros_like(ids, dtype=bool)
    elsewhere[46:49, 40:60] = True
    assert score((0.9, first), (0.8, second)) == pytest.approx(1)
    # On void, on the group, on the small car: ignored, however sure the detector is.
    ignored = [(0.99, ids == 1), (0.99, ids == 26), (0.99, ids == 26002)]
    assert score((0.9, first), (0.8, second), *ignored) == pytest.approx(1)
    # One car missed: precision 1 up to recall 1/2, in centred steps.
    assert score((0.9, first)) == pytest.approx(curve_area([0.9], [], 1)) == pytest.approx(0.5)
    # The surest detection is wrong: precision at descending recalls 1, 1/2, 0 is 2/3, 1/2, 0 (and 0 again).
    steps = 2 / 3 * (1 - 0.5) / 2 + 1 / 2 * (1 - 0) / 2
    assert score((0.99, elsewhere), (0.9, first), (0.8, second)) == pytest.approx(steps)
    # A second mask on a car that has one is wrong.
    assert score((0.9, first), (0.85, first), (0.8, second)) == pytest.approx(curve_area([0.9, 0.8], [0.85], 0))
    assert score((0.9, elsewhere)) == 0
    half = first.copy()
    half[:35] = False  # overlap exactly 0.5 is not enough
    assert score((0.9, half)) == 0


def test_cityscapes_and_coco_agree_on_what_is_perfect(tmp_path: Path) -> None:
    ids = np.full((60, 80), 7)
    ids[5:25, 5:25], ids[30:55, 30:70] = 24000, 33000
    data = city(tmp_path, ids)
    labels = [data.names.index(name) for name in ("person", "bicycle")]
    masks = [rle.decode(outline) for outline in data.records[0].outlines]
    detections = [found(0, [(label, 0.9, (0.0, 0.0, 9.0, 9.0)) for label in labels], masks)]
    assert cityscapes_ap(data, detections)["AP"] == pytest.approx(1)
    results = coco_results(detections, data.category_ids, "segm")
    assert coco_ap(data.ground_truth, results, "segm")["AP"] == pytest.approx(1)
    empty = [Detections(0, np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64))]
    assert cityscapes_ap(data, empty)["AP"] == 0
