"""Where images and labels lie: PASCAL VOC, Cityscapes, or plain folders `images` and `labels`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.clutter import has_clutter

from ...errors import UserMistake
from ..voc_lists import IMAGE_ENDINGS, image_of, listed_names
from .labels import Pair

VOC_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
# The evaluated classes by their id in *_labelIds.png; all other ids are ignored.
CITYSCAPES_NAMES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
_CITYSCAPES_LAST_ID = 33


@dataclass(frozen=True)
class DataSet:
    """The files of one data set.

    Attributes:
        layout: "voc", "cityscapes" or "plain".
        pairs: images with labels, in a fixed order.
        names: label value -> class; empty where the layout does not say.
        ignored: label values that do not count.
        split: which part of the data set these are.
        notes: lines about what was left out.
    """

    layout: str
    pairs: tuple[Pair, ...]
    names: dict[int, str]
    ignored: tuple[int, ...]
    split: str
    notes: tuple[str, ...] = ()


def read_layout(folder: str, part: str, split: str = "") -> DataSet:
    """Find out the layout of a folder and list its pairs.

    Args:
        folder: VOC2012 or the VOCdevkit above it; Cityscapes with `leftImg8bit` and `gtFine`; or a folder with
            `images` and `labels`, or with such folders under `train` and `val`.
        part: "train" or "val", which of the two is wanted.
        split: the split's name; empty is "val", or "train" ("trainaug" in VOC where there is such a list).

    Raises:
        UserMistake: it has none of these layouts, or no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserMistake(f"{_flag(part)} {root} is no folder; give VOC2012, Cityscapes or one with images and labels")
    # A user may name VOC2012 itself or one of the folders around it.
    for inner in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (inner / "JPEGImages").is_dir():
            return _voc(inner, part, split)
    if (root / "leftImg8bit").is_dir():
        return _cityscapes(root, part, split)
    for inner in (root, root / (split or part)):
        if (inner / "images").is_dir() and (inner / "labels").is_dir():
            return _plain(inner, part)
    raise UserMistake(
        f"{_flag(part)} {root} has neither JPEGImages (VOC), nor leftImg8bit (Cityscapes), nor images and labels, nor "
        f"{split or part}/images and {split or part}/labels; give the folder that holds them"
    )


def _flag(part: str) -> str:
    return "--data" if part == "train" else "--val-data"


def _some(pairs: Sequence[Pair], root: Path, part: str) -> tuple[Pair, ...]:
    if not pairs:
        raise UserMistake(f"{_flag(part)} {root} holds no image; check the folder and --{part}-split")
    return tuple(pairs)


def _voc(root: Path, part: str, split: str) -> DataSet:
    lists = root / "ImageSets" / "Segmentation"
    if not split:
        # The protocols train on the 10,582 images that Hariharan et al. labelled, where they were added.
        split = "trainaug" if part == "train" and (lists / "trainaug.txt").is_file() else part
    try:
        names = listed_names(lists / f"{split}.txt", lambda name: _voc_label(root, name).is_file())
    except OSError:
        known = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
        raise UserMistake(f"{_flag(part)}: {lists / split}.txt does not exist; lists there: {known}") from None
    pairs = [Pair(image_of(root, name), _voc_label(root, name)) for name in names]
    return DataSet("voc", _some(pairs, root, part), dict(enumerate(VOC_NAMES)), (255,), split)


def _voc_label(root: Path, name: str) -> Path:
    own = root / "SegmentationClass" / f"{name}.png"
    added = root / "SegmentationClassAug" / f"{name}.png"
    # VOC's own label is used where there is one: the added ones were drawn by others.
    return added if added.is_file() and not own.is_file() else own


def _cityscapes(root: Path, part: str, split: str) -> DataSet:
    split = split or part
    folder = root / "leftImg8bit" / split
    ending = "_leftImg8bit"
    pairs = []
    for image in sorted(folder.glob(f"*/*{ending}.png")):
        stem = image.stem.removesuffix(ending)
        if has_clutter(image.relative_to(folder).parts):
            continue
        pairs.append(Pair(image, root / "gtFine" / split / image.parent.name / f"{stem}_gtFine_labelIds.png"))
    # 255 is how the id -1 of licence plates reads in one byte.
    ignored = (*(value for value in range(_CITYSCAPES_LAST_ID + 1) if value not in CITYSCAPES_NAMES), 255)
    return DataSet("cityscapes", _some(pairs, folder, part), dict(CITYSCAPES_NAMES), ignored, split)


def _plain(root: Path, part: str) -> DataSet:
    images, labels = root / "images", root / "labels"
    pairs = [
        Pair(images / name, (labels / name).with_suffix(".png")) for name in _files(images) if _is_image(name.suffix)
    ]
    names, ignored = _described(root)
    # Not refused: tools leave coloured pictures beside the labels. But an image may have been lost, too.
    without = sorted({labels / name for name in _files(labels) if name.suffix == ".png"} - {p.label for p in pairs})
    notes = [f"{len(without)} labels of {root} have no image and are left out, for example {each}" for each in without]
    return DataSet("plain", _some(pairs, root, part), names, ignored, part, tuple(notes[:1]))


def _files(folder: Path) -> list[Path]:
    """What lies in a folder, relative to it and in order, without what systems leave there."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")))
    return [path for path in found if not has_clutter(path.parts)]


def _is_image(ending: str) -> bool:
    return ending.lower() in IMAGE_ENDINGS


def _described(root: Path) -> tuple[dict[int, str], tuple[int, ...]]:
    """Names and ignored value of `classes.json` in the folder or the one above; nothing where there is none."""
    places = [folder / "classes.json" for folder in (root, root.parent)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return {}, ()
    try:
        content = json.loads(path.read_bytes())
        classes = content["classes"] if isinstance(content, dict) else content
        ignored = content.get("ignore_index") if isinstance(content, dict) else None
        entries = enumerate(classes) if isinstance(classes, list) else classes.items()
        names = {int(value): str(name) for value, name in entries}
        return names, () if ignored is None else (int(ignored),)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as reason:
        raise UserMistake(
            f"{path} cannot be used: {repr(reason)[:200]}; give a list of names, or "
            '{"classes": {"0": "sky", ...}, "ignore_index": 255}'
        ) from None
