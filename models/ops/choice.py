"""Which implementation of an operator runs: its CUDA kernels or its PyTorch definition.

`POOL` decides for `box_pool` and `masked_pool`, `NORM` for `batch_norm_act`. An environment variable or `set` gives the
mode: "cuda" runs the kernels on CUDA tensors, "definition" the PyTorch definition, "auto" (default) what has been shown
to be right and faster. No one has run the kernels on a GPU yet, so "auto" leaves them off.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable

import torch
from torch import Tensor

MODES = ("auto", "cuda", "definition")

_logger = logging.getLogger(__name__)


@functools.cache
def _say_once(message: str, level: int) -> None:
    _logger.log(level, message)


class KernelChoice:
    """The mode of one family of kernels in this process.

    Args:
        what: the family's name in messages.
        variable: environment variable that holds the mode at start-up.
    """

    def __init__(self, what: str, variable: str) -> None:
        self.what, self.variable = what, variable
        self._mode = os.environ.get(variable, "auto")

    @property
    def mode(self) -> str:
        """One of `MODES`.

        Raises:
            ValueError: the environment variable holds something else. It is read at import, where an error would hide
                from the user which setting is wrong.
        """
        if self._mode not in MODES:
            raise ValueError(f"{self.variable}={self._mode!r} is unknown; choose from {', '.join(MODES)}")
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
            return "it was asked for"
        if not features.is_cuda:
            return f"the features are on {features.device.type}"
        if self.mode == "auto":
            return f"the CUDA kernels have not been run on a GPU yet ({self.variable}=cuda turns them on)"
        return None

    def runs(self, reason: str | None) -> bool:
        """Whether the kernels run, given why they do not; says so in the log, once for each reason."""
        if reason is None:
            _say_once(f"{self.what}: CUDA kernels, as asked for", logging.INFO)
            return True
        # Someone who asked for the kernels must see that something else runs.
        level = logging.WARNING if self.mode == "cuda" else logging.INFO
        _say_once(f"{self.what}: PyTorch definition, because {reason}", level)
        return False


POOL = KernelChoice("mask pooling", "REGATTA_POOL_KERNEL")
NORM = KernelChoice("fused batch norm", "REGATTA_NORM_KERNEL")


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
