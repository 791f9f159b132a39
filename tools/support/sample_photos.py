"""Real photographs that come inside scikit-image, cut into many crops: a labelled data set that needs no download.

Each photograph is a class. Crops for training and for validation come from disjoint parts of it, so nearest neighbours
must recognise a photograph by a part that they have never seen.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.rng import uniform
from train.errors import UserMistake

# Photographs among the files of its wheel; drawings, scans of text and files that it would download are left out.
PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
_FEWEST = 8
_TRAIN_SHARE, _VALIDATION_SHARE = 0.62, 0.3
_SIDE_PX = (64, 160)
# Words that keep the draws of the two parts apart.
_TRAIN, _VALIDATION = 0, 1


@dataclass(frozen=True)
class Part:
    """A vertical strip of a photograph: columns `left` to `right`, as shares of its width."""

    name: str
    left: float
    right: float
    word: int
    crops: int


def find_photos() -> list[Path]:
    """The photographs that are installed.

    Raises:
        UserMistake: when scikit-image, or most of its photographs, are missing.
    """
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.submodule_search_locations[0]) / "data" if spec and spec.submodule_search_locations else None
    found = [folder / name for name in PHOTOS if (folder / name).is_file()] if folder else []
    if len(found) < _FEWEST:
        raise UserMistake(
            f"{len(found)} of the {len(PHOTOS)} photographs inside scikit-image are installed; run "
            "'bash tools/setup.sh --retry', or give a folder of images"
        )
    return found


def cut_photos(
    destination: Path, train_crops: int = 200, validation_crops: int = 40, seed: int = 0
) -> tuple[Path, Path]:
    """Write crops of every photograph as JPEG files in class folders.

    Args:
        destination: folder that receives `train/<photograph>/` and `val/<photograph>/`.
        train_crops: crops of each photograph for training.
        validation_crops: crops of each photograph for validation.
        seed: which crops.

    Returns:
        The two folders.

    Raises:
        UserMistake: when the photographs are not installed.
    """
    parts = (
        Part("train", 0.0, _TRAIN_SHARE, _TRAIN, train_crops),
        Part("val", 1.0 - _VALIDATION_SHARE, 1.0, _VALIDATION, validation_crops),
    )
    for number, path in enumerate(find_photos()):
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        for part in parts:
            folder = destination / part.name / path.stem
            folder.mkdir(parents=True, exist_ok=True)
            for crop, box in enumerate(crop_boxes(photo.size, part, seed, number)):
                photo.crop(box).save(folder / f"{crop:04d}.jpg", quality=92)
    return destination / "train", destination / "val"


def crop_boxes(size: tuple[int, int], part: Part, seed: int, photo: int) -> list[tuple[int, int, int, int]]:
    """Square boxes (left, top, right, bottom) inside one part of a photograph of `size` (width, height) pixels."""
    width, height = size
    first, last = round(part.left * width), round(part.right * width)
    draws = uniform(seed, photo, np.arange(part.crops), part.word, 0)
    # A crop fits into its part; one that reached over would show training what validation asks for.
    low, high = _SIDE_PX[0], min(_SIDE_PX[1], last - first, height)
    sides = (low + draws[:, 0] * (high - low)).astype(int)
    lefts = (first + draws[:, 1] * (last - first - sides + 1)).astype(int)
    tops = (draws[:, 2] * (height - sides + 1)).astype(int)
    return [
        (x, y, x + side, y + side) for x, y, side in zip(lefts.tolist(), tops.tolist(), sides.tolist(), strict=True)
    ]
