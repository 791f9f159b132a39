"""Cityscapes instances: `leftImg8bit/SPLIT/CITY/*.png` and `gtFine/SPLIT/CITY/*_gtFine_instanceIds.png`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.clutter import has_clutter

from ...errors import UserMistake
from . import rle
from .records import DetectionData, ImageRecord, inside

# Cityscapes' label numbers of the eight classes that have instances and are evaluated.
CLASSES = {
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
_IMAGE_END, _LABEL_END = "_leftImg8bit.png", "_gtFine_instanceIds.png"


def instance_files(data: str, part: str) -> list[tuple[Path, Path]]:
    """(image, instance map) of every image of a part ("train" or "val"), sorted by name.

    Raises:
        UserMistake: the folder has no images of that part, or an image has no instance map.
    """
    root = Path(data)
    folder = root / "leftImg8bit" / part
    images = sorted(folder.glob(f"*/*{_IMAGE_END}"))
    images = [image for image in images if not has_clutter(image.relative_to(folder).parts)]
    if not images:
        raise UserMistake(f"{data} has no leftImg8bit/{part}/CITY/*{_IMAGE_END}; give the folder of Cityscapes")
    pairs = []
    for image in images:
        label = label_file(image)
        if not label.is_file():
            raise UserMistake(f"{image} has no {label}; unpack gtFine beside leftImg8bit")
        pairs.append((image, label))
    return pairs


def label_file(image: Path) -> Path:
    """Where the instance map of an image belongs."""
    folder = image.parents[3] / "gtFine" / image.parents[1].name / image.parent.name
    return folder / (image.name.removesuffix(_IMAGE_END) + _LABEL_END)


def read_map(path: Path) -> np.ndarray:
    """The (H, W) int32 values of an instance map.

    Raises:
        UserMistake: the file cannot be read or is another one.
    """
    try:
        with Image.open(path) as image:
            ids = np.asarray(image).astype(np.int32)
    except (OSError, ValueError) as reason:
        raise UserMistake(f"{path} cannot be read: {reason}; copy it again") from None
    if ids.ndim != 2:
        raise UserMistake(f"{path} has {ids.shape[-1]} channels; give the *_instanceIds.png of gtFine")
    return ids


def read_ids(record: ImageRecord) -> np.ndarray:
    """The instance map of an image."""
    return read_map(label_file(record.path))


def read_instances(path: Path) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """((height, width), objects) of an instance map.

    A value of 1000 and more is label * 1000 + number; a smaller one that is a class's label marks a group of objects
    that were not told apart, a crowd. Each object has "label", "crowd", "box" (x0 y0 x1 y1), "area" and "mask".

    Raises:
        UserMistake: the file cannot be read.
    """
    ids = read_map(path)
    objects = []
    for value in np.unique(ids).tolist():
        label, crowd = (value // 1000, False) if value >= 1000 else (value, True)
        if label not in CLASSES:
            continue
        mask = ids == value
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        objects.append(
            {
                "label": label,
                "crowd": crowd,
                "area": int(mask.sum()),
                "mask": rle.encode(mask),
                "box": (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1),
            }
        )
    return (ids.shape[0], ids.shape[1]), objects


def read_cityscapes(data: str, part: str, workers: int) -> DetectionData:
    """Read Cityscapes' fine annotations.

    Args:
        data: the folder with leftImg8bit and gtFine.
        part: "train" or "val".
        workers: threads that decode the instance maps.

    Raises:
        UserMistake: as `instance_files` and `read_instances`.
    """
    files = instance_files(data, part)
    with ThreadPoolExecutor(workers) as pool:
        read = list(pool.map(lambda pair: read_instances(pair[1]), files))
    classes = {label: number for number, label in enumerate(CLASSES)}
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": label, "name": name} for label, name in CLASSES.items()],
    }
    records, crowds = [], 0
    for number, ((image, _), (size, objects)) in enumerate(zip(files, read, strict=True)):
        document["images"].append({"id": number, "height": size[0], "width": size[1]})
        for entry in objects:
            x0, y0, x1, y1 = entry["box"]
            document["annotations"].append(
                {
                    # From 1: COCO's evaluator takes the id 0 for "not matched".
                    "id": len(document["annotations"]) + 1,
                    "image_id": number,
                    "category_id": entry["label"],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": entry["area"],
                    "iscrowd": int(entry["crowd"]),
                    "segmentation": entry["mask"],
                }
            )
        # A group of objects that were not told apart is no example of one.
        single = [entry for entry in objects if not entry["crowd"]]
        crowds += len(objects) - len(single)
        boxes, _ = inside(np.array([entry["box"] for entry in single]), size[1], size[0])
        labels = np.array([classes[entry["label"]] for entry in single], dtype=np.int64)
        outlines = tuple(entry["mask"] for entry in single)
        records.append(ImageRecord(image, number, size[1], size[0], boxes, labels, outlines))
    return DetectionData(
        "cityscapes",
        data,
        tuple(CLASSES.values()),
        tuple(CLASSES),
        tuple(records),
        document if part == "val" else {},
        (f"{crowds} crowds are not trained on",) if crowds else (),
    )
