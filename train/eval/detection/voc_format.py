"""PASCAL VOC: `VOC2007/{Annotations,ImageSets/Main,JPEGImages}`."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.images import MAX_PIXELS

from ...errors import UserMistake
from ..voc_lists import image_of, listed_names
from .records import DetectionData, ImageRecord, inside

NAMES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_FARTHEST = 1e9
# What "VOC07+12 -> VOC07 test" means for a VOCdevkit folder, and what one year's folder means.
_DEVKIT = {"train": ("VOC2007/trainval", "VOC2012/trainval"), "val": ("VOC2007/test",)}
_YEAR = {"train": "trainval", "val": "test"}


@dataclass(frozen=True)
class VocObject:
    """One object of a file: class from 0, box as written (1-based, inclusive corners), difficult or not."""

    label: int
    box: tuple[float, float, float, float]
    difficult: bool


def image_sets(data: str, part: str) -> list[Path]:
    """The lists of images that `data` means.

    Args:
        data: comma-separated: a VOCdevkit folder, a year's folder (VOC2007), or a list in ImageSets/Main.
        part: "train" or "val".

    Raises:
        UserMistake: one of them does not exist.
    """
    found: list[Path] = []
    for name in data.split(","):
        path = Path(name)
        if path.is_file():
            found.append(path)
        elif (path / "ImageSets").is_dir():
            found.append(path / "ImageSets" / "Main" / f"{_YEAR[part]}.txt")
        else:
            wanted = [
                path / year / "ImageSets" / "Main" / f"{split}.txt"
                for year, split in (entry.split("/") for entry in _DEVKIT[part])
            ]
            found += wanted
    for path in found:
        if not path.is_file():
            raise UserMistake(f"{data} ({part}): there is no {path}; give the list of images")
    return found


def _annotation(root: Path, name: str) -> Path:
    return root / "Annotations" / f"{name}.xml"


def _is_annotated(root: Path, name: str) -> bool:
    return _annotation(root, name).is_file()


def read_objects(path: Path) -> tuple[int, int, list[VocObject]]:
    """(width, height, objects) of an annotation file.

    Raises:
        UserMistake: it cannot be read, or names a class that VOC does not have.
    """
    try:
        root = ElementTree.parse(path).getroot()
        size = root.find("size")
        # Some tools write whole numbers as 500.0.
        width, height = (int(_number(size, name)) for name in ("width", "height"))
        if min(width, height) < 1 or width * height > MAX_PIXELS:
            raise ValueError(f"size {width:.4g} x {height:.4g}")
        return width, height, [_object(path, entry) for entry in root.findall("object")]
    except (OSError, ValueError, ElementTree.ParseError, RecursionError) as reason:
        raise UserMistake(f"{path} cannot be read as a VOC annotation: {str(reason)[:300]}; copy it again") from None


def _object(path: Path, entry: ElementTree.Element) -> VocObject:
    name = _text(entry, "name").strip()
    if name not in NAMES:
        raise UserMistake(f"{path}: class {name[:100]!r} is none of VOC's; known are {', '.join(NAMES)}")
    box = entry.find("bndbox")
    x0, y0, x1, y1 = (_number(box, side) for side in ("xmin", "ymin", "xmax", "ymax"))
    # Of a box that was drawn from right to left: as ground truth nothing could ever match it.
    if x1 < x0 or y1 < y0:
        raise ValueError(f"the box {x0:g}, {y0:g}, {x1:g}, {y1:g} of {name} ends before it begins")
    return VocObject(NAMES.index(name), (x0, y0, x1, y1), _is_difficult(entry))


def _is_difficult(entry: ElementTree.Element) -> bool:
    """Whether an object is marked difficult; the mark may be missing, empty, a word, or stand between blanks."""
    text = (entry.findtext("difficult") or "").strip().lower()
    if text in ("1", "true", "yes"):
        return True
    if text in ("", "0", "false", "no", "unspecified"):
        return False
    raise ValueError(f"difficult is {text!r}, neither 0 nor 1")


def _number(node: Any, name: str) -> float:
    value = float(_text(node, name))
    # Corners beyond it are no measurement, and their differences lose every digit.
    if not abs(value) <= _FARTHEST:
        raise ValueError(f"{name} is {value}")
    return value


def _text(node: Any, name: str) -> str:
    text = None if node is None else node.findtext(name)
    if text is None:
        raise ValueError(f"no {name}")
    return str(text)


def read_voc(data: str, part: str) -> DetectionData:
    """Read VOC annotations.

    Boxes become 0-based by taking 1 from the upper left corner. Difficult objects are trained on, as in detectron2, and
    ignored by VOC's AP; in the document for COCO's AP they are crowds, its only kind of object to ignore.

    Args:
        data: as for `image_sets`.
        part: "train" or "val".

    Raises:
        UserMistake: a list or annotation is missing or broken.
    """
    lists = image_sets(data, part)
    records: list[ImageRecord] = []
    difficult: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number + 1, "name": name} for number, name in enumerate(NAMES)],
    }
    left: Counter[str] = Counter()
    for entry in lists:
        root = entry.parents[2]
        for name in listed_names(entry, partial(_is_annotated, root)):
            width, height, objects = read_objects(_annotation(root, name))
            number = len(records)
            records.append(_record(image_of(root, name), number, width, height, objects, left))
            _add_ground_truth(document, difficult, number, (width, height), objects)
    if not records:
        raise UserMistake(f"{data}: the list of images is empty; give one of ImageSets/Main")
    # The rule of the AP belongs to the year: eleven points for VOC 2007, the area for later lists.
    years = {entry.parents[2].name for entry in lists}
    return DetectionData(
        "voc",
        data,
        NAMES,
        tuple(range(1, len(NAMES) + 1)),
        tuple(records),
        document if part == "val" else {},
        tuple(f"{count} {what}" for what, count in left.items()),
        difficult,
        "11 points" if years == {"VOC2007"} else "area",
    )


def _record(
    path: Path, number: int, width: int, height: int, objects: list[VocObject], left: Counter[str]
) -> ImageRecord:
    corners = np.array([entry.box for entry in objects], dtype=np.float32).reshape(-1, 4)
    # VOC counts from 1 and its corners are inclusive: the lower right one is then already the exclusive end.
    corners[:, :2] -= 1
    boxes, full = inside(corners, width, height)
    if not full.all():
        left["objects without area are not trained on"] += int((~full).sum())
    labels = np.array([entry.label for entry in objects], dtype=np.int64)
    return ImageRecord(path, number, width, height, boxes[full], labels[full])


def _add_ground_truth(
    document: dict[str, Any],
    difficult: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]],
    number: int,
    size: tuple[int, int],
    objects: list[VocObject],
) -> None:
    document["images"].append({"id": number, "width": size[0], "height": size[1]})
    for entry in objects:
        x0, y0, x1, y1 = entry.box
        # Inclusive corners counted from 1: the box begins one pixel earlier.
        width, height = x1 - (x0 - 1), y1 - (y0 - 1)
        document["annotations"].append(
            {
                # From 1: COCO's evaluator takes the id 0 for "not matched".
                "id": len(document["annotations"]) + 1,
                "image_id": number,
                "category_id": entry.label + 1,
                "bbox": [x0 - 1, y0 - 1, width, height],
                "area": width * height,
                "iscrowd": int(entry.difficult),
            }
        )
    for label in {entry.label for entry in objects}:
        same = [entry for entry in objects if entry.label == label]
        difficult[number, label] = (
            np.array([entry.box for entry in same], dtype=np.float64),
            np.array([entry.difficult for entry in same]),
        )
