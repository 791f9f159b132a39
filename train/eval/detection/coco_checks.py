"""What a COCO document must hold before anything is trained or measured on it.

Annotation tools write NaN, null, exchanged sides and cut run lengths. COCO's own routines meet those with endless
loops, all of the memory or a wrong mask, so each entry is looked at here and refused by its id.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.images import MAX_PIXELS

from ...errors import UserMistake

_MOST = 2**62
_FARTHEST_NUMBER = 1e18
"""Coordinates and areas beyond it are no measurement, and their sums lose every digit or become infinite."""
# A polygon may leave its image a little; COCO's rasteriser takes memory in proportion to how far it does.
_FARTHEST = 1.0
"""How many image sides a polygon may lie outside its image."""


def unique_by_id(path: Path, entries: list[Any], what: str) -> dict[int, dict[str, Any]]:
    """Entries by their id.

    Args:
        path: file, for the message.
        entries: of the document's list.
        what: "image" or "category".

    Raises:
        UserMistake: an entry is no object with a whole number as id, or an id occurs twice.
    """
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or not _is_whole(entry.get("id")):
            raise UserMistake(f"{path}: {what} {place} of the list has no whole number as id; number them")
    # A dictionary keeps the last of equal ids, so the number tells whether there were any.
    by_id = {entry["id"]: entry for entry in entries}
    if len(by_id) != len(entries):
        twice = Counter(entry["id"] for entry in entries).most_common(1)[0][0]
        raise UserMistake(f"{path}: {what} id {twice} occurs twice; ids must be unique")
    return by_id


def check_image(path: Path, entry: dict[str, Any]) -> None:
    """Refuse an image entry without a file name or a possible size.

    Raises:
        UserMistake: naming the image.
    """
    name = f"{path}: image {entry['id']}"
    if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        raise UserMistake(f"{name} has no file_name; add it")
    sides = entry.get("width"), entry.get("height")
    if not all(_is_whole(side) and side > 0 for side in sides) or sides[0] * sides[1] > MAX_PIXELS:  # type: ignore[operator]
        raise UserMistake(
            f"{name} has width {_shown(sides[0])} and height {_shown(sides[1])}; give its size in whole pixels"
        )


def check_category(path: Path, entry: dict[str, Any]) -> None:
    """Refuse a category without a name.

    Raises:
        UserMistake: naming the category.
    """
    if not isinstance(entry.get("name"), str):
        raise UserMistake(f"{path}: category {entry['id']} has no name; add it")


def annotation_name(path: Path, place: int, entry: Any) -> str:
    """What to call an annotation in a message: by its id, or by its place in the list where it has none."""
    number = entry.get("id") if isinstance(entry, dict) else None
    return (
        f"{path}: annotation {_shown(number)}"
        if number is not None
        else f"{path}: annotation at place {place} of the list"
    )


def check_annotation(
    name: str, entry: Any, images: dict[int, dict[str, Any]], classes: dict[int, int], masks: bool
) -> None:
    """Refuse an annotation that cannot be used.

    Args:
        name: of the annotation, for the message.
        entry: the annotation.
        images: image entries by id, already checked.
        classes: class number by category id.
        masks: whether outlines are wanted.

    Raises:
        UserMistake: an unknown image or category, a box that is not four finite numbers or has a negative size, an
            `iscrowd` that is neither 0 nor 1, or with `masks` an outline that is no outline of this image.
    """
    if not isinstance(entry, dict):
        raise UserMistake(f"{name} is no JSON object; remove it")
    image, category = entry.get("image_id"), entry.get("category_id")
    if not _is_whole(image) or image not in images:
        raise UserMistake(f"{name} belongs to image {_shown(image)}, which the file does not list; remove it")
    if not _is_whole(category) or category not in classes:
        raise UserMistake(f"{name} has category {_shown(category)}, which the file does not list; add it there")
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(side) for side in box):
        raise UserMistake(f"{name} has the box {_shown(box)}; it must be four finite numbers: x, y, width, height")
    # Of a box that was drawn from right to left, or two corners: as ground truth nothing could ever match it.
    if box[2] < 0 or box[3] < 0:
        raise UserMistake(f"{name} has the box {_shown(box)} of negative size; give x, y, width, height")
    if entry.get("iscrowd") not in (None, 0, 1):
        raise UserMistake(f"{name} has iscrowd {_shown(entry['iscrowd'])}; give 0 or 1")
    if masks:
        _check_outline(name, entry.get("segmentation"), images[image])


def check_ground_truth(name: str, entry: dict[str, Any], masks: bool) -> None:
    """Refuse ground truth that COCO's AP is not defined for.

    Args:
        name: of the annotation, for the message.
        entry: an annotation that passed `check_annotation`.
        masks: whether the AP of masks is wanted.

    Raises:
        UserMistake: it has no area or no `iscrowd`, or with `masks` COCO's tools can make no mask of it.
    """
    if not _is_finite(entry.get("area")) or entry["area"] < 0 or entry.get("iscrowd") is None:
        raise UserMistake(f"{name} lacks area or iscrowd, which COCO's AP is defined by; add them")
    shape = entry.get("segmentation")
    # COCO's tools look at the first polygon's length to tell polygons from boxes.
    drawable = isinstance(shape, dict) or (isinstance(shape, list) and shape and len(shape[0]) > 4)
    if masks and not drawable:
        raise UserMistake(
            f"{name} has no polygon of three points to start with, of which COCO's tools can make no mask; correct it, "
            "or evaluate a detector without masks"
        )


def run_lengths(counts: Any) -> np.ndarray | None:
    """Run lengths of an encoding as int64, None where the encoding is cut or of another kind.

    Args:
        counts: a list of whole numbers, or COCO's compressed text: groups of 5 bits, the sixth says that more follow,
            each run after the third as its difference to the one before the last.
    """
    if isinstance(counts, list):
        return np.array(counts, dtype=np.int64) if all(_is_whole(count) for count in counts) else None
    if isinstance(counts, str) and counts.isascii():
        counts = counts.encode()
    if not isinstance(counts, bytes):
        return None
    groups = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    # A last group that says more follow is a text that was cut.
    if len(groups) == 0 or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return None
    return _undo_differences(_numbers_of(groups))


def _numbers_of(groups: np.ndarray) -> np.ndarray:
    """Signed numbers from groups of 5 bits, lowest first."""
    starts = np.flatnonzero(np.concatenate([[True], (groups[:-1] & 32) == 0]))
    lengths = np.diff(np.append(starts, len(groups)))
    if lengths.max() > 7:  # beyond 2^34 no image has as many pixels
        return np.array([-1], dtype=np.int64)
    shifts = 5 * (np.arange(len(groups)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((groups & 31) << shifts, starts)
    negative = (groups[starts + lengths - 1] & 16) != 0
    return numbers - np.where(negative, np.int64(1) << (5 * lengths), 0)


def _undo_differences(numbers: np.ndarray) -> np.ndarray:
    runs = numbers.copy()
    runs[1::2] = np.cumsum(numbers[1::2])
    runs[2::2] = np.cumsum(numbers[2::2])
    return runs


def _check_outline(name: str, outline: Any, image: dict[str, Any]) -> None:
    if outline is None:
        return
    if isinstance(outline, dict):
        _check_encoding(name, outline, image)
    elif isinstance(outline, list):
        for polygon in outline:
            _check_polygon(name, polygon, image)
    else:
        raise UserMistake(f"{name} has a segmentation that is neither polygons nor run lengths; correct it")


def _check_polygon(name: str, polygon: Any, image: dict[str, Any]) -> None:
    if not isinstance(polygon, list):
        raise UserMistake(f"{name} has {_shown(polygon)} where a polygon should be; give lists of x, y, x, y, ...")
    points = np.array(polygon, dtype=object if any(isinstance(part, list | dict) for part in polygon) else None)
    if len(points) and (points.dtype.kind not in "iuf" or not np.isfinite(points).all()):
        raise UserMistake(f"{name} has a polygon with a coordinate that is no finite number; correct it")
    for side, values in ((image["width"], points[0::2]), (image["height"], points[1::2])):
        if len(values) and (values.min() < -_FARTHEST * side or values.max() > (1 + _FARTHEST) * side):
            raise UserMistake(
                f"{name} has a polygon far outside its image of {image['width']} x {image['height']} pixels; correct it"
            )


def _check_encoding(name: str, outline: dict[str, Any], image: dict[str, Any]) -> None:
    size = [image["height"], image["width"]]
    found = outline.get("size")
    # 64.0 equals 64, but COCO's compiled tools take whole numbers only, and would say so after the training.
    if found != size or not all(map(_is_whole, found)):
        raise UserMistake(
            f"{name} has run lengths of size {_shown(found)}, its image is [height, width] {size}; correct them"
        )
    runs = run_lengths(outline.get("counts"))
    # None longer than the image: a sum of very long ones could wrap around to the right number.
    damaged = runs is None or (runs < 0).any() or (runs > size[0] * size[1]).any()
    if runs is None or damaged or runs.sum() != size[0] * size[1]:
        covered = "are damaged" if runs is None or damaged else f"cover {runs.sum()} pixels"
        raise UserMistake(f"{name} has run lengths that {covered}, its image has {size[0] * size[1]}; correct them")


def _is_whole(value: Any) -> bool:
    """Whether a value is an integer that COCO's compiled tools can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -_MOST <= value <= _MOST


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Python compares integers of any length with a float exactly; `math.isfinite` cannot take a very long one.
    return -_FARTHEST_NUMBER <= value <= _FARTHEST_NUMBER


def _shown(value: Any) -> str:
    """A value as a message can show it, however deep or long it is."""
    return reprlib.repr(value)
