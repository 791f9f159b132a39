"""Lists of class names in a text file, and the part of a source that belongs to them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.classes import composed

from .open_source import open_source
from .source import Source, Unusable


@dataclass(frozen=True)
class ClassList:
    """Names of class folders, as a file lists them.

    Attributes:
        file: the file's name, without its folder.
        sha256: hexadecimal SHA-256 of the file's bytes, as `sha256sum` prints it.
        lines: the file's lines without blanks at their ends, each once; none is empty.
    """

    file: str
    sha256: str
    lines: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The first word of each line, as in `n01440764 tench`, without the lines that begin with #."""
        return tuple(dict.fromkeys(line.split()[0] for line in self.lines if not line.startswith("#")))

    def found_in(self, classes: Iterable[str]) -> tuple[set[str], list[str]]:
        """The classes that the list names, and what it names beside them.

        A line that equals a class name stands for that class, blanks and a leading # included; of other lines the
        first word counts. Names are compared in Unicode's composed form: macOS stores an accent apart from its letter.
        """
        known = {composed(name): name for name in classes}
        found, missing = set(), []
        for line in self.lines:
            word = line.split()[0]
            name = known.get(composed(line)) or known.get(composed(word))
            if name is not None and (name == known.get(composed(line)) or not line.startswith("#")):
                found.add(name)
            elif not line.startswith("#"):
                missing.append(word)
        return found, list(dict.fromkeys(missing))


def open_chosen(source: str, class_file: str | None) -> tuple[Source, dict[str, Any]]:
    """The images that SOURCE and `--classes` name together, and what the manifest records of the choice.

    Args:
        source: as for `open_source`.
        class_file: list of the classes to keep; None keeps every image and records nothing.

    Returns:
        (the images, settings of the manifest: the list's file name and hash under "classes").

    Raises:
        ValueError: the source or the list cannot be used, or the source lacks a class of the list.
    """
    if class_file is None:
        return open_source(source), {}
    # The list is read before the source, whose folders can take minutes to search.
    wanted = read_class_list(Path(class_file))
    return only_classes(open_source(source), wanted), {"classes": {"file": wanted.file, "sha256": wanted.sha256}}


def read_class_list(path: Path) -> ClassList:
    """The lines of a text file that names classes.

    Raises:
        ValueError: the file cannot be read or names no class.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--classes {path} cannot be read: {error.strerror}") from error
    # A byte that is no UTF-8 is kept as Python keeps it in file names, so that such a folder can be listed too. The
    # byte-order mark that some editors write would otherwise be part of the first name.
    text = data.decode("utf-8-sig", "surrogateescape")
    lines = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not lines:
        raise ValueError(f"--classes {path} names no class; write one class folder name a line")
    return ClassList(path.name, hashlib.sha256(data).hexdigest(), lines)


def only_classes(source: Source, wanted: ClassList) -> Source:
    """The images of the wanted classes, in the source's order; the labels number the classes that are left.

    What stands for images that cannot be told apart, as behind a damaged header, is of no class and stays, so that it
    is counted.

    Raises:
        ValueError: the source has no image of a wanted class, or the list names none.
    """
    # Shards with class numbers name every number up to the highest, so a class counts only if an image has it.
    present = [source.classes[label] for label in np.unique(source.labels).tolist() if label >= 0]
    found, missing = wanted.found_in(present)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"the source has no images of class {missing[0]}{more}, which {wanted.file} names")
    if not found:
        raise ValueError(f"--classes {wanted.file} names no class; write one class folder name a line")
    # The order of the source's own classes, not that of the file: labels must not depend on how a list is sorted.
    classes = tuple(name for name in source.classes if name in found)
    renumbered = np.full(len(source.classes), -1, dtype=np.int64)
    renumbered[[source.classes.index(name) for name in classes]] = np.arange(len(classes))
    # Images without a class have label -1, which would index the last class.
    labels = np.where(source.labels >= 0, renumbered[source.labels], -1)
    lost = [isinstance(place, Unusable) for place in source.places]
    kept = np.flatnonzero((labels >= 0) | (np.array(lost) & (source.labels < 0))).tolist()
    return dataclasses.replace(source, labels=labels, classes=classes).taken(kept)
