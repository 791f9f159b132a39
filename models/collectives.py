"""Exchanges between ranks over rows of a batch: identity or a local operation without a process group.

All of them run on gloo (CPU) and nccl (CUDA). A rank's B rows are positions rank * B .. rank * B + B - 1 of the global
batch of G = B * world rows; every rank must hold the same number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _as_bytes(rows: Tensor) -> Tensor:
    """The memory of contiguous rows as (B, bytes per row) uint8: copies need no arithmetic, so any dtype travels."""
    return rows.reshape(rows.shape[0], -1).contiguous().view(torch.uint8)


def _rows_first_layout(tensor: Tensor) -> tuple[Tensor, bool]:
    """A contiguous form of the rows and whether it is channels-last, permuted to (B, H, W, C) without a copy."""
    channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    channels_last = channels_last and not tensor.is_contiguous()
    return (tensor.permute(0, 2, 3, 1) if channels_last else tensor.contiguous()), channels_last


def _restore_layout(rows: Tensor, channels_last: bool) -> Tensor:
    return rows.permute(0, 3, 1, 2) if channels_last else rows


@torch.no_grad()
def all_gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks in rank order, without a gradient.

    Args:
        tensor: (B, ...) of any dtype; channels-last memory is kept.

    Returns:
        (G, ...); the detached tensor itself where there is one process.
    """
    size = world()
    if size == 1:
        return tensor.detach()
    rows, channels_last = _rows_first_layout(tensor.detach())
    local = _as_bytes(rows)
    gathered = torch.empty((size * local.shape[0], local.shape[1]), dtype=torch.uint8, device=local.device)
    dist.all_gather_into_tensor(gathered, local)
    joined = gathered.view(tensor.dtype).view(size * rows.shape[0], *rows.shape[1:])
    return _restore_layout(joined, channels_last)


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks; a row's gradient is the sum of what all ranks' losses give it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        return all_gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        total = grads[0].contiguous().clone()
        # A sum of everything, because gloo has no reduce-scatter; embeddings are small.
        dist.all_reduce(total)
        first = rank() * ctx.rows
        own: Tensor = total[first : first + ctx.rows]
        return own


def gather_with_gradient(rows: Tensor) -> Tensor:
    """The rows of all ranks in rank order, through which gradients flow back to the rank that a row came from.

    With losses that are means over a rank's own rows, and gradients averaged over ranks afterwards, the result is the
    gradient of the mean over the global batch. Every rank must reach `backward`, which holds a collective.
    Compiled code must leave it out (`torch.compiler.disable`).

    Args:
        rows: (B, D) floating-point.

    Returns:
        (G, D); `rows` itself where there is one process.
    """
    if world() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        # Every rank computes the same loss from the sum, so the sum of the ranks' gradients needs no exchange.
        scaled: Tensor = grads[0] * world()
        return scaled


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' tensors, for a loss that every rank computes alike from it.

    Gradients are those of the sum of the ranks' equal losses, so that averaging what follows from them over ranks gives
    the gradient of one loss over the global batch. Compiled code must leave it out (`torch.compiler.disable`).

    Args:
        values: floating-point, of equal shape on all ranks.

    Returns:
        A tensor of that shape; `values` itself where there is one process.
    """
    if world() == 1:
        return values
    total: Tensor = _SumOverRanks.apply(values)
    return total


def _local_slice(permutation: Tensor, rows: int) -> Tensor:
    if permutation.numel() != rows * world():
        raise ValueError(
            f"a permutation of {permutation.numel()} positions does not fit {world()} rank(s) of {rows} rows; "
            f"it must have {rows * world()} entries"
        )
    return permutation[rank() * rows : (rank() + 1) * rows]


@torch.no_grad()
def shuffle_rows(local: Tensor, permutation: Tensor) -> Tensor:
    """This rank's slice of the permuted global batch: position j holds global row `permutation[j]`.

    With the permutation on the CPU each rank receives just the B rows that it needs (one all-to-all); with the
    permutation on the device, whose values the host cannot know without waiting, all rows are gathered first.

    Args:
        local: (B, ...) this rank's rows, any dtype; channels-last memory is kept.
        permutation: (G,) int64, equal on all ranks.

    Returns:
        (B, ...) without a gradient.

    Raises:
        ValueError: the permutation does not have G entries.
    """
    wanted = _local_slice(permutation, local.shape[0])
    if world() == 1:
        # PyTorch's selection writes its result in the default layout; over (B, H, W, C) that is channels-last.
        rows, channels_last = _rows_first_layout(local.detach())
        return _restore_layout(rows.index_select(0, wanted.to(local.device, non_blocking=True)), channels_last)
    if permutation.device.type == "cpu":
        return _exchange_rows(local, permutation)
    rows, channels_last = _rows_first_layout(all_gather_rows(local))
    return _restore_layout(rows.index_select(0, wanted.to(local.device, non_blocking=True)), channels_last)


def _exchange_rows(local: Tensor, permutation: Tensor) -> Tensor:
    """`shuffle_rows` by one all-to-all: every rank sends each other rank the rows that it asked for, in its order."""
    size, me, rows_here = world(), rank(), local.shape[0]
    source_of = permutation.view(size, rows_here)  # source_of[r] = global rows that rank r wants
    mine = source_of[me]
    owner = torch.div(mine, rows_here, rounding_mode="floor")
    receive_counts = torch.bincount(owner, minlength=size).tolist()
    send_lists = [wanted[(wanted >= me * rows_here) & (wanted < (me + 1) * rows_here)] for wanted in source_of]
    send_index = torch.cat(send_lists) - me * rows_here
    rows, channels_last = _rows_first_layout(local.detach())
    outgoing = rows.index_select(0, send_index.to(local.device, non_blocking=True))
    bytes_out = _as_bytes(outgoing)
    bytes_in = torch.empty_like(bytes_out)
    dist.all_to_all_single(bytes_in, bytes_out, receive_counts, [len(index) for index in send_lists])
    received = bytes_in.view(local.dtype).view(rows.shape)
    # Rows arrive ordered by owner, then by the position that wants them: a stable sort by owner says which is which.
    place = torch.empty_like(owner)
    place[torch.argsort(owner, stable=True)] = torch.arange(rows_here)
    return _restore_layout(received.index_select(0, place.to(local.device, non_blocking=True)), channels_last)


@torch.no_grad()
def unshuffle_rows(local: Tensor, permutation: Tensor) -> Tensor:
    """Inverse of `shuffle_rows`: this rank's own rows, back in the order of the global batch.

    Args:
        local: (B, ...) this rank's slice of the permuted batch.
        permutation: (G,) int64, the one given to `shuffle_rows`.

    Returns:
        (B, ...) without a gradient.

    Raises:
        ValueError: the permutation does not have G entries.
    """
    return shuffle_rows(local, torch.argsort(permutation))


@torch.no_grad()
def average_buffers(tensors: Sequence[Tensor]) -> None:
    """Replace each floating-point tensor by its mean over ranks, in place, with one collective for each dtype.

    Integer tensors (batch counters) are equal on all ranks and left alone.
    """
    size = world()
    if size == 1:
        return
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    for dtype in dict.fromkeys(tensor.dtype for tensor in floating):
        group = [tensor for tensor in floating if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        flat.div_(size)
        pieces = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [piece.view_as(tensor) for piece, tensor in zip(pieces, group, strict=True)])
