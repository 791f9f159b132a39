"""Operators with a PyTorch definition and, where it pays, a kernel of our own."""

from .box_pool import box_pool
from .masked_pool import masked_pool
from .queue_contrast import queue_contrast

__all__ = ["box_pool", "masked_pool", "queue_contrast"]
