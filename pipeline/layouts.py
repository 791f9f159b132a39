"""What Python and the C++ under `native/` both know: memory layouts, flag bits, and numbers that stand for names.

A structure of C++ is a NumPy dtype here, with the same member names in the same order. Sizes are compared when a
library is loaded; `tests/test_layouts.py` compares members and numbers with the C++ sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .interface import ViewSpec

VIEW = np.dtype(
    [
        ("size", "<i4"),
        ("kind", "<i4"),
        ("interpolation", "<i4"),
        ("draw_id", "<u4"),
        ("scale", "<f8", 2),
        ("ratio", "<f8", 2),
        ("log_ratio", "<f8", 2),
        ("resize_ratio", "<f8"),
    ]
)
"""`ViewSpec` of C++: how one view is cut."""
JOB = np.dtype(
    [
        ("data", "<u8"),
        ("size", "<u8"),
        ("path", "<u8"),
        ("index", "<u4"),
        ("crc", "<u4"),
        ("flags", "<u4"),
        ("slot", "<i4"),
        ("status", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("decoder", "<i4"),
    ]
)
"""`Job` of C++: one image to decode, and afterwards how it fared."""
PACKED = np.dtype(
    [
        ("pool", "<u8"),
        ("specs", "<u8"),
        ("views", "<i8"),
        ("seed", "<u8"),
        ("epoch", "<i8"),
        ("max_pixels", "<i8"),
        ("offsets", "<u8"),
        ("sizes", "<u8"),
        ("checksums", "<u8"),
        ("jobs", "<u8"),
        ("outs", "<u8"),
        ("finish", "<u8"),
        ("ring", "<i8"),
        ("rows", "<i8"),
    ]
)
"""`PackedCall` of C++: what a batch of a packed file needs beside its sample numbers."""
FINISH = np.dtype([("call", "<u8"), ("context", "<u8")])
"""`Finish` of C++: what takes an image's views on the thread that cut them."""
AUGMENTATION = np.dtype(
    [
        ("sizes", "<u8"),
        ("radii", "<u8"),
        ("tables", "<u8"),
        ("outs", "<u8"),
        ("views", "<i4"),
        ("gray_first", "<i4"),
        ("output", "<i4"),
        ("reserved", "<i4"),
    ]
)
"""`BatchPlan` of C++: how the views of a batch are augmented and where they go."""

# Flags of a job.
CHECK_CRC, WHOLE_IMAGE, REFUSE_ROTATED, LIBJPEG_ONLY = 1, 2, 4, 8
# Its status afterwards, and which decoder made the pixels.
OK, DAMAGED, UNSUPPORTED, CHECKSUM, UNREADABLE, TOO_LARGE = range(6)
LIBJPEG, BASELINE = range(2)

KINDS = {"random": 0, "center": 1, "whole": 2}
INTERPOLATIONS = {"bilinear": 0, "bicubic": 1}

PARAMETERS = 14
"""Floats in a row of augmentation parameters, the columns of `augment.COLUMNS`."""
OUTPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.float16: 3}
"""What the compiled augmentation can write, and its number for each."""

LOW_64 = 0xFFFFFFFFFFFFFFFF
"""A seed as C++ takes it: its low 64 bits."""


def view_array(views: Sequence[ViewSpec]) -> np.ndarray:
    """The views as an array of `VIEW`, (V,)."""
    rows = np.zeros(len(views), dtype=VIEW)
    for row, spec in zip(rows, views, strict=True):
        row["size"], row["kind"], row["draw_id"] = spec.size, KINDS[spec.kind], spec.draw_id
        row["interpolation"] = INTERPOLATIONS[spec.interpolation]
        row["scale"], row["ratio"], row["resize_ratio"] = spec.scale, spec.ratio, spec.resize_ratio
        # Taken here for both implementations, because two math libraries may round a logarithm differently.
        row["log_ratio"] = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    return rows
