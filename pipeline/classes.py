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


def composed(name: str) -> str:
    """A class name in Unicode's composed form, in which two names are compared."""
    return unicodedata.normalize("NFC", name)
