"""Fixed-size memory of keys from earlier steps: the negatives of MoCo-style losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """The last K keys, one a row, overwritten oldest first.

    The write position is a Python integer, so no step waits for the device to read it. Enqueueing happens after
    `backward`, so the loss may use `rows` itself as the snapshot before the step, without a copy.

    Args:
        size: K.
        dim: D.
        generator: source of the first rows; None uses PyTorch's global one, which all ranks must have seeded alike.

    Attributes:
        rows: (K, D) float32 buffer, unit rows.
        pointer: next row to overwrite.

    Source: MoCo (arXiv 1911.05722) section 3.2.
    """

    rows: Tensor

    def __init__(self, size: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"--queue-size {size} must be at least 1")
        self.register_buffer("rows", F.normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.pointer = 0

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest rows with keys (N, D), wrapping around at the end; N may be anything up to K.

        A key that is not finite leaves the row as it was: one NaN would make every later loss NaN.

        Raises:
            ValueError: more keys than rows: some would be overwritten before any loss had seen them.
        """
        size, count = self.rows.shape[0], keys.shape[0]
        if count > size:
            raise ValueError(f"{count} keys a step do not fit a queue of {size}; raise --queue-size to {count} or more")
        # At most two copies into the buffer itself: `loss.backward` has run, so nothing reads the old rows any more.
        until_end = min(count, size - self.pointer)
        _overwrite(self.rows[self.pointer : self.pointer + until_end], keys[:until_end])
        if until_end < count:
            _overwrite(self.rows[: count - until_end], keys[until_end:])
        self.pointer = (self.pointer + count) % size

    def extra_repr(self) -> str:
        """Size and dimension for `print`."""
        return f"{self.rows.shape[0]}, {self.rows.shape[1]}"


def _overwrite(rows: Tensor, keys: Tensor) -> None:
    finite = torch.isfinite(keys).all(dim=1, keepdim=True)
    rows.copy_(torch.where(finite, keys, rows))
