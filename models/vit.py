"""MoCo v3's vision transformers as trunks whose map has one cell: the class token, which is the image's feature."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 16
_PUBLISHED_SIDE = 224 // PATCH


def sincos_positions(side: int, dim: int) -> Tensor:
    """Fixed positions (1, 1 + side * side, dim) of a square grid in row-major order; zeros for the class token.

    Of each cell's channels the first half are sines and cosines of its row, the second of its column.

    Args:
        side: cells a side.
        dim: channels, a multiple of 4.

    Source: MoCo v3 (arXiv 2104.02057) section 4.4; facebookresearch/moco-v3 vits.py, temperature 10000.
    """
    cells = torch.arange(side, dtype=torch.float32)
    rows, columns = (grid.flatten() for grid in torch.meshgrid(cells, cells, indexing="ij"))
    rates = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    angles = [torch.outer(place, rates) for place in (rows, columns)]
    grid = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim), grid])[None]


# Kept, because a step must not wait for a copy to the device.
@cache
def _positions_on(side: int, dim: int, device: torch.device) -> Tensor:
    return sincos_positions(side, dim).to(device)


class _PatchEmbedding(nn.Module):
    """Images (B, 3, S, S) -> patch tokens as a map (B, C, S/16, S/16), by a projection that stays as it was drawn."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=PATCH, stride=PATCH)
        bound = math.sqrt(6.0 / (3 * PATCH * PATCH + dim))
        nn.init.uniform_(self.proj.weight, -bound, bound)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]
        # Training it makes runs unstable: gradients there have spikes (MoCo v3, section 4.2).
        self.proj.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.proj(images)
        return found


class _Attention(nn.Module):
    """Multi-head self-attention of tokens (B, N, C)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        # (3, B, heads, N, C / heads)
        query, key, value = self.qkv(tokens).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        found: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, count, dim))
        return found


class _Mlp(nn.Module):
    """Two linear layers with GELU, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return found


class _Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and beside a residual connection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), _Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), _Mlp(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        found: Tensor = tokens + self.mlp(self.norm2(tokens))
        return found


class VitTrunk(nn.Module):
    """ViT with fixed positions and a fixed random patch projection: images (B, 3, S, S) -> class token (B, C, 1, 1).

    S is any multiple of 16. Tensors have timm's names. No dropout and no drop-path, as in the paper's pre-training.

    Args:
        dim: channels (C), a multiple of 4.
        depth: blocks.
        heads: attention heads.

    Source: MoCo v3 (arXiv 2104.02057) sections 4.2 and 4.4; facebookresearch/moco-v3 vits.py. Its ViT-S has 12 heads,
    where others' have 6.
    """

    stride: int = PATCH
    feature_dim: int
    pos_embed: Tensor

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.feature_dim = dim
        self.patch_embed = _PatchEmbedding(dim)
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, dim))
        # A buffer, so that files have it by timm's name; it is read at the published size alone.
        self.register_buffer("pos_embed", sincos_positions(_PUBLISHED_SIDE, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(_draw_start)

    def forward(self, images: Tensor) -> Tensor:
        """The class token after the last LayerNorm, as a map of one cell (B, C, 1, 1).

        Raises:
            ValueError: images that are not square or no whole number of patches a side.
        """
        height, width = images.shape[2:]
        if height != width or height % PATCH:
            raise ValueError(f"images of {height} x {width} are no square of whole patches of {PATCH} px")
        cells = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(cells), -1, -1).to(cells.dtype), cells], dim=1)
        tokens = self.blocks(tokens + self._positions(height // PATCH, tokens))
        # Only the class token is read, and LayerNorm works token by token.
        first: Tensor = self.norm(tokens[:, 0])
        return first[:, :, None, None]

    def _positions(self, side: int, like: Tensor) -> Tensor:
        if side == _PUBLISHED_SIDE:
            return self.pos_embed.to(like.dtype)
        return _positions_on(side, self.feature_dim, like.device).to(like.dtype)


def _draw_start(layer: nn.Module) -> None:
    """Xavier-uniform weights, those of query, key and value each by themselves, and zero biases."""
    if isinstance(layer, _Attention):
        dim = layer.qkv.in_features
        bound = math.sqrt(6.0 / (2 * dim))
        # `apply` visits children first, so this takes the place of what the Linear below drew.
        nn.init.uniform_(layer.qkv.weight, -bound, bound)
    elif isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
