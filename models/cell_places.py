"""Where the cells of a view's feature map lie in the image that the view was cut from, and which of two views meet."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Distance = Literal["sides", "pixels"]


def cell_places(boxes: Tensor, grid: tuple[int, int], distance: Distance = "sides") -> tuple[Tensor, Tensor]:
    """Centres of a feature map's cells in the image, and the size of a cell.

    Args:
        boxes: (B, 6) floating, left, top, right and bottom edge of the view, width and height of its image, in pixels;
            left is larger than right in a flipped view.
        grid: rows and columns of the feature map.
        distance: "pixels" gives pixels of the image. "sides" counts as the released code does: from the centre of the
            view's first pixel to that of its last, in shares of the way from the image's first pixel to its last.

    Returns:
        (B, S, 2) x and y of the S = rows * columns centres, row by row, and (B, 2) width and height of a cell, the
        width negative in a flipped view.

    Source: zdaxie/PixPro contrast/data/transform_coord.py and contrast/models/PixPro.py.
    """
    rows, columns = grid
    start, end = boxes[:, :2], boxes[:, 2:4]
    if distance == "sides":
        inwards = 0.5 * (end - start).sign()
        # One pixel at least: a way of no pixels would divide by zero.
        way = (boxes[:, 4:] - 1).clamp(min=1)
        start, end = (start + inwards - 0.5) / way, (end - inwards - 0.5) / way
    width, height = (end - start).unbind(dim=1)
    cell = torch.stack([width / columns, height / rows], dim=1)
    across = torch.arange(columns, device=boxes.device, dtype=boxes.dtype) + 0.5
    down = torch.arange(rows, device=boxes.device, dtype=boxes.dtype) + 0.5
    steps = torch.stack([across.repeat(rows), down.repeat_interleave(columns)], dim=1)
    return start[:, None] + steps * cell[:, None], cell


@torch.no_grad()
def near_pairs(
    first: Tensor, second: Tensor, grid: tuple[int, int], reach: float, distance: Distance = "sides"
) -> Tensor:
    """Which cells of two views of an image lie near each other in it.

    Args:
        first: (B, 6) boxes of one view, as `cell_places` takes them.
        second: (B, 6) boxes of the other.
        grid: rows and columns of both feature maps.
        reach: distance below which two cells are near, in diagonals of the larger of the two views' cells.
        distance: as for `cell_places`.

    Returns:
        (B, S, S) bool, S = rows * columns: cell of the first view, cell of the second.

    Source: PixPro (arXiv 2011.10043) Eq. 1; zdaxie/PixPro for the larger of the two diagonals.
    """
    (here, cell), (there, other) = (cell_places(boxes, grid, distance) for boxes in (first, second))
    diagonal = torch.maximum(cell.norm(dim=1), other.norm(dim=1))
    apart = (here[:, :, None] - there[:, None]).norm(dim=-1)
    return apart / diagonal[:, None, None] < reach
