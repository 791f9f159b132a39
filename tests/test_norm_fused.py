"""Batch norm, residual sum and ReLU as one operator inside networks: the same results under the same names."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import resnet18

from models.norm import convert_batch_norm, norm_relu, stacked_views
from models.ops.choice import NORM
from models.resnet import build_backbone
from tests.method_cases import NarrowResNet, build, make_inputs, small_config, to_double


@pytest.fixture(autouse=True)
def restore_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NORM, "_mode", "auto")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool, bool]]:
    """(groups, whether there is a residual, whether there is a ReLU) of each call of the operator."""
    made: list[tuple[int, bool, bool]] = []
    module = sys.modules["models.ops.batch_norm_act"]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(x, residual, weight, bias, groups, eps, relu, keep_mask):
            made.append((groups, residual is not None, relu))
            return original(x, residual, weight, bias, groups, eps, relu, keep_mask)

        return call

    # The operator, and what stands in for it in a pass without gradients.
    for name in ("_batch_norm_act", "_forward"):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return made


def images(count: int = 8, channels: int = 3, size: int = 32) -> Tensor:
    x = torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


def results(network: nn.Module, x: Tensor, views: int = 1) -> list[Tensor]:
    """Output, gradients of input and parameters, and buffers after one pass."""
    x = x.clone().requires_grad_()
    with stacked_views(network, views):
        y = network(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *network.parameters()]), *network.buffers()]


CASES = [("group", 0, 1), ("group", 2, 1), ("group", 2, 2), ("sync", 0, 2)]


@pytest.mark.parametrize(("mode", "group", "views"), CASES)
def test_a_trunk_gives_the_same(calls: list, mode: str, group: int, views: int) -> None:
    trunk = NarrowResNet().double()
    convert_batch_norm(trunk, mode, group)
    other = copy.deepcopy(trunk)
    expected = results(other, images(), views)
    assert not calls, "off by default"
    NORM.set("definition")
    actual = results(trunk, images(), views)
    groups = (8 // group if group else views) if mode == "group" else views
    # A ReLU behind every norm but those of the three shortcuts, a sum before the last one of every block.
    kinds = {(False, True): 5, (True, True): 4, (False, False): 3}
    assert sorted(calls) == sorted((groups, *kind) for kind, count in kinds.items() for _ in range(count))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_blocks_are_torchvision_s(arch: str) -> None:
    """Same keys and, with the operator off, the very values of torchvision's forward pass."""
    from torchvision.models import resnet50

    trunk = build_backbone(arch, "fan_out").eval()
    theirs = {"resnet18": resnet18, "resnet50": resnet50}[arch]()
    theirs.fc = nn.Identity()
    theirs.avgpool = nn.Identity()
    assert list(theirs.state_dict()) == list(trunk.state_dict())
    theirs.load_state_dict(trunk.state_dict())
    x = images(2, size=64).float()
    for network in (trunk, theirs):
        network.train()
    assert torch.equal(trunk(x).flatten(1), theirs(x))
    for ours, other in zip(trunk.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(ours, other)


def test_evaluation_and_plain_norms_stay_pytorch_s(calls: list) -> None:
    NORM.set("definition")
    x = images(4, 6, 3)
    for norm in (convert_batch_norm(nn.BatchNorm2d(6).double()).eval(), nn.BatchNorm2d(6).double()):
        expected = F.relu(copy.deepcopy(norm)(x) + x)
        torch.testing.assert_close(norm_relu(norm, x, x), expected, rtol=0, atol=0)
    assert not calls


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_and_their_counter(momentum: float | None) -> None:
    states = []
    for mode in ("auto", "definition"):
        NORM.set(mode)
        norm = convert_batch_norm(nn.BatchNorm2d(6, momentum=momentum).double(), "group", 2)
        for step in range(2):
            with stacked_views(norm, 2):
                norm_relu(norm, images(8, 6, 3) + step)
        states.append(norm.state_dict())
    assert states[0]["num_batches_tracked"] == 4
    torch.testing.assert_close(states[1], states[0], rtol=1e-12, atol=1e-12)


def test_norms_without_running_statistics_or_parameters(calls: list) -> None:
    norm = convert_batch_norm(nn.BatchNorm2d(6, affine=False, track_running_stats=False).double(), "group", 2)
    expected = norm_relu(norm, images(4, 6, 3))
    NORM.set("definition")
    torch.testing.assert_close(norm_relu(norm, images(4, 6, 3)), expected)
    torch.testing.assert_close(norm_relu(norm.eval(), images(4, 6, 3)), expected)
    assert len(calls) == 2


def test_refusals_are_those_of_the_separate_path() -> None:
    norm = convert_batch_norm(nn.BatchNorm2d(6).double(), "group", 4)
    for mode in ("auto", "definition"):
        NORM.set(mode)
        with pytest.raises(ValueError, match="6 images .* not a whole number of batch-norm groups of 4"):
            norm(images(6, 6, 3))
        with pytest.raises(ValueError, match="not 2 stacked views"), stacked_views(norm, 2):
            norm(images(5, 6, 3))


@pytest.mark.parametrize("shared", [False, True])
def test_regioncl_m_takes_the_same_step(calls: list, shared: bool) -> None:
    """Loss, gradients and running statistics of a whole step, in two passes or one, with the operator and without."""
    outcomes = []
    for mode in ("auto", "definition"):
        NORM.set(mode)
        method = build("regioncl-m", small_config("regioncl-m", region_shared_forward=shared)).double()
        method.train()
        loss = method(to_double(make_inputs(method, 1))).loss
        loss.backward()
        outcomes.append([loss, *(p.grad for p in method.parameters() if p.grad is not None), *method.buffers()])
    assert len(calls) == (24 if shared else 36)
    for ours, theirs in zip(outcomes[1], outcomes[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_a_compiled_trunk_holds_the_operator() -> None:
    NORM.set("definition")
    trunk = convert_batch_norm(NarrowResNet().double(), "group", 4)
    expected = results(copy.deepcopy(trunk), images())
    trunk.compile(backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(results(trunk, images()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trunk_on_a_gpu(dtype: torch.dtype) -> None:
    """A training pass with the kernels errs at most twice as much as one without, against float64; also in a graph."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    trunk = convert_batch_norm(build_backbone("resnet18", "fan_out"), "group", 4).cuda()
    trunk.to(memory_format=torch.channels_last)
    x = images(8, size=64).float().cuda().contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(trunk).double()(x.double())
    errors = {}
    for mode in ("auto", "cuda"):
        NORM.set(mode)
        network = copy.deepcopy(trunk)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            y = network(x)
        y.float().square().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)
        errors[mode] = float((y.double() - exact).abs().max())
    assert errors["cuda"] <= 2 * errors["auto"] + 1e-6
    with torch.no_grad():
        expected = network(x)  # which loads the kernels for its dtype
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = network(x)
        graph.replay()
        torch.testing.assert_close(captured, expected)
