"""Batched colour operations on float images in grey levels, one parameter per image.

All take and give (B, 3, H, W) floating point in [0, 255], any memory layout, and may write into their input. Nothing is
rounded between operations: torchvision and PIL round after each one (down, mostly), so one operation here is within one
grey level of theirs, and a chain does not collect their bias. Clamping happens where theirs does.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ITU-R 601 luma; PIL's 16-bit integers round the same three numbers.
LUMA = (0.299, 0.587, 0.114)
WHITE = 255.0


def luma(images: Tensor) -> Tensor:
    """ITU-R 601 luma, (B, H, W), of (B, 3, H, W)."""
    red, green, blue = images.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale by `factor` (B,), in place."""
    return images.mul_(factor.view(-1, 1, 1, 1)).clamp_(0.0, WHITE)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale by `factor` (B,) about each image's mean luma, in place.

    Differs: PIL rounds that mean to a grey level and torchvision rounds each pixel's luma down before averaging; the
    true mean moves a pixel by less than half a grey level for the factors in use.
    """
    mean = luma(images).mean(dim=(1, 2))
    offset = (1.0 - factor) * mean
    return images.mul_(factor.view(-1, 1, 1, 1)).add_(offset.view(-1, 1, 1, 1)).clamp_(0.0, WHITE)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale by `factor` (B,) about each pixel's own luma, in place."""
    grey = luma(images).mul_((1.0 - factor).view(-1, 1, 1)).unsqueeze(1)
    return images.mul_(factor.view(-1, 1, 1, 1)).add_(grey).clamp_(0.0, WHITE)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (B,), in fractions of the circle, at fixed HSV value and saturation.

    HSV is never built: with v the largest channel, c = v - smallest and h the hue in sextants, channel n of the result
    is v - c * clamp(min(k, 4 - k), 0, 1), k = (offset_n + h) mod 6, offsets 5, 3, 1 for red, green, blue.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    # Grey pixels have no hue; dividing by one leaves them unchanged because their chroma is zero.
    divisor = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sextant = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2.0, (red - green) / divisor + 4.0),
    )
    sextant.add_((6.0 * shift).view(-1, 1, 1))
    result = torch.empty_like(images)
    for channel, offset in enumerate((5.0, 3.0, 1.0)):
        k = torch.remainder(sextant + offset, 6.0)
        amount = torch.minimum(k, 4.0 - k).clamp_(0.0, 1.0).mul_(chroma)
        torch.sub(value, amount, out=result[:, channel])
    return result


def to_gray(images: Tensor) -> Tensor:
    """Replace the three channels by their luma, in place."""
    return images.copy_(luma(images).unsqueeze(1))


def solarize(images: Tensor) -> Tensor:
    """Invert what is 128 or brighter.

    On integers that is min(v, 255 - v), which is also continuous: a value that rounding would push over the
    threshold changes by no more than the rounding did.
    """
    return torch.minimum(images, WHITE - images)
