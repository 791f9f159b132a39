"""Crop boxes: torchvision's distribution, limits, purity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from pipeline.geometry import draw_crops, portable_exp, validate_view
from pipeline.interface import ViewSpec


def boxes(spec: ViewSpec, n: int, height: int, width: int, seed: int = 3, epoch: int = 1) -> np.ndarray:
    return draw_crops(spec, seed, epoch, np.arange(n), np.full(n, height), np.full(n, width))


def test_portable_exp_is_exp() -> None:
    x = np.linspace(-4.7, 4.7, 2001)
    assert np.abs(portable_exp(x) / np.exp(x) - 1).max() < 1e-11


@pytest.mark.parametrize("height,width", [(300, 400), (37, 500), (500, 37), (1, 1), (1, 300), (2, 3)])
def test_boxes_lie_inside_the_image(height: int, width: int) -> None:
    top, left, box_height, box_width = boxes(ViewSpec("v", 224, scale=(0.05, 1.0)), 500, height, width).T
    assert (top >= 0).all() and (left >= 0).all() and (box_height > 0).all() and (box_width > 0).all()
    assert (top + box_height <= height).all() and (left + box_width <= width).all()


def test_distribution_matches_torchvision() -> None:
    n = 6000
    ours = boxes(ViewSpec("v", 224, scale=(0.2, 1.0)), n, 300, 400).astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(n)], dtype=float)
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        # Two-sample Kolmogorov-Smirnov distance; 1.95 * sqrt(2 / n) is the 0.1% point.
        grid = np.arange(401)
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / n
        assert distance < 1.95 * math.sqrt(2 / n)


def test_fallback_is_torchvisions_centre_crop() -> None:
    spec = ViewSpec("v", 224, scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
    for height, width in ((50, 500), (500, 50)):
        torch.manual_seed(0)
        expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
        assert (boxes(spec, 5, height, width) == np.array(expected)).all()


def test_each_part_of_the_address_matters_and_the_batch_does_not() -> None:
    spec = ViewSpec("v", 224)
    first = boxes(spec, 64, 300, 400)
    assert (first == boxes(spec, 64, 300, 400)).all()
    assert (first != boxes(spec, 64, 300, 400, seed=4)).any()
    assert (first != boxes(spec, 64, 300, 400, epoch=2)).any()
    assert (first != boxes(ViewSpec("v", 224, draw_id=1), 64, 300, 400)).any()
    shuffled = np.random.default_rng(0).permutation(64)
    again = draw_crops(spec, 3, 1, shuffled, np.full(64, 300), np.full(64, 400))
    assert (again == first[shuffled]).all()


def test_center_and_whole() -> None:
    assert boxes(ViewSpec("v", 224, kind="whole"), 1, 30, 40).tolist() == [[0, 0, 30, 40]]
    assert boxes(ViewSpec("v", 224, kind="center"), 1, 256, 512).tolist() == [[16, 144, 224, 224]]


@pytest.mark.parametrize(
    "spec",
    [
        ViewSpec("v", 0),
        ViewSpec("v", 8, kind="corner"),
        ViewSpec("v", 8, scale=(0.5, 0.2)),
        ViewSpec("v", 8, ratio=(0.0, 1.0)),
        ViewSpec("v", 8, interpolation="nearest"),
        ViewSpec("v", 8, kind="center", resize_ratio=0.5),
    ],
)
def test_impossible_views_are_refused(spec: ViewSpec) -> None:
    with pytest.raises(ValueError, match="view 'v'"):
        validate_view(spec)
