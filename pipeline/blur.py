"""Batched Gaussian blur with one sigma per image."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

REACH = 4.0
"""Taps farther than this many sigmas from the centre are left out: together they weigh 6e-5, 0.02 grey levels."""


def blur_radius(side: int, largest_sigma: float = math.inf) -> int:
    """Taps on each side of the centre: kernels of about a tenth of the side, 23 taps at 224 px.

    Source: BYOL, appendix B (a 23 x 23 kernel at 224 px). Below about 160 px the kernel cuts off the tails of the
    largest sigmas (2 px) and is normalised again.

    Args:
        side: the shorter side of the images in pixels.
        largest_sigma: largest sigma in use; no more taps are kept than `REACH` leaves it.

    Raises:
        ValueError: for a side under 2 px, which has nothing to reflect.
    """
    if side < 2:
        raise ValueError(f"cannot blur images of {side} px; use at least 2 px a side")
    return int(min(max(1, round(side / 20)), REACH * largest_sigma))


def gaussian_taps(sigma: Tensor, radius: int) -> Tensor:
    """Normalised kernels (B, 2 * radius + 1) for `sigma` (B,) in pixels."""
    position = torch.arange(-radius, radius + 1, device=sigma.device, dtype=sigma.dtype)
    weight = torch.exp(-0.5 * (position / sigma.unsqueeze(1)) ** 2)
    # Four times a float is exact, so every implementation leaves out the same taps.
    weight = torch.where(position.abs() <= REACH * sigma.unsqueeze(1), weight, 0.0)
    return weight / weight.sum(dim=1, keepdim=True)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image with its own sigma, borders mirrored without repeating the edge pixel.

    The border rule and the kernel are torchvision's, but for the taps beyond `REACH`. Differs: the official codes call
    PIL's GaussianBlur(radius = sigma), repeated box blurs that approximate the same Gaussian.

    Args:
        images: (B, C, H, W) floating point.
        sigma: (B,) of the same dtype, in pixels.
        radius: taps on each side of the centre, less than H and W.

    Returns:
        (B, C, H, W), newly allocated.
    """
    taps = gaussian_taps(sigma, radius)
    blurred = _blur_rows(images, taps, radius)
    # The second pass works on the transpose, so that both walk along contiguous memory.
    return _blur_rows(blurred.transpose(2, 3), taps, radius).transpose(2, 3)


def _blur_rows(images: Tensor, taps: Tensor, radius: int) -> Tensor:
    """One pass along the last axis, as a sum of shifted slices: exact fp32 on any device (a convolution may use TF32),
    the same for an image whatever else is in its batch.
    """
    width = images.shape[3]
    padded = F.pad(images, (radius, radius, 0, 0), mode="reflect")
    weights = taps.unbind(1)
    total = padded[..., radius : radius + width] * weights[radius].view(-1, 1, 1, 1)
    for distance in range(1, radius + 1):
        pair = padded[..., radius - distance : radius - distance + width]
        pair = pair + padded[..., radius + distance : radius + distance + width]
        total.addcmul_(pair, weights[radius + distance].view(-1, 1, 1, 1))
    return total
