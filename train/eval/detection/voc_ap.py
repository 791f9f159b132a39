"""PASCAL VOC's average precision as detectron2 reports it: AP over ten thresholds, AP50 and AP75."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .inference import Detections

THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
Truth = Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]]


def interpolated(recall: np.ndarray, precision: np.ndarray, rule: str) -> float:
    """Average precision of a curve.

    Args:
        recall: (n,) ascending.
        precision: (n,) at those recalls.
        rule: "11 points": the mean over recalls 0, 0.1 ... 1 of the best precision at that recall or above (VOC 2007);
            "area": the area under that envelope (VOC 2010 on).
    """
    if rule == "11 points":
        # Some of these lie a rounding error above the tenth that they stand for, in detectron2 as well.
        best = [precision[recall >= level].max(initial=0.0) for level in np.arange(0.0, 1.1, 0.1)]
        return float(np.mean(best))
    # From the right: at each recall the best precision that this or a higher recall reaches.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with (n, 4) others, corners inclusive (VOC counts pixels)."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]) + 1
    shared = sides.clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1)
    union: np.ndarray = (box[2:] - box[:2] + 1).prod() + areas - shared
    return shared / union


@dataclass(frozen=True)
class _Matches:
    """Detections of one class, best score first, each with the object of its image that it overlaps most.

    Attributes:
        objects: number of objects that count.
        difficult: for all objects of the class in turn.
        best: (n,) index of that object, -1 where the image has none.
        overlap: (n,) with it.
    """

    objects: int
    difficult: np.ndarray
    best: np.ndarray
    overlap: np.ndarray


def _flat(detections: Sequence[Detections]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(image ids, labels, scores, 1-based boxes) of all detections, rounded to detectron2's three and one decimals."""
    images = np.concatenate([np.full(len(found.scores), found.image_id) for found in detections])
    labels = np.concatenate([found.labels for found in detections])
    # detectron2 writes its detections into text files first, and rounding changes ties.
    scores = np.concatenate([found.scores.astype(np.float64) for found in detections]).round(3)
    boxes = np.concatenate([found.boxes.astype(np.float64).reshape(-1, 4) for found in detections])
    return images, labels, scores, (boxes + np.array([1.0, 1.0, 0.0, 0.0])).round(1)


def _match(images: np.ndarray, scores: np.ndarray, boxes: np.ndarray, truth: Truth, label: int) -> _Matches:
    """Compare the detections of one class, of all images, with its objects."""
    first: dict[int, int] = {}
    flags: list[np.ndarray] = []
    for (image, own), (_, difficult) in truth.items():
        if own == label:
            first[image] = sum(map(len, flags))
            flags.append(difficult)
    # Stable, so that equal scores keep the order of the images.
    order = np.argsort(-scores, kind="stable")
    best, overlap = np.full(len(order), -1), np.zeros(len(order))
    for place, row in enumerate(order):
        image = int(images[row])
        if image in first:
            overlaps = _overlaps(boxes[row], truth[image, label][0])
            nearest = int(overlaps.argmax())
            best[place], overlap[place] = first[image] + nearest, overlaps[nearest]
    joined = np.concatenate(flags).astype(bool) if flags else np.zeros(0, dtype=bool)
    return _Matches(int((~joined).sum()), joined, best, overlap)


def _curve_area(matches: _Matches, threshold: float, rule: str) -> float:
    """Average precision of one class at one threshold.

    A detection that overlaps its object by more than the threshold is right if that object was not found before,
    ignored if the object is difficult, and wrong otherwise.
    """
    near = matches.overlap > threshold
    right, wrong = np.zeros(len(near)), (~near).astype(np.float64)
    taken = np.zeros(len(matches.difficult), dtype=bool)
    for place in np.flatnonzero(near):
        best = matches.best[place]
        if not matches.difficult[best]:
            (wrong if taken[best] else right)[place] = 1
            taken[best] = True
    found, missed = right.cumsum(), wrong.cumsum()
    precision = found / np.maximum(found + missed, np.finfo(np.float64).eps)
    return interpolated(found / matches.objects, precision, rule)


def voc_ap(detections: Sequence[Detections], truth: Truth, classes: int, rule: str) -> dict[str, float | None]:
    """AP (mean over the thresholds 0.5, 0.55 ... 0.95), AP50 and AP75 in [0, 1], each a mean over classes.

    Args:
        detections: of all images.
        truth: (image id, class) -> 1-based inclusive boxes (n, 4) and which of them are difficult (n,) bool.
        classes: how many; those without an object that counts are left out of the means.
        rule: as for `interpolated`.

    Source: Everingham et al., IJCV 2010, section 4.2; thresholds, rounding and text files of detectron2.
    """
    images, labels, scores, boxes = _flat(detections)
    known = []
    for label in range(classes):
        own = labels == label
        matches = _match(images[own], scores[own], boxes[own], truth, label)
        if matches.objects:
            known.append([_curve_area(matches, threshold, rule) for threshold in THRESHOLDS])
    if not known:
        return {"AP": None, "AP50": None, "AP75": None}
    means = np.asarray(known).mean(axis=0)
    return {"AP": float(means.mean()), "AP50": float(means[0]), "AP75": float(means[THRESHOLDS.index(0.75)])}
