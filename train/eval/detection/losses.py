"""Losses with detectron2's values: L1 for boxes, binary mask targets, its normalisers, counted over all ranks.

Where detectron2 divides by what one device counted, here the count is the mean over ranks, so that the gradient is that
of the global batch however many ranks share it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align, sigmoid_focal_loss

from models.collectives import world


def mean_over_ranks(count: Tensor) -> Tensor:
    """The mean of a scalar tensor over ranks, without a gradient; every rank must call it."""
    total = count.detach().float()
    if world() > 1:
        # `all_reduce` works in place; the caller's count stays.
        total = total.clone()
        dist.all_reduce(total)
    return total / world()


def proposal_losses(
    logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor, sampled: tuple[Tensor, Tensor], normaliser: float
) -> tuple[Tensor, Tensor]:
    """Objectness (binary cross-entropy over the sampled anchors) and box loss (L1 over the sampled positives).

    Differs from torchvision: L1 instead of smooth L1 of beta 1/9, and both sums are divided by the number of anchors
    wanted, not found, as in detectron2's RPN.

    Args:
        logits: (A,) of all anchors of all images.
        deltas: (A, 4).
        labels: (A,) 1 object, 0 background, -1 ignored.
        targets: (A, 4).
        sampled: indices of the positives and of the negatives that count.
        normaliser: anchors wanted for an image times images.
    """
    positive, negative = sampled
    both = torch.cat([positive, negative])
    objectness = F.binary_cross_entropy_with_logits(logits[both], labels[both], reduction="sum")
    box = F.l1_loss(deltas[positive], targets[positive], reduction="sum")
    return objectness / normaliser, box / normaliser


def region_losses(logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over regions and L1 over the boxes of the objects among them, both divided by the regions.

    Differs from torchvision: L1 instead of smooth L1 of beta 1/9.

    Args:
        logits: (R, K + 1), background first.
        deltas: (R, 4 (K + 1)).
        labels: (R,) int64, 0 background.
        targets: (R, 4).
    """
    # At least 1, because a rank, or all of them, may have no region.
    count = mean_over_ranks(torch.full((), float(len(labels)), device=labels.device)).clamp(min=1)
    objects = torch.where(labels > 0)[0]
    # Each class has offsets of its own; only the true class's are trained.
    own = deltas.view(len(labels), -1, 4)[objects, labels[objects]]
    box = F.l1_loss(own, targets[objects], reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum") / count, box / count


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor, side: int) -> Tensor:
    """The masks of the objects that boxes were matched with, cut to the boxes.

    Differs from torchvision: aligned cutting, and cut at 0.5, so that targets are 0 or 1 (detectron2's bitmap masks;
    its default draws the polygons anew in each box, which differs at the edges by less than a cell).

    Args:
        masks: (n, H, W) uint8 of an image's objects.
        boxes: (R, 4) in the image's pixels.
        matched: (R,) int64, which object belongs to each.
        side: of the result.

    Returns:
        (R, side, side) fp32.
    """
    # roi_align takes the mask's number in the place of the image's: each mask is an image of one channel.
    rois = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)
    cut = roi_align(masks[:, None].to(boxes.dtype), rois, side, 1.0, 0, aligned=True)[:, 0]
    return (cut >= 0.5).float()


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each object's own class mask, mean over objects and pixels.

    Args:
        logits: (R, K, M, M).
        labels: (R,) int64, class from 0.
        targets: (R, M, M), 0 or 1.
    """
    count = mean_over_ranks(torch.full((), float(targets.numel()), device=logits.device)).clamp(min=1)
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, targets, reduction="sum") / count


def focal_losses(
    logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor]:
    """Focal loss (alpha 0.25, gamma 2) over the anchors that are not ignored, and L1 over those with an object.

    Args:
        logits: (A, K).
        deltas: (A, 4).
        labels: (A,) int64: class from 0, -1 background, -2 ignored.
        targets: (A, 4).
        normaliser: scalar.

    Source: Lin et al., arXiv 1708.02002, equation 5.
    """
    known, objects = torch.where(labels >= -1)[0], torch.where(labels >= 0)[0]
    wanted = torch.zeros_like(logits)
    wanted[objects, labels[objects]] = 1.0
    focal = sigmoid_focal_loss(logits[known], wanted[known], alpha=0.25, gamma=2.0, reduction="sum")
    box = F.l1_loss(deltas[objects], targets[objects], reduction="sum")
    return focal / normaliser, box / normaliser
