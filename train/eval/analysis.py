"""Analyses that the papers show beside accuracies: class activation, gradients in objects, maps, neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.alignment import AlignmentHead, alignment_maps
from models.methods.base import Method, StepInputs

from ..measure.features import evaluation_mode, normalised_rows


def grad_cam(encoder: nn.Module, logits_of: Callable[[Tensor], Tensor], images: Tensor, classes: Tensor) -> Tensor:
    """Class activation maps (B, H, W) fp32, >= 0, not scaled, at the resolution of the last feature map.

    map = relu(sum_c a_c F_c) with a_c the mean over positions of d score / d F_c.

    Args:
        encoder: images -> feature map (B, C, H, W); run in eval mode.
        logits_of: pooled features (B, C) fp32 -> class scores (B, classes), for example a linear probe.
        images: (B, 3, S, S) normalised.
        classes: (B,) int64, the class of each image's map.

    Source: Selvaraju et al. 2017, Eq. 1 and 2; CARE (arXiv 2110.05340) figure 4.
    """
    with evaluation_mode(encoder), torch.no_grad():
        feature_map = encoder(images).float()
    # A leaf of its own: the gradient stops at the map, so the backbone needs no backward pass.
    feature_map.requires_grad_(True)
    with torch.enable_grad():
        scores = logits_of(feature_map.mean(dim=(2, 3))).gather(1, classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(scores, feature_map)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * feature_map.detach()).sum(dim=1).relu()


def common_scale(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps of several backbones divided by the one largest value of all, so that they compare; zeros stay zeros."""
    # One divisor for all backbones: with one for each a weak map would look as strong as any.
    largest = max(float(each.max()) for each in maps)
    return [each / largest if largest > 0 else each for each in maps]


def input_gradient(method: Method, view1: Tensor, inputs_of: Callable[[Tensor], StepInputs]) -> Tensor:
    """|d loss_i / d view1_i| averaged over channels: (B, S, S) fp32, for the pre-training loss.

    The loss is a mean over images, so its gradient is multiplied by B: the figure does not depend on the batch.

    Args:
        method: in training mode; its parameters get no gradient and its state is left as forward leaves it.
        view1: (B, 3, S, S) normalised fp32.
        inputs_of: view1 -> inputs of a step, so that composites made from it carry its gradient.
    """
    # A copy, because a view that is reused must not collect gradients.
    leaf = view1.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        loss = method(inputs_of(leaf)).loss
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.float().abs().mean(dim=1) * len(view1)


def box_mask(boxes: Sequence[Sequence[tuple[float, float, float, float]]], size: int) -> Tensor:
    """(B, size, size) bool: the pixels whose centre lies in a box of their image.

    Args:
        boxes: for each image, boxes as left, top, right, bottom in shares of its width and height.
        size: side of the views, which show whole images.
    """
    # Centres decide, so boxes that touch share no pixel.
    centre = (torch.arange(size) + 0.5) / size
    masks = torch.zeros(len(boxes), size, size, dtype=torch.bool)
    for mask, members in zip(masks, boxes, strict=True):
        for left, top, right, bottom in members:
            mask |= ((centre >= top) & (centre < bottom))[:, None] & ((centre >= left) & (centre < right))[None, :]
    return masks


def inside_outside(gradient: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean gradient magnitude inside and outside the boxes, over all pixels of all images.

    Raises:
        ValueError: no pixel is inside, or none is outside.

    Source: RegionCL (arXiv 2111.12309) figure 4.
    """
    if not bool(mask.any()) or bool(mask.all()):
        raise ValueError("the boxes cover no pixel or every pixel; choose other images")
    return float(gradient[mask].mean()), float(gradient[~mask].mean())


@torch.no_grad()
def lewel_maps(encoder: nn.Module, head: AlignmentHead, images: Tensor) -> Tensor:
    """Alignment maps (B, d, H, W) that sum to 1 over positions; map u * d / h + k pools channel group u.

    Raises:
        ValueError: the head has random maps or none.

    Source: LEWEL (arXiv 2203.14898) Eq. 1.
    """
    with evaluation_mode(encoder), evaluation_mode(head):
        feature_map = encoder(images).float()
        rows = feature_map.flatten(2).transpose(1, 2)
        # Such a head projects the pooled row together with the positions; its first row is no position.
        if head.joint:
            scores = head.projector(torch.cat([rows.mean(dim=1, keepdim=True), rows], dim=1))[:, 1:]
        elif hasattr(head, "map_projector"):
            scores = head.map_projector(rows)
        else:
            raise ValueError("this run learned no alignment maps; choose one with --align learned and the aligned loss")
        maps = alignment_maps(scores).transpose(1, 2)
    return maps.unflatten(2, feature_map.shape[2:])


def nearest(bank: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(index (Q, count) int64, cosine (Q, count)) of the nearest rows of a bank (N, C), nearest first."""
    similarity = normalised_rows(queries) @ normalised_rows(bank).T
    values, index = similarity.topk(min(count, len(bank)), dim=1)
    return index, values


def principal_plane(features: Tensor) -> Tensor:
    """(N, 2) fp32: L2-normalised rows projected on their two principal axes, signs fixed by the largest entry."""
    rows = normalised_rows(features).double()
    # Centred, or the first axis would point to the mean.
    rows = rows - rows.mean(dim=0)
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    axes = axes[:2]
    # An SVD leaves the signs open, and pictures of two runs would be mirrored at random.
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    return (rows @ axes.T).float()


def upsample(maps: Tensor, size: int) -> Tensor:
    """(B, H, W) -> (B, size, size), bilinear."""
    return F.interpolate(maps[:, None].float(), size=(size, size), mode="bilinear", align_corners=False)[:, 0]
