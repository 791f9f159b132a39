"""The lists of a PASCAL VOC folder, one image a line, and the image file of a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UserMistake

IMAGE_ENDINGS = (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG", ".webp", ".bmp", ".tif", ".tiff")
"""Endings of image files, VOC's own first."""


def listed_names(path: Path, labelled: Callable[[str], bool]) -> list[str]:
    """The image names of a list, without endings.

    VOC's lists of one class have a number behind each name, and other tools write the ending of the image file. A name
    may hold blanks and dots, so either is only taken off where the longer name has no label.

    Args:
        path: list below ImageSets.
        labelled: whether a name has a label.

    Raises:
        OSError: the list cannot be read.
        UserMistake: the list is no text.
    """
    try:
        # Some editors put a byte-order mark before the first name, which would then name no file.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserMistake(f"{path} is no UTF-8 text; save the list of images as one") from None
    return [_name(line, labelled) for line in filter(None, map(str.strip, text.splitlines()))]


def _name(line: str, labelled: Callable[[str], bool]) -> str:
    bare = _without_number(line)
    return next(filter(labelled, (line, bare, _without_ending(line), _without_ending(bare))), bare)


def _without_number(line: str) -> str:
    name, _, last = line.rpartition(" ")
    return name.strip() if name and last in ("-1", "0", "1") else line


def _without_ending(line: str) -> str:
    name, dot, ending = line.rpartition(".")
    return name if name and dot + ending in IMAGE_ENDINGS else line


def image_of(root: Path, name: str) -> Path:
    """The image file of a name: VOC's own .jpg, or the ending that another tool gave it.

    Args:
        root: a year's folder.
        name: without an ending.

    Returns:
        The file that exists, or the .jpg that is missing, so that a later message names it.
    """
    paths = [root / "JPEGImages" / (name + ending) for ending in IMAGE_ENDINGS]
    return next((path for path in paths if path.is_file()), paths[0])
