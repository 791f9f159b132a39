"""InfoNCE of many rows against a long queue, without ever holding the whole matrix of logits.

    loss[r] = log(exp(p_r / t) + sum_e exp(x_re / t) + sum_k exp(rows_r . queue_k / t)) - p_r / t

for a positive similarity p_r, optional extra negatives x_re and temperature t. The sum over the queue is taken block
by block; the backward pass recomputes each block. Query, canvas and paste rows are stacked into one call, so that one
GEMM serves all of them.

Measured, forward and backward of 768 rows against 65536 keys of 128 in fp32 on a CPU (`tools/bench_ops.py --ops
queue_contrast`): 63 MiB at most are held beyond the inputs, 960 MiB with the whole matrix.

Source: MoCo (arXiv 1911.05722) Eq. 1; RegionCL (arXiv 2111.12309) Eq. 2 for the extra negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .choice import QUEUE
from .operator import differentiable
from .precision import accumulated_matmul, accumulation_dtype

BLOCK_ELEMENTS = 8 * 2**20
"""Logits held at a time, 32 MiB in float32: below Hopper's 50 MB L2 cache, so a block is summed where it was made."""


def block_size(rows: int, queue_size: int) -> int:
    """Queue entries taken at a time: a multiple of 256, at least 256, at most the queue."""
    return min(queue_size, max(256, BLOCK_ELEMENTS // max(rows, 1) // 256 * 256))


def queue_sumexp_definition(rows: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """For every row sum_k exp(logit_k - m) and m = max_k logit_k, logit_k = rows . queue_k / temperature; each (R,).

    The sum and its shift are returned apart, not as one logarithm: a logarithm near 8 rounded to float32 would put an
    error of 2e-7 into every probability. The online rule keeps a running maximum and a sum relative to it.
    """
    dtype = accumulation_dtype(rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        maximum = rows.new_full((rows.shape[0], 1), -torch.inf, dtype=dtype)
        total = rows.new_zeros((rows.shape[0], 1), dtype=dtype)
        for block in queue.split(block_size(rows.shape[0], queue.shape[0])):
            logits = accumulated_matmul(rows, block.T).div_(temperature)  # (R, block)
            new_maximum = torch.maximum(maximum, logits.amax(dim=1, keepdim=True))
            total.mul_((maximum - new_maximum).exp_()).add_(logits.sub_(new_maximum).exp_().sum(dim=1, keepdim=True))
            maximum = new_maximum
        return total.squeeze(1), maximum.squeeze(1)


def _sumexp_fake(rows: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    total = rows.new_empty(rows.shape[0], dtype=accumulation_dtype(rows.dtype))
    return total, torch.empty_like(total)


def queue_sumexp_backward_definition(
    grad: Tensor, rows: Tensor, queue: Tensor, maximum: Tensor, temperature: float
) -> Tensor:
    """Return grad / temperature * sum_k exp(logit_k - m) queue_k, each block computed again; m is a constant."""
    dtype = accumulation_dtype(rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        result = torch.zeros(rows.shape, dtype=dtype, device=rows.device)
        for block in queue.split(block_size(rows.shape[0], queue.shape[0])):
            share = accumulated_matmul(rows, block.T).div_(temperature).sub_(maximum[:, None]).exp_()
            # Cast for the second GEMM. At most 1, not normalised: probabilities of 1 / K would be float16 subnormals.
            result.add_(accumulated_matmul(share.to(rows.dtype), block))
        return result.mul_((grad.to(dtype) / temperature)[:, None]).to(rows.dtype)


def _sumexp_backward_fake(grad: Tensor, rows: Tensor, queue: Tensor, maximum: Tensor, temperature: float) -> Tensor:
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)


def _setup_context(ctx, inputs, output) -> None:
    rows, queue, ctx.temperature = inputs
    ctx.save_for_backward(rows, queue, output[1])


def _gradients(backward, ctx, grad_total: Tensor, _: object) -> tuple[Tensor, None, None]:
    rows, queue, maximum = ctx.saved_tensors
    return backward(grad_total, rows, queue, maximum, ctx.temperature), None, None


_queue_sumexp = differentiable(
    "queue_sumexp",
    forward=queue_sumexp_definition,
    forward_fake=_sumexp_fake,
    backward=queue_sumexp_backward_definition,
    backward_fake=_sumexp_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)


def queue_contrast(
    rows: Tensor, queue: Tensor, positives: Tensor, temperature: float, extra: Tensor | None = None
) -> Tensor:
    """InfoNCE loss of every row; its denominator holds the positive, the extra negatives and the whole queue.

    Args:
        rows: (R, D) L2-normalised embeddings; float16, bfloat16, float32 or float64. This dtype is the GEMM's.
        queue: (K, D) L2-normalised keys, cast to the dtype of `rows`; receives no gradient. It must not be overwritten
            between forward and backward.
        positives: (R,) similarities of the positive pairs, not yet divided by the temperature.
        temperature: positive number.
        extra: (R, E) similarities of further negatives, not yet divided; -inf leaves an entry out.

    Returns:
        (R,) losses in float32 (float64 for float64). Gradients reach `rows`, `positives` and `extra`.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    if rows.ndim != 2 or queue.ndim != 2 or rows.shape[1] != queue.shape[1]:
        raise ValueError(f"rows (R, D) and queue (K, D) do not fit: {tuple(rows.shape)} and {tuple(queue.shape)}")
    if positives.shape != rows.shape[:1] or (extra is not None and extra.shape[:1] != rows.shape[:1]):
        given = (tuple(positives.shape), None if extra is None else tuple(extra.shape))
        raise ValueError(f"{rows.shape[0]} rows need positives (R,) and extra negatives (R, E), not {given}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if QUEUE.mode == "definition":
        return queue_contrast_definition(rows, queue, positives, temperature, extra)
    dtype = accumulation_dtype(rows.dtype)
    total, queue_maximum = _queue_sumexp(rows, queue.detach().to(rows.dtype), temperature)
    own = positives[:, None] if extra is None else torch.cat([positives[:, None], extra], dim=1)
    own = own.to(dtype) / temperature  # (R, 1 + E)
    # The shift changes no value, so nothing flows through it; it keeps every exponential at most 1.
    shift = torch.maximum(queue_maximum, own.amax(dim=1)).detach()
    denominator = total * (queue_maximum.detach() - shift).exp() + (own - shift[:, None]).exp().sum(dim=1)
    return denominator.log() + (shift - own[:, 0])


def queue_contrast_definition(
    rows: Tensor, queue: Tensor, positives: Tensor, temperature: float, extra: Tensor | None = None
) -> Tensor:
    """The loss from one materialised matrix of all logits; arguments and result as for `queue_contrast`."""
    logits = [positives[:, None], *([] if extra is None else [extra]), rows @ queue.detach().to(rows.dtype).T]
    scaled = torch.cat([part.to(accumulation_dtype(rows.dtype)) for part in logits], dim=1) / temperature
    return torch.logsumexp(scaled, dim=1) - scaled[:, 0]
