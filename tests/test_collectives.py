"""Exchanges between ranks, on gloo, against one process that sees the joined batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.collectives import (
    all_gather_rows,
    average_buffers,
    gather_with_gradient,
    rank,
    shuffle_rows,
    unshuffle_rows,
    world,
)
from models.momentum import copy_and_freeze, ema_update, follow
from models.norm import convert_batch_norm
from tests.distributed import run_ranks

GLOBAL = 12


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = (100 * torch.randn(GLOBAL, 3, 4, 2, generator=generator)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def permutation() -> Tensor:
    return torch.randperm(GLOBAL, generator=torch.Generator().manual_seed(1))


def test_one_process_needs_no_group() -> None:
    x = images().requires_grad_()
    assert (world(), rank()) == (1, 0)
    assert not all_gather_rows(x).requires_grad
    shuffled = shuffle_rows(x, permutation())
    torch.testing.assert_close(shuffled, x.detach()[permutation()])
    assert shuffled.is_contiguous(memory_format=torch.channels_last), "convolutions would copy it back"
    torch.testing.assert_close(unshuffle_rows(shuffled, permutation()), x.detach())
    value = torch.tensor([3.0])
    average_buffers([value])
    assert value == 3.0
    with pytest.raises(ValueError, match="12 positions does not fit 1 rank.* of 5 rows"):
        shuffle_rows(x[:5], permutation())


def _exchange(me: int, size: int) -> dict[str, object]:
    order = permutation()
    mine = images().chunk(size)[me]
    found: dict[str, object] = {"ranks": (rank(), world())}
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64):
        part = images(dtype).chunk(size)[me]
        found[f"gather {dtype}"] = all_gather_rows(part)
    # On the device the permutation's values are unknown to the host: the other path, with all rows gathered.
    local = GLOBAL // size
    on_device = all_gather_rows(mine).index_select(0, order[me * local : (me + 1) * local])
    shuffled = shuffle_rows(mine, order)
    found["paths agree"] = bool((on_device == shuffled).all())
    found["shuffled"] = shuffled
    found["layout"] = shuffled.is_contiguous(memory_format=torch.channels_last)
    found["back"] = unshuffle_rows(shuffled, order)
    found["bf16"] = shuffle_rows(images(torch.bfloat16).chunk(size)[me], order)
    found["rows"] = unshuffle_rows(torch.arange(me * local, (me + 1) * local), order)
    values = [torch.full((3,), float(me)), torch.full((2, 2), 10.0 * me), torch.tensor(me), torch.tensor(me).double()]
    average_buffers(values)
    found["averages"] = values
    return found


def _weight() -> Tensor:
    return torch.arange(1.0, GLOBAL * GLOBAL + 1).view(GLOBAL, GLOBAL).sin()


def _pairs_loss(rows: Tensor, everything: Tensor, weight: Tensor) -> Tensor:
    """Mean over this rank's rows of a sum over all rows, so that every row of a rank reaches the loss of each."""
    return (weight * (rows @ everything.T).square()).sum(1).mean()


def _gradient(me: int, size: int) -> tuple[Tensor, Tensor]:
    mine = images(torch.float64).flatten(1).chunk(size)[me].clone().requires_grad_()
    gathered = gather_with_gradient(mine)
    _pairs_loss(mine, gathered, _weight().double().chunk(size)[me]).backward()
    assert mine.grad is not None
    return gathered.detach(), mine.grad


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_flow_back_through_a_gather(tmp_path: Path, size: int) -> None:
    """Averaged over ranks, as DDP does with what follows from them, they are those of the joined batch."""
    rows = images(torch.float64).flatten(1).clone().requires_grad_()
    assert gather_with_gradient(rows) is rows
    _pairs_loss(rows, rows, _weight().double()).backward()
    found = run_ranks(_gradient, size, tmp_path)
    for gathered, _ in found:
        assert torch.equal(gathered, rows.detach())
    torch.testing.assert_close(torch.cat([gradient / size for _, gradient in found]), rows.grad)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_see_the_joined_batch(tmp_path: Path, size: int) -> None:
    results = run_ranks(_exchange, size, tmp_path)
    everything, order = images(), permutation()
    for me, found in enumerate(results):
        part = slice(me * GLOBAL // size, (me + 1) * GLOBAL // size)
        assert found["ranks"] == (me, size)
        for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64):
            assert torch.equal(found[f"gather {dtype}"], images(dtype)), dtype
        assert found["paths agree"] and found["layout"]
        assert torch.equal(found["shuffled"], everything[order][part])
        assert torch.equal(found["back"], everything[part])
        assert torch.equal(found["bf16"], images(torch.bfloat16)[order][part])
        assert torch.equal(found["rows"], torch.argsort(order)[part])
        mean = (size - 1) / 2
        expected = [torch.full((3,), mean), torch.full((2, 2), 10 * mean)]
        expected += [torch.tensor(me), torch.tensor(mean).double()]
        for a, b in zip(found["averages"], expected, strict=True):
            torch.testing.assert_close(a, b)


def test_every_permutation_of_a_small_batch(tmp_path: Path) -> None:
    """The exchange of rows is right for all 24 orders of 4 images on 2 ranks: also when a rank sends nothing."""
    results = run_ranks(_all_orders, 2, tmp_path)
    for index, order in enumerate(_orders()):
        assert torch.equal(torch.cat([found[index] for found in results]), order), order


def _orders() -> list[Tensor]:
    from itertools import permutations

    return [torch.tensor(order) for order in permutations(range(4))]


def _all_orders(me: int, size: int) -> list[Tensor]:
    return [shuffle_rows(torch.arange(2 * me, 2 * me + 2), order) for order in _orders()]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(32, 2))
    return convert_batch_norm(net, "group", 2)


def test_ema_to_the_formula() -> None:
    online = network().double()
    momentum = copy_and_freeze(online)
    assert not any(p.requires_grad for p in momentum.parameters())
    assert all(torch.equal(a, b) for a, b in zip(online.parameters(), momentum.parameters(), strict=True))
    before = copy.deepcopy(momentum)
    ema_update([(online, momentum)], 0.9)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), momentum.parameters(), strict=True))
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(torch.randn_like(parameter))
    online[1].running_mean.add_(1.0)
    ema_update([(online, momentum)], 0.9)
    for new, old, source in zip(momentum.parameters(), before.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * source, rtol=1e-12, atol=1e-14)
    assert torch.equal(momentum[1].running_mean, before[1].running_mean)
    ema_update([(online, momentum)], 1.0)
    ema_update([(online, momentum)], 0.0)
    assert all(torch.equal(a, b) for a, b in zip(online.parameters(), momentum.parameters(), strict=True))


def test_ema_of_the_whole_state() -> None:
    online = network().double()
    momentum = copy_and_freeze(online)
    online[1].running_mean.add_(1.0)
    online[1].num_batches_tracked.fill_(7)
    ema_update([(online, momentum)], 0.9, buffers=True)
    torch.testing.assert_close(momentum[1].running_mean, torch.full((4,), 0.1).double())
    assert momentum[1].num_batches_tracked == 7


def test_ema_refuses_what_is_no_pair() -> None:
    with pytest.raises(ValueError, match=r"1\.5 is outside"):
        ema_update([(network(), network())], 1.5)
    with pytest.raises(ValueError, match="differ in structure"):
        ema_update([(network(), nn.Linear(3, 4))], 0.9)


def _follow(me: int, size: int) -> Tensor:
    online = network()
    momentum = copy_and_freeze(online)
    online(images().chunk(size)[me])
    follow([(online, momentum)], 0.5, whole_state=True)
    return torch.stack([momentum[1].running_mean, momentum[1].running_var])


def test_whole_state_follows_the_statistics_of_all_ranks(tmp_path: Path) -> None:
    """Each rank's momentum network has the running statistics of one process on the joined batch."""
    expected = _follow(0, 1)
    for found in run_ranks(_follow, 2, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
