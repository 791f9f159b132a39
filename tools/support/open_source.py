"""From what a user names as SOURCE to the images in it."""

from __future__ import annotations

import glob
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipeline.classes import joined
from pipeline.clutter import is_clutter
from pipeline.endings import is_table, is_tar
from pipeline.listing import list_images
from pipeline.parquet import ParquetImages
from pipeline.refusal import ImageRefused
from pipeline.shards import expand_braces

from .remote_source import open_mixed_list, open_remote
from .source import FilePart, Place, Source, refuse_huge
from .tar_source import open_tars


def open_source(text: str) -> Source:
    """The images that SOURCE names.

    Args:
        text: a folder, a text file with one path or address a line, a tar file or a shard pattern, a parquet file, an
            address of a list or folder; several of them separated by commas, or a pattern with `*`, `?` or `[`.

    Raises:
        ValueError: it does not exist, holds no images, or a shard is damaged.
    """
    # Here and not above: stores import PyTorch, seconds that `--help` and a mistyped flag should not cost.
    from pipeline.stores import data_parts

    parts = data_parts(text)
    if len(parts) == 1:
        return _open_one(parts[0])
    sources = [_open_one(part) for part in parts]
    labels, classes = joined([(each.labels, each.classes, part) for each, part in zip(sources, parts, strict=True)])
    # With the part before it: two folders may have files of one name.
    names = [f"{part}/{name}" for part, each in zip(parts, sources, strict=True) for name in each.names]
    places: list[Place] = [place for each in sources for place in each.places]
    passed_over = sum((Counter(each.passed_over) for each in sources), Counter())
    return Source(names, labels, classes, places, passed_over)


def _open_one(text: str) -> Source:
    path = Path(text)
    if "://" in text:
        return open_remote(text)
    if is_tar(text):
        return open_tars(_tar_files(text))
    if not path.exists():
        raise ValueError(f"{text} does not exist; give a folder of images, a list of paths or a shard pattern")
    if is_table(text):
        images = ParquetImages([path])
        places = [ParquetCell(images, index) for index in range(len(images))]
        return Source(images.names, images.labels, images.classes, places)
    return open_mixed_list(path) or _open_files(path)


def _open_files(path: Path) -> Source:
    listing = list_images(path)
    places = [FilePart(str(file)) for file in listing.files]
    return Source(listing.names, listing.labels, listing.classes, places, listing.passed_over)


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """An image in a row of a parquet file."""

    images: ParquetImages
    index: int

    def read(self) -> bytes:
        """The bytes; see `Place`."""
        try:
            return refuse_huge(self.images.read(self.index))
        except OSError as error:
            raise ImageRefused(str(error)) from error


def _tar_files(pattern: str) -> list[Path]:
    """The files of a shard pattern, which has ranges as {000..009} or wildcards."""
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return [Path(name) for name in expand_braces(pattern)]
    # In the order of the names as bytes, which does not depend on the locale.
    found = sorted(glob.glob(pattern, recursive=True), key=os.fsencode)
    if not found:
        raise ValueError(f"no file fits {pattern}; check the pattern, and quote it so that the shell leaves it alone")
    return [Path(name) for name in found if not is_clutter(Path(name).name)]
