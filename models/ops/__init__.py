"""Operators with a PyTorch definition and, where it pays, a kernel of our own."""

from .batch_norm_act import batch_norm_act
from .box_pool import box_pool
from .masked_pool import masked_pool
from .queue_contrast import queue_contrast

__all__ = ["batch_norm_act", "box_pool", "masked_pool", "queue_contrast"]
