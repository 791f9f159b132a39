"""CARE's transformer stream: bottleneck blocks whose middle is self-attention over the cells of a feature map.

Letters: B images, C channels, s cells a side, N = s * s tokens in row-major order, h heads, d channels a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hyperparameters import Position

POSITIONS: tuple[Position, ...] = ("absolute", "relative", "sincos", "none")


def sincos_table(side: int, dim: int) -> Tensor:
    """Fixed position vectors (side * side, dim) float32: sines and cosines of x in the first half, of y in the second.

    Raises:
        ValueError: `dim` is not a multiple of 4.

    Source: Vaswani et al., arXiv 1706.03762, section 3.5, for each axis.
    """
    if dim % 4:
        raise ValueError(f"--pos sincos needs heads whose width is a multiple of 4, not {dim}")
    rates = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates  # (s, d / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (s, d / 2)
    grid = torch.cat([axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)], dim=2)
    return grid.reshape(side * side, dim).float()


class CellAttention(nn.Module):
    """Multi-head self-attention over the cells of a map, without output projection.

    logits = (q k^T + pos(q)) / sqrt(d). Where pos(q)[i, j] = q_i . e_j (absolute, sincos) it is folded into the keys,
    k' = k + e; the relative form pos(q)[i, j] = q_i . (rel_w[x_j - x_i] + rel_h[y_j - y_i]) is an additive bias. Both
    run through PyTorch's fused attention and are exact.

    Args:
        channels: channels of the input map; the output has heads * head_dim.
        side: cells a side of the map.
        heads: number of heads.
        head_dim: channels a head.
        pos: position encoding; learned tables are shared by the heads.

    Source: CARE (arXiv 2110.05340) Eq. 2, Table 8; tables and their N(0, 1) / sqrt(d) start as in its code.
    """

    def __init__(self, channels: int, side: int, heads: int, head_dim: int, pos: Position) -> None:
        super().__init__()
        if pos not in POSITIONS:
            raise ValueError(f"--pos {pos} is unknown; choose one of {', '.join(POSITIONS)}")
        self.side, self.heads, self.head_dim, self.pos = side, heads, head_dim, pos
        self.to_qkv = nn.Conv2d(channels, 3 * heads * head_dim, kernel_size=1, bias=False)
        scale = 1.0 / math.sqrt(head_dim)
        if pos == "absolute":
            self.row = nn.Parameter(torch.randn(side, head_dim) * scale)
            self.col = nn.Parameter(torch.randn(side, head_dim) * scale)
        elif pos == "relative":
            self.rel_h = nn.Parameter(torch.randn(2 * side - 1, head_dim) * scale)
            self.rel_w = nn.Parameter(torch.randn(2 * side - 1, head_dim) * scale)
            cells = torch.arange(side)
            # offset[i, j] = j - i + s - 1: the row of a table for a query at i and a key at j along one axis
            self.register_buffer("offset", cells[None, :] - cells[:, None] + side - 1, persistent=False)
        elif pos == "sincos":
            self.register_buffer("table", sincos_table(side, head_dim), persistent=False)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Attend: (B, C, s, s) -> (B, h * d, s, s).

        Raises:
            ValueError: the map has another number of cells than the module was built for.
        """
        if feature_map.shape[2:] != (self.side, self.side):
            raise ValueError(
                f"attention was built for {self.side} x {self.side} cells and got {tuple(feature_map.shape[2:])}; "
                f"give --image-size the size of the views"
            )
        batch = feature_map.shape[0]
        rows = self.to_qkv(feature_map).permute(0, 2, 3, 1)  # (B, s, s, 3 h d)
        qkv = rows.reshape(batch, self.side**2, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # each (B, h, N, d)
        bias = self._relative_bias(query) if self.pos == "relative" else None
        table = self._key_table()
        if table is not None:
            key = key + table.to(key.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return out.transpose(1, 2).reshape(batch, self.side, self.side, -1).permute(0, 3, 1, 2)

    def _key_table(self) -> Tensor | None:
        """Position vectors (N, d) to add to the keys."""
        if self.pos == "absolute":
            return (self.row[:, None] + self.col[None, :]).flatten(0, 1)
        return self.table if self.pos == "sincos" else None  # type: ignore[return-value]

    def _relative_bias(self, query: Tensor) -> Tensor:
        """q_i . (rel_w + rel_h) / sqrt(d) for all pairs: (B, h, N, d) -> (B, h, N, N) in the query's dtype."""
        side = self.side
        scaled = (query / math.sqrt(self.head_dim)).unflatten(2, (side, side))  # (B, h, y, x, d)
        by_row = torch.einsum("bhyxd,yjd->bhyxj", scaled, self.rel_h[self.offset].to(query.dtype))  # type: ignore[index]
        by_col = torch.einsum("bhyxd,xjd->bhyxj", scaled, self.rel_w[self.offset].to(query.dtype))  # type: ignore[index]
        bias = by_row.unsqueeze(-1) + by_col.unsqueeze(-2)  # (B, h, y, x, y_j, x_j)
        return bias.flatten(4).flatten(2, 3).to(query.dtype)


class AttentionBlock(nn.Module):
    """ReLU(main + shortcut), where main is 1x1, attention, [pooling], 1x1 with batch norms between.

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the output map.
        side: cells a side of the input.
        heads: attention heads; each has out_channels / 4 / heads channels.
        pos: position encoding.
        downsample: halve the side: 2x2 average pooling after attention, a strided 3x3 convolution as shortcut.

    Source: CARE (arXiv 2110.05340) Fig. 3 and its code for the order of the layers.
    Differs: an odd side is halved rounding up, as the convolution does; the code works on 14 x 14 only.
    """

    def __init__(
        self, in_channels: int, out_channels: int, side: int, heads: int, pos: Position, downsample: bool
    ) -> None:
        super().__init__()
        inner = out_channels // 4
        self.reduce = nn.Conv2d(in_channels, inner, kernel_size=1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(inner)
        self.attention = CellAttention(inner, side, heads, inner // heads, pos)
        self.pool: nn.Module = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if downsample else nn.Identity()
        self.attention_norm = nn.BatchNorm2d(inner)
        self.expand = nn.Conv2d(inner, out_channels, kernel_size=1, bias=False)
        self.expand_norm = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if downsample or in_channels != out_channels:
            kernel, stride, padding = (3, 2, 1) if downsample else (1, 1, 0)
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            )

    def forward(self, feature_map: Tensor) -> Tensor:
        """(B, in_channels, s, s) -> (B, out_channels, s or ceil(s / 2), likewise)."""
        x = F.relu(self.reduce_norm(self.reduce(feature_map)))
        x = F.relu(self.attention_norm(self.pool(self.attention(x))))
        return F.relu(self.expand_norm(self.expand(x)) + self.shortcut(feature_map))


class AttentionStream(nn.Sequential):
    """Attention blocks in a row.

    Args:
        in_channels: channels of the input map.
        out_channels: channels of every block's output.
        side: cells a side of the input map.
        blocks: number of blocks (n).
        heads: attention heads.
        pos: position encoding.
        downsample: halve the side in the first block.
        zero_init: start the last batch norm of each block at gamma 0; the code means to, then resets it to 1.

    Raises:
        ValueError: a number of blocks or heads that does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        side: int,
        *,
        blocks: int = 5,
        heads: int = 4,
        pos: Position = "absolute",
        downsample: bool = True,
        zero_init: bool = False,
    ) -> None:
        if blocks < 1:
            raise ValueError(f"--n-blocks {blocks} must be at least 1")
        if out_channels % (4 * heads):
            raise ValueError(
                f"--heads {heads} does not divide the {out_channels // 4} channels of the attention stream"
            )
        inside = -(-side // 2) if downsample else side
        super().__init__(
            AttentionBlock(in_channels, out_channels, side, heads, pos, downsample),
            *(AttentionBlock(out_channels, out_channels, inside, heads, pos, False) for _ in range(blocks - 1)),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if zero_init:
            for block in self:
                nn.init.zeros_(block.expand_norm.weight)  # type: ignore[arg-type, union-attr]
