"""Mixtures of pairs of images, whole or by a box, as Un-Mix draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .draws import mixed_seed


@dataclass(frozen=True)
class Mixture:
    """How the images of a group are mixed with those of the reversed group.

    Attributes:
        share: of an image in its own mixture, 0..1; its partner has the rest.
        box: top, bottom, left and right of the pixels taken from the partner; None mixes all pixels in proportion.
    """

    share: float
    box: tuple[int, int, int, int] | None


def draw_mixture(height: int, width: int, beta: float, global_share: float, *address: int) -> Mixture:
    """A mixture for images of height x width pixels, a pure function of the address.

    Args:
        height: of the images.
        width: of the images.
        beta: both parameters of the beta distribution of the share.
        global_share: how often all pixels are mixed instead of a box.
        address: what the draw is for: seed, step, view and group.

    Source: Un-Mix (arXiv 2003.05438); szq0214/Un-Mix. As in that code a box is cut at the image's border, and
    the share is then counted anew from its pixels.
    """
    draws = np.random.default_rng(mixed_seed(*address))
    whole = draws.random() < global_share
    share = float(draws.beta(beta, beta))
    centre = int(draws.integers(height)), int(draws.integers(width))
    if whole:
        return Mixture(share, None)
    side = math.sqrt(1.0 - share)
    top, bottom = _edges(centre[0], int(height * side), height)
    left, right = _edges(centre[1], int(width * side), width)
    return Mixture(1.0 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def _edges(centre: int, length: int, limit: int) -> tuple[int, int]:
    return max(centre - length // 2, 0), min(centre + length // 2, limit)


def mix(images: Tensor, mixture: Mixture) -> Tensor:
    """Each image with its partner of the reversed group: (N, 3, H, W) -> a new tensor of that shape and layout."""
    partners = images.flip(0)
    if mixture.box is None:
        return torch.lerp(partners, images, mixture.share)
    top, bottom, left, right = mixture.box
    mixed = images.clone(memory_format=torch.preserve_format)
    mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return mixed
