"""From what a user names as SOURCE to the images in it."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from pipeline.clutter import is_clutter
from pipeline.listing import list_images
from pipeline.shards import expand_braces

from .source import FilePart, Source
from .tar_source import open_tars


def open_source(text: str) -> Source:
    """The images that SOURCE names: a folder, a text file with one path a line, a tar file or a shard pattern.

    Raises:
        ValueError: it does not exist, holds no images, or a shard is damaged.
    """
    path = Path(text)
    if text.endswith(".tar") and not path.is_dir():
        return open_tars(_tar_files(text))
    if not path.exists():
        raise ValueError(f"{text} does not exist; give a folder of images, a list of paths or a shard pattern")
    listing = list_images(path)
    places = [FilePart(str(file)) for file in listing.files]
    return Source(listing.names, listing.labels, listing.classes, places, listing.passed_over)


def _tar_files(pattern: str) -> list[Path]:
    """The files of a shard pattern, which has ranges as {000..009} or wildcards."""
    if Path(pattern).exists() or not any(sign in pattern for sign in "*?["):
        return [Path(name) for name in expand_braces(pattern)]
    # In the order of the names as bytes, which does not depend on the locale.
    found = sorted(glob.glob(pattern, recursive=True), key=os.fsencode)
    if not found:
        raise ValueError(f"no file fits {pattern}; check the pattern, and quote it so that the shell leaves it alone")
    return [Path(name) for name in found if not is_clutter(Path(name).name)]
