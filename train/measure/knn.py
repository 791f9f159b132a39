"""Exact k-nearest-neighbour classification of frozen features: a pure function, blockwise, on CPU or GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import DEFAULT_KS, DEFAULT_TEMPERATURE

_PIECE = 1 << 16
"""Rows of a half-precision table that are fp32 at a time."""


def _vote(labels: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Predicted class (q,) int64 of votes `weights` (q, k) fp32 for classes `labels` (q, k).

    Votes are added in fp64 in order of falling similarity, and the lowest class wins a tie, so that the result does not
    depend on the block size.
    """
    votes = torch.zeros(labels.shape[0], num_classes, dtype=torch.float64, device=labels.device)
    votes.scatter_add_(1, labels, weights.double())
    # torch.argmax promises nothing about ties, so the first maximum is looked for by hand.
    columns = torch.arange(num_classes, device=votes.device)
    return torch.where(votes == votes.amax(dim=1, keepdim=True), columns, num_classes).amin(dim=1)


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = DEFAULT_TEMPERATURE,
    num_classes: int | None = None,
    block: int = 512,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Nearest-neighbour votes of every query by cosine similarity.

    Args:
        bank: (N, C) features of the labelled set, any float dtype; normalised here. A table in half precision stays
            one: its rows become fp32 in pieces, as they are compared.
        bank_labels: (N,) int64, all >= 0.
        queries: (Q, C) features to classify, on the same device as the bank.
        ks: how many neighbours vote; a k above N uses all N.
        temperature: the weighted vote of a neighbour is exp(similarity / temperature).
        num_classes: number of classes; None is the largest label + 1.
        block: queries compared with the whole bank at a time; only memory depends on it (block x N fp32).

    Returns:
        k -> (weighted prediction, majority prediction), each (Q,) int64 on the CPU.

    Raises:
        ValueError: when there is nothing to vote, a label is missing or a k is not positive.

    Source: weighting of Wu et al. 2018 (instance discrimination), section 3.4, with temperature 0.07.
    """
    _check(bank, bank_labels, queries, ks, num_classes)
    classes = int(bank_labels.max()) + 1 if num_classes is None else num_classes
    if bank.dtype not in (torch.float16, torch.bfloat16):
        bank = F.normalize(bank.float(), dim=1, eps=1e-12)
    bank_labels = bank_labels.to(bank.device)
    most = min(max(ks), bank.shape[0])
    weighted: dict[int, list[Tensor]] = {k: [] for k in ks}
    majority: dict[int, list[Tensor]] = {k: [] for k in ks}
    # The table that is ranked must be fp32 whatever the caller's autocast: bf16 similarities have three digits.
    with torch.autocast(bank.device.type, enabled=False):
        for rows in queries.split(block):
            rows = F.normalize(rows.to(bank.device).float(), dim=1, eps=1e-12)
            similarity, neighbour = _similarities(rows, bank).topk(most, dim=1, largest=True, sorted=True)
            labels = bank_labels[neighbour]
            # exp((s - s_max) / T) only scales every vote of a row, and cannot overflow for small temperatures.
            votes = torch.exp((similarity - similarity[:, :1]) / temperature)
            for k in ks:
                weighted[k].append(_vote(labels[:, :k], votes[:, :k], classes).cpu())
                majority[k].append(_vote(labels[:, :k], torch.ones_like(votes[:, :k]), classes).cpu())
    return {k: (torch.cat(weighted[k]), torch.cat(majority[k])) for k in ks}


def _similarities(rows: Tensor, bank: Tensor) -> Tensor:
    """Cosines (q, N) fp32 of normalised fp32 rows (q, C) with a bank (N, C), normalised unless in half precision."""
    if bank.dtype == rows.dtype:
        return rows @ bank.T
    # Sums in fp32 of rounded features: a product in half precision would rank by three digits.
    pieces = (F.normalize(piece.float(), dim=1, eps=1e-12) for piece in bank.split(_PIECE))
    return torch.cat([rows @ piece.T for piece in pieces], dim=1)


class Predict(Protocol):
    """What `knn_predict` is."""

    def __call__(
        self,
        bank: Tensor,
        bank_labels: Tensor,
        queries: Tensor,
        ks: Sequence[int],
        temperature: float,
        num_classes: int | None,
        block: int,
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Predictions as `knn_predict` gives them."""


def predict_over_ranks(rank: int, world_size: int, gather: Callable[[Any], list[Any]]) -> Predict:
    """`knn_predict` shared among ranks that all hold the same bank and queries; every rank gets all predictions.

    Args:
        rank: this process.
        world_size: number of processes.
        gather: a value of each rank -> those of all ranks, in rank order, on every rank.
    """

    def predict(bank: Tensor, bank_labels: Tensor, queries: Tensor, *rest: Any) -> dict[int, tuple[Tensor, Tensor]]:
        # Every n-th query, so that shares differ by one at most.
        shares = gather(knn_predict(bank, bank_labels, queries[rank::world_size], *rest))
        return {
            k: (_dealt([share[k][0] for share in shares]), _dealt([share[k][1] for share in shares])) for k in shares[0]
        }

    return knn_predict if world_size == 1 else predict  # type: ignore[return-value]


def _dealt(shares: list[Tensor]) -> Tensor:
    """The rows in one tensor, of which share number r holds every n-th from r on."""
    joined = torch.empty(sum(len(share) for share in shares), dtype=shares[0].dtype)
    for number, share in enumerate(shares):
        joined[number :: len(shares)] = share
    return joined


def knn_classify(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = DEFAULT_TEMPERATURE,
    num_classes: int | None = None,
    block: int = 512,
    predict: Predict = knn_predict,
) -> dict[int, tuple[float, float]]:
    """Shares right: k -> (weighted top-1, majority top-1) in [0, 1], over the queries whose label (Q,) is not negative.

    `predict` is `knn_predict` or what `predict_over_ranks` gives. The rest is as for `knn_predict`.
    """
    known = query_labels.cpu() >= 0
    if not bool(known.any()):
        raise ValueError(f"none of the {len(query_labels)} queries has a label; pass labelled validation images")
    predictions = predict(bank, bank_labels, queries[known.to(queries.device)], ks, temperature, num_classes, block)
    truth = query_labels.cpu()[known]
    return {
        k: (float((w == truth).double().mean()), float((m == truth).double().mean()))
        for k, (w, m) in predictions.items()
    }


def _check(bank: Tensor, bank_labels: Tensor, queries: Tensor, ks: Sequence[int], num_classes: int | None) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"bank {tuple(bank.shape)} and queries {tuple(queries.shape)} must be two tables of equal width"
        )
    if len(bank) == 0 or len(bank) != len(bank_labels):
        raise ValueError(f"{len(bank)} bank features with {len(bank_labels)} labels; give one label for each feature")
    if int(bank_labels.min()) < 0:
        raise ValueError("the bank holds unlabelled images (label -1); leave them out of it")
    if num_classes is not None and int(bank_labels.max()) >= num_classes:
        raise ValueError(f"bank label {int(bank_labels.max())} is not below num_classes {num_classes}")
    if not ks or min(ks) < 1:
        raise ValueError(f"k values {list(ks)}; give at least one, each 1 or more")
