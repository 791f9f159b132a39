"""Random size, crop, flip and colours of a training sample, drawn by (seed, epoch, sample) alone.

Source: the training pipelines of mmsegmentation for VOC12 and Cityscapes. Differs: pixels are not rounded between
colour operations, and labels are sampled at pixel centres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.color import WHITE, adjust_brightness, adjust_hue
from pipeline.rng import SLOT_SEGMENT_COLOUR, SLOT_SEGMENT_CROP, SLOT_SEGMENT_SIZE, uniform

from .labels import IGNORED

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CROP_ATTEMPTS = 10
MOST_OF_ONE_CLASS = 0.75
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 0.1


@dataclass(frozen=True)
class Geometry:
    """Sizes of a training sample.

    Attributes:
        crop: (height, width) in pixels.
        scale: (long, short) edge that an image is made to fit into, times the drawn ratio; (0, 0): its own size.
        ratio: limits of the drawn ratio.
    """

    crop: tuple[int, int]
    scale: tuple[int, int]
    ratio: tuple[float, float] = (0.5, 2.0)


def fitted_size(height: int, width: int, scale: tuple[int, int], ratio: float = 1.0) -> tuple[int, int]:
    """(height, width) that fit into `scale` times `ratio` at the same aspect; at least one pixel."""
    if scale == (0, 0):
        factor = ratio
    else:
        # Cut to whole pixels first, as mmsegmentation does with a random scale.
        longest, shortest = (int(edge * ratio) for edge in scale)
        factor = min(longest / max(height, width), shortest / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def _axis(length: int, resized: int, start: int, count: int) -> np.ndarray:
    """Source positions of `count` resized pixels from `start` on, pixel centres on pixel centres."""
    positions: np.ndarray = (np.arange(start, start + count) + 0.5) * (length / resized) - 0.5
    return positions


def resample_image(
    image: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """A crop of a bilinearly resized image, without computing the rest; no antialiasing, as OpenCV's bilinear.

    Args:
        image: (H, W, C) uint8.
        size: (height, width) of the whole resized image.
        box: top, left, height, width of the crop in it; None is all of it.

    Returns:
        (height, width, C) uint8.
    """
    top, left, height, width = box or (0, 0, *size)
    # At its own size a crop is a plain cut, without rounding.
    if image.shape[:2] == size:
        return image[top : top + height, left : left + width]
    y = np.clip(_axis(image.shape[0], size[0], top, height), 0, image.shape[0] - 1)
    x = np.clip(_axis(image.shape[1], size[1], left, width), 0, image.shape[1] - 1)
    y0, x0 = y.astype(np.int64), x.astype(np.int64)
    y1, x1 = np.minimum(y0 + 1, image.shape[0] - 1), np.minimum(x0 + 1, image.shape[1] - 1)
    # Only the columns that the crop needs are weighted: a crop of a large image is a small part of it.
    first = int(x0[0])
    columns = image[:, first : int(x1[-1]) + 1]
    wy = (y - y0).astype(np.float32)[:, None, None]
    wx = (x - x0).astype(np.float32)[None, :, None]
    rows = columns[y0] * (1 - wy) + columns[y1] * wy
    mixed = rows[:, x0 - first] * (1 - wx) + rows[:, x1 - first] * wx
    return np.rint(mixed).astype(np.uint8)


def resample_label(label: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """The crop of a resized label (H, W) that `resample_image` takes of its image, by nearest pixel."""
    top, left, height, width = box
    y = np.floor(_axis(label.shape[0], size[0], top, height) + 0.5).astype(np.int64)
    x = np.floor(_axis(label.shape[1], size[1], left, width) + 0.5).astype(np.int64)
    taken: np.ndarray = label[np.minimum(y, label.shape[0] - 1)[:, None], np.minimum(x, label.shape[1] - 1)]
    return taken


@dataclass(frozen=True)
class Crop:
    """A training sample before its colours are changed.

    Attributes:
        image: (crop height, crop width, 3) uint8; beyond `valid` anything.
        label: (crop height, crop width) uint8 classes, 255 where ignored and beyond `valid`.
        valid: (height, width) of the part, at the top left, that comes from the image.
    """

    image: np.ndarray
    label: np.ndarray
    valid: tuple[int, int]


def _one_class_dominates(label: np.ndarray) -> bool:
    counts = np.bincount(label.reshape(-1), minlength=IGNORED + 1)[:IGNORED]
    return not (np.count_nonzero(counts) > 1 and counts.max() < MOST_OF_ONE_CLASS * counts.sum())


def random_crop(image: np.ndarray, label: np.ndarray, geometry: Geometry, seed: int, epoch: int, sample: int) -> Crop:
    """Resize by a random ratio, crop where no class dominates (the last of ten tries else), flip one in two."""
    size_draw = uniform(seed, sample, epoch, 0, SLOT_SEGMENT_SIZE)
    low, high = geometry.ratio
    ratio = low + float(size_draw[0]) * (high - low)
    size = fitted_size(label.shape[0], label.shape[1], geometry.scale, ratio)
    height, width = min(size[0], geometry.crop[0]), min(size[1], geometry.crop[1])
    # Labels alone are resampled for a try, since they decide; the pixels follow once.
    for attempt in range(CROP_ATTEMPTS):
        # Each try has draws of its own, so that the number of tries shifts no other draw.
        draw = uniform(seed, sample, epoch, 0, SLOT_SEGMENT_CROP + attempt)
        top, left = int(draw[0] * (size[0] - height + 1)), int(draw[1] * (size[1] - width + 1))
        box = (top, left, height, width)
        labels = resample_label(label, size, box)
        if not _one_class_dominates(labels):
            break
    pixels = resample_image(image, size, box)
    if size_draw[1] < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    padded = np.zeros((*geometry.crop, 3), dtype=np.uint8)
    padded[:height, :width] = pixels
    # Padding is ignored by loss and metrics.
    classes = np.full(geometry.crop, IGNORED, dtype=np.uint8)
    classes[:height, :width] = labels
    return Crop(padded, classes, (height, width))


# ---------------------------------------------------------------------------------------------------------------------
# Colours, on the device


@dataclass(frozen=True)
class Colours:
    """What is done to the colours of each sample of a batch; a neutral value means that it is left out.

    Attributes:
        brightness: (B,) added, in levels.
        contrast_first: (B,) factor before the next two.
        saturation: (B,) factor of the HSV saturation.
        hue: (B,) turn of the hue in circles.
        contrast_last: (B,) factor after them.
    """

    brightness: np.ndarray
    contrast_first: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray
    contrast_last: np.ndarray


def draw_colours(seed: int, epochs: np.ndarray, samples: np.ndarray) -> Colours:
    """Each operation for one sample in two; contrast comes first or last, one in two."""
    applied, amount, order = (uniform(seed, samples, epochs, 0, SLOT_SEGMENT_COLOUR + number) for number in range(3))
    on = applied < 0.5

    def between(column: int, low: float, high: float, neutral: float) -> np.ndarray:
        return np.where(on[:, column], low + amount[:, column] * (high - low), neutral).astype(np.float32)

    contrast, first = between(1, *CONTRAST, 1.0), order[:, 0] < 0.5
    one = np.float32(1.0)
    return Colours(
        between(0, -BRIGHTNESS, BRIGHTNESS, 0.0),
        np.where(first, contrast, one),
        between(2, *SATURATION, 1.0),
        between(3, -HUE, HUE, 0.0),
        np.where(first, one, contrast),
    )


def scale_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the HSV saturation by `factor` (B,), at most to 1, at fixed hue and value; images (B, 3, H, W).

    With v the largest channel and s = (v - smallest) / v, every channel keeps its distance to v in proportion to s.
    """
    value = images.amax(1, keepdim=True)
    saturation = (value - images.amin(1, keepdim=True)) / value.clamp_min(1e-6)
    # The reciprocal is the factor at which the saturation reaches 1.
    strength = torch.minimum(factor.view(-1, 1, 1, 1), saturation.clamp_min(1e-6).reciprocal())
    return value - (value - images) * strength


def change_colours(images: Tensor, colours: Colours) -> Tensor:
    """Apply drawn colours to (B, 3, H, W) float levels 0..255, in place; only samples that change are computed."""

    def on(values: np.ndarray, neutral: float, change: str) -> None:
        chosen = np.flatnonzero(values != neutral)
        if not len(chosen):
            return
        # Half of the samples stay as they are in each operation, so only the others are computed.
        rows = torch.from_numpy(chosen).to(images.device, non_blocking=True)
        amount = torch.from_numpy(values[chosen]).to(images.device, non_blocking=True)
        images[rows] = _CHANGES[change](images[rows], amount)

    on(colours.brightness, 0.0, "brightness")
    on(colours.contrast_first, 1.0, "contrast")
    on(colours.saturation, 1.0, "saturation")
    on(colours.hue, 0.0, "hue")
    on(colours.contrast_last, 1.0, "contrast")
    return images


_CHANGES = {
    "brightness": lambda images, levels: images.add_(levels.view(-1, 1, 1, 1)).clamp_(0.0, WHITE),
    "contrast": adjust_brightness,  # about black, as mmsegmentation scales
    "saturation": scale_saturation,
    "hue": adjust_hue,
}


def normalise(images: Tensor) -> Tensor:
    """Levels (B, 3, H, W) to zero mean and unit variance of ImageNet's channels."""
    # Made on the device itself they would keep the host until all work before them is done.
    mean, std = (torch.tensor(v).view(1, 3, 1, 1).to(images.device, non_blocking=True) for v in (MEAN, STD))
    return (images - mean) / std


def blank_padding(images: Tensor, valid: np.ndarray) -> Tensor:
    """Zero what lies beyond each image's `valid` (B, 2) height and width, in place; images (B, 3, H, W)."""
    # After normalising: zero is then the mean colour.
    for row, (height, width) in enumerate(valid.tolist()):
        images[row, :, height:] = 0
        images[row, :, :, width:] = 0
    return images
