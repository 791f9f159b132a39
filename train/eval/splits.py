"""Which training images few-shot and semi-supervised protocols use: lists fixed by a seed, or published ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from pipeline.beton import BetonReader
from pipeline.classes import composed
from pipeline.endings import is_packed, is_table
from pipeline.listing import list_images
from pipeline.manifest import manifest_of
from pipeline.parts import Whole, arranged
from pipeline.rng import permutation
from pipeline.shard_store import open_shards
from pipeline.stores import data_parts, is_shard_pattern, open_store

from ..errors import UserMistake

_SLOT_SUBSET = 64  # beyond the slots of pipeline/rng.py: which images of a class are in a labelled subset
_DIGITS = 18  # more than any index has


def balanced_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a share of every class's images, at least one each.

    Args:
        labels: (N,) int64, all >= 0.
        fraction: share of each class, in (0, 1]; counts are rounded to the nearest whole image.
        seed: a subset is a function of (labels, fraction, seed), and a smaller fraction's is part of a larger one's.

    Raises:
        UserMistake: a fraction outside its range.
    """
    if not 0 < fraction <= 1:
        raise UserMistake(f"--fraction {fraction}: must be above 0 and at most 1, for example 0.01")
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(fraction * len(members)))
        chosen.append(members[permutation(seed, len(members), int(label), 0, _SLOT_SUBSET)[:count]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def source_names(data: str) -> list[str] | None:
    """The source file of every sample in storage order, relative to the source; None where the store keeps none."""
    wholes = arranged(data_parts(data))
    if len(wholes) == 1:
        return _names_of(wholes[0], data)
    several = [_names_of(whole, whole.paths[0]) for whole in wholes]
    # With the part before it: two folders may have files of one name.
    joined_names = [
        f"{whole.paths[0]}/{name}" for whole, names in zip(wholes, several, strict=True) for name in names or ()
    ]
    return None if None in several else joined_names


def _names_of(whole: Whole, data: str) -> list[str] | None:
    if whole.manifest is not None:
        return whole.manifest.sources
    path = Path(whole.paths[0])
    if is_packed(whole.paths[0]):
        manifest = manifest_of(BetonReader(path))
        return None if manifest is None else manifest.sources
    if path.is_dir() and not is_shard_pattern(data):
        return [file.relative_to(path).as_posix() for file in list_images(path).files]
    return None


def class_names(data: str) -> list[str] | None:
    """The names of the classes in label order, None where the store keeps none.

    Args:
        data: a `.beton` file, a folder, a list of files, or shards with an index. What is not there has no names: a
            number of synthetic images, for example.

    Raises:
        UserMistake: the data cannot be read.
    """
    try:
        parts = data_parts(data)
        if len(parts) > 1 or is_table(parts[0]):
            return list(open_store(data).classes) or None
        data = parts[0]  # what a pattern found, or the copy of what an address names
        if is_shard_pattern(data):
            store = open_shards(data, "sequential", readers=1, window=1)
            store.files.close()
            return list(store.classes) or None
        if not Path(data).exists():
            return None
        if is_packed(data):
            manifest = manifest_of(BetonReader(Path(data)))
            return None if manifest is None else list(manifest.classes) or None
        return list(list_images(Path(data)).classes) or None
    except (ValueError, OSError) as reason:
        raise UserMistake(str(reason)) from None


def check_classes(data: str, val_data: str) -> None:
    """Refuse validation data with a class that the training data lack; classes that only the latter have are harmless.

    Raises:
        UserMistake: both stores know their classes, and one of `val_data` is not among those of `data`.
    """
    train, val = class_names(data), class_names(val_data)
    known = {composed(name) for name in train or ()}
    lacking = [] if train is None or val is None else sorted(name for name in val if composed(name) not in known)
    if lacking:
        raise UserMistake(
            f"--data has {len(train or ())} classes and --val-data {len(val or ())}, which differ, for example in "
            f"{lacking[0]}; label numbers would not mean the same; give both with the same class folders"
        )


def read_list(path: str, names: Sequence[str] | None, total: int) -> np.ndarray:
    """Sorted indices of the samples that a list names.

    Args:
        path: text file with one image a line: a file name (as SimCLR's 1percent.txt), a path that ends in it, or a
            sample index. Blank lines and lines that begin with # are skipped, unless an image is called so.
        names: source file of each sample, None where the store does not keep them.
        total: number of samples.

    Raises:
        UserMistake: the file cannot be read, an entry is not in the data or is there twice, or a name is ambiguous.
    """
    try:
        # As file names are kept: a byte that is no UTF-8 may be part of one, and editors write a byte-order mark.
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as reason:
        raise UserMistake(f"--list {path}: {reason.strerror}; give a text file with one image a line") from None
    if "\0" in text:
        raise UserMistake(f"--list {path}: holds zero bytes; save it as UTF-8 text with one image a line")
    entries = _entries(text, frozenset(names or ()))
    if not entries:
        raise UserMistake(f"--list {path}: names no image")
    # Only where every line is a number: a file name may be one as well.
    if all(entry.isascii() and entry.isdecimal() for entry in entries):
        # Python refuses to read a number of thousands of digits.
        found = [int(entry) if len(entry) < _DIGITS else 10**_DIGITS for entry in entries]
        if max(found) >= total:
            raise UserMistake(f"--list {path}: index {max(found)}, but the data has {total} images")
    else:
        found = _by_name(path, entries, names)
    # Twice the same image would weigh twice, and the share of labels would be another one than stated.
    if len(set(found)) != len(found):
        raise UserMistake(f"--list {path}: {len(found) - len(set(found))} images are named twice")
    return np.sort(np.asarray(found, dtype=np.int64))


def _entries(text: str, names: Collection[str]) -> list[str]:
    """The lines of a list that name an image. A name of the data is one to the letter, blanks and # included."""
    found = []
    for line in text.splitlines():
        entry = line if line in names else line.strip()
        if entry and (entry in names or not entry.startswith("#")):
            found.append(entry)
    return found


def _printable(entry: str) -> str:
    """An entry as a message can show it: not longer than a name, and without bytes that no terminal takes."""
    return entry[:200].encode("utf-8", "backslashreplace").decode()


def _by_name(path: str, entries: list[str], names: Sequence[str] | None) -> list[int]:
    if names is None:
        raise UserMistake(f"--list {path}: the data does not keep file names; pack it with tools/make_ffcv_dataset.py")
    whole = {name: place for place, name in enumerate(names)}
    # Lists of other projects hold bare file names; a bare name that fits several images is refused below.
    last: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        last.setdefault(Path(name).name, []).append(place)
    found = []
    for entry in entries:
        places = [whole[entry]] if entry in whole else last.get(Path(entry).name, [])
        if len(places) != 1:
            problem = "is not in the data" if not places else f"fits {len(places)} images"
            raise UserMistake(f"--list {path}: {_printable(entry)} {problem}; the list must belong to --data")
        found.append(places[0])
    return found


def write_list(path: Path, indices: np.ndarray, names: Sequence[str] | None) -> None:
    """Save a list that `read_list` reads back: source names where they are known and can be, else indices."""
    # A list of names outlasts packing anew, one of indices does not.
    named = [] if names is None else [names[i] for i in indices.tolist()]
    lines = named if _tell_apart(named) else [str(i) for i in indices.tolist()]
    # As file names are kept: a byte that is no UTF-8 may be part of one.
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")


def _tell_apart(names: Sequence[str]) -> bool:
    """Whether names, one a line, name the images: distinct, each on one line, and not taken for indices."""
    on_lines = all(name.splitlines() == [name] for name in names)
    numbers = all(name.strip().isascii() and name.strip().isdecimal() for name in names)
    return len(set(names)) == len(names) and on_lines and not numbers
