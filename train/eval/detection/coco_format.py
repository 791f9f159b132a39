"""COCO's annotation files: `instances_*.json` beside a folder of images."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserMistake
from .coco_checks import (
    annotation_name,
    check_annotation,
    check_category,
    check_ground_truth,
    check_image,
    unique_by_id,
)
from .records import DetectionData, ImageRecord, Outline, inside


def annotation_file(data: str, part: str) -> Path:
    """The annotation file meant by a path: itself, or the one `annotations/instances_PART*.json` in a folder.

    Args:
        data: a JSON file or COCO's folder.
        part: "train" or "val".

    Raises:
        UserMistake: none or several fit.
    """
    path = Path(data)
    if path.is_file():
        return path
    found = sorted((path / "annotations").glob(f"instances_{part}*.json"))
    # Two candidates, such as val2014 and val2017, are another data set each: the user must say which.
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserMistake(f"{data}/annotations should hold one instances_{part}*.json, it has {names}; give the file")
    return found[0]


def image_folder(annotations: Path, first: str) -> Path:
    """The folder that the file names of an annotation file belong to, found by the first of them.

    Raises:
        UserMistake: the first image is in none of the usual places.
    """
    root = annotations.parent.parent if annotations.parent.name == "annotations" else annotations.parent
    split = annotations.stem.removeprefix("instances_")
    candidates = [root / "images" / split, root / split, root / "images", root]
    for folder in candidates:
        if (folder / first).is_file():
            return folder
    places = ", ".join(str(folder) for folder in candidates)
    raise UserMistake(f"{annotations}: its first image {first} is in none of {places}; put the images into one of them")


def read_document(path: Path) -> dict[str, Any]:
    """The JSON document.

    Raises:
        UserMistake: it cannot be read or lacks COCO's parts.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as reason:
        raise UserMistake(f"{path} cannot be read as COCO's JSON: {str(reason)[:200]}; copy it again") from None
    parts = ("images", "annotations", "categories")
    if not isinstance(document, dict) or not all(isinstance(document.get(part), list) for part in parts):
        raise UserMistake(f"{path} lacks {', '.join(parts)}; give COCO's instances_*.json")
    return document


def outline_of(segmentation: Any) -> Outline | None:
    """The outline of an object, None where nothing can be drawn.

    Polygons of fewer than three points, or with an odd number of coordinates, are left out as detectron2 does.
    """
    if isinstance(segmentation, dict):
        return segmentation
    polygons = tuple(
        np.asarray(polygon, dtype=np.float32)
        for polygon in segmentation or ()
        if len(polygon) >= 6 and len(polygon) % 2 == 0
    )
    return polygons or None


def read_coco(data: str, part: str, masks: bool) -> DetectionData:
    """Read COCO annotations.

    Crowds are ground truth for AP and not trained on. Objects without area, and with `masks` those of which no mask
    can be drawn, are not trained on either, as in detectron2.

    Args:
        data: a JSON file or COCO's folder.
        part: "train", or "val" which keeps the document for AP.
        masks: whether outlines are wanted.

    Raises:
        UserMistake: a broken file, an unknown image or category, or ground truth that COCO's tools cannot use.
    """
    path = annotation_file(data, part)
    document = read_document(path)
    images = unique_by_id(path, document["images"], "image")
    # Sorted by id: COCO's 80 classes have ids with gaps up to 90, and files list them in any order.
    categories = sorted(unique_by_id(path, document["categories"], "category").values(), key=lambda entry: entry["id"])
    if not images or not categories:
        raise UserMistake(f"{path} lists no images or no categories; give COCO's instances_*.json")
    for image in images.values():
        check_image(path, image)
    for category in categories:
        check_category(path, category)
    classes = {entry["id"]: number for number, entry in enumerate(categories)}
    objects: dict[int, list[dict[str, Any]]] = {}
    for place, entry in enumerate(document["annotations"]):
        name = annotation_name(path, place, entry)
        check_annotation(name, entry, images, classes, masks)
        if part == "val":
            check_ground_truth(name, entry, masks)
        objects.setdefault(entry["image_id"], []).append(entry)
    folder = image_folder(path, document["images"][0]["file_name"])
    left: Counter[str] = Counter()
    records = tuple(
        _record(folder, image, objects.get(number, []), classes, masks, left) for number, image in images.items()
    )
    return DetectionData(
        "coco",
        data,
        tuple(entry["name"] for entry in categories),
        tuple(classes),
        records,
        _numbered(document) if part == "val" else {},
        tuple(f"{count} {what}" for what, count in sorted(left.items())),
    )


def _numbered(document: dict[str, Any]) -> dict[str, Any]:
    """The document with annotations numbered from 1.

    COCO's evaluator takes an annotation's id for "matched" and so reads 0 as "not matched". It also looks annotations
    up by id over the whole file. Tools that count from 0, or anew in each image, would lower the AP without a word.
    """
    annotations = [{**entry, "id": number} for number, entry in enumerate(document["annotations"], start=1)]
    return {**document, "annotations": annotations}


def _record(
    folder: Path,
    image: dict[str, Any],
    objects: list[dict[str, Any]],
    classes: dict[int, int],
    masks: bool,
    left: Counter[str],
) -> ImageRecord:
    """One image, with what is not trained on counted in `left`."""
    corners = np.array([entry["bbox"] for entry in objects], dtype=np.float32).reshape(-1, 4)
    # COCO stores width and height; records hold corners.
    corners[:, 2:] += corners[:, :2]
    boxes, full = inside(corners, image["width"], image["height"])
    kept: list[int] = []
    outlines: list[Outline] = []
    for number, entry in enumerate(objects):
        # Built only where masks are wanted, since polygons take memory.
        outline = outline_of(entry.get("segmentation")) if masks else None
        if entry.get("iscrowd", 0):
            left["crowds are not trained on"] += 1
        elif not full[number]:
            left["objects without area are not trained on"] += 1
        elif masks and outline is None:
            left["objects without a drawable mask are not trained on"] += 1
        else:
            kept.append(number)
            outlines += [outline] if outline is not None else []
    labels = np.array([classes[objects[number]["category_id"]] for number in kept], dtype=np.int64)
    return ImageRecord(
        folder / image["file_name"], image["id"], image["width"], image["height"], boxes[kept], labels, tuple(outlines)
    )
