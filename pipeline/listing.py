"""Which files of a folder or a list are images, in which order, and of which class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .clutter import is_clutter
from .file_kinds import foreign_kind

# What people call image files. Those of a format that we cannot read are listed too, so that they are refused by name
# instead of missing in silence.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm .tga .jp2 .j2k .avif "
    ".heic .heif .qoi".split()
)


@dataclass(frozen=True)
class Listing:
    """Image files in storage order.

    Attributes:
        files: their paths.
        names: what to call them: the path relative to the source.
        labels: (N,) int64, -1 where there are no classes.
        classes: class names by label, empty where there are none.
        passed_over: what a folder holds beside them: an ending, as ".txt", or "system files", and how many.
    """

    files: list[Path]
    names: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    passed_over: Mapping[str, int] = field(default_factory=dict)


def list_images(source: Path) -> Listing:
    """The image files of a folder or of a list file.

    A folder is searched with its subfolders, in the order of the relative paths as bytes. What systems leave in
    folders is skipped (`clutter.is_clutter`). Links are followed, but a link back to a folder on its own path is not.

    A list has one path a line, relative to the list's own folder or absolute. Its order and its repetitions are kept.

    Where every image lies in a subfolder of the source (for a list: of the deepest folder that holds them all), the
    first folder on its way is its class.

    Raises:
        ValueError: there are no images, or a folder cannot be read.
    """
    passed_over: Counter[str] = Counter()
    if source.is_dir():
        # As bytes: the order must not depend on the locale.
        names = sorted(_walk(source, passed_over), key=os.fsencode)
        files = [source / name for name in names]
        labels, classes = label_by_folder(names)
    else:
        # Before it is read as text: an archive or a film may have gigabytes.
        foreign = foreign_kind(source)
        if foreign:
            raise ValueError(f"{source} {foreign}")
        text = source.read_text(encoding="utf-8-sig", errors="surrogateescape")
        names = [line for line in text.split("\n") if line.strip()]
        names = [name.removesuffix("\r") for name in names]
        if any("\0" in name for name in names):
            raise ValueError(f"{source} is not a list of paths (it holds zero bytes); give a folder or a text file")
        files = [source.parent / name for name in names]
        labels, classes = label_by_folder(_relative([os.path.abspath(file) for file in files]))
    if not files:
        raise ValueError(f"{source} holds no image files; {_instead(passed_over)}")
    return Listing(files, names, labels, classes, passed_over)


def image_names(folder: Path) -> Iterator[str]:
    """Relative paths of the image files below a folder as they are found, in no order.

    Raises:
        ValueError: a folder cannot be read.
    """
    return _walk(folder, Counter())


def _instead(passed_over: Mapping[str, int]) -> str:
    """What to give instead of a folder or list without images."""
    if passed_over.get(".tar"):
        return (
            f"it has {passed_over['.tar']} tar files without an index: pack them with tools/make_webdataset.py "
            "'FOLDER/*.tar' SHARDS, and give SHARDS"
        )
    if passed_over.get(".parquet"):
        return f"it has {passed_over['.parquet']} parquet files: give 'FOLDER/*.parquet'"
    return "give a folder of photos or a list with one path a line"


def describe_passed_over(passed_over: Mapping[str, int]) -> str:
    """What was found beside the images, in words: "3 .mp4, 2 .txt"; empty where nothing was."""
    # The commonest first; equal numbers by name, so that the text does not depend on the order of a folder.
    kinds = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in kinds)


def label_by_folder(names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (N,) int64 and class names from relative paths: classes are numbered in the order of their names.

    Where a path has no folder there are no classes, and every label is -1.
    """
    tops = [name.split("/", 1)[0] if "/" in name else None for name in names]
    if not names or None in tops:
        return np.full(len(names), -1, dtype=np.int64), ()
    classes = sorted({top for top in tops if top is not None}, key=os.fsencode)
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[top] for top in tops if top is not None], dtype=np.int64), tuple(classes)


def common_folder_removed(names: Sequence[str]) -> list[str]:
    """Paths relative to the deepest folder that holds them all."""
    return _relative([os.path.join("/", name) for name in names])


def _relative(paths: Sequence[str]) -> list[str]:
    if not paths:
        return []
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, folder) for path in paths]


def _walk(source: Path, passed_over: Counter[str]) -> Iterator[str]:
    """Relative paths of the image files below a folder, in no order; other files are counted in `passed_over`."""
    # Folders are told apart by device and inode, so that a link back to one above ends the walk there only.
    start = os.stat(source)
    folders = [("", frozenset([(start.st_dev, start.st_ino)]))]
    while folders:
        prefix, above = folders.pop()
        try:
            entries = list(os.scandir(source / prefix))
        except OSError as error:
            raise ValueError(f"the folder {source / prefix} cannot be read: {error.strerror}") from error
        for entry in entries:
            if is_clutter(entry.name):
                passed_over["system files"] += 1
                continue
            name = prefix + entry.name
            if entry.is_dir():
                status = entry.stat()
                identity = (status.st_dev, status.st_ino)
                if identity not in above:
                    folders.append((name + "/", above | {identity}))
                continue
            suffix = os.path.splitext(name)[1].lower()
            # A link that leads nowhere is listed, so that it is refused by name.
            if suffix in IMAGE_SUFFIXES and (entry.is_file() or entry.is_symlink()):
                yield name
            else:
                passed_over[suffix or "without ending"] += 1
