"""Which samples a rank sees at which step: pure integer functions of (seed, epoch, index of the data).

Step t of an epoch uses positions t*B .. (t+1)*B - 1 of the epoch's order, B the global batch, and rank r takes the
r-th contiguous slice of them. So the global sequence is the same for any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .rng import SLOT_EPOCH_ORDER, SLOT_HOLDOUT, permutation


def hold_out(n: int, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Split range(n) into what is trained on and `count` held-out samples, both sorted int64; depends on the seed."""
    if not 0 <= count < n:
        raise ValueError(f"cannot hold out {count} of {n} samples; choose a number from 0 to {n - 1}")
    # A slot of its own: the split must not follow from the order of the first epoch.
    chosen = permutation(seed, n, 0, 0, SLOT_HOLDOUT)[:count]
    kept = np.ones(n, dtype=bool)
    kept[chosen] = False
    return np.flatnonzero(kept).astype(np.int64), np.sort(chosen).astype(np.int64)


def global_order(population: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the whole population (int64 sample indices) for one epoch."""
    return population[permutation(seed, len(population), epoch, 0, SLOT_EPOCH_ORDER)]


def sharded_order(population: np.ndarray, seed: int, epoch: int, block_sizes: np.ndarray, window: int) -> np.ndarray:
    """A permutation of blocks, and of the samples within windows of them, for stores that are read in sequence.

    Args:
        population: sorted int64 sample indices in storage order.
        seed: run seed.
        epoch: epoch number.
        block_sizes: samples in each block (a shard, or a run of pages of a packed file), summing to the store's size,
            in storage order. Samples outside the population are dropped from their block.
        window: how many consecutive blocks of the permuted sequence are mixed with one another; at most this many
            need to be held in memory at a time.

    Returns:
        int64 sample indices, a permutation of the population.
    """
    # Where each block's samples stand in the population, which may lack some.
    starts = np.concatenate([[0], np.cumsum(block_sizes)])
    edges = np.searchsorted(population, starts)
    blocks = permutation(seed, len(block_sizes), epoch, 1, SLOT_EPOCH_ORDER)
    # Only the blocks of one window are mixed, so that a reader needs no more than these at a time.
    pieces = []
    for first in range(0, len(blocks), window):
        members = [population[edges[block] : edges[block + 1]] for block in blocks[first : first + window]]
        mixed = np.concatenate(members)
        # The third word differs between windows and never is 1, which the permutation of the blocks uses.
        pieces.append(mixed[permutation(seed, len(mixed), epoch, 2 + first, SLOT_EPOCH_ORDER)])
    return np.concatenate(pieces) if pieces else population[:0]


def sharded_windows(population: np.ndarray, seed: int, epoch: int, block_sizes: np.ndarray, window: int) -> np.ndarray:
    """For each position of `sharded_order` the number of its window, ascending int64; arguments as there."""
    starts = np.concatenate([[0], np.cumsum(block_sizes)])
    # Repeats the block permutation of `sharded_order` without building the order itself.
    held = np.diff(np.searchsorted(population, starts))[permutation(seed, len(block_sizes), epoch, 1, SLOT_EPOCH_ORDER)]
    return np.repeat(np.arange(len(held)) // window, held)


@dataclass(frozen=True)
class RankSlice:
    """Which part of every global batch belongs to one rank."""

    global_batch: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.global_batch % self.world_size:
            raise ValueError(
                f"global batch {self.global_batch} does not divide over {self.world_size} ranks; "
                f"choose a multiple of {self.world_size}"
            )

    @property
    def batch_per_device(self) -> int:
        """Samples of each global batch that this rank processes."""
        return self.global_batch // self.world_size

    def steps(self, n: int, drop_last: bool = True) -> int:
        """Steps in an epoch of n samples."""
        return n // self.global_batch if drop_last else -(-n // self.global_batch)

    def select(self, order: np.ndarray, first_step: int = 0, drop_last: bool = True) -> np.ndarray:
        """This rank's samples from step `first_step` to the end of the epoch, one int64 sequence.

        With `drop_last` every step contributes exactly `batch_per_device` samples; without it the last global batch
        is cut into contiguous slices as even as its size allows, for evaluation.
        """
        first, size = first_step * self.global_batch, self.batch_per_device
        # All whole batches are picked by one reshape, because an epoch can have very many steps.
        whole = len(order) // self.global_batch * self.global_batch
        picked = order[first:whole].reshape(-1, self.world_size, size)[:, self.rank].reshape(-1)
        if drop_last or whole == len(order):
            return picked
        # As even as possible, because every rank takes the last step together.
        rest = np.array_split(order[max(whole, first) :], self.world_size)[self.rank]
        return np.concatenate([picked, rest])
