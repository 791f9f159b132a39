"""Pictures for a report: what a run's augmentation makes of its own images, and its mixed views with their boxes."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pipeline import augment
from pipeline.regions import Region
from train.record.run import CONFIG, Run
from train.record.seen import MixedStep, first_views, mixed_steps
from train.resolve import resolve

_IMAGES = 8
_MIXED_STEPS = 3
_GAP_PX = 4
_PLOTTED = ("boxes", "embedding")
"""Analyses that are plots."""
_CELL_PX = (96, 144)
"""Smallest and largest side of one picture: small views are enlarged by a whole factor, large ones reduced."""


@dataclass(frozen=True)
class Picture:
    """A grid of images as one PNG.

    Attributes:
        title: what it shows.
        note: how to read it.
        uri: `data:` address of the PNG.
        width_px: its width.
        plotted: drawn on white, as a plot is, and not made of photos.
    """

    title: str
    note: str
    uri: str
    width_px: int
    plotted: bool = False


def run_pictures(run: Run) -> list[Picture]:
    """Views of a few of the run's images, and mixed views where its method makes them, as training saw them.

    Raises:
        UserMistake: when the configuration or the data of the run cannot be read, with the reason.
    """
    config = resolve(["--config", str(run.folder / CONFIG)])
    cell = _cell_px(config.recipe.image_size)
    pictures = [
        _picture(
            "Augmented views",
            "One column an image; the two rows are the two views that the method compares, as it sees them.",
            [_resized(_pixels(view), cell) for view in first_views(config, _IMAGES).values()],
        )
    ]
    steps = mixed_steps(config, run.config.get("world_size", 1), _IMAGES, _MIXED_STEPS)
    if steps:
        pictures.append(_mixed_picture(steps, cell))
    return pictures


def analysis_pictures(run_dir: Path) -> list[Picture]:
    """The pictures that `tools/analyze.py` left in a run's folder, by name: those with a description beside them."""
    found = []
    for path in sorted(run_dir.glob("*.png")):
        try:
            about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            content = path.read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                # Only a whole PNG goes into the page.
                image.verify()
                width = image.width
        except (OSError, ValueError, SyntaxError):  # verify() calls a damaged PNG a syntax error
            continue
        if isinstance(about, dict) and "analysis" in about:
            title, note = (str(about.get(name, "")) for name in ("title", "note"))
            plotted = about["analysis"] in _PLOTTED
            found.append(Picture(title or str(about["analysis"]), note, _data_uri(content), width, plotted))
    return found


def _pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, S, S, 3) of normalised images (B, 3, S, S)."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (augment.MEAN, augment.STD))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _mixed_picture(steps: list[MixedStep], cell: int) -> Picture:
    scale, grid = cell / steps[0].images.shape[3], steps[0].grid
    rows = [[_boxed(image, step.region, scale) for image in _resized(_pixels(step.images), cell)] for step in steps]
    return _picture(
        "Mixed views",
        "Rows are the first steps: each image with the region of another pasted in (solid line). The dashed line is "
        f"the box of feature cells that is pooled as the paste; the grid has {grid} x {grid} cells.",
        rows,
    )


def _boxed(image: Image.Image, region: Region, scale: float) -> Image.Image:
    draw = ImageDraw.Draw(image)
    top, left, height, width = region.box_cells
    stride_px = region.height_px // height
    pooled = (left * stride_px, top * stride_px, width * stride_px, height * stride_px)
    pasted = (region.left_px, region.top_px, region.width_px, region.height_px)
    for (x, y, w, h), colour in ((pasted, (255, 255, 255)), (pooled, (230, 30, 90))):
        corners = [x * scale, y * scale, (x + w) * scale - 1, (y + h) * scale - 1]
        # Drawn first and thicker, so that the dashed box stays visible where both meet.
        if colour == (255, 255, 255):
            draw.rectangle(corners, outline=colour, width=3)
        else:
            _dashed(draw, corners, colour)
    return image


def _dashed(draw: ImageDraw.ImageDraw, corners: list[float], colour: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = corners
    for start in np.arange(0.0, max(x1 - x0, y1 - y0), 8.0):
        for a, b in ((y0, y0), (y1, y1)):
            if x0 + start < x1:
                draw.line([x0 + start, a, min(x0 + start + 4, x1), b], fill=colour)
        for a, b in ((x0, x0), (x1, x1)):
            if y0 + start < y1:
                draw.line([a, y0 + start, b, min(y0 + start + 4, y1)], fill=colour)


def _cell_px(size: int) -> int:
    if size > _CELL_PX[1]:
        return _CELL_PX[1]
    # A whole factor, so that every source pixel is a square.
    return size * max(1, math.ceil(_CELL_PX[0] / size))


def _resized(images: torch.Tensor, cell: int) -> list[Image.Image]:
    """PIL images of `cell` pixels a side from uint8 (B, S, S, 3)."""
    size = images.shape[1]
    # Enlarged, single pixels stay visible; reduced, they must not alias.
    method = Image.Resampling.NEAREST if cell % size == 0 else Image.Resampling.LANCZOS
    return [Image.fromarray(np.ascontiguousarray(image)).resize((cell, cell), method) for image in images.numpy()]


def _picture(title: str, note: str, rows: list[list[Image.Image]]) -> Picture:
    cell = rows[0][0].width
    columns = max(len(row) for row in rows)
    width, height = (n * cell + (n - 1) * _GAP_PX for n in (columns, len(rows)))
    sheet = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * (cell + _GAP_PX), y * (cell + _GAP_PX)))
    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    return Picture(title, note, _data_uri(stream.getvalue()), width)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
