"""A labelled data set that is drawn, not stored: shapes with textures, whose colour, place and size say nothing.

The class of a picture is one of four shapes with one of three textures. What varies besides are place, size and the
colour of the light, in a range that random crops and a strong colour jitter (the profile "mocov1") take away: a method
that learns what two views share finds the classes, and random filters see mostly colour.
"""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("plain", "stripes", "checks")
CLASSES = tuple(f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES)
SIDE = 48  # pixels
PERIOD = 8  # pixels of a texture


def _inside(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Which points lie in a shape of radius 1 around the origin."""
    if shape == "disc":
        return y**2 + x**2 < 1
    if shape == "square":
        return (abs(y) < 0.85) & (abs(x) < 0.85)
    if shape == "triangle":
        return (y < 0.8) & (y > 2 * abs(x) - 1)
    return (abs(y) < 0.3) & (abs(x) < 1) | (abs(x) < 0.3) & (abs(y) < 1)


def _texture(texture: str, phase: int) -> np.ndarray:
    """Which pixels have the second colour."""
    y, x = np.mgrid[:SIDE, :SIDE] + phase
    rows, columns = y % PERIOD < PERIOD // 2, x % PERIOD < PERIOD // 2
    return {"plain": np.zeros((SIDE, SIDE), bool), "stripes": rows, "checks": rows ^ columns}[texture]


def _colours(draw: np.random.Generator) -> np.ndarray:
    """Background and two foreground colours, (3, 3): dark, light and between, under a light of any hue."""
    levels = draw.uniform((40, 200, 100), (70, 240, 130))
    tint = colorsys.hsv_to_rgb(draw.uniform(), draw.uniform(0.3, 0.8), draw.uniform(0.7, 1.0))
    return levels[:, None] * np.array(tint)


def picture(label: int, draw: np.random.Generator) -> np.ndarray:
    """One picture of class `CLASSES[label]`: (SIDE, SIDE, 3) uint8."""
    shape, texture = SHAPES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    radius = draw.uniform(0.28, 0.42) * SIDE
    centre = draw.uniform(radius, SIDE - radius, 2)
    y, x = ((axis - middle) / radius for axis, middle in zip(np.mgrid[:SIDE, :SIDE], centre, strict=True))
    background, first, second = _colours(draw)
    inside = np.where(_texture(texture, int(draw.integers(PERIOD)))[..., None], second, first)
    image = np.where(_inside(shape, y, x)[..., None], inside, background)
    return np.clip(image + draw.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def write_pictures(folder: Path, per_class: int, seed: int) -> Path:
    """Draw `per_class` pictures of every class into class folders; returns `folder`."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = picture(label, np.random.default_rng((seed, label, number)))
            Image.fromarray(pixels).save(folder / name / f"{number:04d}.jpg", quality=95)
    return folder
