"""Pictures for a report: what a run's augmentation makes of its own images, and its mixed views with their boxes."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pipeline import augment, regions
from pipeline.interface import Batch, PipelineConfig
from pipeline.loaders import build_pipeline
from train.config import Config
from train.errors import UserMistake
from train.inputs import VIEWS, region_sampler, train_views
from train.resolve import resolve

_IMAGES = 8
_MIXED_STEPS = 3
_GAP_PX = 4
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
    """

    title: str
    note: str
    uri: str
    width_px: int


def run_pictures(run_dir: Path) -> list[Picture]:
    """Augmented views of a few of the run's images, and mixed views where its method makes them.

    The draws are those of epoch 0 and of the first steps, so the pictures are what the training saw for these images.

    Raises:
        UserMistake: when the configuration or the data of the run cannot be read, with the reason.
    """
    config = resolve(["--config", str(run_dir / "config.json")])
    batch = _some_images(config)
    views = [_grey_levels(batch.views[name]) for name in VIEWS]
    cell = _cell_px(config.recipe.image_size)
    pictures = [
        _picture(
            "Augmented views",
            "One column an image; the two rows are the two views that the method compares, as it sees them.",
            [_resized(view, cell) for view in views],
        )
    ]
    if hasattr(config.model, "region"):
        pictures.append(_mixed_picture(config, views[0], cell))
    return pictures


def analysis_pictures(run_dir: Path) -> list[Picture]:
    """The pictures that `tools/analyze.py` left in a run's folder, by name: those with a description beside them."""
    found = []
    for path in sorted(run_dir.glob("*.png")):
        try:
            about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            content = path.read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                image.verify()
                width = image.width
        except (OSError, ValueError, SyntaxError):  # verify() calls a damaged PNG a syntax error
            continue
        if isinstance(about, dict) and "analysis" in about:
            title, note = (str(about.get(name, "")) for name in ("title", "note"))
            found.append(Picture(title or str(about["analysis"]), note, _data_uri(content), width))
    return found


def _some_images(config: Config) -> Batch:
    run = config.run
    # Our own reader opens a packed file at once; FFCV's would first compile its pipeline.
    loader = "folder" if run.data.endswith(".beton") else run.loader
    settings = PipelineConfig(
        data=run.data,
        views=train_views(config),
        global_batch=_IMAGES,
        seed=run.seed,
        workers=1,
        augment=config.recipe.augment.profile,
    )
    try:
        pipeline = build_pipeline(loader, settings, quiet=True)
        try:
            return next(iter(pipeline))
        finally:
            pipeline.close()
    except (ValueError, OSError, ImportError, StopIteration) as reason:
        raise UserMistake(f"{run.data or 'no data'}: {reason}") from None


def _grey_levels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, S, S, 3) of a finished view."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (augment.MEAN, augment.STD))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _mixed_picture(config: Config, view: torch.Tensor, cell: int) -> Picture:
    size = config.recipe.image_size
    grid = max(size // 32, 1)
    sampler = region_sampler(config, grid)
    even = view[: len(view) // 2 * 2]
    # The few images of the picture are a group of their own, because the run's groups are larger.
    partner = dataclasses.replace(sampler, scope="group").partners(0, 0, len(even), len(even))
    rows = []
    for step in range(_MIXED_STEPS):
        region = sampler.region(step)
        mixed = regions.make_mixed(even.permute(0, 3, 1, 2), torch.from_numpy(partner), region).permute(0, 2, 3, 1)
        rows.append([_boxed(image, region, cell / size) for image in _resized(mixed, cell)])
    return _picture(
        "Mixed views",
        "Rows are the first steps: each image with the region of another pasted in (solid line). The dashed line is "
        f"the box of feature cells that is pooled as the paste; the grid has {grid} x {grid} cells.",
        rows,
    )


def _boxed(image: Image.Image, region: regions.Region, scale: float) -> Image.Image:
    draw = ImageDraw.Draw(image)
    top, left, height, width = region.box_cells
    stride_px = region.height_px // height
    pooled = (left * stride_px, top * stride_px, width * stride_px, height * stride_px)
    pasted = (region.left_px, region.top_px, region.width_px, region.height_px)
    for (x, y, w, h), colour in ((pasted, (255, 255, 255)), (pooled, (230, 30, 90))):
        corners = [x * scale, y * scale, (x + w) * scale - 1, (y + h) * scale - 1]
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
    return size * max(1, math.ceil(_CELL_PX[0] / size))


def _resized(images: torch.Tensor, cell: int) -> list[Image.Image]:
    """PIL images of `cell` pixels a side from uint8 (B, S, S, 3)."""
    size = images.shape[1]
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
