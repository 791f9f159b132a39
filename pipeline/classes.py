"""Classes by their names. Two data sets meet by name, since numbers follow from the folders that each has."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np


def renumbered(labels: np.ndarray, own: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """Labels numbered by another data set's classes.

    A class that only the other data set has shifts nothing. Names are compared in Unicode's composed form, since macOS
    stores an accent apart from its letter.

    Args:
        labels: (N,) int64 numbers of `own`, -1 where there is no label.
        own: class names by number.
        wanted: class names of the other data set by number.

    Returns:
        (N,) int64 numbers of `wanted`, -1 where there was no label.

    Raises:
        ValueError: a labelled image is of a class that `wanted` lacks. It names that class.
    """
    number = {composed(name): place for place, name in enumerate(wanted)}
    table = np.array([number.get(composed(name), -1) for name in own], dtype=np.int64)
    used = np.unique(labels[labels >= 0])
    lacking = [own[label] for label in used.tolist() if table[label] < 0]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ValueError(
            f"class {lacking[0]}{more} is not among the {len(wanted)} classes that are compared with; labels would not "
            "mean the same, give both data sets the same class folders"
        )
    # An index of -1 reads the last entry, so images without a label are set apart.
    return np.where(labels >= 0, table[labels], -1) if len(table) else labels


def joined(parts: Sequence[tuple[np.ndarray, Sequence[str], str]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of several data sets as one: classes meet by name.

    Args:
        parts: (labels (N,) int64, class names by label, what to call the part) of each.

    Returns:
        (labels of all parts in turn, class names by label). Where no part has names, numbers stay as they are.

    Raises:
        ValueError: one part has numbers only and another one names.
    """
    named = [part for part in parts if part[1]]
    bare = next((where for labels, names, where in parts if not names and (labels >= 0).any()), None)
    if named and bare is not None:
        raise ValueError(
            f"{bare} has class numbers only and {named[0][2]} has names, so their labels do not compare; pack both "
            "from folders"
        )
    if not named:
        return np.concatenate([labels for labels, _, _ in parts]), ()
    lists = [tuple(composed(name) for name in names) for _, names, _ in named]
    longest = max(lists, key=len)
    # One list that begins like all others keeps its order, as numbers of class files do; else the order of the names.
    if all(longest[: len(names)] == names for names in lists):
        classes = longest
    else:
        classes = tuple(sorted({name for names in lists for name in names}, key=_as_bytes))
    return np.concatenate(
        [renumbered(labels, names, classes) if names else labels for labels, names, _ in parts]
    ), classes


def _as_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def composed(name: str) -> str:
    """A class name in Unicode's composed form, in which two names are compared."""
    return unicodedata.normalize("NFC", name)
