"""Backbones, heads and the key queue: layouts, counts, initialisation, drop-path, wrap-around."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

from models.heads import dense_head, initialise_linear, mlp_head
from models.key_queue import KeyQueue
from models.methods import METHODS
from models.methods.base import Method
from models.resnet import BACKBONES, build_backbone
from models.swin import SwinTrunk, draw_branch_scale

TORCHVISION = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "resnet50-2x": "wide_resnet50_2",
    "swin-t": "swin_t",
}
CLASSIFIER = {"fc.weight", "fc.bias", "head.weight", "head.bias"}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# Parameter counts (methods.md 1.3)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("resnet50", 23_508_032),
        ("resnet101", 42_500_160),
        ("resnet152", 58_143_808),
        ("resnet50-2x", 66_834_240),
        ("swin-t", 27_519_354),
    ],
)
def test_backbone_parameters(arch, expected):
    with torch.device("meta"):
        assert count(build_backbone(arch, "fan_out")) == expected


def full_size(name: str, arch: str = "resnet50") -> Method:
    with torch.device("meta"):
        return METHODS[name](METHODS[name].Config(), arch=arch, image_size=224)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "arch", "part", "expected"),
    [
        ("moco-v2", "resnet50", "projector", 4_458_624),
        ("moco-v2", "resnet50", "", 27_966_656),
        ("regioncl-m", "resnet50", "projector", 4_458_624),
        ("regioncl-m", "resnet50", "", 27_966_656),
        # 1x1 convolutions have the weights of linear layers of the same widths.
        ("densecl", "resnet50", "dense_projector", 4_458_624),
        ("regioncl-d", "resnet50", "", 27_966_656 + 4_458_624),
        # three 2048 x 2048 layers without bias, two affine batch norms, one without
        ("simsiam", "resnet50", "projector", 3 * 2048**2 + 2 * 2 * 2048),
        ("simsiam", "resnet50", "predictor", 2048 * 512 + 2 * 512 + 512 * 2048 + 2048),
        ("moco-v3", "resnet50", "projector", 2048 * 4096 + 2 * 4096 + 4096 * 256),
        ("moco-v3", "resnet50", "predictor", 256 * 4096 + 2 * 4096 + 4096 * 256),
        ("moby", "swin-t", "encoder", 27_519_354),
        ("moby", "swin-t", "projector", 768 * 4096 + 4096 + 2 * 4096 + 4096 * 256 + 256),
        ("moby", "swin-t", "predictor", 256 * 4096 + 4096 + 2 * 4096 + 4096 * 256 + 256),
    ],
)
def test_method_parameters(name, arch, part, expected):
    method = full_size(name, arch)
    assert count(getattr(method, part) if part else method) == expected


# Backbones


@pytest.mark.parametrize("arch", [name for name in BACKBONES if name in TORCHVISION])
def test_state_dict_is_torchvisions_without_classifier(arch):
    with torch.device("meta"):
        ours = build_backbone(arch, "fan_out").state_dict()
        theirs = getattr(torchvision.models, TORCHVISION[arch])().state_dict()
    assert {key: value.shape for key, value in theirs.items() if key not in CLASSIFIER} == {
        key: value.shape for key, value in ours.items()
    }


@pytest.mark.parametrize("arch", ["resnet18", "swin"])
def test_features_equal_torchvisions(arch):
    torch.manual_seed(0)
    if arch == "resnet18":
        theirs, ours = torchvision.models.resnet18().eval(), build_backbone(arch, "torch").eval()
    else:
        sizes = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}
        theirs = SwinTransformer([4, 4], window_size=[7, 7], **sizes).eval()
        ours = SwinTrunk(**sizes).eval()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if key not in CLASSIFIER})
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        feature_map = ours(images)
        classifier = theirs.fc if arch == "resnet18" else theirs.head
        assert feature_map.shape == (2, ours.feature_dim, 96 // ours.stride, 96 // ours.stride)
        torch.testing.assert_close(classifier(feature_map.mean((2, 3))), theirs(images))


@pytest.mark.parametrize(("arch", "width"), [("resnet10-w16", 16), ("resnet10-w32", 32)])
def test_a_narrow_trunk_has_a_map_of_two_cells_at_32_px(arch, width):
    trunk = build_backbone(arch, "fan_out", zero_init_residual=True)
    middle, last = trunk.forward_stages(torch.randn(2, 3, 32, 32))
    assert middle.shape == (2, trunk.stage_dims[0], 4, 4) and last.shape == (2, trunk.feature_dim, 2, 2)
    assert trunk.stage_dims == (4 * width, 8 * width) and trunk.feature_dim == 8 * width and trunk.stride == 16
    assert all((stage[0].bn2.weight == 0).all() for stage in (trunk.layer1, trunk.layer4))
    assert not (build_backbone(arch, "fan_out").layer1[0].bn2.weight == 0).any()


def test_stages_are_layer3_and_layer4():
    trunk = build_backbone("resnet18", "fan_out").eval()
    with torch.no_grad():
        middle, last = trunk.forward_stages(torch.randn(1, 3, 64, 64))
    assert middle.shape == (1, trunk.stage_dims[0], 4, 4) and last.shape == (1, trunk.stage_dims[1], 2, 2)
    torch.testing.assert_close(trunk.layer4(middle), last)


@pytest.mark.parametrize(("scheme", "fan"), [("fan_out", 64 * 9), ("fan_in", 128 * 9)])
def test_convolutions_start_kaiming_normal(scheme, fan):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(128, 64, 3))
    from models.resnet import initialise_convolutions

    initialise_convolutions(layer, scheme)
    weight = layer[0].weight.detach()
    assert weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.02)
    assert abs(weight.mean().item()) < 1e-3
    kurtosis = ((weight / weight.std()) ** 4).mean().item()
    assert kurtosis == pytest.approx(3.0, abs=0.15)  # a normal distribution, not a uniform one (1.8)


def test_torch_initialisation_is_uniform():
    torch.manual_seed(0)
    weight = build_backbone("resnet18", "torch").layer1[0].conv1.weight.detach()
    assert weight.abs().max().item() <= 1 / math.sqrt(64 * 9) + 1e-7
    assert ((weight / weight.std()) ** 4).mean().item() == pytest.approx(1.8, abs=0.1)


@pytest.mark.parametrize("on", [True, False])
def test_residual_branches_start_at_zero(on):
    trunk = build_backbone("resnet50", "fan_out", zero_init_residual=on)
    gammas = torch.stack([block.bn3.weight.detach().abs().max() for block in trunk.layer2])
    assert bool((gammas == 0).all()) == on
    assert trunk.layer2[0].bn2.weight.detach().eq(1).all()


def test_wrong_architectures_are_refused():
    with pytest.raises(ValueError, match="--arch vgg16 is unknown; choose one of resnet10-w16"):
        build_backbone("vgg16", "fan_out")
    with pytest.raises(ValueError, match="--zero-init-residual false"):
        build_backbone("swin-t", "torch", zero_init_residual=True)
    with pytest.raises(ValueError, match="--drop-path 0"):
        METHODS["moby"](METHODS["moby"].Config(), arch="resnet18", image_size=64)  # type: ignore[call-arg]


# Swin


def test_swin_starts_normal():
    torch.manual_seed(0)
    trunk = SwinTrunk(32, (1, 1), (1, 2))
    layers = [m for m in trunk.modules() if isinstance(m, nn.Linear)]
    weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    tables = torch.cat([p.detach().flatten() for n, p in trunk.named_parameters() if n.endswith("bias_table")])
    assert tables.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(layer.weight.std().item() == pytest.approx(0.02, rel=0.1) for layer in layers)
    assert not any(layer.bias is not None and layer.bias.any() for layer in layers)


def test_no_weight_of_swin_starts_far_out():
    """A truncated normal number by the inverse error function of a float32 can be infinite, and is then cut to -2."""
    torch.manual_seed(0)
    trunk = build_backbone("swin-t", "torch")
    assert max(p.abs().max().item() for p in trunk.parameters() if p.ndim == 2) < 7 * 0.02


def test_swin_starts_alike_whatever_torchvision_draws(monkeypatch):
    def start() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        return SwinTrunk(8, (1, 2), (1, 2)).state_dict(), torch.rand(1)

    weights, following = start()
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, std: nn.init.constant_(weight, std))
    again, following_again = start()
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert following == following_again


def small_swin() -> SwinTrunk:
    torch.manual_seed(0)
    return SwinTrunk(embed_dim=8, depths=(1, 2), num_heads=(1, 2)).double().eval()


def test_branch_scales_reach_their_branches():
    """Factors of one equal no factors; zeros leave what is not a branch; each image has factors of its own."""
    trunk = small_swin()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    scale = torch.ones(2 * trunk.num_blocks, 2)
    torch.testing.assert_close(trunk(images, scale), trunk(images))
    bare = trunk.features[2](trunk.features[0](images))
    torch.testing.assert_close(trunk(images, torch.zeros_like(scale)), trunk.norm(bare).permute(0, 3, 1, 2))
    for branch in range(len(scale)):
        changed = scale.clone()
        changed[branch, 1] = 0
        out = trunk(images, changed)
        torch.testing.assert_close(out[0], trunk(images)[0])
        assert not torch.allclose(out[1], trunk(images)[1])


def test_drop_path_rates_grow_linearly():
    blocks, rate, rows = 6, 0.2, 20_000
    scale = draw_branch_scale(blocks, rate, seed=1, step=2, tag=0, rows=slice(0, rows), global_batch=rows)
    assert scale.shape == (2 * blocks, rows)
    for block in range(blocks):
        keep = 1 - rate * block / (blocks - 1)
        for branch in scale[2 * block : 2 * block + 2]:
            assert torch.unique(branch[branch > 0]).tolist() == [pytest.approx(1 / keep)]
            assert (branch > 0).float().mean().item() == pytest.approx(keep, abs=0.01)
    # Attention and MLP of a block are dropped independently of each other.
    both = ((scale[-1] == 0) & (scale[-2] == 0)).float().mean().item()
    assert both == pytest.approx(rate * rate, abs=0.006)


def test_drop_path_depends_on_step_and_pass_but_not_on_ranks():
    def draw(step=3, tag=1, seed=0, rows=slice(0, 8)):
        return draw_branch_scale(12, 0.5, seed, step, tag, rows, 8)

    whole = draw()
    assert torch.equal(whole, draw())
    assert torch.equal(whole, torch.cat([draw(rows=slice(0, 4)), draw(rows=slice(4, 8))], dim=1))
    assert len({draw(**change).numpy().tobytes() for change in ({}, {"step": 4}, {"tag": 2}, {"seed": 1})}) == 4
    assert not torch.equal(draw(step=1, tag=2), draw(step=2, tag=1))
    with pytest.raises(ValueError, match="--drop-path 1.0"):
        draw_branch_scale(12, 1.0, 0, 0, 0, slice(0, 8), 8)


# Heads


def test_mlp_head_by_hand():
    """Linear, batch norm over rows, ReLU, Linear, batch norm without gamma and beta, in float64."""
    torch.manual_seed(0)
    head = mlp_head((3, 5, 2), biases=(False, True), hidden_norm=True, output_norm="fixed").double()
    rows = torch.randn(7, 3, dtype=torch.float64)

    def norm(x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(0)
        return centred / (centred.square().mean(0) + 1e-5).sqrt()

    hidden = norm(rows @ head[0].weight.T) * head[1].weight + head[1].bias
    expected = norm(hidden.clamp(min=0) @ head[3].weight.T + head[3].bias)
    torch.testing.assert_close(head(rows), expected, rtol=1e-6, atol=1e-9)
    assert [type(layer).__name__ for layer in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert head[0].bias is None and head[3].bias is not None and not head[4].affine and head[1].affine


def test_mlp_head_counts_its_biases():
    with pytest.raises(ValueError, match="2 linear layers need as many bias flags, not 1"):
        mlp_head((3, 4, 5), biases=(True,), hidden_norm=False)


def test_dense_head_is_the_mlp_at_each_position():
    torch.manual_seed(0)
    dense, mlp = dense_head(3, 5, 2), mlp_head((3, 5, 2), biases=(True, True), hidden_norm=False)
    for index in (0, 2):
        mlp[index].weight.data = dense[index].weight.data[:, :, 0, 0]
        mlp[index].bias.data = dense[index].bias.data
    feature_map = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(dense(feature_map)[1, :, 2, 3], mlp(feature_map[:, :, 2, 3])[1])


def test_open_self_sup_head_initialisation():
    torch.manual_seed(0)
    head = mlp_head((512, 256, 128), biases=(True, True), hidden_norm=False)
    initialise_linear(head, "fan_in")
    assert head[0].weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.02)
    assert head[2].weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert not head[0].bias.any() and not head[2].bias.any()
    initialise_linear(head, "torch")
    assert head[0].weight.abs().max().item() <= 1 / math.sqrt(512) + 1e-7 and head[0].bias.any()


def test_reference_initialisations_of_the_methods():
    """fan_in for OpenSelfSup's descendants, fan_out for the others; some start branches at zero."""
    for name, cls in METHODS.items():
        config = cls.Config()
        open_self_sup = name in ("regioncl-m", "densecl", "regioncl-d")
        expected = "fan_in" if open_self_sup else "torch" if "moby" in name else "fan_out"
        assert config.conv_init == expected, name
        assert config.zero_init_residual == (
            name in ("simsiam", "regioncl-s", "moco-v3", "regioncl-m3", "simclr", "barlow-twins", "pixpro")
        ), name
        if hasattr(config, "head_init"):
            assert config.head_init == ("fan_in" if open_self_sup else "torch"), name


# Key queue


def test_queue_overwrites_oldest_first_and_wraps():
    queue = KeyQueue(5, 2)
    numbers = torch.arange(24.0).view(12, 2)
    queue.rows.zero_()
    storage = queue.rows.data_ptr()
    queue.enqueue(numbers[0:2])
    assert queue.rows[:, 0].tolist() == [0, 2, 0, 0, 0] and queue.pointer == 2
    queue.enqueue(numbers[2:4])
    queue.enqueue(numbers[4:6])  # one row at the end, one at the start
    assert queue.rows[:, 0].tolist() == [10, 2, 4, 6, 8] and queue.pointer == 1
    queue.enqueue(numbers[6:11])  # a whole queue
    assert queue.rows[:, 0].tolist() == [20, 12, 14, 16, 18] and queue.pointer == 1
    assert queue.rows.data_ptr() == storage


@pytest.mark.parametrize("batch", range(1, 8))
def test_queue_holds_the_last_keys_for_any_batch(batch):
    queue, stream = KeyQueue(7, 1), torch.arange(200.0).view(-1, 1)
    for first in range(0, 20 * batch, batch):
        if first + batch <= 200:
            queue.enqueue(stream[first : first + batch])
            last = first + batch
    assert sorted(queue.rows[:, 0].tolist()) == stream[last - 7 : last, 0].tolist()


def test_queue_refuses_more_keys_than_rows():
    with pytest.raises(ValueError, match="3 keys a step do not fit a queue of 2; raise --queue-size"):
        KeyQueue(2, 4).enqueue(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="--queue-size 0"):
        KeyQueue(0, 4)


def test_queue_starts_with_unit_rows_of_its_generator():
    queue = KeyQueue(1000, 8, torch.Generator().manual_seed(3))
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(1000))
    assert torch.equal(queue.rows, KeyQueue(1000, 8, torch.Generator().manual_seed(3)).rows)
    assert queue.rows.mean().abs() < 0.01  # directions all around
    assert list(queue.state_dict()) == ["rows"]
