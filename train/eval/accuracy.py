"""Top-1, top-5 and ImageNet-ReaL accuracy of logits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserMistake

_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1]; `real` is ImageNet-ReaL top-1, None without its labels."""

    top1: float
    top5: float
    real: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The figures that there are."""
        figures = {"top1": self.top1, "top5": self.top5}
        return figures if self.real is None else {**figures, "real_top1": self.real}


def accuracy(logits: Tensor, labels: Tensor, real: Sequence[Sequence[int]] | None = None) -> Accuracy:
    """Accuracy of logits (N, classes) against labels (N,) int64 and, where given, each image's set of ReaL labels.

    With fewer than five classes top-5 is 1. Rows that are not finite count as wrong.
    """
    labels = labels.to(logits.device)
    # `topk` gives NaN some rank, so a broken row could be right by chance.
    finite = torch.isfinite(logits).all(dim=1)
    # Data of fewer than five classes have no five best.
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]) & finite[:, None]
    share = None if real is None else real_accuracy(ranked[:, 0].cpu().numpy(), real)
    return Accuracy(float(hits[:, 0].double().mean()), float(hits.any(dim=1).double().mean()), share)


def real_accuracy(predicted: np.ndarray, real: Sequence[Sequence[int]]) -> float:
    """Share of predictions (N,) that are in their image's label set; images with an empty set are skipped.

    Source: Beyer et al. 2020, "Are we done with ImageNet?", section 4.
    """
    # ReaL has images on which no label was agreed; the paper leaves them out of the mean.
    judged = [int(guess) in allowed for guess, allowed in zip(predicted, real, strict=True) if len(allowed)]
    if not judged:
        raise ValueError("all ReaL label sets are empty; check the label file")
    return sum(judged) / len(judged)


def read_real_labels(path: str, names: Sequence[str] | None, samples: int, classes: int) -> list[list[int]]:
    """Label sets in the order of the validation samples.

    Args:
        path: JSON: the published list of 50,000 label lists in the order of ILSVRC2012_val_00000001.JPEG and following,
            or an object from file name to label list.
        names: source file of each validation sample, None where the store does not know them.
        samples: number of validation samples.
        classes: number of classes that the probe tells apart.

    Raises:
        UserMistake: the file does not fit the validation images.
    """
    try:
        loaded = json.loads(Path(path).read_text())
    except (OSError, ValueError) as reason:
        raise UserMistake(f"--real-labels {path}: {reason}; give ImageNet-ReaL's real.json") from None
    if isinstance(loaded, dict):
        chosen = _by_name(path, {Path(name).name: labels for name, labels in loaded.items()}, names)
    elif isinstance(loaded, list):
        chosen = _by_number(path, loaded, names, samples)
    else:
        raise UserMistake(f"--real-labels {path}: neither a list nor an object; give ImageNet-ReaL's real.json")
    # A label beyond the probe's classes can never be hit: the file belongs to other data.
    largest = max((label for labels in chosen for label in labels), default=-1)
    if largest >= classes:
        raise UserMistake(f"--real-labels {path}: label {largest} with {classes} classes; give the data it belongs to")
    return [[int(label) for label in labels] for labels in chosen]


def _by_name(path: str, labels: dict[str, list[int]], names: Sequence[str] | None) -> list[list[int]]:
    if names is None:
        raise UserMistake(f"--real-labels {path}: needs file names, which --val-data does not keep; pack it again")
    missing = [name for name in names if Path(name).name not in labels]
    if missing:
        raise UserMistake(f"--real-labels {path}: no entry for {missing[0]} and {len(missing) - 1} more images")
    return [labels[Path(name).name] for name in names]


def _by_number(path: str, labels: list[list[int]], names: Sequence[str] | None, samples: int) -> list[list[int]]:
    numbers = [_VAL_NUMBER.search(name) for name in names or []]
    # By the number in the name: validation images in class folders stand in another order than the list.
    if numbers and all(numbers):
        places = [int(match[1]) - 1 for match in numbers if match]
        if max(places) >= len(labels):
            raise UserMistake(f"--real-labels {path}: {len(labels)} entries, but an image has number {max(places) + 1}")
        return [labels[place] for place in places]
    if len(labels) != samples:
        raise UserMistake(
            f"--real-labels {path}: {len(labels)} entries for {samples} images whose names do not tell their number; "
            "keep the names ILSVRC2012_val_XXXXXXXX.JPEG"
        )
    return labels
