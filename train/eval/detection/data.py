"""Which format a path is in, and reading it."""

from __future__ import annotations

from pathlib import Path

from ...errors import UserMistake
from .cityscapes_format import read_cityscapes
from .coco_format import read_coco
from .records import DetectionData, Format
from .voc_format import read_voc


def format_of(data: str) -> Format:
    """The format of a path, by what is there.

    Raises:
        UserMistake: it is none that is known.
    """
    first = Path(data.split(",")[0])
    if not first.exists():
        raise UserMistake(f"{first} does not exist; give COCO's folder or JSON, VOCdevkit, or Cityscapes' folder")
    if first.suffix == ".json" or (first / "annotations").is_dir():
        return "coco"
    if (first / "leftImg8bit").is_dir():
        return "cityscapes"
    if first.suffix == ".txt" or (first / "ImageSets").is_dir() or any(first.glob("VOC20*")):
        return "voc"
    raise UserMistake(
        f"{data} is in no known format; give COCO's folder (annotations/) or JSON, VOCdevkit, a VOC2007 folder or list "
        "of images, or Cityscapes' folder (leftImg8bit/, gtFine/)"
    )


def read_data(data: str, part: str, masks: bool, workers: int) -> DetectionData:
    """Read a data set.

    Args:
        data: path or, for VOC, paths.
        part: "train" or "val"; the latter keeps what AP needs.
        masks: whether outlines of objects are wanted.
        workers: threads for decoding annotations.

    Raises:
        UserMistake: the format is unknown, has no masks, or the annotations are broken.
    """
    kind = format_of(data)
    if kind == "coco":
        return read_coco(data, part, masks)
    if kind == "cityscapes":
        return read_cityscapes(data, part, workers)
    if masks:
        raise UserMistake(f"{data} is in VOC's format, which has no masks; choose a Faster R-CNN or RetinaNet")
    return read_voc(data, part)
