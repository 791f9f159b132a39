"""Label images: which value means which class, and proof that every file can be used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.images import ImageRefused, open_rgb

from ...errors import UserMistake
from ...runtime import Runtime
from ..progress import in_threads

IGNORED = 255
"""Class of pixels that count neither for the loss nor for the metrics."""
_INVALID = 254
_INDEX_MODES = ("L", "P", "1")


@dataclass(frozen=True)
class LabelMap:
    """From the values of label files to classes.

    Attributes:
        names: of the classes 0, 1, ...
        table: (256,) uint8, value -> class, 255 for ignored, 254 for a value that must not occur.
    """

    names: tuple[str, ...]
    table: np.ndarray

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)


def label_map(names: Mapping[int, str], ignored: Sequence[int]) -> LabelMap:
    """The map that numbers the values in `names` from 0 in rising order and ignores those in `ignored`.

    Raises:
        UserMistake: a value is outside 0..255, or no class is left.
    """
    kept = sorted(set(names) - set(ignored))
    outside = [value for value in (*names, *ignored) if not 0 <= value <= 255]
    if outside:
        raise UserMistake(f"label value {outside[0]} of a class is outside 0..255; label files hold one byte a pixel")
    if len(kept) < 2 or len(kept) > _INVALID:
        raise UserMistake(
            f"{len(kept)} classes are left (label values {kept[:3]}) when the values {list(ignored)} are ignored; a "
            "segmenter needs 2 to 254. Give another --ignore-index, or label what should count with another value"
        )
    # Every value that is not named is an error, not background: a wrong file would otherwise train on noise.
    table = np.full(256, _INVALID, dtype=np.uint8)
    table[list(ignored)] = IGNORED
    table[kept] = np.arange(len(kept))
    return LabelMap(tuple(names[value] for value in kept), table)


@dataclass(frozen=True)
class Pair:
    """An image and its label file."""

    image: Path
    label: Path


def read_values(path: Path) -> np.ndarray:
    """The values of a label file as (H, W) uint8; for a palette image, its indices.

    Raises:
        UserMistake: it is missing, damaged, or does not hold one byte a pixel.
    """
    try:
        with Image.open(path) as image:
            # An RGB label picture holds colours, and no table from colours to classes comes with it.
            if image.mode not in _INDEX_MODES:
                raise UserMistake(
                    f"label {path} has mode {image.mode}; give one byte a pixel with the class's number (an 8-bit grey "
                    "or palette PNG)"
                )
            return np.array(image, dtype=np.uint8)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as reason:
        raise UserMistake(f"label {path} cannot be read: {reason}; copy it again") from None


def read_label(path: Path, labels: LabelMap) -> np.ndarray:
    """(H, W) uint8 classes of a label file, 255 where ignored.

    Raises:
        UserMistake: as `read_values`, or a value is no class.
    """
    values = read_values(path)
    classes: np.ndarray = labels.table[values]
    if (classes == _INVALID).any():
        raise UserMistake(_out_of_range(path, np.unique(values), labels))
    return classes


def _out_of_range(path: Path, present: np.ndarray, labels: LabelMap) -> str:
    wrong = int(present[labels.table[present] == _INVALID][0])
    known = np.flatnonzero(labels.table < _INVALID)
    ignored = np.flatnonzero(labels.table == IGNORED).tolist()
    return (
        f"label {path} has the value {wrong}; the {labels.classes} classes have values {known.min()}..{known.max()}, "
        f"ignored are {ignored[:4]}; correct the file, --classes or --ignore-index"
    )


# ---------------------------------------------------------------------------------------------------------------------
# All files of a data set


@dataclass(frozen=True)
class Finding:
    """What is known of one pair.

    Attributes:
        problem: why it cannot be used, or empty.
        present: values that occur in the label file.
        digest: hash of the label file and of the name and size of the image file, hexadecimal.
    """

    problem: str
    present: tuple[int, ...] = ()
    digest: str = ""


def inspect(pair: Pair) -> Finding:
    """Read the label and the image."""
    try:
        if not pair.label.is_file():
            raise UserMistake(f"image {pair.image} has no label {pair.label}; add it or remove the image")
        values = read_values(pair.label)
        # Decoded whole and turned upright, as training and validation will see it: neither a damaged image nor one
        # whose label was drawn on the unturned pixels may end a run at its last step.
        size = open_rgb(pair.image.read_bytes()).size
    except UserMistake as reason:
        return Finding(str(reason))
    except (OSError, ImageRefused) as reason:
        return Finding(f"image {pair.image} cannot be read: {reason}; copy it again")
    if size != (values.shape[1], values.shape[0]):
        return Finding(
            f"label {pair.label} is {values.shape[1]} x {values.shape[0]} pixels, its image {size[0]} x {size[1]} "
            "(upright, as its EXIF says); they must be equal"
        )
    digest = hashlib.sha256(f"{pair.image.name} {pair.image.stat().st_size};".encode())
    digest.update(pair.label.read_bytes())
    present = np.flatnonzero(np.bincount(values.reshape(-1), minlength=256))
    return Finding("", tuple(present.tolist()), digest.hexdigest())


@dataclass(frozen=True)
class Inspection:
    """What all pairs of a data set have in common: the values that occur, and a hash of the whole."""

    present: tuple[int, ...]
    data_hash: str
    findings: tuple[Finding, ...]


def inspect_all(
    pairs: Sequence[Pair], runtime: Runtime, threads: int, after_pair: Callable[[], object] = lambda: None
) -> Inspection:
    """Look at every pair before anything is trained; ranks share the work, and `after_pair` may end it by raising.

    Raises:
        UserMistake: a pair cannot be used; the first of them is named.
    """
    # Decoding every file takes long, so the ranks share it.
    own = pairs[runtime.rank :: runtime.world_size]
    parts = runtime.gather_objects(in_threads(inspect, own, threads, after_pair))
    findings = [parts[position % len(parts)][position // len(parts)] for position in range(len(pairs))]
    problems = [finding.problem for finding in findings if finding.problem]
    # The first in the order of the data, so that the message does not depend on the number of ranks.
    if problems:
        raise UserMistake(problems[0] + (f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""))
    joined = hashlib.sha256("".join(finding.digest for finding in findings).encode()).hexdigest()
    return Inspection(tuple(sorted({value for f in findings for value in f.present})), joined, tuple(findings))


def check_values(pairs: Sequence[Pair], inspection: Inspection, labels: LabelMap) -> None:
    """Refuse values that are no class.

    Raises:
        UserMistake: names the first file that has one.
    """
    for pair, finding in zip(pairs, inspection.findings, strict=True):
        present = np.array(finding.present, dtype=np.uint8)
        if (labels.table[present] == _INVALID).any():
            raise UserMistake(_out_of_range(pair.label, present, labels))


def check_occurrence(inspection: Inspection, labels: LabelMap, part: str) -> None:
    """Refuse labels that leave nothing to learn or to measure.

    With one class every network is right at once; without a labelled pixel the mean IoU is NaN. Both would end well.

    Args:
        inspection: of all pairs.
        labels: the classes.
        part: "train", which needs two classes, or "val", which needs one.

    Raises:
        UserMistake: naming what there is.
    """
    values = list(inspection.present)
    found = np.unique(labels.table[values])
    names = [labels.names[number] for number in found if number < labels.classes]
    if part == "train" and len(names) < 2:
        raise UserMistake(
            f"--data: of the {labels.classes} classes only {names[0] if names else 'none'} occurs in the labels, whose "
            f"values are {values[:4]}; label at least two, or give another --ignore-index"
        )
    if not names:
        raise UserMistake(
            f"--val-data: no pixel of the labels counts, their values {values[:4]} are ignored; give others, or "
            "another --ignore-index"
        )
