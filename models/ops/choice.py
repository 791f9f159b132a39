"""Which implementation of an operator runs: its kernels or its PyTorch definition.

Each operator has a `KernelChoice`. It begins as "auto": the kernels are off. `train/proving` compares and times them on
the card of a run, and sets "cuda" where they proved right and faster; tests and benchmarks set what they look at.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

import torch
from torch import Tensor

MODES = ("auto", "cuda", "definition")

_logger = logging.getLogger(__name__)


@functools.cache
def _say_once(message: str, level: int) -> None:
    _logger.log(level, message)


class KernelChoice:
    """The mode of one operator in this process: one of `MODES`.

    Args:
        what: the operator's name in messages.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._mode = "auto"

    @property
    def mode(self) -> str:
        """What runs: "cuda" is kernels on CUDA tensors, "definition" PyTorch's; "auto" if nobody has chosen."""
        return self._mode

    @property
    def asked_for(self) -> bool:
        """Whether a mode other than "auto" was chosen: networks then call the fused operator in either form."""
        return self.mode != "auto"

    def set(self, mode: str) -> None:
        """Choose the mode for this process.

        Raises:
            ValueError: an unknown mode.
        """
        if mode not in MODES:
            raise ValueError(f"the mode {mode!r} of {self.what} is unknown; choose from {', '.join(MODES)}")
        self._mode = mode

    def why_not(self, features: Tensor) -> str | None:
        """Why the kernels do not run for these features, whatever their shape; None where shape and dtype decide."""
        if self.mode == "definition":
            return "it was chosen"
        if not features.is_cuda:
            return f"the features are on {features.device.type}"
        if self.mode == "auto":
            return "the kernels have not been proved on this GPU (train/main.py --kernels does it)"
        return None

    def runs(self, reason: str | None) -> bool:
        """Whether the kernels run, given why they do not; says so in the log, once for each reason."""
        if reason is None:
            _say_once(f"{self.what}: CUDA kernels", logging.INFO)
            return True
        # Someone who chose the kernels must see that something else runs.
        level = logging.WARNING if self.mode == "cuda" else logging.INFO
        _say_once(f"{self.what}: PyTorch definition, because {reason}", level)
        return False


BOX_POOL = KernelChoice("box pooling")
MASKED_POOL = KernelChoice("mask pooling")
NORM = KernelChoice("fused batch norm")
QUEUE = KernelChoice("queue contrast")
"""Without kernels: "definition" holds the whole matrix of logits, the other modes take it block by block."""
AUGMENT = KernelChoice("augmentation")
WINDOWS = KernelChoice("window attention")
"""Without kernels of ours: "cuda" calls PyTorch's fused attention, the other modes hold the matrix of weights."""

CHOICES = {
    "batch_norm_act": NORM,
    "augmentation": AUGMENT,
    "box_pool": BOX_POOL,
    "masked_pool": MASKED_POOL,
    "queue_contrast": QUEUE,
    "window_attention": WINDOWS,
}
"""Every choice by the name of its operator."""


def unreadable(
    features: Tensor, others: Iterable[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]]
) -> str | None:
    """Why kernels cannot read tensors by their address alone: the first that is not stored as they expect.

    A kernel gets an address and no strides, so it would silently read the wrong elements of a strided tensor, and past
    the end of a short one.

    Args:
        features: tensor whose device the others must be on.
        others: name, tensor (None is left out), shape and dtype that the kernels expect.
    """
    for name, tensor, shape, dtype in others:
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            return f"the kernels take {name} of {dtype}, not {tensor.dtype}"
        if tensor.shape != shape:
            return f"the kernels take {name} of shape {shape}, not {tuple(tensor.shape)}"
        if tensor.device != features.device:
            return f"{name} is on {tensor.device}, the features on {features.device}"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return None
