"""Annotated images in one form, whatever format they were read from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...errors import UserMistake

# One object's outline: polygons, each (x0, y0, x1, y1, ...), or a run-length encoding as COCO's tools write it.
Outline = tuple[np.ndarray, ...] | dict[str, Any]
Format = Literal["coco", "voc", "cityscapes"]


@dataclass(frozen=True)
class ImageRecord:
    """One image and the objects that a detector is trained on.

    Attributes:
        path: image file.
        image_id: its id in the ground truth.
        width: pixels.
        height: pixels.
        boxes: (n, 4) fp32, x0 y0 x1 y1 in pixels, inside the image and not empty.
        labels: (n,) int64, class from 0.
        outlines: n outlines, or none where no masks are wanted.
    """

    path: Path
    image_id: int
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    outlines: tuple[Outline, ...] = ()


@dataclass(frozen=True)
class DetectionData:
    """A data set.

    Attributes:
        format: what it was read from.
        origin: as given on the command line.
        names: class names.
        category_ids: id of each class in the ground truth.
        records: every image, in the order of the file.
        ground_truth: COCO document of all objects, crowds included, for COCO's AP; empty where it was not asked for.
        notes: what was left out of training and why, a line each.
        difficult: (image id, class) -> boxes and flags for VOC's AP; see `voc_ap`.
        rule: VOC's rule of interpolation, "11 points" (2007) or "area" (later); empty for other formats.
    """

    format: Format
    origin: str
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: tuple[ImageRecord, ...]
    ground_truth: dict[str, Any]
    notes: tuple[str, ...] = ()
    difficult: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] | None = None
    rule: str = ""

    @property
    def data_hash(self) -> str:
        """SHA-256 over names, sizes, boxes and labels of all images."""
        digest = hashlib.sha256(json.dumps([self.format, self.names]).encode())
        for record in self.records:
            # Names without their folders: data that were moved are still the same.
            digest.update(f"{record.path.name} {record.image_id} {record.width} {record.height};".encode())
            digest.update(record.boxes.tobytes() + record.labels.tobytes())
        return digest.hexdigest()


def trainable(data: DetectionData) -> tuple[ImageRecord, ...]:
    """The images with at least one object to train on, as detectron2 chooses them.

    Raises:
        UserMistake: there is none.
    """
    kept = tuple(record for record in data.records if len(record.labels))
    if not kept:
        raise UserMistake(f"--data {data.origin} has no image with an object to train on; give annotated images")
    return kept


def inside(boxes: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes cut at the image's edges, and which of them are not empty (wider and higher than 1e-5 pixels).

    Args:
        boxes: (n, 4) x0 y0 x1 y1.
        width: of the image in pixels.
        height: of the image in pixels.
    """
    limits = np.array([width, height, width, height], dtype=np.float32)
    cut = np.clip(boxes.astype(np.float32).reshape(-1, 4), 0, limits)
    sides = cut[:, 2:] - cut[:, :2]
    return cut, np.all(sides > 1e-5, axis=1)


def check_same_classes(train: DetectionData, val: DetectionData) -> None:
    """Raises UserMistake unless both have the same classes under the same ids."""
    ours, theirs = (dict(zip(data.category_ids, data.names, strict=True)) for data in (train, val))
    if ours == theirs:
        return
    wrong = sorted(set(ours.items()) ^ set(theirs.items()))[0]
    raise UserMistake(
        f"--val-data {val.origin} and --data {train.origin} disagree on category {wrong[0]} ({wrong[1]!r}); give "
        "annotations with the same list of categories"
    )
