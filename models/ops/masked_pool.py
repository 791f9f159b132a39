"""Weighted mean of a feature map under several masks: definition, registration, dispatch.

    pooled[b, m, c] = sum_s weights[b, g(c), m, s] * features[b, c, s] / sum_s weights[b, g(c), m, s]

with s over the H*W positions and g(c) = c // (C / G): G contiguous channel groups, each with maps of its own.
RegionCL pools with G = 1 and binary masks, LEWEL with G heads of M soft maps.

Source: RegionCL (arXiv 2111.12309) section 3.2, mask pooling; LEWEL (arXiv 2203.14898) Eq. 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import layout_of, like_layout
from .masked_pool_kernels import kernels_for
from .operator import differentiable
from .precision import accumulated_matmul, accumulation_dtype


def check_masked_pool(features: Tensor, weights: Tensor) -> None:
    """Refuse shapes that do not fit each other."""
    if features.ndim != 4 or weights.ndim != 5:
        raise ValueError(
            f"masked_pool takes features (B, C, H, W) and weights (B, G, M, H, W); "
            f"got {tuple(features.shape)} and {tuple(weights.shape)}"
        )
    batch, channels, height, width = features.shape
    if weights.shape[0] != batch or weights.shape[3:] != (height, width):
        raise ValueError(f"weights {tuple(weights.shape)} do not cover features {tuple(features.shape)}")
    if channels % weights.shape[1]:
        raise ValueError(f"{channels} channels do not divide into {weights.shape[1]} groups of weights")


def _grouped(features: Tensor, groups: int) -> Tensor:
    """Features (B, C, H, W) as (B * G, C/G, S); a view for the default format and, with G = 1, for channels-last."""
    batch, channels, height, width = features.shape
    return features.flatten(2).reshape(batch * groups, channels // groups, height * width)


def _inverse_sums(maps: Tensor) -> Tensor:
    """1 / sum over positions of maps (B * G, M, S), and 0 where the sum is 0: (B * G, M, 1)."""
    total = maps.sum(dim=2, keepdim=True, dtype=accumulation_dtype(maps.dtype))
    return torch.where(total == 0, torch.zeros_like(total), 1 / torch.where(total == 0, torch.ones_like(total), total))


def masked_pool_definition(features: Tensor, weights: Tensor) -> Tensor:
    """The mathematics in plain PyTorch; arguments and result as for `masked_pool`."""
    batch, groups, masks = weights.shape[:3]
    with torch.autocast(features.device.type, enabled=False):
        maps = weights.flatten(3).flatten(0, 1)  # (B * G, M, S)
        pooled = accumulated_matmul(maps, _grouped(features, groups).mT) * _inverse_sums(maps)  # (B * G, M, C/G)
        by_group = pooled.to(features.dtype).view(batch, groups, masks, -1)
        return by_group.transpose(1, 2).reshape(batch, masks, features.shape[1])


def masked_pool_backward_definition(
    grad: Tensor, features: Tensor, weights: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `masked_pool`; one that is not needed comes back as an empty tensor.

    With p[s] = sum_c grad[c] * features[c, s] over a group's channels and n = sum_s weights[s]:
    d features[c, s] = sum_m weights[m, s] / n[m] * grad[m, c] and
    d weights[s] = (p[s] - sum_s' weights[s'] p[s'] / n) / n, which needs no saved output.
    Both are zero for a mask whose sum is 0.
    """
    batch, channels, height, width = features.shape
    groups, masks = weights.shape[1:3]
    dtype = accumulation_dtype(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        maps = weights.flatten(3).flatten(0, 1)  # (B * G, M, S)
        inverse = _inverse_sums(maps)
        by_group = grad.view(batch, masks, groups, channels // groups).transpose(1, 2).flatten(0, 1)  # (B * G, M, C/G)
        grad_features, grad_weights = features.new_empty(0), weights.new_empty(0)
        if need_features:
            # Written as (B, S, C), so that the result is channels-last where the features are.
            by_position = accumulated_matmul((maps.to(dtype) * inverse).mT, by_group)  # (B * G, S, C/G)
            flat = by_position.to(features.dtype).view(batch, groups, height, width, -1).permute(0, 1, 4, 2, 3)
            grad_features = like_layout(flat.reshape(features.shape), features)
        if need_weights:
            product = accumulated_matmul(by_group, _grouped(features, groups))  # (B * G, M, S)
            mean = (maps * product).sum(dim=2, keepdim=True) * inverse
            grad_weights = ((product - mean) * inverse).to(weights.dtype).view(weights.shape)
    return grad_features, grad_weights


def _forward(features: Tensor, weights: Tensor) -> Tensor:
    kernels = kernels_for(features, weights)
    return kernels.forward(features, weights) if kernels else masked_pool_definition(features, weights)


def _forward_fake(features: Tensor, weights: Tensor) -> Tensor:
    return features.new_empty((features.shape[0], weights.shape[2], features.shape[1]))


def _backward(
    grad: Tensor, features: Tensor, weights: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    kernels = kernels_for(features, weights)
    if kernels is None:
        return masked_pool_backward_definition(grad.contiguous(), features, weights, need_features, need_weights)
    grad_features, grad_weights = kernels.backward(grad, features, weights, need_features, need_weights)
    return like_layout(grad_features, features) if need_features else grad_features, grad_weights


def _backward_fake(
    grad: Tensor, features: Tensor, weights: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    grad_features = (
        torch.empty_like(features, memory_format=layout_of(features)) if need_features else features.new_empty(0)
    )
    return grad_features, weights.new_empty(weights.shape if need_weights else (0,))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(backward, ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    features, weights = ctx.saved_tensors
    need_features, need_weights = ctx.needs_input_grad
    grad_features, grad_weights = backward(grad, features, weights, need_features, need_weights)
    return grad_features if need_features else None, grad_weights if need_weights else None


_masked_pool = differentiable(
    "masked_pool",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)


def masked_pool(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over positions of each channel group under that group's maps.

    Args:
        features: (B, C, H, W), any floating dtype, either memory format.
        weights: (B, G, M, H, W), floating; M maps for each of G contiguous blocks of C / G channels. They need not sum
            to 1: the mean divides by their sum.

    Returns:
        (B, M, C) in the features' dtype, summed in float32 (float64 for float64). A map whose sum is 0 yields zeros and
        passes no gradient.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_masked_pool(features, weights)
    pooled: Tensor = _masked_pool(features, weights)
    return pooled
