"""Attention inside the windows of a map, with a bias for each pair of places and a mask between parts of a window.

    values[i] = sum_j softmax_j(q_i . k_j / sqrt(d) + bias[i, j] + mask[i, j]) v_j

There are two forms. The definition holds the matrix of weights, as torchvision's Swin does. The other calls PyTorch's
fused attention, which reads and writes no such matrix in the forward pass; it rounds bias and mask to the dtype of the
queries. Which is faster depends on the card, so `train/proving` compares and times them.

Source: Swin (arXiv 2103.14030), Eq. 4, and the masks of its section 3.2.

Letters: B images, W windows of an image, h heads, L places of a window, d channels of a head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .choice import WINDOWS
from .operator import tell_recorders


def window_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Attend within each window.

    Args:
        query: (B, W, h, L, d), any floating dtype.
        key: likewise.
        value: likewise.
        bias: (h, L, L), added for every window.
        mask: (W, L, L), added for every image and head: 0 where a place may see another, far below zero where not.
            None where every place sees all others of its window.

    Returns:
        (B, W, h, L, d) in the dtype of `value`.
    """
    tell_recorders("window_attention", (query, key, value, bias, mask))
    form = fused_window_attention if WINDOWS.mode == "cuda" else window_attention_definition
    return form(query, key, value, bias, mask)


def window_attention_definition(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """`window_attention` with the weights of all pairs held; the bits of torchvision's Swin."""
    q, k, v = (each.flatten(0, 1) for each in (query, key, value))  # (B * W, h, L, d)
    logits = (q * q.shape[-1] ** -0.5).matmul(k.transpose(-2, -1)) + bias
    if mask is not None:
        # Without this view each image would need a copy of the mask.
        logits = (logits.unflatten(0, query.shape[:2]) + mask[:, None]).flatten(0, 1)
    return logits.softmax(-1).to(v.dtype).matmul(v).unflatten(0, query.shape[:2])


def fused_window_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """`window_attention` by PyTorch's fused attention."""
    # The fused kernels take four dimensions and one mask for the whole batch. Without a mask all windows are alike and
    # belong to the batch. With one they differ, and are heads of their image, so that all images share bias and mask.
    alone = mask is None
    q, k, v = (each.flatten(0, 1) if alone else each.flatten(1, 2) for each in (query, key, value))
    added = bias if mask is None else (mask[:, None] + bias).flatten(0, 1)
    values = F.scaled_dot_product_attention(q, k, v, attn_mask=added[None].to(q.dtype))
    return values.unflatten(0, query.shape[:2]) if alone else values.unflatten(1, query.shape[1:3])
