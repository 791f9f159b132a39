"""Detections on whole images, in the pixels of the originals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime import Runtime
from . import rle
from .feed import read_image, resize_image
from .records import ImageRecord
from .schedule import Sizes, resized


@dataclass(frozen=True)
class Detections:
    """What was found in one image.

    Attributes:
        image_id: of the record.
        boxes: (n, 4) fp32 x0 y0 x1 y1 in the original's pixels.
        scores: (n,) fp32.
        labels: (n,) int64, class from 0.
        masks: n run-length encodings, or none.
    """

    image_id: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: tuple[dict[str, Any], ...] = ()


def paste_mask(mask: Tensor, box: Tensor, height: int, width: int) -> np.ndarray:
    """A box's (M, M) probabilities laid into the image, and cut at 0.5.

    Cells are taken bilinearly at the centre of each pixel, with nothing outside the box. Only the pixels that the box
    touches are computed.

    Args:
        mask: (M, M) fp32.
        box: (4,) x0 y0 x1 y1.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns:
        (height, width) bool.

    Source: detectron2's `paste_masks_in_image`.
    """
    x0, y0, x1, y1 = box.tolist()
    left, top = max(int(x0) - 1, 0), max(int(y0) - 1, 0)
    right, bottom = min(int(np.ceil(x1)) + 1, width), min(int(np.ceil(y1)) + 1, height)
    # grid_sample wants -1..1 across the box.
    columns = (torch.arange(left, right, dtype=torch.float32) + 0.5 - x0) / (x1 - x0) * 2 - 1
    rows = (torch.arange(top, bottom, dtype=torch.float32) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    inside = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
    pasted = np.zeros((height, width), dtype=bool)
    pasted[top:bottom, left:right] = inside.numpy()
    return pasted


def to_original(found: dict[str, Tensor], record: ImageRecord, size: tuple[int, int]) -> Detections:
    """Detections in an image resized to `size` (height, width), brought back; boxes that vanish are left out."""
    scale = torch.tensor([record.width / size[1], record.height / size[0]] * 2)
    # By rounding, scaling back can move an edge just beyond the image.
    limits = torch.tensor([record.width, record.height] * 2, dtype=torch.float32)
    boxes = torch.minimum((found["boxes"].cpu().float() * scale).clamp(min=0), limits)
    kept = torch.where((boxes[:, 2:] > boxes[:, :2]).all(1))[0]
    masks: tuple[dict[str, Any], ...] = ()
    if "masks" in found:
        probabilities = found["masks"].cpu().float()
        masks = tuple(
            rle.encode(paste_mask(probabilities[row], boxes[row], record.height, record.width)) for row in kept.tolist()
        )
    scores, labels = found["scores"].cpu().float(), found["labels"].cpu()
    return Detections(record.image_id, boxes[kept].numpy(), scores[kept].numpy(), labels[kept].numpy(), masks)


def _ahead(records: Sequence[ImageRecord], sizes: Sizes, workers: int) -> Iterator[tuple[ImageRecord, Tensor]]:
    """Each record with its resized image, a few of them prepared by threads meanwhile."""

    def prepare(record: ImageRecord) -> Tensor:
        return resize_image(read_image(record), *resized(record.height, record.width, sizes.test, sizes.test_longest))

    with ThreadPoolExecutor(workers) as pool:
        # A few images ahead, so that memory does not grow with the data set.
        waiting = [pool.submit(prepare, record) for record in records[: 2 * workers]]
        for number, record in enumerate(records):
            if number + len(waiting) < len(records):
                waiting.append(pool.submit(prepare, records[number + len(waiting)]))
            yield record, waiting.pop(0).result()


@torch.no_grad()
def detect(
    model: nn.Module,
    records: Sequence[ImageRecord],
    sizes: Sizes,
    runtime: Runtime,
    workers: int,
    after_image: Callable[[], object] = lambda: None,
) -> list[Detections]:
    """Run a detector over images one by one, each rank over its share; all ranks get all detections in order.

    Args:
        model: a `Detector`; left in evaluation mode.
        records: all images.
        sizes: short and long edge at test.
        runtime: device, precision and rank.
        workers: decoding threads.
        after_image: called after each image of this rank; what it raises ends the pass.
    """
    model.eval()
    found = []
    for record, image in _ahead(records[runtime.rank :: runtime.world_size], sizes, workers):
        with runtime.autocast():
            detections = model([image.to(runtime.device)])[0]
        found.append(to_original(detections, record, (image.shape[1], image.shape[2])))
        after_image()
    # Rank r had every n-th image from r on, so the shares are dealt back in turn.
    shares = runtime.gather_objects(found)
    return [shares[number % runtime.world_size][number // runtime.world_size] for number in range(len(records))]
