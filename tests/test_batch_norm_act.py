"""Fused batch norm: the definition against PyTorch's, and the CUDA source, run on the host, against the definition."""

import functools
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from models.ops import batch_norm_act_kernels, choice
from models.ops.batch_norm_act import (
    batch_norm_act,
    batch_norm_act_backward_definition,
    batch_norm_act_definition,
    move_running_definition,
    move_running_statistics,
)
from models.ops.batch_norm_act_kernels import (
    BLOCKS_A_MULTIPROCESSOR,
    KERNELS,
    SOURCE,
    BatchNormActKernels,
    cuda_kernels,
    kernels_for,
    kernels_to_move,
    why_not,
)
from models.ops.choice import NORM
from tests.cuda_host import HostModule, compiles_for, compiles_for_volta
from tools.bench.timing import check_twice_eager

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def normal(*shape, dtype=torch.float64, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)


def make_map(*shape, dtype=torch.float64, seed=0):
    """Channels-last, every channel with a mean and a spread of its own."""
    x = normal(*shape, seed=seed) * torch.linspace(0.3, 2, shape[1])[:, None, None]
    return (x + torch.linspace(-3, 4, shape[1])[:, None, None]).to(dtype).to(memory_format=torch.channels_last)


def parameters(channels, dtype=torch.float64):
    return normal(channels, seed=8, shift=1.0, dtype=dtype), normal(channels, seed=9, dtype=dtype)


def separate(x, weight, bias, groups, residual, relu):
    """What a network does without the operator: PyTorch's batch norm on each group, sum, ReLU."""
    y = torch.cat([F.batch_norm(part, None, None, weight, bias, True, 0.0, EPS) for part in x.chunk(groups)])
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


FORMS = [(False, False), (False, True), (True, False), (True, True)]  # residual, relu


@pytest.mark.smoke
@pytest.mark.parametrize(("with_residual", "relu"), FORMS)
@pytest.mark.parametrize("groups", [1, 3])
def test_equals_the_separate_operations(groups, with_residual, relu):
    x, (weight, bias) = make_map(6, 5, 3, 2).requires_grad_(), parameters(5)
    residual = make_map(6, 5, 3, 2, seed=3).requires_grad_() if with_residual else None
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    y, mean, variance = batch_norm_act(x, weight, bias, groups=groups, eps=EPS, residual=residual, relu=relu)
    expected = separate(x, weight, bias, groups, residual, relu)
    torch.testing.assert_close(y, expected)
    cotangent = normal(6, 5, 3, 2, seed=5)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    for group, part in enumerate(x.detach().chunk(groups)):
        torch.testing.assert_close(mean[group], part.mean((0, 2, 3)))
        torch.testing.assert_close(variance[group], part.var((0, 2, 3), correction=0))
    assert not mean.requires_grad and not variance.requires_grad
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("with_residual", "relu"), FORMS)
def test_gradcheck(with_residual, relu, layout):
    x = normal(4, 3, 2, 2).to(memory_format=layout).requires_grad_()
    weight, bias = (t.requires_grad_() for t in parameters(3))
    residual = normal(4, 3, 2, 2, seed=3).requires_grad_() if with_residual else None

    def function(x, weight, bias, residual):
        return batch_norm_act(x, weight, bias, groups=2, residual=residual, relu=relu)[0]

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual))
    function(x, weight, bias, residual).sum().backward()
    assert x.grad.is_contiguous(memory_format=layout)


def test_opcheck():
    dtype = torch.bfloat16
    x = make_map(4, 8, 3, 2, dtype=dtype).requires_grad_()
    residual = make_map(4, 8, 3, 2, dtype=dtype, seed=3).requires_grad_()
    weight, bias = (t.requires_grad_() for t in parameters(8, torch.float32))
    op = torch.ops.regatta.batch_norm_act.default
    for arguments in (
        (x, residual, weight, bias, 2, EPS, True, True),
        (x.detach().contiguous(), residual.detach(), None, None, 4, EPS, False, False),
    ):
        torch.library.opcheck(op, arguments)
    statistics = [torch.zeros(8), torch.ones(8), torch.tensor(3), torch.rand(2, 8), torch.rand(2, 8)]
    torch.library.opcheck(torch.ops.regatta.move_running.default, (*statistics, 12, 2, 0.1))


def test_full_graph_compile():
    def block(x, residual, weight, bias):
        return batch_norm_act(x, weight, bias, groups=2, residual=residual, relu=True)[0].square().sum()

    x, (weight, bias), residual = make_map(4, 4, 3, 3).requires_grad_(), parameters(4), make_map(4, 4, 3, 3, seed=3)
    expected = torch.autograd.grad(block(x, residual, weight, bias), x)[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, residual, weight, bias), x)[0], expected)


@pytest.mark.parametrize("views", [1, 2])
def test_running_statistics_move_view_by_view(views):
    mean, variance = normal(4, 3, seed=1), normal(4, 3, seed=2).square()
    running_mean, running_variance, batches = normal(3, seed=3), normal(3, seed=4).square(), torch.tensor(5)
    expected = [running_mean.clone(), running_variance.clone()]
    for view in range(views):
        groups = slice(4 // views * view, 4 // views * (view + 1))
        expected[0] = 0.9 * expected[0] + 0.1 * mean[groups].mean(0)
        expected[1] = 0.9 * expected[1] + 0.1 * (variance[groups] * 12 / 11).mean(0)
    move_running_statistics(running_mean, running_variance, batches, mean, variance, 12, views, 0.1)
    torch.testing.assert_close([running_mean, running_variance], expected)
    assert batches == 5 + views


def test_nan_is_not_lost_in_the_relu():
    x = make_map(2, 2, 2, 2, dtype=torch.float32)
    x[0, 0, 0, 0] = torch.nan
    y, _, _ = batch_norm_act(x, None, None, residual=x, relu=True)
    assert y[:, 0].isnan().all() and y[:, 1].isfinite().all()


def test_what_does_not_fit_is_refused():
    x = make_map(6, 4, 1, 1)
    with pytest.raises(ValueError, match="6 images are not 4 groups"):
        batch_norm_act(x, None, None, groups=4)
    with pytest.raises(ValueError, match="more than one value"):
        batch_norm_act(x, None, None, groups=6)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got \(6, 4\)"):
        batch_norm_act(x[:, :, 0, 0], None, None)
    with pytest.raises(ValueError, match="residual"):
        batch_norm_act(x, None, None, residual=x.float())
    y = torch.ops.regatta.batch_norm_act(x.requires_grad_(), x, None, None, 1, EPS, True, False)[0]
    with pytest.raises(RuntimeError, match="keep_mask"):
        y.sum().backward()


def test_mask_is_a_bit_for_each_element():
    x, residual = make_map(3, 8, 2, 3, dtype=torch.bfloat16), make_map(3, 8, 2, 3, dtype=torch.bfloat16, seed=3)
    y, _, _, mask = batch_norm_act_definition(x, residual, None, None, 1, EPS, True, True)
    assert mask.numel() == x.numel() // 8
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).view(3, 2, 3, 8).permute(0, 3, 1, 2)
    assert torch.equal(bits.bool(), y > 0) and 0 < bits.sum() < bits.numel()


# The CUDA source itself, compiled for the host.


@pytest.fixture(scope="module")
def host_load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return functools.cache(functools.partial(HostModule, SOURCE, folder=folder))


# N, C, H, W, groups: one image; odd channels, which allow no vectors; more channels than a block holds; channels that
# do not fill the lanes; several rows a thread; several groups of one image.
CASES = [(1, 8, 2, 3, 1), (4, 7, 3, 3, 2), (2, 264, 2, 1, 1), (6, 48, 5, 3, 3), (3, 16, 9, 11, 3), (6, 3, 1, 1, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("blocks", [4, 64])
def test_kernels_agree_with_the_definition(host_load, case, dtype, blocks):
    """At most twice the error of PyTorch in this dtype, outputs and gradients, against float64.

    PyTorch is its own batch norm, sum and ReLU, or the definition, whichever errs more: its batch norm on a CPU sums in
    float64, the definition rounds the mean less.
    """
    *shape, groups = case
    kernels = BatchNormActKernels(host_load, blocks=blocks, min_rows=1)
    x, residual = make_map(*shape, dtype=dtype), make_map(*shape, dtype=dtype, seed=3)
    weight, bias = parameters(shape[1], torch.float32)
    grad = normal(*shape, dtype=dtype, seed=5).to(memory_format=torch.channels_last)
    for added, relu in ((None, False), (None, True), (residual, False), (residual, True)):
        y, mean, variance, mask = kernels.forward(x, added, weight, bias, groups, EPS, relu, True)
        gradients = kernels.backward(grad, x, weight, bias, mean, variance, mask, EPS, relu, added is not None and relu)
        plain, defined = (
            eager_results(x, added, weight, bias, groups, relu, grad, network=net) for net in (separate, fused)
        )
        exact = eager_results(
            *(t if t is None else t.double() for t in (x, added, weight, bias)),
            groups,
            relu,
            grad.double(),
            like=y if relu else None,
        )
        names = ("y", "x", "residual", "weight", "bias")
        ours = dict(zip(names, (y, *gradients), strict=True))
        for name, truth in exact.items():
            eager = max(plain[name], defined[name], key=lambda y, truth=truth: float((y.double() - truth).abs().max()))
            assert ours[name].dtype == eager.dtype and ours[name].shape == eager.shape
            check_twice_eager(f"{name}, relu {relu}", ours[name], eager, truth)
        torch.testing.assert_close(mean.double(), exact_statistics(x, groups)[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(variance.double(), exact_statistics(x, groups)[1], rtol=1e-5, atol=1e-7)


def fused(x, weight, bias, groups, residual, relu):
    return batch_norm_act(x, weight, bias, groups=groups, eps=EPS, residual=residual, relu=relu)[0]


def eager_results(x, residual, weight, bias, groups, relu, grad, like=None, network=separate):
    """y and gradients of `network`; with `like`, the ReLU passes what is above zero there.

    Where a value is so close to zero that rounding decides, the float64 result would otherwise take another branch.
    """
    leaves = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    inputs = leaves["x"], leaves["weight"], leaves["bias"], groups, leaves.get("residual")
    y = network(*inputs, relu) if like is None else network(*inputs, False) * (like > 0)
    if not relu:
        leaves.pop("residual", None)  # its gradient is that of y itself
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))


def exact_statistics(x, groups):
    parts = x.double().unflatten(0, (groups, -1))
    return parts.mean((1, 3, 4)), parts.var((1, 3, 4), correction=0)


def test_kernels_equal_the_definition_bit_by_bit_in_the_mask(host_load):
    kernels = BatchNormActKernels(host_load, min_rows=1)
    x, residual = make_map(4, 24, 3, 3, dtype=torch.float16), make_map(4, 24, 3, 3, dtype=torch.float16, seed=3)
    weight, bias = parameters(24, torch.float32)
    ours = kernels.forward(x, residual, weight, bias, 2, EPS, True, True)
    wanted = batch_norm_act_definition(x, residual, weight, bias, 2, EPS, True, True)
    assert torch.equal(ours[3], wanted[3])
    grad = normal(4, 24, 3, 3, dtype=torch.float16, seed=5)
    for a, b in zip(
        kernels.backward(grad, x, weight, bias, *ours[1:], EPS, True, True),
        batch_norm_act_backward_definition(grad, x, weight, bias, *wanted[1:], EPS, True, True),
        strict=True,
    ):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=2e-3, atol=2e-3)


def test_statistics_of_a_channel_far_from_zero(host_load):
    """Sums of squares would lose everything here: mean 1000, spread 1e-2."""
    x = normal(8, 4, 8, 8, scale=1e-2, shift=1000.0).float().to(memory_format=torch.channels_last)
    for blocks in (1, 64):
        _, mean, variance, _ = BatchNormActKernels(host_load, blocks, 1).forward(
            x, None, None, None, 2, EPS, False, False
        )
        exact_mean, exact_variance = exact_statistics(x, 2)
        torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
        torch.testing.assert_close(variance.double(), exact_variance, rtol=1e-4, atol=0)
    constant = torch.full((4, 4, 3, 3), 7.0).to(memory_format=torch.channels_last)
    assert (BatchNormActKernels(host_load).forward(constant, None, None, None, 1, EPS, False, False)[2] == 0).all()


def test_kernels_keep_nan_and_take_other_layouts(host_load):
    kernels = BatchNormActKernels(host_load)
    x, weight = make_map(4, 8, 3, 3, dtype=torch.float32), parameters(8, torch.float32)[0]
    expected = kernels.forward(x, x, weight, None, 1, EPS, True, False)[0]
    shifted = torch.empty(x.numel() + 1)[1:].view(4, 3, 3, 8).permute(0, 3, 1, 2).copy_(x)
    assert shifted.data_ptr() % 16 and shifted.is_contiguous(memory_format=torch.channels_last)
    for other in (x.contiguous(), torch.stack([x, x], 4)[..., 0], shifted):
        assert torch.equal(kernels.forward(other, other, weight, None, 1, EPS, True, False)[0], expected)
    x = x.clone(memory_format=torch.channels_last)
    x[1, 2, 0, 0] = torch.nan
    y = kernels.forward(x, None, weight, None, 1, EPS, True, False)[0]
    assert y[:, 2].isnan().all() and y[:, :2].isfinite().all()


@pytest.mark.parametrize("views", [1, 2])
def test_running_kernel_agrees_with_the_definition(host_load, views):
    mean, variance = normal(4, 300, seed=1, dtype=torch.float32), normal(4, 300, seed=2, dtype=torch.float32).square()
    for momentum in (0.1, 0.9):
        results = []
        for move in (BatchNormActKernels(host_load).move_running, move_running_definition):
            running = [torch.zeros(300), torch.ones(300), torch.tensor(7)]
            move(*running, mean, variance, 12, views, momentum)
            results.append(running)
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("multiprocessors", [80, 108, 132])
@pytest.mark.parametrize("shape", [(256, 64, 56, 56, 2), (256, 2048, 7, 7, 2), (256, 256, 14, 14, 8)], ids=str)
def test_a_large_map_is_cut_into_as_many_blocks_as_run_at_once(monkeypatch, multiprocessors, shape):
    card = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    launched = []
    monkeypatch.setattr(
        batch_norm_act_kernels, "loader", lambda *_: lambda options: lambda *launch: launched.append(launch)
    )
    kernels = cuda_kernels.__wrapped__(torch.device("cuda", 0))
    x = torch.empty(shape[:4], dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    monkeypatch.setattr(batch_norm_act_kernels, "_readable", lambda tensor: tensor)
    kernels.forward(x, None, None, None, shape[4], EPS, False, False)
    columns, splits, groups = launched[0][1]
    at_once = BLOCKS_A_MULTIPROCESSOR * multiprocessors
    assert 0.75 * at_once < columns * splits * groups <= at_once


# Residual, ReLU, whether a gradient is wanted -> ends of the names of the passes that depend on them.
LAUNCHED = {
    (False, False, True): ("", "", ""),
    (True, False, True): ("_added", "", ""),  # the residual's gradient is that of y
    (False, True, True): ("_recompute", "_recompute", "_recompute"),
    (True, True, True): ("_mask_added", "_mask", "_mask_added"),
    (True, True, False): ("_recompute_added",),
}


@pytest.mark.parametrize("case", LAUNCHED, ids=str)
def test_each_pass_is_one_launch_of_the_kernel_for_its_case(host_load, case):
    with_residual, relu, wanted = case
    kernels, ends = BatchNormActKernels(host_load), LAUNCHED[case]
    x = make_map(2, 8, 2, 2, dtype=torch.float32)
    launched = host_load(("-DFEATURE=Float32", "-DVECTOR=4")).launched
    launched.clear()
    results = kernels.forward(x, x if with_residual else None, None, None, 1, EPS, relu, wanted)
    expected = ["batch_norm_statistics", "batch_norm_join_statistics", f"batch_norm_normalise{ends[0]}"]
    if wanted:
        kernels.backward(x, x, None, None, *results[1:], EPS, relu, with_residual and relu)
        expected += [
            f"batch_norm_backward_sums{ends[1]}",
            "batch_norm_join_sums",
            f"batch_norm_backward_input{ends[2]}",
        ]
    assert launched == expected and set(launched) <= set(KERNELS)


def test_a_frozen_residual_has_no_gradient_written(host_load):
    kernels, x = BatchNormActKernels(host_load), make_map(2, 8, 2, 2, dtype=torch.float32)
    launched = host_load(("-DFEATURE=Float32", "-DVECTOR=4")).launched
    results = kernels.forward(x, x, None, None, 1, EPS, True, True)
    written = kernels.backward(x, x, None, None, *results[1:], EPS, True, True)
    alone = kernels.backward(x, x, None, None, *results[1:], EPS, True, False)
    assert launched[-1] == "batch_norm_backward_input_mask" and alone[1].numel() == 0
    assert all(torch.equal(alone[place], written[place]) for place in (0, 2, 3))
    with pytest.raises(ValueError, match="needs the mask"):
        kernels.backward(x, x, None, None, *results[1:3], results[3][:0], EPS, True, True)


# Compilation for GPUs, which needs none.


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_source_compiles_for_gpus(capability):
    for feature, vector in (("BFloat16", 8), ("Float32", 1)):
        compiles_for(SOURCE, KERNELS, capability, [f"-DFEATURE={feature}", f"-DVECTOR={vector}"])


def test_source_compiles_for_volta_with_cuda_12():
    compiles_for_volta(SOURCE, ["-DFEATURE=Float16", "-DVECTOR=8"])


# The choice.


def test_choice_is_said_once(caplog, monkeypatch):
    x = make_map(2, 4, 3, 3, dtype=torch.float32)
    monkeypatch.setattr(NORM, "_mode", "cuda")
    choice._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        for _ in range(3):
            batch_norm_act(x, None, None)
    assert [record.message for record in caplog.records] == [
        "fused batch norm: PyTorch definition, because the features are on cpu"
    ]
    assert caplog.records[0].levelno == logging.WARNING


class OnGpu:
    """As much of a CUDA tensor as the choice looks at: a map (2, 4, 3, 3), or what its arguments say."""

    is_cuda = True

    def __init__(self, *length, dtype=torch.float32, contiguous=True, device="cuda:0", shape=None):
        self.dtype, self.device, self.contiguous = dtype, torch.device(device), contiguous
        self.shape = torch.Size(shape if shape is not None else length or (2, 4, 3, 3))

    def numel(self):
        return self.shape.numel()

    def is_contiguous(self):
        return self.contiguous


def test_kernels_are_off_until_asked_for(monkeypatch):
    monkeypatch.setattr(NORM, "_mode", "auto")
    assert "have not been proved" in why_not(OnGpu(), None, None, 1) and not NORM.asked_for
    NORM.set("definition")
    assert "was chosen" in why_not(OnGpu(), None, None, 1) and NORM.asked_for
    NORM.set("cuda")
    assert why_not(OnGpu(), OnGpu(4), None, 1) is None
    assert "float64" in why_not(OnGpu(dtype=torch.float64), None, None, 1)
    assert "float32, not torch.bfloat16" in why_not(OnGpu(), OnGpu(4, dtype=torch.bfloat16), None, 1)
    with pytest.raises(ValueError, match="definition"):
        NORM.set("fast")


def test_what_kernels_would_misread_is_left_to_the_definition(monkeypatch):
    """A kernel gets addresses without strides: each of these would be read or written at the wrong place."""
    monkeypatch.setattr(NORM, "_mode", "cuda")
    x, good = OnGpu(), OnGpu(4)
    assert why_not(x, good, good, 65535) is None
    assert why_not(x, None, None, 65536) == "the kernels take up to 65535 groups, not 65536"
    assert "a bias is not contiguous" in why_not(x, good, OnGpu(4, contiguous=False), 1)
    assert "a weight of shape (4,), not (5,)" in why_not(x, OnGpu(5), good, 1)
    assert "a weight is on cpu" in why_not(x, OnGpu(4, device="cpu"), good, 1)
    counter, rows = OnGpu(dtype=torch.int64, shape=()), OnGpu(shape=(2, 4))
    said = []
    monkeypatch.setattr(choice, "_say_once", lambda message, level: said.append(message))
    for changed in ({0: OnGpu(4, contiguous=False)}, {1: OnGpu(8)}, {2: OnGpu(shape=())}, {4: OnGpu(shape=(1, 4))}):
        given = [good, good, counter, rows, rows]
        for place, tensor in changed.items():
            given[place] = tensor
        assert kernels_to_move(*given) is None
    assert len(said) == 4 and all("PyTorch definition, because" in message for message in said)


def test_strided_parameters_and_statistics_give_what_they_hold(monkeypatch):
    """In mode "cuda" too, the operator on strided tensors equals the one on copies of them."""
    monkeypatch.setattr(NORM, "_mode", "cuda")
    x, wide = make_map(4, 6, 3, 3, dtype=torch.float32), torch.linspace(0.5, 2, 12)
    ours = batch_norm_act(x, wide[::2], wide[:1].expand(6), groups=2)[0]
    assert torch.equal(ours, batch_norm_act(x, wide[::2].clone(), wide[:1].repeat(6), groups=2)[0])
    running = torch.zeros(12)
    mean = torch.ones(2, 6)
    move_running_statistics(running[::2], torch.ones(6), torch.tensor(0), mean, mean, 12, 1, 0.5)
    assert running.view(6, 2).tolist() == [[0.5, 0.0]] * 6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_on_a_gpu(dtype, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(NORM, "_mode", "cuda")
    for *shape, groups in [*CASES, (32, 64, 56, 56, 2), (32, 256, 28, 28, 1), (64, 2048, 7, 7, 4)]:
        x, residual = (make_map(*shape, dtype=dtype, seed=seed).cuda() for seed in (0, 3))
        weight, bias = (t.cuda() for t in parameters(shape[1], torch.float32))
        assert kernels_for(x, weight, bias, groups) is not None
        grad = normal(*shape, dtype=dtype, seed=5).cuda().to(memory_format=torch.channels_last)
        for added, relu in ((None, False), (None, True), (residual, False), (residual, True)):
            ours = eager_results(x, added, weight, bias, groups, relu, grad, network=fused)
            eager = eager_results(x, added, weight, bias, groups, relu, grad)
            wide = (t if t is None else t.double() for t in (x, added, weight, bias))
            exact = eager_results(*wide, groups, relu, grad.double(), like=ours["y"] if relu else None)
            for name in eager:
                check_twice_eager(f"{name}, {shape}, relu {relu}", ours[name], eager[name], exact[name])


@pytest.mark.gpu
def test_kernels_inside_a_cuda_graph(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(NORM, "_mode", "cuda")
    x = make_map(8, 64, 7, 7, dtype=torch.float16).cuda()
    statistics = [torch.zeros(64).cuda(), torch.ones(64).cuda(), torch.tensor(0).cuda()]

    def step():
        y, mean, variance = batch_norm_act(x, None, None, groups=2, relu=True)
        move_running_statistics(*statistics, mean, variance, 4 * 49, 1, 0.1)
        return y

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    x.add_(1.0).mul_(2.0)
    graph.replay()
    expected = batch_norm_act_definition(x, None, None, None, 2, EPS, True, False)[0]
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    assert statistics[2] == 2 and bool((statistics[0] != 0).all())
