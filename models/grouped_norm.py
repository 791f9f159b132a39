"""Batch norm of each group of rows by its own statistics: an autograd function for eager mode, and its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of means and variances of `x`: float32, or wider where x is."""
    return torch.promote_types(x.dtype, torch.float32)


def like_input(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in the memory layout of its input."""
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return grad.contiguous(memory_format=torch.channels_last) if channels_last else grad.contiguous()


class _GroupedBatchNorm(torch.autograd.Function):
    """Normalise each of `groups` equal chunks of rows by its own statistics, written into one output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Groups write into one output, so that no copy joins them.
        output = torch.empty_like(x)
        dtype, shape = statistics_dtype(x), (2, groups, x.shape[1])
        # Zeros: with momentum 1 the "running" statistics become this group's mean and unbiased variance, and what they
        # held before is multiplied by 0, which NaN would survive.
        means, variances = torch.zeros(shape, dtype=dtype, device=x.device).unbind()
        saved = torch.empty(shape, dtype=dtype, device=x.device)
        parts = zip(x.chunk(groups), output.chunk(groups), means, variances, *saved.unbind(), strict=True)
        for source, target, mean, variance, kept_mean, kept_inverse in parts:
            torch.native_batch_norm(
                source, weight, bias, mean, variance, True, 1.0, eps, out=(target, kept_mean, kept_inverse)
            )
        ctx.save_for_backward(x, weight, saved)
        ctx.groups, ctx.eps, ctx.has_bias = groups, eps, bias is not None
        ctx.mark_non_differentiable(means, variances)
        return output, means, variances

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, saved = ctx.saved_tensors
        grad = like_input(grads[0], x)
        grad_x = torch.empty_like(x)
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        chunks = zip(x.chunk(ctx.groups), grad.chunk(ctx.groups), *saved.unbind(), strict=True)
        # PyTorch's backward function allocates its result, and its `out=` form copies from such a result too; a formula
        # of our own would round differently. So the groups are joined by a copy. The fused kernels have none.
        parts = [
            torch.ops.aten.native_batch_norm_backward(
                grad_part, x_part, weight, None, None, mean, inverse_std, True, ctx.eps, mask
            )
            for x_part, grad_part, mean, inverse_std in chunks
        ]
        if mask[0]:
            torch._foreach_copy_(list(grad_x.chunk(ctx.groups)), [part[0] for part in parts])
        wanted = [place for place in (1, 2) if mask[place]]
        sums = [parts[0][place] for place in wanted]
        for part in parts[1:] if wanted else ():
            torch._foreach_add_(sums, [part[place] for place in wanted])
        grad_weight, grad_bias = (dict(zip(wanted, sums, strict=True)).get(place) for place in (1, 2))
        return (grad_x if mask[0] else None), grad_weight, grad_bias, None, None


def grouped_batch_norm_definition(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What grouped normalisation computes, in tensor operations that a compiler can fuse.

    Args:
        x: (N, C, ...) of any float dtype; N is a multiple of `groups`.
        weight: (C,) or None.
        bias: (C,) or None.
        groups: number of equal chunks of rows.
        eps: added to the variance.

    Returns:
        The normalised tensor in x's dtype and layout, and (groups, C) means and unbiased variances in fp32 or wider,
        detached.
    """
    parts = x.unflatten(0, (groups, x.shape[0] // groups)).to(statistics_dtype(x))
    dims = [1, *range(3, parts.ndim)]
    variance, mean = torch.var_mean(parts, dims, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    columns = [1, 1, x.shape[1]] + [1] * (x.ndim - 2)
    if weight is not None:
        scale = scale * weight.to(scale.dtype).view(columns)
    normalised = (parts - mean) * scale
    if bias is not None:
        normalised = normalised + bias.to(scale.dtype).view(columns)
    count = x.numel() // (groups * x.shape[1])
    shape = (groups, x.shape[1])
    unbiased = variance.detach().view(shape) * (count / (count - 1))
    return normalised.flatten(0, 1).to(x.dtype), mean.detach().view(shape), unbiased


def grouped_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as for `grouped_batch_norm_definition`, from PyTorch's batch-norm kernels in eager mode.

    A compiler fuses the definition with what surrounds it, but would have to leave the kernels alone.
    """
    norm = grouped_batch_norm_definition if torch.compiler.is_compiling() else _GroupedBatchNorm.apply
    result: tuple[Tensor, Tensor, Tensor] = norm(x, weight, bias, groups, eps)
    return result
