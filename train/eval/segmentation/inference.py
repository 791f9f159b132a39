"""Logits of whole images: in one pass, or as the mean over sliding windows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .augment import fitted_size, normalise, resample_image
from .network import upsampled

Network = Callable[[Tensor], Tensor]
"""(1, 3, h, w) normalised image -> logits (1, classes, h', w') of any resolution."""


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start so that they cover `length` at most `stride` apart; the last one ends at the border."""
    # Rounded up, so that the last window reaches the border.
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(number * stride, length - window), 0) for number in range(count)]


def whole_logits(network: Network, image: Tensor) -> Tensor:
    """(1, classes, H, W) logits of an image (1, 3, H, W) in one pass."""
    return upsampled(network(image).float(), (image.shape[2], image.shape[3]))


def sliding_logits(network: Network, image: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """(1, classes, H, W) logits as the mean over all windows that see a pixel; a smaller image is one window."""
    height, width = image.shape[2:]
    total: Tensor | None = None
    seen = torch.zeros(1, 1, height, width, device=image.device)
    for top in window_starts(height, window[0], stride[0]):
        for left in window_starts(width, window[1], stride[1]):
            rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
            logits = whole_logits(network, image[:, :, rows, columns].contiguous(memory_format=torch.channels_last))
            # Only the first result tells the number of classes.
            if total is None:
                total = torch.zeros(1, logits.shape[1], height, width, device=image.device)
            total[:, :, rows, columns] += logits
            seen[:, :, rows, columns] += 1
    assert total is not None
    # Windows overlap unevenly near the border, so the sum is divided by how often each pixel was seen.
    return total / seen


def predict(
    network: Network,
    image: np.ndarray,
    device: torch.device,
    scale: tuple[int, int],
    window: tuple[int, int] | None,
    stride: tuple[int, int],
) -> Tensor:
    """Class of each pixel.

    Args:
        network: in eval mode.
        image: (H, W, 3) uint8.
        device: where to compute.
        scale: (long, short) edge that the image is made to fit into before; (0, 0): its own size.
        window: (height, width) of sliding windows, None for one pass over the whole image.
        stride: between windows.

    Returns:
        (H, W) int64 on the device.
    """
    size = fitted_size(image.shape[0], image.shape[1], scale)
    resized = torch.from_numpy(np.array(resample_image(image, size)))  # a copy, since files decode read-only
    pixels = normalise(resized.to(device).permute(2, 0, 1)[None].float())
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    logits = whole_logits(network, pixels) if window is None else sliding_logits(network, pixels, window, stride)
    # Scores are taken at the size of the labels.
    if size != image.shape[:2]:
        logits = upsampled(logits, (image.shape[0], image.shape[1]))
    return logits[0].argmax(0)
