"""Batch norm's kernels launched from C++, `batch_norm_act.cpp`: what that file needs to know of a launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .host_library import batch_norm_library
from .launcher import FUNCTIONS, Addresses

KERNELS = (
    "batch_norm_statistics",
    "batch_norm_join_statistics",
    "batch_norm_normalise",
    "batch_norm_normalise_added",
    "batch_norm_normalise_recompute",
    "batch_norm_normalise_recompute_added",
    "batch_norm_normalise_mask_added",
    "batch_norm_backward_sums",
    "batch_norm_backward_sums_recompute",
    "batch_norm_backward_sums_mask",
    "batch_norm_join_sums",
    "batch_norm_backward_input",
    "batch_norm_backward_input_recompute",
    "batch_norm_backward_input_mask",
    "batch_norm_backward_input_mask_added",
)
"""In the order of the enumeration in the source."""
Operator = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Plan(ctypes.Structure):
    """The launches for maps of one shape; fields as in the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*FUNCTIONS, "current_stream")),
        ("context", ctypes.c_void_p),
        ("kernels", ctypes.c_void_p * len(KERNELS)),
        ("rows", ctypes.c_longlong),
        *(
            (name, ctypes.c_int)
            for name in ("device", "channels", "groups", "splits", "columns", "lanes", "slices", "pack")
        ),
    ]


def plan_of(addresses: Addresses, **sizes: int) -> Plan:
    """A plan; `sizes` are the fields that follow from the shape."""
    kernels = (ctypes.c_void_p * len(KERNELS))(*(addresses.kernels[name] for name in KERNELS))
    return Plan(**addresses.functions, context=addresses.context, kernels=kernels, device=addresses.device, **sizes)


def operator() -> Operator | None:
    """The operator of the source; None while it is compiled, and where it cannot be."""
    path = batch_norm_library().loaded()
    return None if path is None else _operator_of(path)


@functools.cache
def _operator_of(path: Path) -> Operator:
    """The operator, after a look at whether its structure is the one above."""
    size = ctypes.CDLL(str(path)).batch_norm_act_plan_bytes()
    if size != ctypes.sizeof(Plan):
        raise RuntimeError(f"batch_norm_act.cpp takes a plan of {size} bytes, Python makes {ctypes.sizeof(Plan)}")
    found: Operator = torch.ops.regatta_host.batch_norm_act.default
    return found
