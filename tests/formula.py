"""Layers written from their formulas with loops, for references that share no code with the models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.norm import GroupBatchNorm


def batch_norm(x: Tensor, norm: Any) -> Tensor:
    """(B, C, ...) by the statistics of each group of images, or by running ones in evaluation mode."""
    shape = [1, -1] + [1] * (x.ndim - 2)
    dims = [0, *range(2, x.ndim)]
    group = (norm.group_size if isinstance(norm, GroupBatchNorm) else 0) or x.shape[0]
    parts = []
    for part in x.split(group):
        mean, variance = norm.running_mean, norm.running_var
        if norm.training:
            mean = part.sum(dims) / (part.numel() // part.shape[1])
            variance = ((part - mean.view(shape)) ** 2).sum(dims) / (part.numel() // part.shape[1])
        y = (part - mean.view(shape)) / torch.sqrt(variance.view(shape) + norm.eps)
        parts.append(y if norm.weight is None else y * norm.weight.view(shape) + norm.bias.view(shape))
    return torch.cat(parts)


def mlp(columns: Tensor, layers: Any) -> Tensor:
    """(B, S, in) through Linear, batch norm over all columns of a group of images, ReLU, Linear."""
    first, norm, _, second = layers

    def linear(x: Tensor, layer: Any) -> Tensor:
        y = torch.einsum("bsi,oi->bso", x, layer.weight)
        return y if layer.bias is None else y + layer.bias

    hidden = batch_norm(linear(columns, first).transpose(1, 2), norm).transpose(1, 2)
    return linear(hidden.clamp(min=0), second)


def unit(rows: Tensor) -> Tensor:
    """Each row over its length."""
    return rows / rows.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-12)


def pooled(feature_map: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C)."""
    return feature_map.sum((2, 3)) / (feature_map.shape[2] * feature_map.shape[3])


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every gradient agrees to 1e-6 of the largest of its tensor."""
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        bound = 1e-6 * float(expected[name].abs().max()) + 1e-12
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
