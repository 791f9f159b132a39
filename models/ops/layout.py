"""How maps are stored: the dtypes that kernels read, and the memory formats of tensors (B, C, H, W)."""

from __future__ import annotations

import torch
from torch import Tensor

STORAGE = {torch.float32: "Float32", torch.float16: "Float16", torch.bfloat16: "BFloat16"}
"""Dtypes that the kernels read and write, with the names of their structs in `storage.h`."""


def layout_of(pattern: Tensor) -> torch.memory_format:
    """Channels-last where `pattern` (B, C, H, W) is stored so, the default format otherwise."""
    channels_last = pattern.is_contiguous(memory_format=torch.channels_last) and not pattern.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def like_layout(tensor: Tensor, pattern: Tensor) -> Tensor:
    """`tensor` made contiguous in the memory format of `pattern` (both (B, C, H, W))."""
    return tensor.contiguous(memory_format=layout_of(pattern))


def channels_last(features: Tensor) -> Tensor:
    """The memory format that the kernels read; a copy where the features (B, C, H, W) are not stored so."""
    return features.contiguous(memory_format=torch.channels_last)
