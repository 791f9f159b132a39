"""Mean of a feature map inside a box, outside it and over all of it, in one read of the map.

Source: RegionCL (arXiv 2111.12309) section 3.2: the paste region's feature is the mean inside its box, the canvas'
the mean of the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masked_pool import accumulation_dtype, layout_of, like_layout


def check_box_pool(feature_map: Tensor, box_cells: Tensor) -> None:
    """Refuse shapes and dtypes that do not fit each other."""
    if feature_map.ndim != 4 or box_cells.shape != (feature_map.shape[0], 4):
        raise ValueError(
            f"box_pool takes a feature map (B, C, H, W) and boxes (B, 4); "
            f"got {tuple(feature_map.shape)} and {tuple(box_cells.shape)}"
        )
    if box_cells.dtype != torch.int64:
        raise ValueError(f"box_cells must be int64 (top, left, height, width), not {box_cells.dtype}")


def box_masks(box_cells: Tensor, height: int, width: int) -> Tensor:
    """Boolean masks (B, H, W), true inside each box (B, 4) of top, left, height, width, cut off at the edge."""
    top, left, box_height, box_width = box_cells[:, :, None].unbind(1)  # each (B, 1)
    rows = torch.arange(height, device=box_cells.device)
    columns = torch.arange(width, device=box_cells.device)
    in_rows = (rows >= top) & (rows < top + box_height)  # (B, H)
    in_columns = (columns >= left) & (columns < left + box_width)  # (B, W)
    return in_rows[:, :, None] & in_columns[:, None, :]


def _weights(box_cells: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """(B, 3, S): 0/1 masks of paste, canvas and everything, each divided by its number of cells (0 where empty)."""
    paste = box_masks(box_cells, height, width).flatten(1)
    masks = torch.stack([paste, ~paste, torch.ones_like(paste)], dim=1).to(dtype)
    return masks / masks.sum(dim=2, keepdim=True).clamp(min=1)


def box_pool_definition(feature_map: Tensor, box_cells: Tensor) -> Tensor:
    """The mathematics in plain PyTorch; arguments and result as for `box_pool`."""
    dtype = accumulation_dtype(feature_map.dtype)
    with torch.autocast(feature_map.device.type, enabled=False):
        weights = _weights(box_cells, feature_map.shape[2], feature_map.shape[3], dtype)
        return torch.bmm(weights, feature_map.flatten(2).to(dtype).mT).to(feature_map.dtype)


def box_pool_backward_definition(grad: Tensor, feature_map: Tensor, box_cells: Tensor) -> Tensor:
    """Gradient for the feature map: every cell gets the gradients of the means it is part of, over their sizes."""
    batch, channels, height, width = feature_map.shape
    dtype = accumulation_dtype(feature_map.dtype)
    with torch.autocast(feature_map.device.type, enabled=False):
        weights = _weights(box_cells, height, width, dtype)
        by_position = torch.bmm(weights.mT, grad.to(dtype)).to(feature_map.dtype)  # (B, S, C)
    return like_layout(by_position.view(batch, height, width, channels).permute(0, 3, 1, 2), feature_map)


@torch.library.custom_op("regatta::box_pool", mutates_args=())
def _box_pool(feature_map: Tensor, box_cells: Tensor) -> Tensor:
    return box_pool_definition(feature_map, box_cells).contiguous()


@_box_pool.register_fake
def _(feature_map: Tensor, box_cells: Tensor) -> Tensor:
    return feature_map.new_empty((feature_map.shape[0], 3, feature_map.shape[1]))


@torch.library.custom_op("regatta::box_pool_backward", mutates_args=())
def _box_pool_backward(grad: Tensor, feature_map: Tensor, box_cells: Tensor) -> Tensor:
    return box_pool_backward_definition(grad.contiguous(), feature_map, box_cells)


@_box_pool_backward.register_fake
def _(grad: Tensor, feature_map: Tensor, box_cells: Tensor) -> Tensor:
    return torch.empty_like(feature_map, memory_format=layout_of(feature_map))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    feature_map, box_cells = ctx.saved_tensors
    return _box_pool_backward(grad, feature_map, box_cells), None


_box_pool.register_autograd(_backward, setup_context=_setup_context)


def box_pool(feature_map: Tensor, box_cells: Tensor) -> Tensor:
    """Paste mean, canvas mean and global mean of every image.

    Args:
        feature_map: (B, C, H, W), any floating dtype, either memory format.
        box_cells: (B, 4) int64 on the same device: top, left, height, width in feature cells; a part of a box outside
            the map is cut off.

    Returns:
        (B, 3, C) in the map's dtype, summed in float32 (float64 for float64): the mean inside the box (zeros for an
        empty box), the mean of the rest (zeros when the box fills the map), the mean of everything. An empty part
        passes no gradient.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_box_pool(feature_map, box_cells)
    return _box_pool(feature_map, box_cells)
