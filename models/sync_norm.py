"""Batch norm over the rows of all ranks, as autograd functions for the CPU and for CUDA."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import world
from .grouped_norm import like_input, statistics_dtype


class _SyncBatchNormCpu(torch.autograd.Function):
    """Batch norm over the rows of all ranks, from kernels that run anywhere; ranks may hold unequal rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, channels = statistics_dtype(x), x.shape[1]
        local_mean = torch.zeros(channels, dtype=dtype, device=x.device)
        local_variance = torch.zeros_like(local_mean)
        rows = x.numel() // channels
        if rows > 1:
            torch.batch_norm_update_stats(x, local_mean, local_variance, 1.0)
            local_variance *= (rows - 1) / rows
        else:
            local_mean.copy_(x.reshape(channels))
        means, variances, counts = _gather_statistics(local_mean, local_variance, rows)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean).square())).sum(0) / total
        y = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps, ctx.mask = eps, (weight is not None, bias is not None)
        unbiased = variance * (total / (total - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, variance, total = ctx.saved_tensors
        grad = like_input(grads[0], x)
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        # The evaluation-mode backward gives w * dy / std and, as parameter gradients, the sums of dy * xhat and of dy.
        direct, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([sum_dy, sum_dy_xhat])
        dist.all_reduce(sums)
        mean_dy, mean_dy_xhat = sums / total
        inverse_std = torch.rsqrt(variance + ctx.eps)
        # dx = w / std * (dy - mean(dy) - xhat * mean(dy * xhat)), the last two terms as one affine function of x
        slope = -scale * inverse_std.square() * mean_dy_xhat
        offset = -scale * inverse_std * mean_dy - slope * mean
        columns = [1, x.shape[1]] + [1] * (x.ndim - 2)
        correction = torch.addcmul(offset.view(columns), x.to(mean.dtype), slope.view(columns))
        grad_x = (direct + correction).to(x.dtype)
        return grad_x, (sum_dy_xhat if ctx.mask[0] else None), (sum_dy if ctx.mask[1] else None), None


class _SyncBatchNormCuda(torch.autograd.Function):
    """Batch norm over the rows of all ranks, on the CUDA kernels of PyTorch's `nn.SyncBatchNorm`.

    PyTorch's own function looks at the counts of all ranks on the host, a wait in every layer; here a rank always holds
    rows, so that nothing has to be looked at.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        local_mean, local_inverse_std = torch.batch_norm_stats(x, eps)
        means, inverse_stds, counts = _gather_statistics(local_mean, local_inverse_std, x.numel() // x.shape[1])
        # With momentum 1 the "running" statistics become those of the joint batch, the variance unbiased.
        joint_mean = torch.zeros_like(local_mean)
        unbiased = torch.zeros_like(local_mean)
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
            x, means, inverse_stds, joint_mean, unbiased, 1.0, eps, counts.view(-1)
        )
        ctx.save_for_backward(x, weight, mean, inverse_std, counts.to(torch.int32))
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(joint_mean, unbiased)
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps), joint_mean, unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, inverse_std, counts = ctx.saved_tensors
        grad = like_input(grads[0], x)
        sum_dy, sum_dy_xmu, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, inverse_std, weight, True, weight is not None, ctx.has_bias
        )
        sums = torch.stack([sum_dy, sum_dy_xmu])
        dist.all_reduce(sums)
        scale = None if weight is None else weight.to(mean.dtype)
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean, inverse_std, scale, sums[0], sums[1], counts)
        return grad_x, (grad_weight if weight is not None else None), (grad_bias if ctx.has_bias else None), None


def _gather_statistics(first: Tensor, second: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two (C,) statistics and the number of rows of every rank: (ranks, C), (ranks, C) and (ranks, 1)."""
    channels = first.shape[0]
    local = torch.cat([first, second, torch.full((1,), float(rows), dtype=first.dtype, device=first.device)])
    gathered = torch.empty(world() * local.numel(), dtype=local.dtype, device=local.device)
    dist.all_gather_into_tensor(gathered, local)
    one, two, counts = gathered.view(world(), -1).split([channels, channels, 1], dim=1)
    return one.contiguous(), two.contiguous(), counts.contiguous()


def sync_batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the rows of all ranks together. A caller leaves it out of compiled graphs, which cannot trace its sums.

    Args:
        x: (N, C, ...) this rank's rows; ranks may hold unequal numbers of them.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: added to the variance.

    Returns:
        This rank's normalised rows in x's dtype and layout, and the joint mean and unbiased variance (C,), without
        gradient, in float32 or wider.
    """
    function = _SyncBatchNormCuda if x.is_cuda else _SyncBatchNormCpu
    result: tuple[Tensor, Tensor, Tensor] = function.apply(x, weight, bias, eps)
    return result
