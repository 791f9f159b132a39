"""Running statistics of many batch norms moved together: two multi-tensor calls for a pass instead of four a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class Move(NamedTuple):
    """One batch that a layer has seen.

    Attributes:
        norm: the layer; it has running statistics and a momentum.
        mean: (G, C) of the batch's groups.
        variance: (G, C), unbiased after multiplication with `correction`.
        correction: n / (n - 1) where `variance` is the biased one, else 1.
    """

    norm: _BatchNorm
    mean: Tensor
    variance: Tensor
    correction: float = 1.0


@dataclass
class _Pending:
    moves: list[Move] | None = None
    """What the pass has left so far; None outside of `moved_together`."""


_pending = _Pending()


@contextmanager
def moved_together() -> Iterator[None]:
    """Within the block batch norms leave their statistics; at its end all running statistics move, in order.

    The result is that of moving each layer in its turn. An error inside the block moves nothing.
    """
    # A block inside a block (an evaluation in a forward pass) belongs to the outer one.
    if _pending.moves is not None:
        yield
        return
    _pending.moves = []
    try:
        yield
        move_pending()
    finally:
        _pending.moves = None


def is_moved_together() -> bool:
    """Whether what a layer leaves now is moved later, within `moved_together`; never in a graph that is compiled."""
    # A compiled graph cannot leave tensors for later.
    return _pending.moves is not None and not torch.compiler.is_compiling()


def leave(norm: _BatchNorm, mean: Tensor, variance: Tensor, correction: float) -> bool:
    """Leave a batch's statistics for the end of `moved_together`; false outside of it. Arguments as for `move`."""
    if not is_moved_together():
        return False
    _pending.moves.append(Move(norm, mean, variance, correction))  # type: ignore[union-attr]
    return True


def move(norm: _BatchNorm, mean: Tensor, variance: Tensor, correction: float = 1.0) -> None:
    """Move the running statistics of one layer towards a batch's: now, or at the end of `moved_together`.

    Args:
        norm: has running statistics, counter and momentum.
        mean: (G, C), averaged over its groups.
        variance: (G, C), likewise, multiplied by `correction` first.
        correction: 1, or n / (n - 1) for biased variances.
    """
    if not leave(norm, mean, variance, correction):
        _move_all([Move(norm, mean, variance, correction)])


def move_pending() -> None:
    """Move now what was left within `moved_together`: before somebody reads running statistics in the same pass."""
    if is_moved_together() and _pending.moves:
        moves, _pending.moves = _pending.moves, []
        _move_all(moves)


@torch.no_grad()
def _move_all(moves: list[Move]) -> None:
    rounds: defaultdict[tuple, list[Move]] = defaultdict(list)
    seen: defaultdict[int, int] = defaultdict(int)
    for each in moves:
        # A layer's second batch starts from what its first has moved, so it belongs to the next round.
        turn = seen[id(each.norm)]
        seen[id(each.norm)] += 1
        # One call takes one momentum, and one concatenation one number of groups and one dtype.
        rounds[turn, each.norm.momentum, each.mean.shape[0], each.mean.dtype].append(each)
    for key in sorted(rounds, key=lambda key: key[0]):
        _move_round(rounds[key])
    layers = {id(each.norm): each.norm for each in moves}
    _count({each: seen[number] for number, each in layers.items()})


def _move_round(moves: list[Move]) -> None:
    """Move layers that each have one batch, all with as many groups."""
    means, variances = [each.mean for each in moves], [each.variance for each in moves]
    if any(each.correction != 1.0 for each in moves):
        variances = list(torch._foreach_mul(variances, [each.correction for each in moves]))
    for buffers, values in (
        ([each.norm.running_mean for each in moves], _averaged(means)),
        ([each.norm.running_var for each in moves], _averaged(variances)),
    ):
        if buffers[0].dtype != values[0].dtype:  # type: ignore[union-attr]
            values = [value.to(buffer.dtype) for value, buffer in zip(values, buffers, strict=True)]  # type: ignore
        torch._foreach_lerp_(buffers, values, moves[0].norm.momentum)  # type: ignore[arg-type]


def _averaged(values: list[Tensor]) -> list[Tensor]:
    """The mean over the groups of each (G, C), as (C,)."""
    if len(values[0]) == 1:
        return [value[0] for value in values]
    # One mean of all layers side by side instead of one for each.
    return list(torch.cat(values, 1).mean(0).split([value.shape[1] for value in values]))


def _count(batches: dict[_BatchNorm, int]) -> None:
    """Add to each layer's counter how many batches it has seen."""
    by_number: defaultdict[int, list[Tensor]] = defaultdict(list)
    for norm, number in batches.items():
        assert norm.num_batches_tracked is not None
        by_number[number].append(norm.num_batches_tracked)
    for number, counters in by_number.items():
        torch._foreach_add_(counters, number)
