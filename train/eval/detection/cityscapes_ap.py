"""Cityscapes' own average precision of instances: AP over ten overlaps and AP50."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import rle
from .cityscapes_format import read_ids
from .inference import Detections
from .records import DetectionData

OVERLAPS = tuple(percent / 100 for percent in range(50, 100, 5))
SMALLEST = 100
# Labels of pixels that count neither for nor against a detection.
VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)


@dataclass(frozen=True)
class _Found:
    """A detection's mask against the objects and groups of its class in the image.

    Attributes:
        score: confidence.
        pixels: of the mask.
        void: of them on void.
        shared: id of an object or group -> common pixels.
    """

    score: float
    pixels: int
    void: int
    shared: dict[int, int]


@dataclass(frozen=True)
class _Scene:
    """One class in one image: id -> pixels of its objects (1000 and more) and groups, and what was found."""

    sizes: dict[int, int]
    found: list[_Found]


def _scenes(ids: np.ndarray, detections: Detections, labels: Sequence[int]) -> list[_Scene]:
    """The image as each class sees it.

    Args:
        ids: (H, W) instance map.
        detections: with masks.
        labels: Cityscapes' label of each class.
    """
    values, counts = np.unique(ids, return_counts=True)
    scenes = []
    for label in labels:
        # A group carries the bare label, an object label * 1000 + its number.
        own = (values == label) | (values // 1000 == label)
        scenes.append(_Scene(dict(zip(values[own].tolist(), counts[own].tolist(), strict=True)), []))
    for row, mask in enumerate(detections.masks):
        covered, shares = np.unique(ids[rle.decode(mask).astype(bool)], return_counts=True)
        if not len(covered):
            continue
        scene = scenes[detections.labels[row]]
        pixels = dict(zip(covered.tolist(), shares.tolist(), strict=True))
        scene.found.append(
            _Found(
                float(detections.scores[row]),
                int(shares.sum()),
                sum(pixels.get(value, 0) for value in VOID),
                {value: count for value, count in pixels.items() if value in scene.sizes},
            )
        )
    return scenes


def _near(found: _Found, value: int, size: int, overlap: float) -> bool:
    common = found.shared.get(value, 0)
    return common > 0 and common / (size + found.pixels - common) > overlap


def _outcomes(scene: _Scene, overlap: float) -> tuple[list[float], list[float], int]:
    """(scores of right detections, of wrong ones, objects that were missed).

    The best detection near an object is right and the others are wrong. One that is near nothing is ignored where more
    than `overlap` of it lies on void, on a group or on objects smaller than 100 pixels, and wrong otherwise.
    """
    right, wrong, missed = [], [], 0
    for value, size in scene.sizes.items():
        # Groups and tiny objects need not be found.
        if value < 1000 or size < SMALLEST:
            continue
        scores = sorted((found.score for found in scene.found if _near(found, value, size, overlap)), reverse=True)
        right += scores[:1]
        wrong += scores[1:]
        missed += not scores
    for found in scene.found:
        if any(_near(found, value, size, overlap) for value, size in scene.sizes.items()):
            continue
        # A group smaller than 100 pixels counts twice, as in the official script.
        ignored = found.void + sum(
            common * ((value < 1000) + (scene.sizes[value] < SMALLEST)) for value, common in found.shared.items()
        )
        if ignored / found.pixels <= overlap:
            wrong.append(found.score)
    return right, wrong, missed


def curve_area(right: Sequence[float], wrong: Sequence[float], missed: int) -> float:
    """Area under the curve of precision over recall, by the official script's centred steps.

    Args:
        right: scores of right detections.
        wrong: scores of wrong ones.
        missed: objects without one.
    """
    if not right and not wrong:
        return 0.0
    good, bad = np.sort(right), np.sort(wrong)
    thresholds = np.unique(np.concatenate([good, bad]))
    # Detections at or above each threshold, without a loop over them.
    true = len(good) - np.searchsorted(good, thresholds)
    false = len(bad) - np.searchsorted(bad, thresholds)
    objects = len(good) + missed
    precision = true / (true + false)
    recall = true / objects if objects else np.zeros(len(true))
    precision, recall = np.append(precision, precision[-1]), np.append(recall, 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float((precision * (padded[:-2] - padded[2:]) / 2).sum())


def class_precisions(scenes: Sequence[_Scene]) -> list[float] | None:
    """Average precision of one class at each overlap; None where it has no object that counts."""
    if not any(value >= 1000 and size >= SMALLEST for scene in scenes for value, size in scene.sizes.items()):
        return None
    areas = []
    for overlap in OVERLAPS:
        outcomes = [_outcomes(scene, overlap) for scene in scenes]
        right = [score for outcome in outcomes for score in outcome[0]]
        wrong = [score for outcome in outcomes for score in outcome[1]]
        areas.append(curve_area(right, wrong, sum(outcome[2] for outcome in outcomes)))
    return areas


def cityscapes_ap(data: DetectionData, detections: Sequence[Detections]) -> dict[str, float | None]:
    """AP (mean over overlaps above 0.5, 0.55 ... 0.95) and AP50 in [0, 1], each a mean over classes with objects.

    Args:
        data: validation data read from Cityscapes.
        detections: of its images in order, with masks.

    Source: cityscapesScripts, evaluation of instance-level semantic labelling.
    """
    scenes = [
        _scenes(read_ids(record), found, data.category_ids)
        for record, found in zip(data.records, detections, strict=True)
    ]
    known = [areas for number in range(len(data.names)) if (areas := class_precisions([s[number] for s in scenes]))]
    if not known:
        return {"AP": None, "AP50": None}
    means = np.asarray(known).mean(axis=0)
    return {"AP": float(means.mean()), "AP50": float(means[0])}
