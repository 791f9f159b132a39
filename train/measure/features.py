"""Frozen features of a whole data set, in storage order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.collectives import world
from pipeline.augment import MEAN, STD
from pipeline.interface import Batch, Pipeline, ViewSpec
from pipeline.refusal import TooManyBad

from . import MAX_BAD


class Features(NamedTuple):
    """Features of a data set sorted by sample index: (N, C) fp32 on the device; the rest (N,) int64 on the CPU.

    `bad` is the number of images beside these N that could not be read.
    """

    features: Tensor
    labels: Tensor
    samples: Tensor
    bad: int = 0


def center_view(size: int, name: str = "center", interpolation: str = "bilinear") -> ViewSpec:
    """The evaluation view: short side to 256/224 of `size`, then the centre square of `size` pixels.

    Source: methods' evaluation transform (short side 256, centre crop 224), scaled to other sizes.
    """
    return ViewSpec(name, size, kind="center", interpolation=interpolation)


def normalise(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """ImageNet-normalised copy, channels-last, of uint8 images (B, 3, H, W) as `dtype`."""
    mean, scale = _mean_and_scale(images.device)
    return ((images.float() - mean) * scale).to(dtype).contiguous(memory_format=torch.channels_last)


@cache
def _mean_and_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean grey level and its inverse deviation (1, 3, 1, 1)."""
    # Made once: such a copy waits until the device has done all that was queued, and every batch would wait so.
    mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1) * 255
    return mean, 1 / (torch.tensor(STD, device=device).view(1, 3, 1, 1) * 255)


def pool(output: Tensor) -> Tensor:
    """(B, C) fp32 from an encoder's output: global average of a feature map (B, C, H, W), or (B, C) itself."""
    return output.float().mean(dim=(2, 3)) if output.ndim == 4 else output.float()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has its own former training flag again, not its root's."""
    # Each module's own flag: some keep a part in eval mode while the rest trains.
    flags = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, flag in flags:
            child.training = flag


def _encode(encoder: nn.Module, images: Tensor, autocast_dtype: torch.dtype | None) -> Tensor:
    with torch.autocast(images.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        return pool(encoder(images))


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    pipeline: Pipeline,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    view: str | None = None,
    transform: Callable[[Batch, Tensor], Tensor] | None = None,
    max_bad: float = MAX_BAD,
    compact: bool = False,
    after_batch: Callable[[], object] = lambda: None,
) -> Features:
    """Globally average-pooled features of every image of a pipeline, the encoder in eval mode.

    Args:
        encoder: images (B, 3, S, S) -> feature map (B, C, H, W) or pooled features (B, C). Every submodule's training
            flag is restored, and no state of it changes.
        pipeline: best with one "center" view (`center_view`), order "sequential" and drop_last False; each image must
            be delivered once. Under several ranks every rank receives the features of all ranks.
        device: where the encoder is and the features shall be.
        autocast_dtype: bf16 or fp16 autocast of the encoder; None computes in the encoder's own dtype.
        view: which view to encode; None is the pipeline's only one.
        transform: (batch, uint8 view) -> normalised images, where the view needs augmentation; None normalises.
        max_bad: share of the images that may be unreadable. A loader delivers other pixels in their place; those rows
            are left out, since they would count a picture under another one's label.
        compact: keep directions alone, as L2-normalised rows in float16: for nearest neighbours, whose table of
            ImageNet would otherwise take 31 GB of a GPU while it is put together, beside the training.
        after_batch: called after each batch; what it raises ends the pass.

    Returns:
        Features sorted by sample index, of the images that can be read.

    Raises:
        ValueError: when the pipeline is empty or delivers several views and `view` is None.
        TooManyBad: when more than `max_bad` of the images cannot be read, on every rank.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    indices: list[Tensor] = []
    with evaluation_mode(encoder):
        for batch in pipeline:
            after_batch()
            if len(batch.index) == 0:  # more ranks than images were left for the last batch
                continue
            if view is None and len(batch.views) != 1:
                raise ValueError(f"several views {sorted(batch.views)}; name the one to encode")
            pixels = batch.views[view or next(iter(batch.views))].to(device, non_blocking=True)
            images = normalise(pixels) if transform is None else transform(batch, pixels)
            encoded = _encode(encoder, images, autocast_dtype)
            features.append(normalised_rows(encoded).half() if compact else encoded)
            labels.append(batch.label)
            indices.append(batch.index)
    width = _common_width(features[0].shape[1] if features else 0, device)
    if width == 0:
        raise ValueError("the pipeline delivered no image; check the data path and the population")
    # With an empty part in front, so that a rank without images can join in.
    empty = torch.zeros(0, width, dtype=torch.float16 if compact else torch.float32, device=device)
    table = torch.cat([empty, *features])
    features.clear()  # a second table of the size of the first
    none = torch.zeros(0, dtype=torch.int64)
    found = _in_storage_order(table, torch.cat([none, *labels]), torch.cat([none, *indices]))
    return _readable(found, pipeline.stats().bad_records, max_bad)


def _readable(found: Features, own: Iterable[int], max_bad: float) -> Features:
    """The rows of images that can be read.

    Args:
        found: rows of all ranks, equal on all of them.
        own: samples that this rank found to be unreadable.
        max_bad: share of the rows that may be.

    Raises:
        TooManyBad: more are, on every rank.
    """
    lost = torch.isin(found.samples, torch.tensor(sorted(own), dtype=torch.int64))
    if world() > 1:
        said = lost.to(found.features.device, torch.uint8)
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        lost = said.bool().cpu()
    count, asked = int(lost.sum()), len(lost)
    if count == 0:
        return found
    if count > max_bad * asked or count == asked:
        raise TooManyBad(
            f"{count} of {asked} images cannot be read, more than a share of {max_bad:g}; a figure over the rest would "
            "not be about these data: copy them again, or allow more where there is a --max-bad"
        )
    kept = ~lost
    return Features(found.features[kept.to(found.features.device)], found.labels[kept], found.samples[kept], count)


def _common_width(width: int, device: torch.device) -> int:
    """The largest of all ranks' feature widths: a rank that got no image learns it from the others."""
    if world() == 1:
        return width
    said = torch.tensor([width], device=device)
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return int(said)


def _in_storage_order(features: Tensor, labels: Tensor, index: Tensor) -> Features:
    """The rows of all ranks sorted by sample, on every rank; they deliver their parts one after the other.

    The result does not depend on the number of ranks. On the device it holds two tables of all rows at the most.
    """
    present = torch.arange(len(index))
    if world() > 1:
        sizes = _sizes(len(index), features.device)
        longest = max(sizes)
        present = torch.cat([torch.arange(size) + rank * longest for rank, size in enumerate(sizes)])
        features = _joined(features, longest)
        labels, index = (_joined(column.to(features.device), longest).cpu() for column in (labels, index))
    rows = present[index[present].argsort()]
    if not torch.equal(rows, torch.arange(len(features))):  # in order already, as one process delivers them
        features = features[rows.to(features.device)]
    return Features(features, labels[rows], index[rows])


def _sizes(own: int, device: torch.device) -> list[int]:
    """How many rows each rank has; they may differ, as the last batch need not divide."""
    counts = torch.empty(world(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([own], device=device))
    sizes: list[int] = counts.tolist()
    return sizes


def _joined(column: Tensor, longest: int) -> Tensor:
    """The rows of all ranks, each rank's filled up to `longest`: collectives want equal shapes."""
    padded = column.new_zeros(longest, *column.shape[1:])
    padded[: len(column)] = column
    joined = column.new_empty(world() * longest, *column.shape[1:])
    dist.all_gather_into_tensor(joined, padded)
    return joined


def normalised_rows(features: Tensor) -> Tensor:
    """L2-normalised rows, fp32, eps 1e-12."""
    return F.normalize(features.float(), dim=1, eps=1e-12)
