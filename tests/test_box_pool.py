"""Box pooling: the definition against loops, and the CUDA source, run on the host, against the definition."""

import functools

import pytest
import torch

from models.ops import box_pool, masked_pool
from models.ops.box_pool import box_pool_backward_definition, box_pool_definition
from models.ops.box_pool_kernels import KERNELS, SOURCE, BoxPoolKernels, kernels_for, why_not
from models.ops.choice import BOX_POOL
from tests.cuda_host import HostModule, compiles_for, compiles_for_volta
from tests.pooling_cases import DTYPES, compare, random_boxes, random_features


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
    assert torch.autograd.gradcheck(box_pool, (features, random_boxes(3)))
    box_pool(features, random_boxes(3)).sum().backward()
    assert features.grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    features = random_features(2, 4, 3, 3, dtype).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.regatta.box_pool.default, (features, random_boxes(2)))


def test_wrong_shapes_are_refused():
    features = random_features(2, 6, 3, 3)
    with pytest.raises(ValueError, match="int64"):
        box_pool(features, random_boxes(2).float())
    with pytest.raises(ValueError, match="boxes"):
        box_pool(features, random_boxes(3))


# The CUDA source itself, compiled for the host.


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return BoxPoolKernels(functools.partial(HostModule, SOURCE, folder=folder))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(6, 264, 7, 7), (1, 8, 7, 7), (6, 7, 3, 5), (2, 3, 1, 1)], ids=str)
def test_box_kernels_agree_with_the_definition(host_kernels, case, dtype):
    batch, channels, height, width = case
    feature_map = random_features(batch, channels, height, width, dtype).to(memory_format=torch.channels_last)
    boxes, grad = random_boxes(batch), random_features(batch, 3, channels, 1, dtype, seed=2).squeeze(3)
    compare(
        host_kernels.forward(feature_map, boxes),
        box_pool_definition(feature_map, boxes),
        box_pool_definition(feature_map.double(), boxes),
    )
    compare(
        host_kernels.backward(grad, feature_map, boxes),
        box_pool_backward_definition(grad, feature_map, boxes),
        box_pool_backward_definition(grad.double(), feature_map.double(), boxes),
    )


def test_kernels_read_boxes_that_are_stored_apart(host_kernels):
    """One box for all images, as the released code draws it, is a tensor without a row of its own for each."""
    feature_map, boxes = random_features(3, 8, 5, 5, torch.float32), random_boxes(2)[1:].expand(3, 4)
    assert not boxes.is_contiguous()
    torch.testing.assert_close(host_kernels.forward(feature_map, boxes), box_pool_definition(feature_map, boxes))


# Compilation for GPUs, which needs none.


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_source_compiles_for_gpus(capability):
    for feature, vector in (("BFloat16", 8), ("Float16", 1)):
        compiles_for(SOURCE, KERNELS, capability, [f"-DFEATURE={feature}", f"-DVECTOR={vector}"])


def test_source_compiles_for_volta_with_cuda_12():
    compiles_for_volta(SOURCE, ["-DFEATURE=Float16", "-DVECTOR=8"])


# The choice between definition and kernels.


def test_boxes_elsewhere_are_left_to_the_definition(monkeypatch):
    class OnGpu:
        is_cuda, dtype, shape, device = True, torch.float32, (2, 8, 3, 3), torch.device("cuda", 0)

        def numel(self):
            return 144

    monkeypatch.setattr(BOX_POOL, "_mode", "cuda")
    assert why_not(OnGpu(), random_boxes(2)) == "the boxes are on cpu"
    assert why_not(OnGpu(), OnGpu()) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_on_a_gpu(dtype, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(BOX_POOL, "_mode", "cuda")
    for batch, channels, height, width in [(1, 8, 5, 3), (3, 7, 3, 3), (2, 264, 7, 7), (16, 2048, 7, 7)]:
        features = random_features(batch, channels, height, width, dtype).cuda()
        features = features.to(memory_format=torch.channels_last)
        boxes = random_boxes(batch).cuda()
        assert kernels_for(features, boxes) is not None
        exact = box_pool_definition(features.double(), boxes)
        compare(box_pool(features, boxes), box_pool_definition(features, boxes), exact)


@pytest.mark.gpu
def test_kernels_inside_a_cuda_graph(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(BOX_POOL, "_mode", "cuda")
    features = random_features(8, 64, 7, 7, torch.float16).cuda().to(memory_format=torch.channels_last)
    boxes = random_boxes(8).cuda()
    box_pool(features, boxes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pooled = box_pool(features, boxes)
    features.mul_(2)
    graph.replay()
    torch.testing.assert_close(pooled, box_pool_definition(features, boxes))
