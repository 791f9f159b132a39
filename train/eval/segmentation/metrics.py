"""Intersection over union, pixel and class accuracy from a confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .labels import IGNORED


def confusion_matrix(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(classes, classes) int64 pixel counts, rows are true classes; pixels of truth 255 do not count.

    Args:
        predicted: classes of any shape, each below `classes`.
        truth: uint8 or int64 of the same shape, below `classes` or 255.
        classes: number of classes.
    """
    counted = truth != IGNORED
    joint = truth[counted].long() * classes + predicted[counted].long()
    return torch.bincount(joint, minlength=classes * classes).view(classes, classes)


@dataclass(frozen=True)
class Scores:
    """Scores computed from a confusion matrix, as shares in [0, 1].

    Attributes:
        iou: (classes,) intersection over union, NaN for a class that neither occurs nor was predicted.
        accuracy: (classes,) share of a class's pixels that were found, NaN for a class that does not occur.
        pixels: (classes,) true pixels.
        pixel_accuracy: share of all pixels that are right.
    """

    iou: np.ndarray
    accuracy: np.ndarray
    pixels: np.ndarray
    pixel_accuracy: float

    @property
    def miou(self) -> float:
        """Mean of `iou` over the classes that have one."""
        return float(np.nanmean(self.iou))

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of `accuracy` over the classes that occur."""
        return float(np.nanmean(self.accuracy))

    def as_dict(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Plain values for a result file; None where a figure does not exist."""
        return {
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "mean_class_accuracy": self.mean_class_accuracy,
            "classes": [
                {"name": name, "iou": _number(iou), "accuracy": _number(accuracy), "pixels": int(pixels)}
                for name, iou, accuracy, pixels in zip(names, self.iou, self.accuracy, self.pixels, strict=True)
            ],
        }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def scores(confusion: np.ndarray) -> Scores:
    """Scores of a (classes, classes) confusion matrix with at least one pixel."""
    hits = np.diag(confusion).astype(np.float64)
    truth, predicted = confusion.sum(1).astype(np.float64), confusion.sum(0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, accuracy = hits / (truth + predicted - hits), hits / truth
    return Scores(iou, accuracy, confusion.sum(1), float(hits.sum() / truth.sum()))
