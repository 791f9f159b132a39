"""Sinkhorn-Knopp: scores of samples on prototypes to assignments that use every prototype equally."""

from __future__ import annotations

import torch
from torch import Tensor

from .collectives import sum_over_ranks


@torch.no_grad()
def balanced_assignments(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Soft assignments of the samples of all ranks, of equal weight in total on each prototype.

    Q = exp(scores / epsilon), whose columns (prototypes) and then rows (samples) are divided by their sums, again and
    again; the columns' sums go over the samples of all ranks.

    Args:
        scores: (..., N, K) similarities of this rank's samples, fp32 or wider; leading dimensions are problems of their
            own. Ranks may have different numbers of samples.
        epsilon: entropy of the assignments; small values make them hard.
        iterations: of both divisions.

    Returns:
        (..., N, K), rows that sum to 1, without gradient.

    Source: SwAV (arXiv 2006.09882) Eq. 3 to 5; facebookresearch/swav `distributed_sinkhorn`. Its factors 1/K and 1/B
    are left out, because each is taken back by the next division.
    """
    # In half precision the exponential of 1 / 0.05 would overflow, and a step of the scores would be some percent.
    assert scores.dtype in (torch.float32, torch.float64)
    weights = torch.exp(scores / epsilon)
    for _ in range(iterations):
        weights /= sum_over_ranks(weights.sum(dim=-2, keepdim=True))
        weights /= weights.sum(dim=-1, keepdim=True)
    return weights
