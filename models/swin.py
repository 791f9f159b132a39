"""Swin-T as a trunk that ends in a feature map, with drop-path masks that any rank and any resumed run draws alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer, SwinTransformerBlock

from .draws import mixed_seed
from .ops.window_attention import window_attention

_START_STD = 0.02
_UNSEEN = -100.0
"""What the mask adds where one place must not see another; torchvision's number."""


class SwinTrunk(SwinTransformer):
    """torchvision's Swin-T without classifier: images (B, 3, S, S) -> normalised tokens as a map (B, C, S/32, S/32).

    Linear layers and position biases start normal with std 0.02 and biases at zero. The Swin code cuts that normal
    distribution off at -2 and 2, a hundred standard deviations away, which changes nothing. Drop-path is not a random
    layer here but an argument of `forward`, so that the same module serves as momentum network without it.

    Args:
        embed_dim: channels of the first stage, doubled by each of the next three.
        depths: blocks in each of the four stages.
        num_heads: attention heads in each.
        window_size: side of an attention window in tokens.

    Source: Swin (arXiv 2103.14030) as used by MoBY (arXiv 2105.04553): patch 4, window 7, MLP ratio 4, no absolute
    position embedding.
    """

    stride: int = 32

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
    ) -> None:
        # What torchvision draws is not used: `trunc_normal_` draws other numbers in other releases of torch, and that
        # of 2.11 leaves a few weights of a Swin-T at -2, for it takes the inverse error function of a float32.
        with torch.random.fork_rng(devices=[]):
            super().__init__(
                patch_size=[4, 4],
                embed_dim=embed_dim,
                depths=list(depths),
                num_heads=list(num_heads),
                window_size=[window_size, window_size],
                stochastic_depth_prob=0.0,
            )
        del self.head, self.avgpool, self.flatten
        self.apply(_draw_start)
        # A half window is what torchvision shifts by. Kept, since a mask that each block fills anew is twelve launches.
        self.register_buffer("parted", _parted(window_size, window_size // 2), persistent=False)
        self.feature_dim: int = embed_dim * 2 ** (len(depths) - 1)

    @property
    def num_blocks(self) -> int:
        """Transformer blocks in all stages."""
        return sum(len(_blocks_of(stage)) for stage in self.features)

    def forward(self, images: Tensor, branch_scale: Tensor | None = None) -> Tensor:
        """Tokens after the final LayerNorm as a map (B, C, S/32, S/32).

        Args:
            images: (B, 3, S, S).
            branch_scale: (2 * blocks, B) factors of the residual branches, attention before MLP, from
                `draw_branch_scale`; None leaves all branches as they are.
        """
        scales = iter(() if branch_scale is None else branch_scale.unbind(0))
        x = images
        for stage in self.features:
            blocks = _blocks_of(stage)
            for block in blocks:
                x = x + _scaled(_attended(block.attn, block.norm1(x), self.parted), next(scales, None))
                x = x + _scaled(block.mlp(block.norm2(x)), next(scales, None))
            if not blocks:
                x = stage(x)  # patch embedding or merging: (B, H, W, C)
        return self.norm(x).permute(0, 3, 1, 2)


def _parted(side: int, shift: int) -> Tensor:
    """Which places of a window a shift has brought together from two ends of a map: (2, L, L), by rows and by columns.

    Such a pair has `_UNSEEN`, every other 0. L is side * side, places in row-major order.
    """
    wrapped = torch.arange(side) >= side - shift
    by_row, by_column = wrapped.repeat_interleave(side), wrapped.repeat(side)
    ends = torch.stack([by_row, by_column])
    return torch.zeros(2, side**2, side**2).masked_fill_(ends[:, None] != ends[:, :, None], _UNSEEN)


def _mask(parted: Tensor, rows: int, columns: int, shift: Sequence[int]) -> Tensor | None:
    """What `window_attention` adds in a map of rows x columns windows that was shifted: (rows * columns, L, L)."""
    # Only the last row of windows, and the last column, hold places from both ends of the map.
    by_row = F.pad(parted[0][None], (0, 0, 0, 0, rows - 1, 0))[:, None] if shift[0] else None
    by_column = F.pad(parted[1][None], (0, 0, 0, 0, columns - 1, 0))[None] if shift[1] else None
    if by_row is None or by_column is None:
        only = by_column if by_row is None else by_row
        return None if only is None else only.expand(rows, columns, -1, -1).flatten(0, 1)
    return torch.minimum(by_row, by_column).flatten(0, 1)


def _attended(attention: ShiftedWindowAttention, x: Tensor, parted: Tensor) -> Tensor:
    """The attention of a block on tokens (B, H, W, C): torchvision's values, by `window_attention`."""
    batch, height, width, channels = x.shape
    high, wide = attention.window_size
    x = F.pad(x, (0, 0, 0, -width % wide, 0, -height % high)) if height % high or width % wide else x
    rows, columns = x.shape[1] // high, x.shape[2] // wide
    # One window covers the map along an axis: a shift would bring nothing new together.
    shift = [s if windows > 1 else 0 for s, windows in zip(attention.shift_size, (rows, columns), strict=True)]
    x = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
    windows = x.view(batch, rows, high, columns, wide, channels).transpose(2, 3)
    tokens = windows.reshape(batch, rows * columns, high * wide, channels)
    qkv = attention.qkv(tokens).unflatten(3, (3, attention.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    bias = attention.get_relative_position_bias()[0]
    values = window_attention(qkv[0], qkv[1], qkv[2], bias, _mask(parted, rows, columns, shift))
    tokens = attention.proj(values.transpose(2, 3).flatten(3))
    windows = tokens.view(batch, rows, columns, high, wide, channels).transpose(2, 3)
    x = windows.reshape(batch, rows * high, columns * wide, channels)
    x = x.roll(shift, (1, 2)) if any(shift) else x
    return x[:, :height, :width].contiguous()


def _draw_start(layer: nn.Module) -> None:
    """Give one layer the weights that it starts from."""
    if isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, std=_START_STD)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.Conv2d):
        layer.reset_parameters()
    elif isinstance(layer, ShiftedWindowAttention):
        nn.init.normal_(layer.relative_position_bias_table, std=_START_STD)


def _blocks_of(stage: nn.Module) -> list[SwinTransformerBlock]:
    """A stage's transformer blocks; empty for patch embedding and patch merging."""
    return [block for block in stage.children() if isinstance(block, SwinTransformerBlock)]


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    """A residual branch (B, H, W, C) times one factor an image."""
    return branch if scale is None else branch * scale.to(branch.dtype)[:, None, None, None]


def draw_branch_scale(
    blocks: int, drop_path: float, seed: int, step: int, tag: int, rows: slice, global_batch: int
) -> Tensor:
    """Factors of the residual branches for drop-path: 0 where a branch is dropped for an image, else 1 / keep rate.

    The drop rate grows linearly from 0 in the first block to `drop_path` in the last. All factors of the global batch
    are drawn from (seed, step, tag) and then sliced, so they do not depend on the number of ranks or on resumption.

    Args:
        blocks: transformer blocks.
        drop_path: drop rate of the last block, 0 <= drop_path < 1.
        seed: run seed.
        step: optimizer step.
        tag: which forward pass of the step.
        rows: positions of this rank in the global batch.
        global_batch: G.

    Returns:
        (2 * blocks, B) float32 on the CPU.

    Raises:
        ValueError: a rate outside its range.
    """
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"--drop-path {drop_path} must be at least 0 and below 1")
    generator = torch.Generator().manual_seed(mixed_seed(seed, step, tag))
    uniform = torch.rand(blocks, 2, global_batch, generator=generator)
    keep = 1.0 - torch.linspace(0.0, drop_path, blocks)[:, None, None]
    return ((uniform < keep) / keep).flatten(0, 1)[:, rows]
