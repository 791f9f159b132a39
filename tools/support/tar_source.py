"""Images in tar files: shards with class files, folders packed as they are, and ImageNet's tar of class tars."""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.clutter import has_clutter
from pipeline.listing import IMAGE_SUFFIXES, common_folder_removed, label_by_folder

from .source import FilePart, Place, Source, Unusable
from .tar_members import Gap, walk

_LONGEST_CHAIN = 40  # links that lead to links, as many as Linux follows


@dataclass
class _Image:
    """An image file of a shard.

    Attributes:
        name: path in the shard; None for a stretch whose header is damaged.
        title: what to call it.
        place: where it is.
        label: number in its class file; None without one.
    """

    name: str | None
    title: str
    place: Place
    label: int | None = None


@dataclass
class _Shard:
    """What was found in one shard.

    Attributes:
        path: of the file.
        images: image files, in order.
        files: path in the shard -> place, of regular image files; of equal names the last, as when it is unpacked.
        links: path in the shard -> path that it leads to.
        class_files: path without ".cls" -> places of the class files of that name, in order.
        passed_over: kind and number of what is no image.
    """

    path: Path
    images: list[_Image] = field(default_factory=list)
    files: dict[str, FilePart] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    class_files: dict[str, list[FilePart]] = field(default_factory=lambda: defaultdict(list))
    passed_over: Counter[str] = field(default_factory=Counter)


def open_tars(shards: list[Path]) -> Source:
    """The images of tar files. Every member is an image, is counted as passed over, or is refused by name.

    Class files (`x.cls` beside `x.jpg`) decide the labels where there are any; otherwise the folders inside do. A tar
    file in a tar file counts as a folder of its name.

    Raises:
        ValueError: a file is missing, cut or no tar file, there is no image, or a label is not a number.
    """
    images: list[_Image] = []
    passed_over: Counter[str] = Counter()
    for path in shards:
        shard = _read_shard(path)
        images += shard.images
        passed_over += shard.passed_over
    if all(image.name is None for image in images):
        raise ValueError(f"{shards[0]} and {len(shards) - 1} more hold no image files; give shards with images")
    numbers, classes = _labels(images)
    return Source([image.title for image in images], numbers, classes, [image.place for image in images], passed_over)


def _labels(images: list[_Image]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (N,) int64 and class names, from class files or else from folders."""
    if any(image.label is not None for image in images):
        numbers = np.array([-1 if image.label is None else image.label for image in images], dtype=np.int64)
        return numbers, tuple(str(number) for number in range(int(numbers.max()) + 1))
    numbers = np.full(len(images), -1, dtype=np.int64)
    # A stretch without a name has no folder, which must not take the classes from all others.
    named = {place: image.name for place, image in enumerate(images) if image.name is not None}
    numbers[list(named)], classes = label_by_folder(common_folder_removed(list(named.values())))
    return numbers, classes


def _read_shard(path: Path) -> _Shard:
    if not path.exists():
        raise ValueError(f"shard {path} does not exist; check the pattern")
    shard = _Shard(path)
    with open(path, "rb") as file:
        _read_members(shard, file, 0, path.stat().st_size, "", str(path))
        # Only now: a link may stand before its target, a class file before or behind its image.
        for image in shard.images:
            if image.name in shard.links:
                image.place = _followed(shard, image.name)
        _give_labels(shard, file)
    return shard


def _read_members(shard: _Shard, file: BinaryIO, start: int, end: int, folder: str, where: str) -> None:
    """Note all members of the tar file in these bytes of a shard; `folder` goes before their names."""
    inner: list[tuple[str, int, int]] = []
    for member in walk(file, start, end, where):
        if isinstance(member, Gap):
            shard.images.append(_Image(None, f"{where}, byte {member.start - start}", Unusable(member.reason)))
            continue
        if member.isdir():
            continue
        name = folder + _plain(member.name)
        suffix = os.path.splitext(name)[1].lower()
        first, last = member.offset_data, member.offset_data + member.size
        if has_clutter(_plain(member.name).split("/")):
            shard.passed_over["system files"] += 1
        elif suffix == ".tar" and member.isreg() and not folder:
            inner.append((name, first, last))
        elif suffix == ".cls" and member.isreg():
            shard.class_files[name.removesuffix(".cls")].append(FilePart(str(shard.path), first, member.size))
        elif suffix in IMAGE_SUFFIXES:
            shard.images.append(_Image(name, name, _place(shard, member, name, folder)))
        else:
            shard.passed_over[suffix or "without ending"] += 1
    for name, first, last in inner:
        _read_members(shard, file, first, last, name.removesuffix(".tar") + "/", f"{name} in {where}")


def _plain(name: str) -> str:
    """A member's path without the `./` that many programs put before it."""
    return posixpath.normpath(name).lstrip("/")


def _place(shard: _Shard, member: tarfile.TarInfo, name: str, folder: str) -> Place:
    if member.isreg() and not member.issparse():
        shard.files[name] = FilePart(str(shard.path), member.offset_data, member.size)
        return shard.files[name]
    if member.islnk() or member.issym():
        # A hard link names its target from the top of the archive, a symbolic one from its own folder.
        base = posixpath.dirname(name) if member.issym() else folder
        shard.links[name] = posixpath.normpath(posixpath.join(base, member.linkname))
    return Unusable("a sparse file" if member.issparse() else "not a regular file")


def _followed(shard: _Shard, name: str) -> Place:
    """Where a link leads in the end."""
    target = name
    for _ in range(_LONGEST_CHAIN):
        if target not in shard.links:
            break
        target = shard.links[target]
    if target in shard.files:
        return shard.files[target]
    return Unusable(f"a link to {shard.links[name]}, which is no image of this tar file")


def _give_labels(shard: _Shard, file: BinaryIO) -> None:
    """Label the images that have a class file."""
    copies: Counter[str] = Counter(image.name for image in shard.images if image.name is not None)
    turn: Counter[str] = Counter()
    for image in shard.images:
        if image.name is None:
            continue
        key = _key(shard, image.name)
        if key is not None:
            found = [_class_number(file, shard.path, image.name, place) for place in shard.class_files[key]]
            image.label = _label_of(found, turn[image.name], copies[image.name])
            # Which label belongs to which of several images of one name is a guess that would shift labels.
            if image.label is None:
                image.place = Unusable(
                    f"{len(found)} different class files for {copies[image.name]} images of one name"
                )
        turn[image.name] += 1


def _key(shard: _Shard, name: str) -> str | None:
    """What an image and its class file share: the path up to its last ending, or else up to an earlier one.

    `frame.000.jpg` belongs to `frame.000.cls`; `7.depth.png` to `7.cls`.
    """
    folder, _, last = name.rpartition("/")
    parts = last.split(".")
    for count in range(len(parts) - 1, 0, -1):
        key = posixpath.join(folder, ".".join(parts[:count]))
        if key in shard.class_files:
            return key
    return None


def _label_of(found: list[int], turn: int, copies: int) -> int | None:
    """The label of image number `turn` among `copies` of one name, or None where the class files do not tell."""
    if len(set(found)) == 1:
        return found[0]
    return found[turn] if len(found) == copies else None


def _class_number(file: BinaryIO, shard: Path, name: str, place: FilePart) -> int:
    file.seek(place.offset)
    # A class number is short; a damaged header must not make this read a gigabyte.
    text = file.read(min(place.size, 64)).decode("ascii", "replace").strip()
    if not re.fullmatch(r"-?\d{1,9}", text) or int(text) < -1:
        raise ValueError(f"the label of {name} in {shard} is {text!r}, not a class number; repair the shard")
    return int(text)
