"""Loss functions: pure, in fp32 (fp64 for fp64 inputs) whatever the autocast state, targets without gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.queue_contrast import queue_contrast


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: norms, softmax and sums lose too much in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unit(vectors: Tensor, dim: int = 1) -> Tensor:
    """Divide by max(length, 1e-12) along `dim`, in fp32 or wider; any shape."""
    return F.normalize(_wide(vectors), dim=dim, eps=1e-12)


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Dot product of each pair of rows: (N, D) and (N, D) -> (N,), exact products in fp32 or wider."""
    return (_wide(left) * _wide(right)).sum(dim=1)


def _matmul_dtype(rows: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on: the product with the queue is the one place where it pays."""
    device = rows.device.type
    if rows.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return rows.dtype


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float, extra: Tensor | None = None) -> Tensor:
    """Contrastive loss of each row against its key, a queue of negatives and optionally a few more.

        loss[i] = -log( e(q_i.k_i) / (e(q_i.k_i) + sum_e e(x_ie) + sum_j e(q_i.Q_j)) ),  e(s) = exp(s / temperature)

    The (N, K) matrix of logits is never held whole.

    Args:
        query: (N, D) unit rows.
        key: (N, D) unit rows, the positives; receives no gradient.
        queue: (K, D) unit rows; receives no gradient and must not change before `backward`.
        temperature: positive.
        extra: (N, E) similarities of further negatives, not divided by the temperature; -inf leaves one out.

    Returns:
        (N,) losses, fp32 or wider.

    Source: MoCo (arXiv 1911.05722) Eq. 1; with `extra`, RegionCL (arXiv 2111.12309) Eq. 2.
    """
    with torch.autocast(query.device.type, enabled=False):
        positives = row_dots(query, key.detach())
    return queue_contrast(query.to(_matmul_dtype(query)), queue, positives, temperature, extra)


def batch_contrast(
    query: Tensor, keys: Tensor, target: Tensor, temperature: float, extra: Tensor | None = None
) -> Tensor:
    """Contrastive loss of each row against all keys of the global batch, times 2 * temperature.

    Args:
        query: (N, D) unit rows.
        keys: (G, D) unit rows of all ranks; receive no gradient.
        target: (N,) int64, the positive key of each row.
        temperature: positive.
        extra: (N, E) similarities of further negatives, not divided by the temperature.

    Returns:
        (N,) losses, fp32 or wider.

    Source: MoCo v3 (arXiv 2104.02057) Eq. 1; the factor 2 * temperature is in Algorithm 1 and in the released code.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = _wide(query) @ _wide(keys.detach()).T
        if extra is not None:
            logits = torch.cat([logits, _wide(extra)], dim=1)
        return 2.0 * temperature * F.cross_entropy(logits / temperature, target, reduction="none")


def nt_xent(query: Tensor, others: Tensor, same: Tensor, own: Tensor, temperature: float) -> Tensor:
    """Contrastive loss of each embedding of one view against both views of the global batch, with gradient to all.

        loss[i] = -log( e(q_i.o_p) / (sum_j e(q_i.o_j) + sum_(j != p) e(q_i.s_j)) ),  p = own[i], e(s) = exp(s / tau)

    Args:
        query: (N, D) unit rows of one view.
        others: (G, D) unit rows of the other view, of all images.
        same: (G, D) unit rows of the query's view, of all images; an image's own row is no negative of it.
        own: (N,) int64, which of the G images each query is.
        temperature: positive.

    Returns:
        (N,) losses, fp32 or wider.

    Source: SimCLR (arXiv 2002.05709) Eq. 1.
    """
    with torch.autocast(query.device.type, enabled=False):
        query = _wide(query)
        negatives = query @ _wide(same).T
        # Minus infinity, because a query's product with itself must not count at all.
        negatives = negatives.scatter(1, own.unsqueeze(1), -torch.inf)
        logits = torch.cat([query @ _wide(others).T, negatives], dim=1) / temperature
        return F.cross_entropy(logits, own, reduction="none")


def correlation_terms(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """How far a cross-correlation matrix (D, D) is from the identity: on its diagonal and off it.

    Returns:
        sum_i (1 - C_ii)^2 and sum_(i != j) C_ij^2, scalars.

    Source: Barlow Twins (arXiv 2103.03230) Eq. 1.
    """
    diagonal = correlation.diagonal()
    # The matrix has millions of entries: a difference of sums needs no copy of it without its diagonal.
    return (1.0 - diagonal).square().sum(), correlation.square().sum() - diagonal.square().sum()


def swapped_prediction(scores: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """How well every crop predicts the assignments of the other large crops: the mean cross entropy.

        L = mean over i < A, v != i and rows b of -sum_k q_ibk log softmax_k(s_vb / temperature)

    Args:
        scores: (V, B, K) similarities of V crops of B images to K prototypes, the A assigned crops first.
        assignments: (A, B, K) rows that sum to 1; receive no gradient.
        temperature: positive.

    Returns:
        Scalar, fp32 or wider.

    Source: SwAV (arXiv 2006.09882) Eq. 2 and section 3.2; facebookresearch/swav main_swav.py.
    """
    with torch.autocast(scores.device.type, enabled=False):
        predicted = F.log_softmax(_wide(scores) / temperature, dim=-1)
        # The sum over crops once, and not for each assigned one: K has thousands of entries.
        total = predicted.sum(dim=0)
        assigned = predicted[: len(assignments)]
        losses = [
            -(q * (total - own)).sum(dim=-1).mean() for q, own in zip(assignments.detach(), assigned, strict=True)
        ]
        return torch.stack(losses).mean() / (len(scores) - 1)


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """-cos(prediction_i, sg(target_i)) for each row: (N, D) and (N, D) -> (N,).

    Source: SimSiam (arXiv 2011.10566) Eq. 1 and 3.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        return -row_dots(unit(prediction), unit(target.detach()))


def byol_regression(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos(prediction_i, sg(target_i)) for each row: (N, D) and (N, D) -> (N,).

    Source: BYOL (arXiv 2006.07733) Eq. 2: the squared distance of unit vectors.
    """
    return 2.0 + 2.0 * negative_cosine(prediction, target)


def pair_consistency(prediction: Tensor, target: Tensor, pairs: Tensor) -> Tensor:
    """Minus the mean cosine of each image's pairs of cells; 0 for an image without pairs.

    Args:
        prediction: (B, D, H, W) embeddings.
        target: (B, D, H', W') embeddings of the other view; receive no gradient.
        pairs: (B, H * W, H' * W') bool, which cells of the two maps make a pair.

    Returns:
        (B,) losses, fp32 or wider.

    Source: PixPro (arXiv 2011.10043) Eq. 5, averaged over the pairs of an image.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        cosine = torch.bmm(unit(prediction).flatten(2).mT, unit(target.detach()).flatten(2))
        # At least one: crops that do not meet have no pair, and their loss is 0 and not 0 / 0.
        return -(cosine * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


@torch.no_grad()
def best_matches(query_map: Tensor, key_map: Tensor) -> Tensor:
    """For each position of the query's map the position of the key's map whose feature points the same way.

    Args:
        query_map: (B, C, H, W) backbone features.
        key_map: (B, C, H, W) of the other view of the same images.

    Returns:
        (B, S) int64, S = H * W; no gradient.

    Source: DenseCL (arXiv 2011.09157) section 3.3 and Eq. 2: arg max over cosine similarities of backbone features.
    """
    with torch.autocast(query_map.device.type, enabled=False):
        # The query's lengths scale a whole row of similarities and cannot change its arg max.
        return torch.bmm(_wide(query_map).flatten(2).mT, unit(key_map).flatten(2)).argmax(dim=2)
