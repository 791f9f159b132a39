"""Where each view is cut from its image: crop boxes as a pure function of (seed, epoch, sample, view).

`native/crops.h` computes the same boxes bit for bit. For that the arithmetic keeps to + - * / and sqrt, which IEEE 754
rounds the same everywhere, and to a polynomial for exp, which no libm could promise.
"""

from __future__ import annotations

import math

import numpy as np

from .interface import ViewSpec
from .rng import SLOT_CROP, uniform

ATTEMPTS = 10
KINDS = ("random", "center", "whole")
_EXP_DEGREE = 12


def portable_exp(x: np.ndarray) -> np.ndarray:
    """exp(x) for float64 |x| < 5 to about 1e-12, from additions and multiplications in a fixed order."""
    eighth = x * 0.125
    total = np.ones_like(eighth)
    for term in range(_EXP_DEGREE, 0, -1):  # Horner: 1 + x/1 (1 + x/2 (1 + ...))
        total = 1.0 + total * eighth / float(term)
    total = total * total
    total = total * total
    return total * total


def validate_view(spec: ViewSpec) -> None:
    """Raise `ValueError` where a view cannot be cut as described."""
    if spec.kind not in KINDS:
        raise ValueError(f"view {spec.name!r} has kind {spec.kind!r}; choose one of {', '.join(KINDS)}")
    if spec.interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"view {spec.name!r} has interpolation {spec.interpolation!r}; choose bilinear or bicubic")
    if not 1 <= spec.size <= 4096:
        raise ValueError(f"view {spec.name!r} has size {spec.size}; choose 1 to 4096 pixels")
    if not 0 < spec.scale[0] <= spec.scale[1] <= 1:
        raise ValueError(f"view {spec.name!r} has crop scale {spec.scale}; choose 0 < low <= high <= 1")
    if not 0.01 <= spec.ratio[0] <= spec.ratio[1] <= 100:
        raise ValueError(f"view {spec.name!r} has crop ratio {spec.ratio}; choose 0.01 <= low <= high <= 100")
    if not spec.resize_ratio >= 1:
        raise ValueError(f"view {spec.name!r} has resize ratio {spec.resize_ratio}; choose at least 1")


def _fallback_boxes(ratio: tuple[float, float], heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The largest centred crop within the ratio limits, as torchvision takes after ten failures. (B, 4) int64."""
    height, width = heights.astype(np.float64), widths.astype(np.float64)
    in_ratio = width / height
    # Only the side that breaks the limit is shortened.
    crop_width = np.where(in_ratio > ratio[1], np.rint(height * ratio[1]), width).astype(np.int64)
    crop_height = np.where(in_ratio < ratio[0], np.rint(width / ratio[0]), height).astype(np.int64)
    # An extreme strip would round to zero pixels.
    crop_width, crop_height = np.maximum(crop_width, 1), np.maximum(crop_height, 1)
    return np.stack([(heights - crop_height) // 2, (widths - crop_width) // 2, crop_height, crop_width], axis=1)


def _center_boxes(resize_ratio: float, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The centred square that a resize of the short side and a centre crop would show. (B, 4) int64."""
    short = np.minimum(heights, widths)
    side = np.maximum(np.rint(short.astype(np.float64) / resize_ratio).astype(np.int64), 1)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


def draw_crops(
    spec: ViewSpec, seed: int, epoch: int, index: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """Crop boxes of one view for a batch of samples.

    Args:
        spec: the view; its `draw_id` is part of the random address.
        seed: run seed.
        epoch: epoch number.
        index: (B,) int64 sample indices that key the draws.
        heights: (B,) image heights in pixels.
        widths: (B,) image widths in pixels.

    Returns:
        (B, 4) int64: top, left, height, width in pixels of the image.

    Source: Szegedy et al., CVPR 2015, section 6; the ten attempts and the fallback as in torchvision's
    RandomResizedCrop.
    """
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    if spec.kind == "whole":
        zero = np.zeros_like(heights)
        return np.stack([zero, zero, heights, widths], axis=1)
    if spec.kind == "center":
        return _center_boxes(spec.resize_ratio, heights, widths)
    # Every image starts with the fallback, which the first attempt that fits replaces.
    boxes = _fallback_boxes(spec.ratio, heights, widths)
    index = np.asarray(index, dtype=np.int64)
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    pending = np.arange(len(index))
    for attempt in range(ATTEMPTS):
        if not len(pending):
            break
        # Attempts have addresses of their own, so that those of one image do not shift those of another.
        draws = uniform(seed, index[pending], epoch, spec.draw_id, SLOT_CROP + attempt)
        height, width = heights[pending], widths[pending]
        area = (height * width).astype(np.float64)
        target = area * (spec.scale[0] + draws[:, 0] * (spec.scale[1] - spec.scale[0]))
        aspect = portable_exp(low + draws[:, 1] * (high - low))
        crop_width = np.rint(np.sqrt(target * aspect)).astype(np.int64)
        crop_height = np.rint(np.sqrt(target / aspect)).astype(np.int64)
        fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)
        # Exact: 32 random bits times an integer below 2**20 needs no rounding, so the floor stays below the bound.
        top = np.floor(draws[:, 2] * (height - crop_height + 1)).astype(np.int64)
        left = np.floor(draws[:, 3] * (width - crop_width + 1)).astype(np.int64)
        boxes[pending[fits]] = np.stack([top, left, crop_height, crop_width], axis=1)[fits]
        pending = pending[~fits]
    return boxes
