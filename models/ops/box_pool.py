"""Mean of a feature map inside a box, outside it and over all of it, in one read of the map.

Source: RegionCL (arXiv 2111.12309) section 3.2: the paste region's feature is the mean inside its box, the canvas'
the mean of the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .box_pool_kernels import kernels_for
from .layout import layout_of, like_layout
from .operator import differentiable
from .precision import accumulated_matmul, accumulation_dtype


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


def _cell_counts(paste: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, 1): cells in the box, outside and altogether, at least 1, from the boolean masks (B, S)."""
    cells = paste.sum(dim=1, dtype=dtype)
    everything = torch.full_like(cells, paste.shape[1])
    return torch.stack([cells, everything - cells, everything], dim=1)[:, :, None].clamp(min=1)


def box_pool_definition(feature_map: Tensor, box_cells: Tensor) -> Tensor:
    """The mathematics in plain PyTorch; arguments and result as for `box_pool`."""
    with torch.autocast(feature_map.device.type, enabled=False):
        paste = box_masks(box_cells, feature_map.shape[2], feature_map.shape[3]).flatten(1)
        masks = torch.stack([paste, ~paste, torch.ones_like(paste)], dim=1)  # (B, 3, S); 0 and 1 are exact in any dtype
        sums = accumulated_matmul(masks.to(feature_map.dtype), feature_map.flatten(2).mT)  # (B, 3, C)
        return (sums / _cell_counts(paste, sums.dtype)).to(feature_map.dtype)


def box_pool_backward_definition(grad: Tensor, feature_map: Tensor, box_cells: Tensor) -> Tensor:
    """Gradient for the feature map: every cell gets the gradients of the means it is part of, over their sizes."""
    with torch.autocast(feature_map.device.type, enabled=False):
        paste = box_masks(box_cells, feature_map.shape[2], feature_map.shape[3])
        dtype = accumulation_dtype(feature_map.dtype)
        per_cell = grad.to(dtype) / _cell_counts(paste.flatten(1), dtype)  # (B, 3, C)
        inside, outside = ((per_cell[:, part] + per_cell[:, 2]).to(feature_map.dtype) for part in (0, 1))  # each (B, C)
        by_cell = torch.where(paste[..., None], inside[:, None, None], outside[:, None, None])  # (B, H, W, C)
        return like_layout(by_cell.permute(0, 3, 1, 2), feature_map)


def _forward(feature_map: Tensor, box_cells: Tensor) -> Tensor:
    kernels = kernels_for(feature_map, box_cells)
    return kernels.forward(feature_map, box_cells) if kernels else box_pool_definition(feature_map, box_cells)


def _forward_fake(feature_map: Tensor, box_cells: Tensor) -> Tensor:
    return feature_map.new_empty((feature_map.shape[0], 3, feature_map.shape[1]))


def _backward(grad: Tensor, feature_map: Tensor, box_cells: Tensor) -> Tensor:
    kernels = kernels_for(feature_map, box_cells)
    if kernels is None:
        return box_pool_backward_definition(grad, feature_map, box_cells)
    return like_layout(kernels.backward(grad, feature_map, box_cells), feature_map)


def _backward_fake(grad: Tensor, feature_map: Tensor, box_cells: Tensor) -> Tensor:
    return torch.empty_like(feature_map, memory_format=layout_of(feature_map))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(backward, ctx, grad: Tensor) -> tuple[Tensor, None]:
    feature_map, box_cells = ctx.saved_tensors
    return backward(grad, feature_map, box_cells), None


_box_pool = differentiable(
    "box_pool",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)


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
    pooled: Tensor = _box_pool(feature_map, box_cells)
    return pooled
