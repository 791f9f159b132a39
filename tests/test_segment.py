"""Segmentation: networks, geometry, colours, layouts, metrics, sliding windows, training, ranks, exact resumption."""

from __future__ import annotations

import colorsys
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision.models import resnet50

import train.eval.segment
import train.eval.segmentation.training as training
from tests.runs import last_wins
from tools.bench.rows import RESULTS
from train.backbone_io import build_encoder, save_backbone
from train.errors import Stopped, UserMistake
from train.eval.options import SegmentConfig
from train.eval.segmentation import augment, layouts
from train.eval.segmentation.augment import Geometry, fitted_size, random_crop, resample_image, resample_label
from train.eval.segmentation.fcn import ChannelDropout, dilate_to_stride_8
from train.eval.segmentation.feed import TrainingFeed, read_pair
from train.eval.segmentation.inference import sliding_logits, whole_logits, window_starts
from train.eval.segmentation.labels import IGNORED, Pair, inspect, label_map, read_label
from train.eval.segmentation.layouts import read_layout
from train.eval.segmentation.metrics import confusion_matrix, scores
from train.eval.segmentation.network import build_segmenter, pixel_loss, require_resnet, stages_of
from train.eval.segmentation.protocol import make_plan, task_name
from train.eval.segmentation.upernet import UPerNetHead, mean_pool
from train.eval.tuning import TuningCheckpoints, state_folder
from train.evaluate import main
from train.runtime import Runtime
from train.state import TuningState

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def conv_norm(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel**2 + 2 * outputs


# mmsegmentation's layers written out. Its own networks have 19,232 parameters more in a stem of three convolutions:
# with 150 classes that gives the 66.52 million of its UPerNet on ResNet-50.
ENCODER = 23_508_032
AUXILIARY = conv_norm(1024, 256, 3)
EXPECTED = {
    ("fcn", 21): ENCODER
    + AUXILIARY
    + conv_norm(2048, 512, 3)
    + conv_norm(512, 512, 3)
    + conv_norm(2560, 512, 3)
    + 21 * (512 + 1 + 256 + 1),
    ("upernet", 19): ENCODER
    + AUXILIARY
    + 4 * conv_norm(2048, 512, 1)
    + conv_norm(2048 + 4 * 512, 512, 3)
    + sum(conv_norm(width, 512, 1) for width in (256, 512, 1024))
    + 3 * conv_norm(512, 512, 3)
    + conv_norm(4 * 512, 512, 3)
    + 19 * (512 + 1 + 256 + 1),
}


@pytest.mark.parametrize(("model", "classes"), EXPECTED)
def test_full_size_networks_have_the_protocols_shapes_and_counts(model, classes: int) -> None:
    with torch.device("meta"):
        network = build_segmenter(build_encoder("resnet50"), model, classes, 512, 0, "sync").eval()
        assert sum(p.numel() for p in network.parameters()) == EXPECTED[model, classes]
        images = torch.empty(1, 3, 512, 1024)
        strides = (4, 8, 8, 8) if model == "fcn" else (4, 8, 16, 32)
        shapes = [tuple(stage.shape[1:]) for stage in stages_of(network.trunk, images)]
        assert shapes == [(256 * 2**n, 512 // s, 1024 // s) for n, s in enumerate(strides)]
        stride = 8 if model == "fcn" else 4
        assert network(images).shape == (1, classes, 512 // stride, 1024 // stride)
    assert EXPECTED["fcn", 21] == 49_480_042 and EXPECTED["upernet", 19] == 66_396_006
    assert EXPECTED["upernet", 19] + 131 * (513 + 257) + 19_232 == 66_516_108


@pytest.mark.slow
def test_upernet_passes_a_full_cityscapes_crop() -> None:
    network = build_segmenter(build_encoder("resnet50"), "upernet", 19, 512, 0, "sync").eval()
    with torch.no_grad():
        logits = network(torch.rand(1, 3, 512, 1024))
    assert logits.shape == (1, 19, 128, 256) and torch.isfinite(logits).all()


def test_dilation_is_torchvisions_and_keeps_the_weights() -> None:
    torch.manual_seed(0)
    reference = resnet50(weights=None, replace_stride_with_dilation=[False, True, True]).eval()
    trunk = build_encoder("resnet50").eval()
    trunk.load_state_dict({n: t for n, t in reference.state_dict().items() if not n.startswith("fc.")})
    images = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(images))))
        expected = reference.layer4(reference.layer3(reference.layer2(reference.layer1(x))))
        torch.testing.assert_close(dilate_to_stride_8(trunk)(images), expected)
    basic = dilate_to_stride_8(build_encoder("resnet18"))
    dilations = [block.conv1.dilation[0] for stage in (basic.layer3, basic.layer4) for block in stage]
    assert dilations == [1, 2, 2, 4] and basic(images).shape == (1, 512, 8, 6)


def randomise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                nn.init.normal_(tensor, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 2)


@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_repeatable_pooling_is_adaptive_pooling(side: int) -> None:
    """On CUDA PyTorch's own raises in its backward pass under --deterministic."""
    x = torch.randn(2, 3, 16, 25, dtype=torch.float64, requires_grad=True)
    ours, theirs = mean_pool(x, side), torch.nn.functional.adaptive_avg_pool2d(x, side)
    gradient = torch.randn_like(ours)
    (got,), (expected,) = (torch.autograd.grad(y, x, gradient) for y in (ours, theirs))
    assert torch.allclose(ours, theirs) and torch.allclose(got, expected)
    head = UPerNetHead([8, 16, 32, 64], 8, 5)
    assert not any(isinstance(module, torch.nn.AdaptiveAvgPool2d) for module in head.modules())


def test_upernet_is_its_definition() -> None:
    """Written out anew from the paper and mmsegmentation's head, on the weights of ours."""
    torch.manual_seed(0)
    head = UPerNetHead([4, 6, 8, 10], 12, 3).eval()
    randomise(head)
    stages = [torch.randn(2, c, size, size + 3) for c, size in zip((4, 6, 8, 10), (32, 16, 8, 4), strict=True)]
    decoder = head.decoder

    def unit(block: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        conv, norm = block[0], block[1]
        assert conv.bias is None
        y = F.conv2d(x, conv.weight, padding=conv.weight.shape[-1] // 2)
        return F.relu(F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0, 1e-5))

    def to(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, size=other.shape[2:], mode="bilinear", align_corners=False)

    deepest = stages[3]
    pools = [
        to(unit(block[1], F.adaptive_avg_pool2d(deepest, n)), deepest)
        for block, n in zip(decoder.psp.blocks, (1, 2, 3, 6), strict=True)
    ]
    path = [unit(decoder.psp.out_conv, torch.cat([deepest, *pools], 1))]
    for stage, block in zip(stages[2::-1], decoder.fpn_lateral_blocks, strict=True):
        lateral = unit(block.conv_norm_relu, stage)
        path.append(lateral + to(path[-1], lateral))
    outputs = [path[0]] + [unit(block, x) for block, x in zip(decoder.fpn_conv_blocks, path[1:], strict=True)]
    fused = unit(decoder.fusion_block, torch.cat([to(x, outputs[-1]) for x in outputs[::-1]], 1))
    expected = F.conv2d(fused, head.classifier.conv.weight, head.classifier.conv.bias)
    with torch.no_grad():
        torch.testing.assert_close(head(stages), expected, atol=1e-5, rtol=1e-5)


def test_initial_weights_follow_the_seed_and_leave_other_draws_alone() -> None:
    trunk = build_encoder("resnet18")
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    heads = [build_segmenter(trunk, "fcn", 5, 128, seed, "plain").head for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(1), expected)
    a, b, c = (head.convs[0][0].weight for head in heads)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert abs(a.std().item() - (2 / (128 * 9)) ** 0.5) < 2e-3  # fan-out of 128 channels
    classifier = heads[0].classifier.conv
    assert abs(classifier.weight.std().item() - 0.01) < 2e-3 and not classifier.bias.any()


def test_channel_dropout() -> None:
    dropout = ChannelDropout()
    x = torch.ones(64, 50, 3, 3)
    torch.manual_seed(0)
    y = dropout.train()(x)
    kept = y[:, :, 0, 0] > 0
    assert torch.equal(y, (kept / 0.9)[:, :, None, None].expand_as(x)) and 0.87 < kept.float().mean() < 0.93
    assert torch.equal(dropout.eval()(x), x)


def test_the_loss_counts_labelled_pixels_and_divides_by_all() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 3, 5))
    labels[0, :2] = IGNORED
    expected = 0.0
    for b, y, x in np.ndindex(2, 3, 5):
        if labels[b, y, x] != IGNORED:
            expected -= torch.log_softmax(logits[b, :, y, x], 0)[labels[b, y, x]].item()
    assert pixel_loss(logits, labels).item() == pytest.approx(expected / 30, rel=1e-5)
    finer = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert pixel_loss(torch.zeros(2, 4, 3, 5), finer).item() == pytest.approx(np.log(4) * 20 / 30, rel=1e-5)
    nothing = torch.full_like(labels, IGNORED)
    assert pixel_loss(logits, nothing).item() == 0.0


def test_only_resnets_are_taken() -> None:
    with torch.device("meta"):
        with pytest.raises(UserMistake, match="segment on swin-t: the published .* ResNets"):
            require_resnet(build_encoder("swin-t"), "swin-t")


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and whole-image inference


def test_confusion_and_scores_by_hand() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, (6, 7)), rng.integers(0, 4, (6, 7))
    truth[0, :3] = IGNORED
    expected = np.zeros((4, 4), dtype=np.int64)
    for true, guess in zip(truth.flat, predicted.flat, strict=True):
        if true != IGNORED:
            expected[true, guess] += 1
    got = confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(truth.astype(np.uint8)), 4)
    assert np.array_equal(got.numpy(), expected)

    found = scores(np.array([[3, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert found.iou[:2].tolist() == [3 / 6, 4 / 7] and np.isnan(found.iou[2:]).all()
    assert found.miou == pytest.approx((3 / 6 + 4 / 7) / 2) and found.pixel_accuracy == 0.7
    assert found.mean_class_accuracy == pytest.approx((3 / 4 + 4 / 6) / 2)
    predicted_only = scores(np.array([[3, 0, 1], [0, 0, 0], [0, 0, 0]]))
    assert predicted_only.miou == pytest.approx((3 / 4 + 0) / 2), "a class that was only guessed counts as 0"
    rows = predicted_only.as_dict(("a", "b", "c"))["classes"]
    assert [row["iou"] for row in rows] == [0.75, None, 0.0] and rows[2]["accuracy"] is None


@pytest.mark.parametrize(("length", "window", "stride"), [(10, 4, 3), (10, 4, 2), (9, 4, 4), (4, 4, 1), (3, 5, 2)])
def test_windows_cover_everything(length: int, window: int, stride: int) -> None:
    starts = window_starts(length, window, stride)
    seen = {position for start in starts for position in range(start, min(start + window, length))}
    assert seen == set(range(length)) and starts == sorted(set(starts))
    assert all(start + window <= length for start in starts) or length < window


def test_sliding_is_the_mean_over_windows() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 1)
    image = torch.randn(1, 3, 20, 27)
    with torch.no_grad():
        # what a pixelwise network says does not depend on the window
        torch.testing.assert_close(sliding_logits(conv, image, (8, 9), (5, 4)), whole_logits(conv, image))

    def marks(part: torch.Tensor) -> torch.Tensor:  # each window says its first pixel
        return part[:, :1, :1, :1].expand(1, 1, *part.shape[2:])

    expected, seen = torch.zeros(20, 27), torch.zeros(20, 27)
    for top in (0, 5, 10, 12):
        for left in (0, 4, 8, 12, 16, 18):
            expected[top : top + 8, left : left + 9] += image[0, 0, top, left]
            seen[top : top + 8, left : left + 9] += 1
    torch.testing.assert_close(sliding_logits(marks, image, (8, 9), (5, 4))[0, 0], expected / seen)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, crops, colours


def test_sizes_of_both_protocols() -> None:
    assert fitted_size(1024, 2048, (2048, 1024)) == (1024, 2048)
    assert fitted_size(1024, 2048, (2048, 1024), 0.5) == (512, 1024)
    assert fitted_size(375, 500, (2048, 512)) == (512, 683)  # the short edge decides
    assert fitted_size(500, 375, (2048, 512)) == (683, 512)
    assert fitted_size(100, 2000, (2048, 512)) == (102, 2048)  # the long edge decides
    assert fitted_size(30, 40, (0, 0), 1.5) == (45, 60) and fitted_size(1, 1, (0, 0), 0.1) == (1, 1)


@pytest.mark.parametrize("size", [(23, 41), (64, 90), (7, 9), (40, 30)])
def test_resampling_is_pytorchs_and_a_crop_is_part_of_the_whole(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8), rng.integers(0, 9, (30, 40), dtype=np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = F.interpolate(planes, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    got = resample_image(image, size)
    assert got.dtype == np.uint8 and np.abs(got - expected).max() <= 0.501
    box = (2, 3, size[0] - 4, size[1] - 5)
    part = (slice(2, size[0] - 2), slice(3, size[1] - 2))
    assert np.array_equal(resample_image(image, size, box), got[part])
    nearest = F.interpolate(torch.from_numpy(label)[None, None], size, mode="nearest-exact")[0, 0].numpy()
    assert np.array_equal(resample_label(label, size, box), nearest[part])


def scene(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Four bands with slanted borders, as in a street; a pixel's colour is told by its class, its band."""
    rng = np.random.default_rng(seed)
    slant = np.linspace(-0.1, 0.1, width) * rng.uniform(-1, 1)
    place = (np.arange(height)[:, None] + 0.5) / height + slant
    label = (place[..., None] > np.array([0.3, 0.55, 0.8]) + rng.uniform(-0.1, 0.1, 3)).sum(-1).astype(np.uint8)
    colours = np.array([[200, 40, 40], [40, 200, 60], [50, 60, 210], [220, 220, 90]], dtype=np.uint8)
    return colours[label], label


def test_crops_are_functions_of_their_address_and_image_and_label_move_together() -> None:
    image, label = scene(64, 96)
    geometry = Geometry((48, 64), (0, 0), (0.5, 2.0))
    crops = [random_crop(image, label, geometry, 3, epoch, 5) for epoch in range(40)]
    again = random_crop(image, label, geometry, 3, 7, 5)
    assert np.array_equal(crops[7].image, again.image) and np.array_equal(crops[7].label, again.label)
    assert len({crop.image.tobytes() for crop in crops}) == 40
    assert not np.array_equal(random_crop(image, label, geometry, 4, 7, 5).image, again.image)
    for crop in crops:
        assert crop.image.shape == (48, 64, 3) and crop.label.shape == (48, 64)
        height, width = crop.valid
        inside = crop.label[:height, :width]
        assert (inside < 4).all()
        assert (crop.label[height:] == IGNORED).all() and (crop.label[:, width:] == IGNORED).all()
        colours = np.array([[200, 40, 40], [40, 200, 60], [50, 60, 210], [220, 220, 90]])[inside]
        agree = (np.abs(crop.image[:height, :width].astype(int) - colours).max(2) <= 1).mean()
        assert agree > 0.7, "beside the blended borders of blocks every colour is its label's"
    assert {crop.valid == (48, 64) for crop in crops} == {True, False}


def test_half_are_flipped_and_crops_of_one_class_are_avoided() -> None:
    label = np.tile(np.arange(32, dtype=np.uint8), (32, 1))
    image = label[..., None].repeat(3, 2)
    plain = Geometry((32, 32), (0, 0), (1.0, 1.0))
    flipped = [random_crop(image, label, plain, 0, epoch, 0).label[0, 0] == 31 for epoch in range(400)]
    assert 0.42 < np.mean(flipped) < 0.58
    mostly = np.zeros((32, 320), dtype=np.uint8)
    mostly[:, 288:] = 1
    pixels = mostly[..., None].repeat(3, 2)
    classes = [len(np.unique(random_crop(pixels, mostly, plain, 0, epoch, 0).label)) for epoch in range(200)]
    # One try shows both classes with probability 31 / 289; ten tries, of which the last may be lopsided, with 45%.
    assert 0.3 < np.mean(np.array(classes) == 2) < 0.6


def test_colours_against_colorsys_and_their_frequencies() -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 3, 4, 5) * 255
    images[0, :, 0, 0] = 0
    images[0, :, 0, 1] = 90
    factor = torch.tensor([0.5, 1.4, 1.0])
    got = augment.scale_saturation(images.clone(), factor)
    for b, y, x in np.ndindex(3, 4, 5):
        h, s, v = colorsys.rgb_to_hsv(*(images[b, :, y, x] / 255).tolist())
        expected = colorsys.hsv_to_rgb(h, min(s * factor[b].item(), 1.0), v)
        np.testing.assert_allclose(got[b, :, y, x] / 255, expected, atol=2e-5)
    samples = np.arange(4000)
    drawn = augment.draw_colours(1, np.zeros(4000, dtype=np.int64), samples)
    contrast = drawn.contrast_first * drawn.contrast_last
    for values, neutral, low, high in (
        (drawn.brightness, 0, -32, 32),
        (contrast, 1, 0.5, 1.5),
        (drawn.saturation, 1, 0.5, 1.5),
        (drawn.hue, 0, -0.1, 0.1),
    ):
        changed = values[values != neutral]
        assert 0.47 < len(changed) / 4000 < 0.53 and low <= changed.min() < changed.max() <= high
        assert abs(changed.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert 0.22 < np.mean(drawn.contrast_first != 1) < 0.28 and 0.22 < np.mean(drawn.contrast_last != 1) < 0.28
    one = {name: getattr(drawn, name)[:3] for name in vars(drawn)}
    quiet = augment.Colours(
        *(np.array([n, n, v[2]], dtype=np.float32) for n, v in zip((0, 1, 1, 0, 1), one.values(), strict=True))
    )
    changed = augment.change_colours(images.clone(), quiet)
    assert torch.equal(changed[:2], images[:2])


def test_colour_order_and_limits() -> None:
    grey = torch.full((2, 3, 1, 1), 100.0)
    values = [np.array(v, dtype=np.float32) for v in ([20, 0], [1.5, 1], [1, 1], [0, 0], [1, 0.5])]
    out = augment.change_colours(grey, augment.Colours(*values))
    assert out[:, 0, 0, 0].tolist() == [180.0, 50.0]  # brightness, then contrast about black
    bright = augment.change_colours(torch.full((2, 3, 1, 1), 250.0), augment.Colours(*values))
    assert bright[0].max() == 255.0
    padded = augment.blank_padding(torch.ones(2, 3, 4, 5), np.array([[4, 5], [2, 3]]))
    assert padded[0].sum() == 60 and padded[1].sum() == 18 and padded[1, :, 2:].sum() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Data


def write_pair(folder: Path, stem: str, image: np.ndarray, label: np.ndarray) -> None:
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / "images" / f"{stem}.jpg", quality=95)
    Image.fromarray(label).save(folder / "labels" / f"{stem}.png")


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images with four classes and an ignored value, in the layout of segmentation-sample."""
    root = tmp_path_factory.mktemp("street")
    for part, count in (("train", 8), ("val", 3)):
        for number in range(count):
            image, label = scene(48, 64, seed=number)
            label = label.copy()
            label[:4] = 9
            write_pair(root / part, f"{number}", image, label)
    names = {**{str(value): f"c{value}" for value in range(4)}, "9": "void"}
    (root / "classes.json").write_text(json.dumps({"classes": names, "ignore_index": 9}))
    return root


def test_plain_folders(street: Path) -> None:
    found = read_layout(str(street), "train")
    assert found.layout == "plain" and len(found.pairs) == 8 and found.ignored == (9,)
    assert found == read_layout(str(street / "train"), "train"), "the folder itself and the one above are the same data"
    assert len(read_layout(str(street), "val").pairs) == 3
    labels = label_map(found.names, found.ignored)
    assert labels.names == ("c0", "c1", "c2", "c3")
    label = read_label(found.pairs[0].label, labels)
    assert (label[:4] == IGNORED).all() and set(np.unique(label[4:])) <= {0, 1, 2, 3}


def test_a_void_class_between_the_others_is_skipped() -> None:
    labels = label_map({0: "void", 5: "b", 3: "a"}, (0, 255))
    assert labels.names == ("a", "b") and labels.table[[0, 3, 5, 255]].tolist() == [255, 0, 1, 255]
    assert labels.table[4] == 254
    with pytest.raises(UserMistake, match="0 classes are left"):
        label_map({0: "void"}, (0,))


def test_voc(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    for folder in (root / "JPEGImages", root / "SegmentationClass", root / "SegmentationClassAug", lists):
        folder.mkdir(parents=True)
    label = np.array([[0, 20], [15, 255]], dtype=np.uint8)
    for stem, folder in (("a", "SegmentationClass"), ("b", "SegmentationClassAug")):
        Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8)).save(root / "JPEGImages" / f"{stem}.jpg")
        palette = Image.fromarray(label)
        palette.putpalette(list(range(256)) * 3)
        palette.save(root / folder / f"{stem}.png")
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("a\n")
    assert len(read_layout(str(tmp_path), "train").pairs) == 1
    (lists / "trainaug.txt").write_text("a\nb\n")
    found = read_layout(str(tmp_path), "train")
    assert (found.layout, found.split, len(found.pairs)) == ("voc", "trainaug", 2)
    assert read_layout(str(root), "val").split == "val" and len(read_layout(str(root), "train", "train").pairs) == 1
    labels = label_map(found.names, found.ignored)
    assert labels.classes == 21 and Image.open(found.pairs[1].label).mode == "P"
    assert read_label(found.pairs[1].label, labels).tolist() == label.tolist()
    (root / "JPEGImages" / "b.jpg").rename(root / "JPEGImages" / "b.png")
    (lists / "trainaug.txt").write_text("a.jpg\nb -1\nb.png\n")
    pairs = read_layout(str(tmp_path), "train").pairs
    found_names = [(pair.image.name, pair.label.name) for pair in pairs]
    assert found_names == [("a.jpg", "a.png"), ("b.png", "b.png"), ("b.png", "b.png")]
    (lists / "latin.txt").write_bytes("\xe4\n".encode("latin-1"))
    with pytest.raises(UserMistake, match="latin.txt is no UTF-8 text"):
        read_layout(str(tmp_path), "train", "latin")
    (lists / "latin.txt").unlink()
    with pytest.raises(UserMistake, match="trainval.txt does not exist; lists there: train, trainaug, val"):
        read_layout(str(tmp_path), "train", "trainval")


def test_cityscapes(tmp_path: Path) -> None:
    for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        folder = tmp_path / kind / "train" / "aachen"
        folder.mkdir(parents=True)
        pixels = np.arange(34, dtype=np.uint8).reshape(2, 17)
        array = pixels if kind == "gtFine" else pixels[..., None].repeat(3, 2)
        Image.fromarray(array).save(folder / f"aachen_000000_000019_{ending}.png")
    found = read_layout(str(tmp_path), "train")
    assert found.layout == "cityscapes" and len(found.pairs) == 1 and found.pairs[0].label.is_file()
    labels = label_map(found.names, found.ignored)
    assert labels.classes == 19 and labels.names[0] == "road" and labels.names[18] == "bicycle"
    train_ids = read_label(found.pairs[0].label, labels).reshape(-1)
    # the label table that comes with Cityscapes
    expected = {
        7: 0,
        8: 1,
        11: 2,
        12: 3,
        13: 4,
        17: 5,
        19: 6,
        20: 7,
        21: 8,
        22: 9,
        23: 10,
        24: 11,
        25: 12,
        26: 13,
        27: 14,
        28: 15,
        31: 16,
        32: 17,
        33: 18,
    }
    assert train_ids.tolist() == [expected.get(value, IGNORED) for value in range(34)]
    with pytest.raises(UserMistake, match="holds no image"):
        read_layout(str(tmp_path), "val")


def test_the_order_is_each_epochs_permutation_whatever_the_ranks() -> None:
    pairs = [Pair(Path(str(n)), Path(str(n))) for n in range(7)]

    def feed(rank: int, world: int) -> TrainingFeed:
        return TrainingFeed(pairs, label_map({0: "a", 1: "b"}, ()), Geometry((32, 32), (0, 0)), 4, 3, rank, world, 1)

    one = [feed(0, 1).addresses(step) for step in range(14)]
    samples, epochs = (np.concatenate([pair[part] for pair in one]) for part in (0, 1))
    for epoch in range(8):
        assert sorted(samples[epochs == epoch]) == list(range(7))
    assert not np.array_equal(samples[:7], samples[7:14])
    for step in (0, 5, 13):
        parts = [feed(rank, 2).addresses(step) for rank in range(2)]
        assert np.array_equal(np.concatenate([part[0] for part in parts]), one[step][0])
        assert np.array_equal(np.concatenate([part[1] for part in parts]), one[step][1])


def test_batches_from_the_middle_are_those_of_the_whole(street: Path) -> None:
    found = read_layout(str(street), "train")
    labels = label_map(found.names, found.ignored)

    def feed() -> TrainingFeed:
        return TrainingFeed(found.pairs, labels, Geometry((32, 40), (0, 0)), 3, 0, 0, 1, 2)

    whole = [batch.tensors(0, torch.device("cpu")) for batch in feed().batches(0, 5)]
    rest = [batch.tensors(0, torch.device("cpu")) for batch in feed().batches(3, 5)]
    assert len(whole) == 5 and len(rest) == 2 and list(feed().batches(5, 5)) == []
    for (images, classes), (again, labels_again) in zip(whole[3:], rest, strict=True):
        assert torch.equal(images, again) and torch.equal(classes, labels_again)
        assert images.shape == (3, 3, 32, 40) and classes.dtype == torch.int64
    assert all((images.abs() < 5).all() for images, _ in whole)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone") / "r18.safetensors"
    torch.manual_seed(0)
    save_backbone(build_encoder("resnet18"), path, arch="resnet18", method="moco-v2")
    return path


def command(backbone: Path, data: Path, output: Path, *more: str) -> list[str]:
    return last_wins(
        [
            "segment",
            "--checkpoint",
            str(backbone),
            "--data",
            str(data),
            "--val-data",
            str(data),
            "--output",
            str(output),
            "--crop",
            "32,48",
            "--scale",
            "0,0",
            "--channels",
            "16",
            "--global-batch",
            "4",
            "--log-every",
            "1",
            "--workers",
            "1",
            *more,
        ]
    )


@pytest.mark.parametrize("model", ["fcn", "upernet"])
def test_the_loss_falls_over_twenty_steps(model: str, backbone: Path, street: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    output = tmp_path / "out.json"
    flags = ["--model", model, "--steps", "20", "--lr", "0.1", "--ratio", "0.7,1"]
    assert main(command(backbone, street, output, *flags)) == 0
    found = json.loads(output.read_text())
    losses = [loss for _, loss in found["losses"]]
    assert len(losses) == 20 and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert found["protocol"] == "segment" and found["model"] == model and found["val_images"] == 3
    assert 0 < found["miou"] <= found["pixel_accuracy"] <= 1 and [c["name"] for c in found["classes"]] == [
        "c0",
        "c1",
        "c2",
        "c3",
    ]
    assert not state_folder(output).exists()


def test_no_stopwatch_chooses_convolutions_of_whole_images(
    backbone: Path, street: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN would time each new size of image anew; the crops of training all have one size."""
    seen: list[bool] = []

    def predicted(*_: object) -> None:
        seen.append(torch.backends.cudnn.benchmark)
        raise UserMistake("far enough")

    monkeypatch.setattr("train.eval.segmentation.training.predict", predicted)
    assert main(command(backbone, street, tmp_path / "out.json", "--model", "fcn", "--steps", "1")) == 2
    assert seen == [False]


class Killed(Exception):
    pass


@pytest.mark.parametrize("model", ["fcn", "upernet"])
def test_a_stopped_run_goes_on_byte_for_byte(
    model: str, backbone: Path, street: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(train.eval.segment, "discard_state", lambda result, runtime: None)
    flags = ["--model", model, "--steps", "6", "--checkpoint-every", "2", "--eval-every", "3", "--log-every", "3"]
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert main(command(backbone, street, whole, *flags)) == 0
    original = training.take_step

    def take_step(trainer, state, batch):
        if state.step == 5:
            raise Killed
        return original(trainer, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", take_step)
        with pytest.raises(Killed):
            main(command(backbone, street, parts, *flags))
    assert sorted(path.name for path in state_folder(parts).glob("step_*")) == ["step_00000002", "step_00000004"]
    assert main(command(backbone, street, parts, *flags)) == 0
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        left, right = (state_folder(path) / "step_00000006" / name for path in (whole, parts))
        assert left.read_bytes() == right.read_bytes(), name
    one, two = (json.loads(path.read_text()) for path in (whole, parts))
    for name in ("seconds", "settings", "versions"):  # a commit made meanwhile is no difference
        one.pop(name), two.pop(name)
    assert one == two and [step for step, _ in one["validations"]] == [3, 6]
    assert main(command(backbone, street, parts, *flags, "--lr", "0.1")) == 2


def test_a_stop_is_heard_at_checkpoints_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the ranks ask only now and then; steps that both log and save must not be left out of it."""
    monkeypatch.setattr(training, "take_step", lambda trainer, state, batch: torch.tensor(1.0))
    runtime = Runtime(0, 1, torch.device("cuda"), torch.float32, False)
    model = nn.Linear(2, 2)
    state = TuningState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    trainer = SimpleNamespace(
        config=SegmentConfig(checkpoint_every=4, log_every=4, global_batch=2),
        plan=SimpleNamespace(steps=8),
        runtime=runtime,
        feed=SimpleNamespace(batches=lambda first, last: range(first, last)),
        checkpoints=TuningCheckpoints(tmp_path, {}, runtime),
        watch=SimpleNamespace(asked="SIGTERM"),
        validate=lambda step: {},
        say=lambda line: None,
        after_step=lambda: None,
    )
    with pytest.raises(Stopped, match="after step 4, saved"):
        training.train(trainer, state)  # type: ignore[arg-type]


def test_sliding_and_bf16_run(backbone: Path, street: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    flags = ["--steps", "2", "--test", "slide", "--window", "32,32", "--stride", "16,20", "--precision", "bf16"]
    assert main(command(backbone, street, output, *flags, "--model", "upernet", "--bn", "plain")) == 0
    found = json.loads(output.read_text())
    assert found["dtype"] == "bfloat16" and found["test"] == "slide" and np.isfinite(found["miou"])


@pytest.mark.parametrize("model", ["upernet"])
def test_two_ranks_give_the_run_of_one(model: str, backbone: Path, street: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    flags = ["--model", model, "--steps", "3", "--lr", "0.001"]
    assert main(command(backbone, street, tmp_path / "one.json", *flags)) == 0
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(ROOT / "train/evaluate.py"),
            *command(backbone, street, tmp_path / "two.json", *flags),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["world_size"] == 2 and done.stdout.count("result: ") == 1
    np.testing.assert_allclose([v for _, v in one["losses"]], [v for _, v in two["losses"]], rtol=2e-3)
    assert abs(one["pixel_accuracy"] - two["pixel_accuracy"]) < 0.02
    assert sum(c["pixels"] for c in one["classes"]) == sum(c["pixels"] for c in two["classes"])


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def spoil_missing(root: Path) -> str:
    (root / "train/labels/3.png").unlink()
    return "3.jpg has no label"


def spoil_size(root: Path) -> str:
    Image.fromarray(np.zeros((48, 60), dtype=np.uint8)).save(root / "train/labels/3.png")
    return "is 60 x 48 pixels, its image 64 x 48"


def spoil_range(root: Path) -> str:
    Image.fromarray(np.full((48, 64), 37, dtype=np.uint8)).save(root / "val/labels/1.png")
    return "has the value 37; the 4 classes have values 0..3, ignored are [9]"


def spoil_mode(root: Path) -> str:
    Image.fromarray(np.zeros((48, 64, 3), dtype=np.uint8)).save(root / "train/labels/3.png")
    return "has mode RGB"


def spoil_label(root: Path) -> str:
    (root / "train/labels/3.png").write_bytes((root / "train/labels/2.png").read_bytes()[:60])
    return "3.png cannot be read"


def spoil_image(root: Path) -> str:
    (root / "train/images/3.jpg").write_bytes(b"no image")
    return "3.jpg cannot be read"


def spoil_names(root: Path) -> str:
    (root / "classes.json").write_text('{"classes": 3}')
    return "classes.json cannot be used"


def spoil_folder(root: Path) -> str:
    shutil.rmtree(root / "val")
    return "has neither JPEGImages (VOC)"


def spoil_last_image(root: Path) -> str:
    path = root / "val/images/2.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    return "2.jpg cannot be read"


def spoil_turned(root: Path) -> str:
    path = root / "val/images/1.jpg"
    turn_by_exif(path)
    return "its image 48 x 64 (upright"


def spoil_one_class(root: Path) -> str:
    (root / "classes.json").unlink()
    for label in root.rglob("*.png"):
        values = np.asarray(Image.open(label))
        Image.fromarray(np.where(values == 9, 255, 0).astype(np.uint8)).save(label)
    return "1 classes are left (label values [0]) when the values [255] are ignored"


def spoil_one_class_in_colours(root: Path) -> str:
    """Masks as drawing programs write them: a palette of two colours, of which one has the ignored number."""
    message = spoil_one_class(root)
    for label in root.rglob("*.png"):
        values = np.asarray(Image.open(label))
        mask = Image.new("P", values.shape[::-1])
        mask.putpalette([0] * 765 + [200, 0, 0])
        mask.putdata(values.flatten().tolist())
        mask.save(label)
    return message


def spoil_one_value(root: Path) -> str:
    """Masks of objects whose value is 1, without a pixel of the background."""
    (root / "classes.json").unlink()
    for label in root.glob("train/labels/*.png"):
        Image.fromarray(np.full((48, 64), 1, dtype=np.uint8)).save(label)
    for label in root.glob("val/labels/*.png"):
        Image.fromarray(np.asarray(Image.open(label)) % 2).save(label)
    return "--data: of the 2 classes only class 1 occurs in the labels, whose values are [1]"


def spoil_validation(root: Path) -> str:
    for label in root.glob("val/labels/*.png"):
        Image.fromarray(np.full((48, 64), 9, dtype=np.uint8)).save(label)
    return "--val-data: no pixel of the labels counts, their values [9] are ignored"


def turn_by_exif(path: Path, orientation: int = 6) -> None:
    """Say in a photo's EXIF that it is to be turned, by default by 90 degrees, as phones do."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=exif)


SPOILERS = [
    spoil_missing,
    spoil_size,
    spoil_range,
    spoil_mode,
    spoil_label,
    spoil_image,
    spoil_last_image,
    spoil_turned,
    spoil_one_class,
    spoil_one_class_in_colours,
    spoil_one_value,
    spoil_validation,
    spoil_names,
    spoil_folder,
]


def test_a_photo_that_its_exif_turns_fits_its_upright_label(tmp_path: Path) -> None:
    image, label = scene(48, 64, seed=0)
    write_pair(tmp_path, "phone", image, label)
    turn_by_exif(tmp_path / "images/phone.jpg")
    Image.fromarray(np.rot90(label, -1).copy()).save(tmp_path / "labels/phone.png")
    (pair,) = read_layout(str(tmp_path), "train").pairs
    assert inspect(pair).problem == ""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_of_exif_lays_the_photo_under_its_label(orientation: int, tmp_path: Path) -> None:
    """Sizes alone do not tell the mirrored ones and the one upside down."""
    label = np.zeros((48, 64), dtype=np.uint8)
    label[:16, :40] = 1  # unlike itself however it is turned
    write_pair(tmp_path, "phone", label[..., None].repeat(3, 2) * 255, label)
    turn_by_exif(tmp_path / "images/phone.jpg", orientation)
    turned = Image.fromarray(label)
    turned.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(turned))
    Image.fromarray(upright).save(tmp_path / "labels/phone.png")
    (pair,) = read_layout(str(tmp_path), "train").pairs
    image, classes = read_pair(pair, label_map({0: "a", 1: "b"}, ()))
    assert inspect(pair).problem == "" and ((image[..., 0] > 127) == classes).mean() > 0.97


def test_masks_of_one_bit_have_two_classes(street: Path, tmp_path: Path) -> None:
    image, label = scene(48, 64, seed=0)
    write_pair(tmp_path, "mask", image, label)
    Image.fromarray(label > 0).save(tmp_path / "labels/mask.png")
    (pair,) = read_layout(str(tmp_path), "train").pairs
    assert np.array_equal(read_label(pair.label, label_map({0: "a", 1: "b"}, (255,))), label > 0)


@pytest.mark.parametrize("name", ["._{}", ".ipynb_checkpoints/{}", "@eaDir/{}", "__MACOSX/{}"])
def test_clutter_among_cityscapes_is_no_image(name: str, tmp_path: Path) -> None:
    for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        folder = tmp_path / kind / "train" / "aachen"
        for path in ("{}", name):
            file = folder / path.format(f"aachen_000000_000019_{ending}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L" if kind == "gtFine" else "RGB", (8, 4)).save(file)
        # A folder of clutter beside the cities, which holds what looks like one.
        beside = tmp_path / kind / "train" / name.format("aachen").split("/")[0]
        beside.mkdir(exist_ok=True)
        (beside / f"a_0_1_{ending}.png").write_bytes(b"x")
    assert len(read_layout(str(tmp_path), "train").pairs) == 1


def test_clutter_is_no_image(street: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(street / "train", data)
    for name in ("._0.jpg", ".ipynb_checkpoints/0-checkpoint.jpg", "@eaDir/0.jpg"):
        (data / "images" / name).parent.mkdir(exist_ok=True)
        (data / "images" / name).write_bytes(b"x")
    assert len(read_layout(str(data), "train").pairs) == 8


def test_labels_without_an_image_are_told(street: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(street / "train", data)
    (data / "images/3.jpg").unlink()
    (data / "labels/._5.png").write_bytes(b"x")
    (data / "labels/preview.jpg").write_bytes(b"x")
    found = read_layout(str(data), "train")
    assert len(found.pairs) == 7
    assert found.notes == (f"1 labels of {data} have no image and are left out, for example {data}/labels/3.png",)


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_with_data_is_one_line(
    spoil: Callable[[Path], str], backbone: Path, street: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(street, data)
    message = spoil(data)
    assert main(command(backbone, data, tmp_path / "out.json", "--steps", "1")) == 2
    error = capfd.readouterr().err.strip()
    assert "\n" not in error and message in error, error
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"global_batch": 0}, "--global-batch 0: must be at least 1"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"crop": (64,)}, "--crop 64: give two numbers"),
        ({"crop": (16, 64)}, "at least 32"),
        ({"scale": (512, 2048)}, "give the long edge first"),
        ({"ratio": (2.0, 0.5)}, "--ratio 2.0,0.5"),
        ({"stride": (8, 8)}, "belong to --test slide"),
        ({"model": "upernet", "global_batch": 1}, "at least 2 images"),
        ({"ignore_index": 300}, "values up to 255"),
        ({"checkpoint_every": 0}, "--checkpoint-every 0"),
    ],
)
def test_flags_outside_their_range(flags: dict, message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        make_plan(SegmentConfig(**flags), 1)


def test_ranks_must_share_the_batch() -> None:
    with pytest.raises(UserMistake, match="a multiple of the 3 ranks"):
        make_plan(SegmentConfig(), 3)
    with pytest.raises(UserMistake, match="at least 2 images"):
        make_plan(SegmentConfig(model="upernet", global_batch=2, bn="plain"), 2)


def test_plans_are_the_published_protocols() -> None:
    fcn, city = make_plan(SegmentConfig(), 1), make_plan(SegmentConfig(model="upernet"), 1)
    assert (fcn.steps, fcn.geometry, fcn.channels) == (20_000, Geometry((512, 512), (2048, 512), (0.5, 2.0)), 512)
    assert (city.steps, city.geometry) == (40_000, Geometry((512, 1024), (2048, 1024), (0.5, 2.0)))
    assert city.lr_at(0, 0.01) == 0.01
    assert city.lr_at(20_000, 0.01) == pytest.approx((0.01 - 1e-4) * 0.5**0.9 + 1e-4)
    assert 1e-4 < city.lr_at(39_999, 0.01) < 1.01e-4
    config = SegmentConfig(model="upernet", schedule="80k")
    assert make_plan(config, 1).steps == 80_000
    assert task_name(config, make_plan(config, 1), "cityscapes") == "Cityscapes UPerNet 80k"
    assert task_name(SegmentConfig(), fcn, "voc") == "VOC12 FCN"
    slide = make_plan(SegmentConfig(test="slide"), 1)
    assert slide.window == (512, 512) and slide.stride == (341, 341)


def test_classes_without_names_come_from_the_labels(street: Path, backbone: Path, tmp_path: Path) -> None:
    shutil.copytree(street, tmp_path / "data")
    (tmp_path / "data/classes.json").unlink()
    flags = ["--steps", "1", "--ignore-index", "9"]
    assert main(command(backbone, tmp_path / "data", tmp_path / "out.json", *flags)) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in found["classes"]] == [f"class {value}" for value in range(4)]
    assert layouts.read_layout(str(tmp_path / "data"), "train").names == {}


# ---------------------------------------------------------------------------------------------------------------------
# Real images


@pytest.mark.slow
@pytest.mark.parametrize(("model", "steps", "batch"), [("upernet", 500, 4), ("fcn", 600, 2)])
def test_eight_real_images_are_learned_by_heart(
    model: str, steps: int, batch: int, unpack, backbone: Path, tmp_path: Path
) -> None:
    source = unpack("segmentation-sample")
    stems = sorted(path.stem for path in (source / "train" / "images").glob("*.jpg"))[:8]
    for part, ending in (("images", "jpg"), ("labels", "png")):
        (tmp_path / "eight" / part).mkdir(parents=True)
        for stem in stems:
            shutil.copy(source / "train" / part / f"{stem}.{ending}", tmp_path / "eight" / part)
    shutil.copy(source / "classes.json", tmp_path / "eight")
    # Whole images at two thirds of their size: in smaller ones poles and pedestrians are thinner than a cell.
    flags = [
        "--model",
        model,
        "--steps",
        str(steps),
        "--global-batch",
        str(batch),
        "--crop",
        "240,320",
        "--scale",
        "320,240",
        "--ratio",
        "1,1",
        "--channels",
        "64",
        "--lr",
        "0.03",
        "--log-every",
        "10",
    ]
    assert main(command(backbone, tmp_path / "eight", tmp_path / "out.json", *flags)) == 0
    assert json.loads((tmp_path / "out.json").read_text())["miou"] > 0.6


def test_committed_rows_of_the_long_runs_hold() -> None:
    with (RESULTS / "transfer.csv").open(newline="") as stream:
        newest = {
            row["contender"].split()[2]: float(row["median"])
            for row in csv.DictReader(stream)
            if row["metric"] == "mIoU" and "8 images, measured on the same" in row["setting"]
        }
    assert set(newest) == {"FCN", "UPerNet"} and min(newest.values()) > 0.6
