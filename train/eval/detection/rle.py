"""Run-length encoded masks, through the evaluation package's compiled routines."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import UserMistake
from .records import Outline


def _tools() -> Any:
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        raise UserMistake("detection needs faster-coco-eval; run: bash tools/setup.sh --retry") from None
    return mask


def encode(mask: np.ndarray) -> dict[str, Any]:
    """The COCO encoding of a (H, W) bool or uint8 mask, its counts as text."""
    # COCO's run lengths go down the columns, so its routines want that order in memory.
    rle = _tools().encode(np.asfortranarray(mask[:, :, None].astype(np.uint8)))[0]
    counts = rle["counts"]
    return {"size": list(mask.shape), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def decode(rle: dict[str, Any]) -> np.ndarray:
    """The (H, W) uint8 mask of an encoding, compressed or with a plain list of counts."""
    tools = _tools()
    height, width = rle["size"]
    # Crowds in COCO's files come as plain numbers.
    if isinstance(rle["counts"], list):
        rle = tools.frPyObjects(rle, height, width)
    mask: np.ndarray = tools.decode([rle])[:, :, 0]
    return mask


def draw(polygons: tuple[np.ndarray, ...], height: int, width: int) -> np.ndarray:
    """The (H, W) uint8 mask of the union of polygons in pixels, by COCO's rule."""
    tools = _tools()
    parts = tools.frPyObjects([polygon.astype(np.float64).tolist() for polygon in polygons], height, width)
    mask: np.ndarray = tools.decode([tools.merge(parts)])[:, :, 0]
    return mask


def outline_mask(outline: Outline, size: tuple[int, int], original: tuple[int, int], flip: bool) -> np.ndarray:
    """An object's mask in the resized and perhaps mirrored image.

    Polygons are scaled and drawn; encoded masks are resized to the nearest pixel, as detectron2 does.

    Args:
        outline: in pixels of the original image.
        size: (height, width) of the result.
        original: (height, width) of the original image.
        flip: whether the result is mirrored left to right.

    Returns:
        (height, width) uint8, 0 or 1.
    """
    height, width = size
    if isinstance(outline, dict):
        mask = decode(outline)
        # The nearest source pixel by centres, so that the mask moves with the resized image.
        rows = ((np.arange(height) + 0.5) * mask.shape[0] / height).astype(np.int64)
        columns = ((np.arange(width) + 0.5) * mask.shape[1] / width).astype(np.int64)
        mask = mask[rows][:, columns]
        return np.ascontiguousarray(mask[:, ::-1]) if flip else mask
    scale = np.array([width / original[1], height / original[0]], dtype=np.float32)
    scaled = [polygon.reshape(-1, 2) * scale for polygon in outline]
    if flip:
        # Mirrored before drawing: detectron2 transforms polygons too, not the drawn mask.
        scaled = [np.stack([width - polygon[:, 0], polygon[:, 1]], axis=1) for polygon in scaled]
    return draw(tuple(polygon.reshape(-1) for polygon in scaled), height, width)
