"""Mask pooling: the definition against loops, and the CUDA source, run on the host, against the definition."""

import functools
import logging

import numpy as np
import pytest
import torch

from models.ops import box_pool, choice, masked_pool
from models.ops.choice import MASKED_POOL
from models.ops.masked_pool import masked_pool_backward_definition, masked_pool_definition
from models.ops.masked_pool_kernels import KERNELS, SOURCE, MaskedPoolKernels, kernels_for, why_not
from tests.cuda_host import HostModule, compiles_for, compiles_for_volta
from tests.pooling_cases import DTYPES, compare, random_boxes, random_features, random_maps


def loop_masked_pool(features, weights):
    batch, channels, height, width = features.shape
    groups, masks = weights.shape[1:3]
    out = np.zeros((batch, masks, channels))
    for b in range(batch):
        for m in range(masks):
            for c in range(channels):
                weight = weights[b, c * groups // channels, m].numpy()
                if weight.sum() != 0:
                    out[b, m, c] = (weight * features[b, c].numpy()).sum() / weight.sum()
    return torch.from_numpy(out)


@pytest.mark.smoke
@pytest.mark.parametrize("groups,masks", [(1, 1), (1, 2), (4, 3)])
def test_masked_pool_is_the_weighted_mean(groups, masks):
    features, weights = random_features(3, 8, 5, 3), random_maps(3, groups, masks, 5, 3)
    weights[0, 0, 0] = 0
    expected = loop_masked_pool(features, weights)
    torch.testing.assert_close(masked_pool(features, weights), expected)
    channels_last = features.to(memory_format=torch.channels_last)
    torch.testing.assert_close(masked_pool(channels_last, weights), expected)
    assert (masked_pool(features, weights)[0, 0, : 8 // groups] == 0).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients(layout):
    features = random_features(3, 4, 3, 2).to(memory_format=layout).requires_grad_()
    weights = random_maps(3, 2, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(masked_pool, (features, weights))
    masked_pool(features, weights).sum().backward()
    assert features.grad.is_contiguous(memory_format=layout)


def test_no_gradient_through_a_mask_of_zeros():
    features, weights = random_features(2, 4, 3, 3), random_maps(2, 1, 2, 3, 3)
    weights[0] = 0
    features.requires_grad_(), weights.requires_grad_()
    masked_pool(features, weights).sum().backward()
    assert (features.grad[0] == 0).all() and (weights.grad[0] == 0).all() and (features.grad[1] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    features = random_features(2, 4, 3, 3, dtype).to(memory_format=torch.channels_last).requires_grad_()
    weights = random_maps(2, 2, 2, 3, 3, torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.regatta.masked_pool.default, (features, weights))
    torch.library.opcheck(torch.ops.regatta.masked_pool.default, (features.detach().contiguous(), weights))


def test_full_graph_compile():
    def region_features(feature_map, boxes, weights):
        return torch.cat([box_pool(feature_map, boxes), masked_pool(feature_map, weights)], dim=1).square().sum()

    feature_map, boxes, weights = random_features(2, 4, 3, 3), random_boxes(2), random_maps(2, 1, 2, 3, 3)
    feature_map.requires_grad_()
    expected = torch.autograd.grad(region_features(feature_map, boxes, weights), feature_map)[0]
    compiled = torch.compile(region_features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(feature_map, boxes, weights), feature_map)[0], expected)


def test_autocast_does_not_lower_the_precision():
    features, weights = random_features(2, 8, 7, 7, torch.float32), random_maps(2, 1, 2, 7, 7, torch.float32)
    expected = masked_pool(features, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(masked_pool(features, weights), expected)


def test_wrong_shapes_are_refused():
    features = random_features(2, 6, 3, 3)
    with pytest.raises(ValueError, match="do not cover"):
        masked_pool(features, random_maps(2, 1, 2, 3, 4))
    with pytest.raises(ValueError, match="6 channels do not divide into 4 groups"):
        masked_pool(features, random_maps(2, 4, 2, 3, 3))


# The CUDA source itself, compiled for the host.


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return MaskedPoolKernels(functools.partial(HostModule, SOURCE, folder=folder))


# Shapes cover: one image, M = 1, odd sizes that allow no vectors, more channels than a block holds, several groups in a
# block and across blocks, more masks than are summed together, more positions than a thread keeps.
SOFT_CASES = [
    (1, 8, 1, 1, 5, 3),
    (3, 7, 1, 2, 3, 3),
    (2, 264, 1, 2, 7, 7),
    (2, 48, 2, 3, 4, 5),
    (2, 36, 12, 11, 3, 3),
    (1, 16, 2, 2, 9, 11),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SOFT_CASES, ids=str)
def test_soft_kernels_agree_with_the_definition(host_kernels, case, dtype):
    batch, channels, groups, masks, height, width = case
    features = random_features(batch, channels, height, width, dtype).to(memory_format=torch.channels_last)
    weights = random_maps(batch, groups, masks, height, width, torch.float32)
    weights[0, 0, 0] = 0
    grad = random_features(batch, channels, masks, 1, dtype, seed=2).squeeze(3).transpose(1, 2).contiguous()
    compare(
        host_kernels.forward(features, weights),
        masked_pool_definition(features, weights),
        masked_pool_definition(features.double(), weights.double()),
    )
    ours = host_kernels.backward(grad, features, weights, True, True)
    eager = masked_pool_backward_definition(grad, features, weights, True, True)
    exact = masked_pool_backward_definition(grad.double(), features.double(), weights.double(), True, True)
    for name, *results in zip(("features", "weights"), ours, eager, exact, strict=True):
        compare(*results, name=name)
    only_features = host_kernels.backward(grad, features, weights, True, False)
    assert torch.equal(only_features[0], ours[0]) and only_features[1].numel() == 0


def test_kernels_take_other_layouts_and_half_weights(host_kernels):
    features = random_features(4, 16, 6, 6, torch.bfloat16)
    weights = random_maps(4, 1, 2, 6, 6, torch.bfloat16)
    expected = masked_pool_definition(features.double(), weights.double())
    eager = masked_pool_definition(features, weights)
    strided = torch.stack([features, features], dim=4)[..., 0]
    assert not strided.is_contiguous() and not strided.is_contiguous(memory_format=torch.channels_last)
    for given in (features, strided, strided.to(memory_format=torch.channels_last)):
        compare(
            host_kernels.forward(given, weights[:, :, :1].expand(4, 1, 2, 6, 6)),
            masked_pool_definition(given, weights[:, :, :1].expand(4, 1, 2, 6, 6)),
            expected[:, :1].expand(4, 2, 16),
        )
        compare(host_kernels.forward(given, weights), eager, expected)


def test_misaligned_storage_takes_the_scalar_path(host_kernels):
    base = torch.randn(1 + 2 * 8 * 9)
    features = base[1:].view(2, 3, 3, 8).permute(0, 3, 1, 2)
    assert features.data_ptr() % 16 and features.is_contiguous(memory_format=torch.channels_last)
    weights = random_maps(2, 1, 2, 3, 3, torch.float32)
    torch.testing.assert_close(host_kernels.forward(features, weights), masked_pool_definition(features, weights))


# Compilation for GPUs, which needs none.


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_source_compiles_for_gpus(capability):
    for feature, weight, vector, maps in (("BFloat16", "Float32", 8, 2), ("Float16", "Float16", 1, 8)):
        options = [f"-DFEATURE={feature}", f"-DWEIGHT={weight}", f"-DVECTOR={vector}", f"-DMAPS={maps}"]
        compiles_for(SOURCE, KERNELS, capability, options)


@pytest.mark.parametrize("kind", ["Float16", "Float32"])
def test_source_compiles_for_volta_with_cuda_12(kind):
    compiles_for_volta(SOURCE, [f"-DFEATURE={kind}", "-DWEIGHT=Float32", "-DVECTOR=4", "-DMAPS=2"])


# The choice between definition and kernels.


# The choice between definition and kernels.


def test_choice_is_said_once(caplog, monkeypatch):
    features = random_features(2, 4, 3, 3, torch.float32)
    monkeypatch.setattr(MASKED_POOL, "_mode", "cuda")
    choice._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        for _ in range(3):
            assert kernels_for(features, random_maps(2, 1, 2, 3, 3)) is None
    assert [record.message for record in caplog.records] == [
        "mask pooling: PyTorch definition, because the features are on cpu"
    ]


def test_kernels_are_off_until_asked_for(monkeypatch):
    class OnGpu:
        is_cuda, dtype, shape, device = True, torch.float32, (2, 8, 3, 3), torch.device("cuda", 0)

        def numel(self):
            return 144

    class Maps(OnGpu):
        def __init__(self, groups, masks):
            self.shape = (2, groups, masks, 3, 3)

    monkeypatch.setattr(MASKED_POOL, "_mode", "auto")
    assert "have not been proved" in why_not(OnGpu(), Maps(1, 2))
    MASKED_POOL.set("cuda")
    assert why_not(OnGpu(), Maps(1, 2)) is None
    assert "float64" in why_not(type("Double", (OnGpu,), {"dtype": torch.float64})(), Maps(1, 2))
    assert "more than the kernels hold" in why_not(OnGpu(), Maps(8, 1000))
    assert "are none" in why_not(OnGpu(), Maps(1, 0))
    assert (
        why_not(OnGpu(), random_maps(2, 1, 2, 3, 3, torch.float32)) == "the weights are on cpu, the features on cuda:0"
    )
    with pytest.raises(ValueError, match="definition"):
        MASKED_POOL.set("fast")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_on_a_gpu(dtype, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(MASKED_POOL, "_mode", "cuda")
    for batch, channels, groups, masks, height, width in [*SOFT_CASES, (16, 2048, 1, 2, 7, 7), (8, 2048, 4, 64, 7, 7)]:
        features = random_features(batch, channels, height, width, dtype).cuda()
        features = features.to(memory_format=torch.channels_last)
        weights = random_maps(batch, groups, masks, height, width, torch.float32).cuda()
        assert kernels_for(features, weights) is not None
        results = {}
        for name, pool in (("ours", masked_pool), ("eager", masked_pool_definition), ("exact", masked_pool_definition)):
            cast = (lambda x: x.double()) if name == "exact" else (lambda x: x.clone())
            inputs = [cast(features).requires_grad_(), cast(weights).requires_grad_()]
            pooled = pool(*inputs)
            results[name] = (pooled, *torch.autograd.grad(pooled.float().square().sum(), inputs))
        for ours, eager, exact in zip(*results.values(), strict=True):
            compare(ours, eager, exact)
