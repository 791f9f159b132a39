"""Batch norm by groups, over ranks, and with stacked views, against definitions written from the formula."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.grouped_norm import grouped_batch_norm_definition
from models.norm import (
    GroupBatchNorm,
    SyncBatchNorm,
    convert_batch_norm,
    running_buffers,
    stacked_views,
)
from models.sync_norm import _SyncBatchNormCuda
from tests.distributed import run_ranks

CHANNELS = 6


def make_input(rows: int = 8, dtype: torch.dtype = torch.float64, columns: tuple[int, ...] = (3, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = 2.0 * torch.randn(rows, CHANNELS, *columns, generator=generator, dtype=torch.float64) + 0.7
    if len(columns) == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.to(dtype)


def make_norm(mode: str, group_size: int = 0, dims: int = 2) -> nn.Module:
    norm = (nn.BatchNorm2d if dims == 2 else nn.BatchNorm1d)(CHANNELS).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(CHANNELS, generator=generator))
        norm.bias.copy_(torch.randn(CHANNELS, generator=generator))
    return convert_batch_norm(norm, mode, group_size)


def reference(x: Tensor, weight: Tensor, bias: Tensor, group: int, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Element by element from the formula: output, mean over groups of means, and of unbiased variances."""
    outputs, means, variances = [], [], []
    for start in range(0, x.shape[0], group):
        part = x[start : start + group]
        channels = []
        for c in range(x.shape[1]):
            values = part[:, c]
            mean = values.sum() / values.numel()
            variance = ((values - mean) ** 2).sum() / values.numel()
            channels.append((values - mean) / torch.sqrt(variance + eps) * weight[c] + bias[c])
            means.append(mean)
            variances.append(variance * values.numel() / (values.numel() - 1))
        outputs.append(torch.stack(channels, dim=1))
    groups = x.shape[0] // group
    return (
        torch.cat(outputs),
        torch.stack(means).view(groups, -1).mean(0).detach(),
        torch.stack(variances).view(groups, -1).mean(0).detach(),
    )


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad((output * weights).sum() + (output**3).sum(), inputs))


@pytest.mark.parametrize("columns", [(3, 5), (), (7,)])
@pytest.mark.parametrize("group", [0, 2, 4, 8])
def test_group_statistics_equal_the_formula_with_gradients(columns: tuple[int, ...], group: int) -> None:
    x = make_input(columns=columns).requires_grad_()
    norm = make_norm("group", group, dims=2 if len(columns) == 2 else 1)
    expected, mean, variance = reference(x, norm.weight, norm.bias, group or 8)
    actual = norm(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    for a, b in zip(
        gradients(actual, [x, norm.weight, norm.bias]), gradients(expected, [x, norm.weight, norm.bias]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance, rtol=1e-10, atol=1e-12)
    assert norm.num_batches_tracked == 1


def test_groups_matter() -> None:
    """Statistics of the whole batch are something else: a group size that is ignored would be seen."""
    x = make_input()
    assert (make_norm("group", 2)(x) - make_norm("group", 0)(x)).abs().max() > 0.1


def test_compiler_definition_equals_the_kernels() -> None:
    x = make_input().requires_grad_()
    norm = make_norm("group", 2)
    actual = norm(x)
    defined, means, variances = grouped_batch_norm_definition(x, norm.weight, norm.bias, 4, norm.eps)
    torch.testing.assert_close(defined, actual, rtol=0, atol=1e-12)
    leaves = [x, norm.weight, norm.bias]
    for a, b in zip(gradients(defined, leaves), gradients(actual, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm.running_mean, 0.1 * means.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variances.mean(0))
    assert defined.is_contiguous(memory_format=torch.channels_last)


def test_traces_into_one_graph() -> None:
    """No graph break: compiled trunks hold these layers."""
    norm = make_norm("group", 2).float()
    x = make_input(dtype=torch.float32)
    expected = copy.deepcopy(norm)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var, expected.running_var)
    assert norm.num_batches_tracked == 1


def test_keeps_channels_last_and_its_gradient() -> None:
    x = make_input(dtype=torch.float32).requires_grad_()
    y = make_norm("group", 4).float()(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_fp32_statistics(dtype: torch.dtype) -> None:
    """Error at most twice that of PyTorch's batch norm on each group in the same dtype, statistics in fp32."""
    exact = make_input()
    x = exact.to(dtype).requires_grad_()
    norm = make_norm("group", 4).float()
    y = norm(x)
    assert y.dtype == dtype and norm.running_mean.dtype == torch.float32
    truth, mean, _ = reference(x.detach().double(), norm.weight.double(), norm.bias.double(), 4)
    torchs = torch.cat([F.batch_norm(part, None, None, norm.weight, norm.bias, True) for part in x.split(4)])
    assert (y - truth).abs().max() <= 2 * (torchs - truth).abs().max()
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, rtol=1e-4, atol=1e-6)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x)
    assert grad.dtype == dtype and bool(torch.isfinite(grad).all())


def test_evaluation_uses_running_statistics_whatever_the_groups() -> None:
    plain = make_norm("plain")
    norm = make_norm("group", 4)
    x = make_input()
    for module in (plain, norm):
        module.running_mean.fill_(0.3)
        module.running_var.fill_(2.0)
        module.eval()
    torch.testing.assert_close(norm(x[:3]), plain(x[:3]))  # three rows are no whole group, and need not be


def test_incomplete_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="6 images .* not a whole number of batch-norm groups of 4"):
        make_norm("group", 4)(make_input(6))
    with pytest.raises(ValueError, match="more than one value"):
        make_norm("group", 1, dims=1)(make_input(columns=()))


def test_conversion_keeps_names_and_tensors() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(4, affine=False)))
    names, weight, mean = list(net.state_dict()), net[1].weight, net[1].running_mean
    assert convert_batch_norm(net, "group", 2) is net
    assert list(net.state_dict()) == names and net[1].weight is weight and net[1].running_mean is mean
    assert isinstance(net[1], GroupBatchNorm) and net[1].group_size == 2
    convert_batch_norm(net, "sync")
    assert isinstance(net[2][0], SyncBatchNorm) and net[2][0].weight is None
    convert_batch_norm(net, "plain")
    assert type(net[1]) is nn.BatchNorm2d and type(net[2][0]) is nn.BatchNorm1d and net[1].weight is weight
    with pytest.raises(ValueError, match="mode 'batch' is unknown"):
        convert_batch_norm(net, "batch")
    with pytest.raises(ValueError, match="negative"):
        convert_batch_norm(net, "group", -1)


@pytest.mark.parametrize(("mode", "group"), [("group", 0), ("group", 2), ("sync", 0)])
def test_stacked_views_equal_one_forward_each(mode: str, group: int) -> None:
    """Queries and mixed views may share a forward pass: outputs, gradients and running statistics are those of two."""
    first = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)).double()
    convert_batch_norm(first, mode, group)
    second = copy.deepcopy(first)
    x = make_input(8).requires_grad_()
    with stacked_views(first, 2):
        together = first(x)
    apart = torch.cat([second(x[:4]), second(x[4:])])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(together, [x])[0], gradients(apart, [x])[0], rtol=1e-9, atol=1e-9)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert first[1].views == 1
    alone = first(x)
    assert (alone - together).abs().max() > 1e-3 or group == 2


def test_stacked_views_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="convert_batch_norm"), stacked_views(nn.BatchNorm2d(3), 2):
        pass
    norm = make_norm("group")
    with pytest.raises(ValueError, match="not 2 stacked views"), stacked_views(norm, 2):
        norm(make_input(5))


@pytest.mark.parametrize("mode", ["group", "sync"])
def test_without_groups_or_ranks_it_is_pytorchs_own(mode: str) -> None:
    plain, norm = make_norm("plain"), make_norm(mode)
    for momentum in (0.1, None):
        plain.momentum = norm.momentum = momentum
        for _ in range(2):
            x = make_input()
            torch.testing.assert_close(norm(x), plain(x), rtol=0, atol=0)
    for a, b in zip(norm.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_cumulative_average_of_groups() -> None:
    norm = make_norm("group", 2)
    norm.momentum = None
    norm(make_input())
    _, mean, variance = reference(make_input(), norm.weight, norm.bias, 2)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


def test_running_buffers_lists_what_a_step_changes() -> None:
    net = nn.ModuleList([make_norm("group"), make_norm("plain").eval(), nn.BatchNorm1d(2, track_running_stats=False)])
    expected = [net[0].running_mean, net[0].running_var]
    assert [b.data_ptr() for b in running_buffers(net)] == [b.data_ptr() for b in expected]


def test_batch_norm_without_running_statistics() -> None:
    norm = convert_batch_norm(nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False), "group", 2).double()
    ones, zeros = torch.ones(CHANNELS).double(), torch.zeros(CHANNELS).double()
    expected = reference(make_input(), ones, zeros, 2)[0]
    torch.testing.assert_close(norm(make_input()), expected)
    torch.testing.assert_close(norm.eval()(make_input()), expected)


def _one_rank(rank: int, world: int, columns: tuple[int, ...], views: int, uneven: bool) -> list[Tensor]:
    """Output, input gradient, parameter gradients and buffers of this rank's rows under sync statistics."""
    x = make_input(12, columns=columns)
    edges = [0, 4, 12] if uneven else [round(i * 12 / world) for i in range(world + 1)]
    mine = x[edges[rank] : edges[rank + 1]].detach().requires_grad_()
    norm = make_norm("sync", dims=2 if len(columns) == 2 else 1)
    with stacked_views(norm, views):
        y = norm(mine)
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)[edges[rank] : edges[rank + 1]]
    loss = (y * weights).sum() + (y**3).sum()
    grads = torch.autograd.grad(loss, [mine, norm.weight, norm.bias])
    return [t.detach() for t in (y, *grads, norm.running_mean, norm.running_var)]


@pytest.mark.parametrize(("columns", "world", "uneven"), [((3, 5), 2, False), ((), 3, False), ((4,), 2, True)])
def test_sync_equals_one_process_on_the_joined_batch(
    tmp_path: Path, columns: tuple[int, ...], world: int, uneven: bool
) -> None:
    x = make_input(12, columns=columns).requires_grad_()
    norm = make_norm("plain", dims=2 if len(columns) == 2 else 1)
    y = norm(x)
    expected = [y, *gradients(y, [x, norm.weight, norm.bias]), norm.running_mean, norm.running_var]
    ranks = run_ranks(_one_rank, world, tmp_path, columns, 1, uneven)
    joined = [
        torch.cat([r[0] for r in ranks]),
        torch.cat([r[1] for r in ranks]),
        sum(r[2] for r in ranks),
        sum(r[3] for r in ranks),
        ranks[0][4],
        ranks[1][5],
    ]
    for a, b in zip(joined, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-9)


def _sync_stacked(rank: int, world: int) -> list[Tensor]:
    x = make_input(16)
    halves = x.chunk(2)
    mine = torch.cat([half.chunk(world)[rank] for half in halves])
    norm = make_norm("sync")
    with stacked_views(norm, 2):
        y = norm(mine)
    return [*(part.detach() for part in y.chunk(2)), norm.running_mean, norm.running_var]


def test_sync_with_stacked_views_on_two_ranks(tmp_path: Path) -> None:
    x, norm = make_input(16), make_norm("plain")
    expected = [norm(half).detach() for half in x.chunk(2)]
    first, second = run_ranks(_sync_stacked, 2, tmp_path)
    for view in range(2):
        torch.testing.assert_close(torch.cat([first[view], second[view]]), expected[view], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(first[2], norm.running_mean)
    torch.testing.assert_close(second[3], norm.running_var)


def _sync_half(rank: int, world: int) -> list[Tensor]:
    x = make_input(8, dtype=torch.bfloat16).chunk(world)[rank].requires_grad_()
    norm = make_norm("sync").float()
    y = norm(x)
    (grad,) = torch.autograd.grad((y.float() ** 3).sum(), x)
    return [y.detach(), grad]


def test_sync_in_bf16(tmp_path: Path) -> None:
    norm = make_norm("plain").float()
    x = make_input(8, dtype=torch.bfloat16)
    truth_input = x.double().requires_grad_()
    truth = copy.deepcopy(norm).double()(truth_input)
    (truth_grad,) = torch.autograd.grad((truth**3).sum(), truth_input)
    plain_input = x.clone().requires_grad_()
    plain = norm(plain_input)
    (plain_grad,) = torch.autograd.grad((plain.float() ** 3).sum(), plain_input)
    ranks = run_ranks(_sync_half, 2, tmp_path)
    for index, (exact, torchs) in enumerate(((truth, plain), (truth_grad, plain_grad))):
        ours = torch.cat([r[index] for r in ranks])
        assert ours.dtype == torch.bfloat16
        assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max()


@pytest.mark.gpu
def test_on_cuda_groups_and_sync_equal_pytorchs() -> None:
    """Groups against PyTorch's batch norm on each, sync (two stacked views, one process) against nn.SyncBatchNorm."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    import torch.distributed as dist

    x = make_input(dtype=torch.float32).cuda().contiguous(memory_format=torch.channels_last).requires_grad_()
    norm = make_norm("group", 2).float().cuda()
    expected = torch.cat([F.batch_norm(p, None, None, norm.weight, norm.bias, True) for p in x.split(2)])
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(norm(x), [x])[0], gradients(expected, [x])[0], rtol=1e-4, atol=1e-4)
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29577", rank=0, world_size=1)
    try:
        plain = make_norm("plain").float().cuda()
        torchs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
        for columns in ((3, 5), ()):
            rows = make_input(dtype=torch.float32, columns=columns).cuda().requires_grad_()
            leaves = [rows, plain.weight, plain.bias]
            y, mean, variance = _SyncBatchNormCuda.apply(rows, plain.weight, plain.bias, plain.eps)
            expected = F.batch_norm(rows, None, None, plain.weight, plain.bias, True)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            for a, b in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            if columns:
                torchs.momentum = 1.0
                torch.testing.assert_close(torchs(rows), y, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(torchs.running_mean, mean)
                torch.testing.assert_close(torchs.running_var, variance)
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
def test_on_cuda_sync_does_not_wait_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    import torch.distributed as dist

    norm = make_norm("plain").float().cuda()
    x = make_input(dtype=torch.float32).cuda().contiguous(memory_format=torch.channels_last).requires_grad_()
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29578", rank=0, world_size=1)
    try:
        _SyncBatchNormCuda.apply(x, norm.weight, norm.bias, norm.eps)[0].sum().backward()  # sets the communicator up
        torch.cuda.set_sync_debug_mode("error")
        _SyncBatchNormCuda.apply(x, norm.weight, norm.bias, norm.eps)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
