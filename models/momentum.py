"""The momentum network: a frozen copy that follows the online network by an exponential moving average."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from .collectives import average_buffers
from .norm import running_buffers

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_and_freeze(online: ModuleT) -> ModuleT:
    """An equal copy of a module, buffers included, whose parameters take no gradient."""
    momentum = copy.deepcopy(online)
    for parameter in momentum.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return momentum


@torch.no_grad()
def ema_update(pairs: Sequence[tuple[nn.Module, nn.Module]], m: float, buffers: bool = False) -> None:
    """Move each momentum parameter to m * momentum + (1 - m) * online, all pairs in one group of launches.

    With equal networks, or with m = 1, the momentum network keeps its bits.

    Args:
        pairs: (online, momentum) modules of equal structure.
        m: EMA coefficient, 0..1.
        buffers: also average floating-point buffers (BN running statistics) and copy integer ones.

    Raises:
        ValueError: m outside 0..1, or a pair of unequal structure.

    Source: BYOL, arXiv 2006.07733, eq. 1; EMAN, arXiv 2101.08482, eq. 4 for the buffers.
    """
    if not 0.0 <= m <= 1.0:
        raise ValueError(f"EMA coefficient {m} is outside 0..1")
    online: list[Tensor] = []
    momentum: list[Tensor] = []
    for source, target in pairs:
        _extend(online, momentum, list(source.parameters()), list(target.parameters()))
        if buffers:
            _extend(online, momentum, list(source.buffers()), list(target.buffers()))
    floating = [index for index, tensor in enumerate(momentum) if tensor.is_floating_point()]
    if floating:
        torch._foreach_lerp_([momentum[i] for i in floating], [online[i] for i in floating], 1.0 - m)
    # Integers (batch norm's counters) have no average: they are taken over.
    counters = sorted(set(range(len(momentum))) - set(floating))
    if counters:
        torch._foreach_copy_([momentum[i] for i in counters], [online[i] for i in counters])


def _extend(online: list[Tensor], momentum: list[Tensor], source: list[Tensor], target: list[Tensor]) -> None:
    if [tensor.shape for tensor in source] != [tensor.shape for tensor in target]:
        raise ValueError("an online and a momentum module differ in structure; pair a module with its own copy")
    online.extend(source)
    momentum.extend(target)


@torch.no_grad()
def follow(pairs: Sequence[tuple[nn.Module, nn.Module]], m: float, whole_state: bool = False) -> None:
    """`ema_update` after an optimizer step, of parameters or of the whole state (EMAN).

    With `whole_state` the online running statistics are first averaged over ranks, so that all ranks' momentum networks
    stay equal to one process's.

    Args:
        pairs: (online, momentum) modules of equal structure.
        m: EMA coefficient, 0..1.
        whole_state: average batch-norm running statistics too.
    """
    if whole_state:
        # Each rank has seen other images: without this the ranks' momentum networks would drift apart.
        average_buffers([buffer for online, _ in pairs for buffer in running_buffers(online)])
    ema_update(pairs, m, buffers=whole_state)
