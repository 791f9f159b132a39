"""LEWEL's head: the projector of the global embedding also predicts maps that pool aligned embeddings.

Letters: B images, D channels of the feature map, N its positions, d width of the projector's output, h channel groups,
M = d / h maps and aligned embeddings, c width of an aligned embedding. Everything works on rows, channels last.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hyperparameters import Grouping


class ColumnMlp(nn.Sequential):
    """Linear, batch norm, ReLU, Linear, all without bias, on several columns an image: (B, S, in) -> (B, S, out).

    The batch norm takes its statistics over all B * S columns together. It is the same as a 1x1 Conv1d on (B, in, S)
    with a better memory layout. A batch-norm group is a number of images, each with all its columns.

    Args:
        in_dim: channels of a column.
        hidden_dim: channels of the hidden layer.
        out_dim: channels of the result.

    Source: LEWEL (arXiv 2203.14898) section 3.3; Kaiming-normal (fan_out) start as in its code.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(
            nn.Linear(in_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, out_dim, bias=False),
        )
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, columns: Tensor) -> Tensor:
        """(B, S, in) -> (B, S, out)."""
        first, norm, activation, second = self
        hidden = norm(first(columns).transpose(1, 2)).transpose(1, 2)
        out: Tensor = second(activation(hidden))
        return out


class HeadOutput(NamedTuple):
    """What the head gives for one view.

    Attributes:
        embedding: (B, d) global embedding z_g; None without a global loss.
        aligned: (B, M, c) aligned embeddings z_a; None without an aligned loss.
    """

    embedding: Tensor | None
    aligned: Tensor | None


def alignment_maps(scores: Tensor) -> Tensor:
    """Maps over positions: (B, N, d) scores of any float dtype -> (B, N, d) that sum to 1 over N, fp32 or wider.

    Scores are L2-normalised over d at each position; there is no temperature, so maps are nearly uniform at first.

    Source: LEWEL (arXiv 2203.14898) Eq. 1 and its code.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.normalize(wide, dim=2, eps=1e-12).softmax(dim=1)


def aligned_pool(rows: Tensor, maps: Tensor, groups: int, grouping: Grouping) -> Tensor:
    """Pool each channel group of the features by each of its maps.

    y[b, k] = concat over u of sum_n maps[b, n, i(u, k)] * rows[b, n, group u], where map i(u, k) = u M + k for
    "contiguous" (the code) and k h + u for "interleaved" (the paper's Eq. 2).

    Args:
        rows: (B, N, D) features.
        maps: (B, N, d) weights.
        groups: h, a divisor of D and d.
        grouping: which maps belong to which group of channels.

    Returns:
        (B, M, D) with M = d / h, in the dtype of the features (the autocast dtype under autocast).
    """
    if grouping == "contiguous":
        by_group = maps.unflatten(2, (groups, -1)).permute(0, 2, 3, 1)  # (B, h, M, N)
    else:
        by_group = maps.unflatten(2, (-1, groups)).permute(0, 3, 2, 1)  # (B, h, M, N)
    features = rows.unflatten(2, (groups, -1)).transpose(1, 2)  # (B, h, N, D / h)
    pooled = torch.matmul(by_group.to(rows.dtype), features)
    return pooled.transpose(1, 2).flatten(2)  # (B, h, M, D / h) -> (B, M, D)


def random_scores(seed: int, step: int, view: int, image_index: Tensor, positions: int, channels: int) -> Tensor:
    """Normal scores in place of learned ones, a pure function of (seed, step, view, image, position, channel).

    Each rank draws those of its own images only, and the same on any device or number of ranks.

    Args:
        seed: run seed.
        step: optimizer step.
        view: 0 or 1.
        image_index: (B,) int64 place of each image in the global batch, on the device.
        positions: N.
        channels: d.

    Returns:
        (B, N, d) float32.
    """
    key = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + view * 0x94D049BB133111EB) % 2**64
    cell = torch.arange(positions * channels, device=image_index.device)
    counter = image_index[:, None] * (positions * channels) + cell[None]
    words = _mix(_mix(counter + _signed(key)) + _signed(key * 0xD6E8FEB86659FD93 % 2**64))
    # Odd numbers of 24 bits are exact in fp32; with a bit more the largest would round to 1, its score to infinity.
    uniform = (((words >> 41) & 0x7FFFFF) * 2 + 1).float() / 2**24  # inside (0, 1)
    return (torch.erfinv(2.0 * uniform - 1.0) * 2**0.5).view(-1, positions, channels)


def _signed(word: int) -> int:
    """A 64-bit word as the int64 that has its bits."""
    return word - 2**64 if word >= 2**63 else word


def _mix(words: Tensor) -> Tensor:
    """A bijection of int64 that leaves no pattern (the finaliser of SplitMix64); products wrap around."""
    words = (words ^ ((words >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ ((words >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return words ^ ((words >> 31) & (2**33 - 1))


class AlignmentHead(nn.Module):
    """Global and aligned embeddings of one feature map.

    Coupled: one projector g takes the pooled vector and all N position vectors as 1 + N columns, through one batch
    norm; column 0 is the global embedding, the others are scores of the maps. Uncoupled: g takes the pooled vector
    alone and a head of the same shape, `map_projector`, the N positions. Either way p (`aligned_projector`) takes the
    M pooled rows. With random maps, or without aligned loss, g takes the pooled vector alone.

    Args:
        feature_dim: D.
        hidden_dim: width of the hidden layers.
        dim: d.
        aligned_dim: c.
        groups: h.
        coupled: whether g also makes the maps.
        grouping: which maps belong to which group of channels.
        align: "learned" or "random" maps.
        global_loss: whether a global embedding is wanted.
        aligned_loss: whether aligned embeddings are wanted.

    Raises:
        ValueError: h divides D or d with a remainder, or both losses are off.

    Source: LEWEL (arXiv 2203.14898) section 3.2; LayneH/LEWEL for the joint batch norm.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_dim: int,
        dim: int,
        aligned_dim: int,
        groups: int,
        *,
        coupled: bool = True,
        grouping: Grouping = "contiguous",
        align: Literal["learned", "random"] = "learned",
        global_loss: bool = True,
        aligned_loss: bool = True,
    ) -> None:
        super().__init__()
        if not (global_loss or aligned_loss):
            raise ValueError("--global-loss false and --aligned-loss false leave nothing to train; switch one on")
        if groups < 1 or feature_dim % groups or dim % groups:
            raise ValueError(f"--h {groups} must divide the {feature_dim} feature channels and --dim {dim}")
        if grouping not in ("contiguous", "interleaved"):
            raise ValueError(f"--grouping {grouping} is unknown; choose contiguous or interleaved")
        if align not in ("learned", "random"):
            raise ValueError(f"--align {align} is unknown; choose learned or random")
        self.groups, self.dim, self.grouping = groups, dim, grouping
        self.global_loss, self.aligned_loss = global_loss, aligned_loss
        learned = aligned_loss and align == "learned"
        self.joint = coupled and learned
        if global_loss or self.joint:
            self.projector = ColumnMlp(feature_dim, hidden_dim, dim)
        if learned and not coupled:
            self.map_projector = ColumnMlp(feature_dim, hidden_dim, dim)
        if aligned_loss:
            self.aligned_projector = ColumnMlp(feature_dim, hidden_dim, aligned_dim)
        self.random_maps = aligned_loss and align == "random"

    def forward(self, feature_map: Tensor, random: Tensor | None = None) -> HeadOutput:
        """Embeddings of a feature map (B, D, H, W).

        Args:
            feature_map: output of the trunk.
            random: (B, N, d) scores from `random_scores`, needed where the maps are random.
        """
        rows = feature_map.flatten(2).transpose(1, 2)  # (B, N, D), a view of a channels-last map
        pooled = rows.mean(dim=1, keepdim=True)
        embedding: Tensor | None = None
        scores = random
        if self.joint:
            columns = self.projector(torch.cat([pooled, rows], dim=1))  # (B, 1 + N, d)
            embedding, scores = columns[:, 0], columns[:, 1:]
        elif self.global_loss:
            embedding = self.projector(pooled)[:, 0]
        if hasattr(self, "map_projector"):
            scores = self.map_projector(rows)
        aligned: Tensor | None = None
        if self.aligned_loss:
            assert scores is not None, "random maps need scores"
            pooled_rows = aligned_pool(rows, alignment_maps(scores), self.groups, self.grouping)
            aligned = self.aligned_projector(pooled_rows)
        return HeadOutput(embedding if self.global_loss else None, aligned)
