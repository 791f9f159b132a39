"""Detections to score, for the tests of detection."""

from __future__ import annotations

import numpy as np

from train.eval.detection import rle
from train.eval.detection.inference import Detections


def found(
    image_id: int, rows: list[tuple[int, float, tuple[float, ...]]], masks: list[np.ndarray] | None = None
) -> Detections:
    """Detections from (class, score, x0 y0 x1 y1) rows."""
    boxes = np.array([row[2] for row in rows], dtype=np.float32).reshape(-1, 4)
    return Detections(
        image_id,
        boxes,
        np.array([row[1] for row in rows], dtype=np.float32),
        np.array([row[0] for row in rows], dtype=np.int64),
        tuple(rle.encode(mask) for mask in masks or ()),
    )
