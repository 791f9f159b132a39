"""Proof before the first step that images can be read: a run of days must not end at its last image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...errors import UserMistake
from ...runtime import Runtime
from ..progress import in_threads
from .feed import read_image
from .records import ImageRecord

MOST_DECODED = 5_000
"""Images of a part that are decoded whole, spread evenly over a larger part. COCO's validation part has as many."""


def prove_images(
    records: Sequence[ImageRecord], runtime: Runtime, threads: int, after_image: Callable[[], object] = lambda: None
) -> int:
    """Look at every image file, and decode up to `MOST_DECODED` of them; ranks share the work.

    Args:
        records: images of one part.
        runtime: this process and the others.
        threads: decoding threads.
        after_image: called after each image of this rank; what it raises ends the proof.

    Returns:
        How many images were decoded.

    Raises:
        UserMistake: a file is missing, damaged or of another size than annotated. The first is named, the rest counted.
    """
    decoded = _spread(len(records), MOST_DECODED)
    own = range(runtime.rank, len(records), runtime.world_size)
    problems = in_threads(lambda number: _problem(records[number], number in decoded), own, threads, after_image)
    # Every rank must leave together, so each learns what the others found.
    found = [problem for part in runtime.gather_objects(problems) for problem in part if problem]
    if found:
        raise UserMistake(found[0] + (f" (and {len(found) - 1} more images)" if len(found) > 1 else ""))
    return len(decoded)


def _spread(count: int, most: int) -> frozenset[int]:
    """Indices of at most `most` of `count` items at even distances."""
    return frozenset(np.linspace(0, count - 1, min(count, most)).astype(np.int64).tolist()) if count else frozenset()


def _problem(record: ImageRecord, decode: bool) -> str:
    if not decode:
        return (
            "" if record.path.is_file() else f"{record.path} does not exist; copy it again or correct the annotations"
        )
    try:
        read_image(record)
    except UserMistake as reason:
        return str(reason)
    return ""
