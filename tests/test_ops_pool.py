"""Mask pooling: the definitions against loops, and the CUDA source, run on the host, against the definitions."""

import functools
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.ops import box_pool, masked_pool, pool_kernels
from models.ops.box_pool import box_pool_backward_definition, box_pool_definition
from models.ops.masked_pool import masked_pool_backward_definition, masked_pool_definition
from models.ops.nvrtc import Nvrtc, cached_cubin, find_nvrtc, nvrtc_candidates, read_source
from models.ops.pool_kernels import KERNELS, SOURCE, PoolKernels, kernels_for, set_pool_kernel, why_not
from tests.cuda_host import HostModule
from tools.benchmarking import check_twice_eager

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOXES = [[0, 0, 1, 1], [1, 2, 3, 2], [0, 0, 9, 9], [2, 1, 0, 3], [3, 3, 5, 5], [-1, -1, 3, 2]]


def random_features(batch, channels, height, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, channels, height, width, generator=generator) + 0.5).to(dtype)


def random_maps(batch, groups, masks, height, width, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, groups, masks, height, width, generator=generator).to(dtype)


def random_boxes(batch):
    return torch.tensor([BOXES[i % len(BOXES)] for i in range(batch)])


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


def loop_box_pool(feature_map, boxes):
    batch, channels, height, width = feature_map.shape
    out = torch.zeros(batch, 3, channels, dtype=feature_map.dtype)
    for b, (top, left, box_height, box_width) in enumerate(boxes.tolist()):
        inside, outside = [], []
        for y in range(height):
            for x in range(width):
                hit = top <= y < top + box_height and left <= x < left + box_width
                (inside if hit else outside).append(feature_map[b, :, y, x])
        for part, cells in enumerate((inside, outside, inside + outside)):
            if cells:
                out[b, part] = torch.stack(cells).mean(0)
    return out


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


@pytest.mark.smoke
def test_box_pool_is_the_mean_of_each_part():
    feature_map, boxes = random_features(6, 5, 4, 6), random_boxes(6)
    torch.testing.assert_close(box_pool(feature_map, boxes), loop_box_pool(feature_map, boxes))
    assert (box_pool(feature_map, boxes)[2, 1] == 0).all(), "a box that fills the map leaves no canvas"
    assert (box_pool(feature_map, boxes)[3, 0] == 0).all(), "an empty box"


def test_box_pool_equals_masked_pool_with_its_masks():
    feature_map, boxes = random_features(6, 4, 7, 7), random_boxes(6)
    paste = torch.zeros(6, 7, 7, dtype=torch.float64)
    for b, (top, left, height, width) in enumerate(boxes.clamp(min=0).tolist()):
        paste[b, top : top + height, left : left + width] = 1
    paste[5, 2:] = 0  # the part of the last box on the map is 2 x 1, since it starts above and left of it
    paste[5, :, 1:] = 0
    weights = torch.stack([paste, 1 - paste, torch.ones_like(paste)], dim=1)[:, None]
    torch.testing.assert_close(box_pool(feature_map, boxes), masked_pool(feature_map, weights))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients(layout):
    features = random_features(3, 4, 3, 2).to(memory_format=layout).requires_grad_()
    weights = random_maps(3, 2, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(masked_pool, (features, weights))
    assert torch.autograd.gradcheck(box_pool, (features, random_boxes(3)))
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
    torch.library.opcheck(torch.ops.regatta.box_pool.default, (features, random_boxes(2)))


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
    with pytest.raises(ValueError, match="int64"):
        box_pool(features, random_boxes(2).float())
    with pytest.raises(ValueError, match="boxes"):
        box_pool(features, random_boxes(3))


# The CUDA source itself, compiled for the host.


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return PoolKernels(functools.partial(HostModule, SOURCE, folder=folder))


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
        host_kernels.masked_pool(features, weights),
        masked_pool_definition(features, weights),
        masked_pool_definition(features.double(), weights.double()),
    )
    ours = host_kernels.masked_pool_backward(grad, features, weights, True, True)
    eager = masked_pool_backward_definition(grad, features, weights, True, True)
    exact = masked_pool_backward_definition(grad.double(), features.double(), weights.double(), True, True)
    for name, *results in zip(("features", "weights"), ours, eager, exact, strict=True):
        compare(*results, name=name)
    only_features = host_kernels.masked_pool_backward(grad, features, weights, True, False)
    assert torch.equal(only_features[0], ours[0]) and only_features[1].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(6, 264, 7, 7), (1, 8, 7, 7), (6, 7, 3, 5), (2, 3, 1, 1)], ids=str)
def test_box_kernels_agree_with_the_definition(host_kernels, case, dtype):
    batch, channels, height, width = case
    feature_map = random_features(batch, channels, height, width, dtype).to(memory_format=torch.channels_last)
    boxes, grad = random_boxes(batch), random_features(batch, 3, channels, 1, dtype, seed=2).squeeze(3)
    compare(
        host_kernels.box_pool(feature_map, boxes),
        box_pool_definition(feature_map, boxes),
        box_pool_definition(feature_map.double(), boxes),
    )
    compare(
        host_kernels.box_pool_backward(grad, feature_map, boxes),
        box_pool_backward_definition(grad, feature_map, boxes),
        box_pool_backward_definition(grad.double(), feature_map.double(), boxes),
    )


def compare(ours, eager, exact, name="pooled"):
    assert ours.shape == exact.shape and ours.dtype == eager.dtype
    check_twice_eager(name, ours, eager, exact)


def test_kernels_take_other_layouts_and_half_weights(host_kernels):
    features = random_features(4, 16, 6, 6, torch.bfloat16)
    weights = random_maps(4, 1, 2, 6, 6, torch.bfloat16)
    expected = masked_pool_definition(features.double(), weights.double())
    eager = masked_pool_definition(features, weights)
    strided = torch.stack([features, features], dim=4)[..., 0]
    assert not strided.is_contiguous() and not strided.is_contiguous(memory_format=torch.channels_last)
    for given in (features, strided, strided.to(memory_format=torch.channels_last)):
        compare(
            host_kernels.masked_pool(given, weights[:, :, :1].expand(4, 1, 2, 6, 6)),
            masked_pool_definition(given, weights[:, :, :1].expand(4, 1, 2, 6, 6)),
            expected[:, :1].expand(4, 2, 16),
        )
        compare(host_kernels.masked_pool(given, weights), eager, expected)


def test_misaligned_storage_takes_the_scalar_path(host_kernels):
    base = torch.randn(1 + 2 * 8 * 9)
    features = base[1:].view(2, 3, 3, 8).permute(0, 3, 1, 2)
    assert features.data_ptr() % 16 and features.is_contiguous(memory_format=torch.channels_last)
    weights = random_maps(2, 1, 2, 3, 3, torch.float32)
    torch.testing.assert_close(host_kernels.masked_pool(features, weights), masked_pool_definition(features, weights))


# Compilation for GPUs, which needs none.


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_source_compiles_for_gpus(capability):
    nvrtc = nvrtc_or_skip()
    for feature, weight, vector, maps in (("BFloat16", "Float32", 8, 2), ("Float16", "Float16", 1, 8)):
        options = [f"-DFEATURE={feature}", f"-DWEIGHT={weight}", f"-DVECTOR={vector}", f"-DMAPS={maps}"]
        cubin = nvrtc.compile(read_source(SOURCE), SOURCE.name, capability, options)
        assert cubin[:4] == b"\x7fELF" and all(kernel.encode() in cubin for kernel in KERNELS)


def nvrtc_or_skip():
    try:
        return find_nvrtc()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_source_compiles_for_volta_with_cuda_12():
    path = next((path for path in nvrtc_candidates(12) if os.sep in path), None)
    if path is None:
        pytest.skip("CUDA 12's NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12")
    # Another process, so that two versions of the compiler never meet in one.
    code = (
        "import sys; from pathlib import Path; from models.ops.nvrtc import Nvrtc, read_source\n"
        "source = read_source(Path(sys.argv[2]))\n"
        "for kind in ('Float16', 'Float32'):\n"
        "    options = [f'-DFEATURE={kind}', '-DWEIGHT=Float32', '-DVECTOR=4', '-DMAPS=2']\n"
        "    print(len(Nvrtc(sys.argv[1]).compile(source, 'masked_pool.cu', (7, 0), options)))\n"
    )
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code, path, str(SOURCE)], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(int(size) > 1000 for size in run.stdout.split())


def test_compiler_errors_are_shown():
    nvrtc = nvrtc_or_skip()
    with pytest.raises(RuntimeError, match="undefined_name"):
        nvrtc.compile("__global__ void f() { undefined_name(); }", "broken.cu", (8, 0))


def test_compiled_kernels_are_cached(tmp_path, monkeypatch):
    nvrtc = nvrtc_or_skip()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "tiny.cu"
    source.write_text('extern "C" __global__ void f(float* x) { x[0] = N; }')
    first = cached_cubin(nvrtc, source, (8, 0), ("-DN=1",))
    monkeypatch.setattr(Nvrtc, "compile", lambda *arguments: pytest.fail("compiled again"))
    assert cached_cubin(nvrtc, source, (8, 0), ("-DN=1",)) == first
    with pytest.raises(pytest.fail.Exception):
        cached_cubin(nvrtc, source, (8, 0), ("-DN=2",))


# The choice between definition and kernels.


def test_choice_is_said_once(caplog, monkeypatch):
    features = random_features(2, 4, 3, 3, torch.float32)
    monkeypatch.setattr(pool_kernels, "_mode", "cuda")
    pool_kernels._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=pool_kernels.__name__):
        for _ in range(3):
            assert kernels_for(features) is None
    assert [record.message for record in caplog.records] == [
        "mask pooling: PyTorch definition, because the features are on cpu"
    ]


def test_kernels_are_off_until_asked_for(monkeypatch):
    class OnGpu:
        is_cuda, dtype, shape = True, torch.float32, (2, 8, 3, 3)

        def numel(self):
            return 144

    monkeypatch.setattr(pool_kernels, "_mode", "auto")
    assert "have not been run on a GPU" in why_not(OnGpu(), 1, 2)
    set_pool_kernel("cuda")
    assert why_not(OnGpu(), 1, 2) is None
    assert "float64" in why_not(type("Double", (OnGpu,), {"dtype": torch.float64})(), 1, 2)
    assert "more than the kernels hold" in why_not(OnGpu(), 8, 1000)
    with pytest.raises(ValueError, match="definition"):
        set_pool_kernel("fast")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_on_a_gpu(dtype, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(pool_kernels, "_mode", "cuda")
    for batch, channels, groups, masks, height, width in [*SOFT_CASES, (16, 2048, 1, 2, 7, 7), (8, 2048, 4, 64, 7, 7)]:
        features = random_features(batch, channels, height, width, dtype).cuda()
        features = features.to(memory_format=torch.channels_last)
        weights = random_maps(batch, groups, masks, height, width, torch.float32).cuda()
        assert kernels_for(features, groups, masks) is not None
        results = {}
        for name, pool in (("ours", masked_pool), ("eager", masked_pool_definition), ("exact", masked_pool_definition)):
            cast = (lambda x: x.double()) if name == "exact" else (lambda x: x.clone())
            inputs = [cast(features).requires_grad_(), cast(weights).requires_grad_()]
            pooled = pool(*inputs)
            results[name] = (pooled, *torch.autograd.grad(pooled.float().square().sum(), inputs))
        for ours, eager, exact in zip(*results.values(), strict=True):
            compare(ours, eager, exact)
        boxes = random_boxes(batch).cuda()
        exact = box_pool_definition(features.double(), boxes)
        compare(box_pool(features, boxes), box_pool_definition(features, boxes), exact)


@pytest.mark.gpu
def test_kernels_inside_a_cuda_graph(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(pool_kernels, "_mode", "cuda")
    features = random_features(8, 64, 7, 7, torch.float16).cuda().to(memory_format=torch.channels_last)
    boxes = random_boxes(8).cuda()
    box_pool(features, boxes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pooled = box_pool(features, boxes)
    features.mul_(2)
    graph.replay()
    torch.testing.assert_close(pooled, box_pool_definition(features, boxes))
