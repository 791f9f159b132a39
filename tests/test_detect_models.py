"""Detectors: parameter counts, and each value in which torchvision's building blocks differ from detectron2's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_Weights,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from models.norm import SyncBatchNorm
from train.backbone_io import build_encoder
from train.errors import UserMistake
from train.eval.detection import losses
from train.eval.detection.anchors import Anchors
from train.eval.detection.backbones import Padded, freeze_batch_norm
from train.eval.detection.draws import ANCHORS, PROPOSALS, CountedSampler
from train.eval.detection.feed import Sample
from train.eval.detection.inference import paste_mask
from train.eval.detection.models import DetectorConfig, build_detector, weight_decay_groups
from train.eval.detection.regions import AlignedPool, BoxPredictor, MaskPredictor

NAMES = ("faster-rcnn-c4", "mask-rcnn-c4", "faster-rcnn-fpn", "mask-rcnn-fpn", "retinanet")


def meta_detector(arch: str = "resnet50", **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return build_detector(DetectorConfig(**{"classes": 80, **settings}), build_encoder(arch))


def sample(position: int, height: int = 64, width: int = 80) -> Sample:
    generator = torch.Generator().manual_seed(position)
    boxes = torch.tensor([[6.0, 8.0, 40.0, 50.0], [30.0, 10.0, 70.0, 60.0]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, 8:50, 6:40], masks[1, 10:60, 30:70] = 1, 1
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    return Sample(image, boxes, torch.tensor([1, 0]), masks, (0, position))


# --- parameter counts ---

R50_WITHOUT_NORM = 23_508_032 - 53_120  # trunk of the contract's table, less scales and shifts
RPN_C4 = (1024 * 9 + 1) * 1024 + (1024 + 1) * 15 * 5
PREDICTOR_C4 = (2048 + 1) * (81 + 80 * 4)
MASK_C4 = (2048 * 4) * 256 + 256 + (256 + 1) * 80
PUBLISHED = {  # of torchvision's models with 91 classes, where background has a box and a mask as well
    "faster-rcnn-fpn": FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["num_params"],
    "mask-rcnn-fpn": MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["num_params"],
    "retinanet": RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["num_params"],
}
BOXES_LESS = (1024 + 1) * ((91 - 81) + (91 - 80) * 4)
EXPECTED = {
    "faster-rcnn-c4": R50_WITHOUT_NORM + RPN_C4 + PREDICTOR_C4,
    "mask-rcnn-c4": R50_WITHOUT_NORM + RPN_C4 + PREDICTOR_C4 + MASK_C4,
    "faster-rcnn-fpn": PUBLISHED["faster-rcnn-fpn"] - BOXES_LESS,
    "mask-rcnn-fpn": PUBLISHED["mask-rcnn-fpn"] - BOXES_LESS - (256 + 1) * (91 - 80),
    # Torchvision's P6 starts from the 256 channels of P5, detectron2's from the 2048 of C5.
    "retinanet": PUBLISHED["retinanet"] - (256 * 9 + 1) * 9 * (91 - 80) + (2048 - 256) * 9 * 256,
}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_full_size_detectors_have_the_protocol_s_parameters(name: str) -> None:
    assert parameters(meta_detector(name=name, norm="frozen")) == EXPECTED[name]
    # With batch norm: the trunk's, one after C4's last stage, or one for each convolution of the pyramid, whose biases
    # go; heads of two linear layers, and the mask head beside them, have none.
    added = {
        "faster-rcnn-c4": 2 * 2048,
        "mask-rcnn-c4": 2 * 2048,
        "faster-rcnn-fpn": 8 * 256,
        "mask-rcnn-fpn": 8 * 256,
        "retinanet": 6 * 256,
    }
    assert parameters(meta_detector(name=name, norm="sync")) == EXPECTED[name] + 53_120 + added[name]


def test_every_resnet_builds_and_swin_is_refused_by_name() -> None:
    for arch in ("resnet18", "resnet34", "resnet101", "resnet152", "resnet50-2x"):
        for name in ("mask-rcnn-c4", "mask-rcnn-fpn", "retinanet"):
            assert parameters(meta_detector(arch, name=name)) > 10_000_000
    with pytest.raises(UserMistake, match="swin-t has no published detector"):
        meta_detector("swin-t", name="retinanet")
    with pytest.raises(UserMistake, match="five levels"):
        meta_detector("resnet18", name="retinanet", anchor_sizes=(32.0,))


# --- values that differ from torchvision's ---


def test_region_align_is_aligned_and_adaptive() -> None:
    # On a map that is linear in x and y an aligned cell has the value at its centre; pixel i is centred at i + 0.5.
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    feature = torch.stack([columns + 0.5, rows + 0.5])[None]
    boxes = torch.tensor([[32.0, 48.0, 160.0, 272.0]])
    pooled = AlignedPool(7, (8,))([feature], [boxes])[0]
    centres = (torch.arange(7) + 0.5) / 7
    torch.testing.assert_close(pooled[0], (4 + 16 * centres).expand(7, 7))
    torch.testing.assert_close(pooled[1], (6 + 28 * centres)[:, None].expand(7, 7))


def test_regions_go_to_the_level_of_their_size() -> None:
    pool = AlignedPool(7, (4, 8, 16, 32))
    sides = torch.tensor([1.0, 55.0, 57.0, 111.0, 113.0, 223.0, 225.0, 447.0, 449.0, 2000.0])
    boxes = torch.stack([torch.zeros(10), torch.zeros(10), sides, sides], dim=1)
    assert pool.levels(boxes).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    maps = [torch.full((1, 1, 256 // 2**n, 256 // 2**n), float(n)) for n in range(4)]
    assert pool(maps, [boxes])[:, 0, 3, 3].tolist()[:8] == [0, 0, 0, 0, 1, 1, 2, 2]


def test_anchors_are_neither_rounded_nor_stretched_to_the_padded_size() -> None:
    anchors = Anchors(((32.0, 48.5),), (16,))
    assert anchors.num_anchors_per_location() == [6]
    laid = anchors(ImageList(torch.zeros(1, 3, 50, 70), [(50, 70)]), [torch.zeros(1, 8, 4, 5)])[0].view(4, 5, 6, 4)
    sides = laid[0, 0, :, 2:] - laid[0, 0, :, :2]
    torch.testing.assert_close(sides.prod(1).sqrt(), torch.tensor([32.0, 48.5]).repeat(3))
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 0.5, 1.0, 1.0, 2.0, 2.0]))
    assert sides[0, 0].item() == pytest.approx(32 * 2**0.5, abs=1e-5)
    torch.testing.assert_close((laid[3, 4] - laid[0, 0]), torch.tensor([64.0, 48.0, 64.0, 48.0]).expand(6, 4))
    torch.testing.assert_close(laid[0, 0, :, :2], -laid[0, 0, :, 2:])


def test_proposal_losses_are_l1_over_the_anchors_wanted() -> None:
    logits, labels = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 0.0, -1.0])
    deltas, targets = torch.zeros(3, 4), torch.full((3, 4), 0.05)
    sampled = (torch.tensor([0]), torch.tensor([1]))
    objectness, box = losses.proposal_losses(logits, deltas, labels, targets, sampled, 256.0)
    assert box.item() == pytest.approx(4 * 0.05 / 256)  # smooth L1 of beta 1/9 would give 4 * 0.5 * 0.05**2 * 9
    expected = F.softplus(torch.tensor(-0.5)) + F.softplus(torch.tensor(-1.0))
    assert objectness.item() == pytest.approx(expected.item() / 256)


def test_region_losses_are_l1_of_the_true_class_over_all_regions() -> None:
    labels, targets = torch.tensor([2, 0, 1]), torch.full((3, 4), 0.02)
    deltas = torch.zeros(3, 12, requires_grad=True)
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    classification, box = losses.region_losses(logits, deltas, labels, targets)
    assert box.item() == pytest.approx(2 * 4 * 0.02 / 3)
    torch.testing.assert_close(classification, F.cross_entropy(logits, labels))
    box.backward()
    assert deltas.grad is not None
    touched = deltas.grad.view(3, 3, 4).abs().sum(2) > 0
    assert touched.tolist() == [[False, False, True], [False, False, False], [False, True, False]]


def test_mask_targets_are_aligned_and_binary() -> None:
    mask = torch.zeros(2, 20, 20, dtype=torch.uint8)
    mask[1, 4:12, 6:14] = 1
    boxes = torch.tensor([[6.0, 4.0, 14.0, 12.0], [2.0, 4.0, 18.0, 12.0], [0.0, 0.0, 20.0, 20.0]])
    cut = losses.mask_targets(mask, boxes, torch.tensor([1, 1, 0]), 4)
    assert cut[0].eq(1).all() and cut[2].eq(0).all()
    torch.testing.assert_close(cut[1], torch.tensor([[0.0, 1, 1, 0]]).expand(4, 4))


def test_mask_loss_is_the_own_class_s_mean() -> None:
    logits = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 4, 2])
    targets = (torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    expected = F.binary_cross_entropy_with_logits(torch.stack([logits[i, c] for i, c in enumerate(labels)]), targets)
    torch.testing.assert_close(losses.mask_loss(logits, labels, targets), expected)
    empty = losses.mask_loss(logits[:0], labels[:0], targets[:0])
    assert empty.item() == 0


def test_focal_loss_by_its_formula() -> None:
    logits = torch.tensor([[0.3, -1.2], [2.0, 0.1], [0.5, 0.5], [-3.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([1, -1, -2, 0])
    deltas, targets = torch.zeros(4, 4, dtype=torch.float64), torch.full((4, 4), 0.5, dtype=torch.float64)
    classification, box = losses.focal_losses(logits, deltas, labels, targets, torch.tensor(7.0))
    total = 0.0
    for row, label in ((0, 1), (1, -1), (3, 0)):
        for column in range(2):
            p = 1 / (1 + np.exp(-logits[row, column].item()))
            right, alpha = (p, 0.25) if column == label else (1 - p, 0.75)
            total -= alpha * (1 - right) ** 2 * np.log(right)
    assert classification.item() == pytest.approx(total / 7) and box.item() == pytest.approx(2 * 4 * 0.5 / 7)


def test_p6_of_retinanet_comes_from_c5_even_where_their_widths_agree() -> None:
    detector = build_detector(DetectorConfig("retinanet", 3, norm="plain"), build_encoder("resnet18")).eval()
    top = detector.net.backbone.fpn.extra_blocks
    assert top.p6.in_channels == 512 and not top.use_P5
    seen: dict[str, Tensor] = {}
    top.p6.register_forward_pre_hook(lambda module, inputs: seen.update(p6=inputs[0]))
    detector.net.backbone.body.layers["c5"].register_forward_hook(lambda module, inputs, output: seen.update(c5=output))
    with torch.no_grad():
        maps = detector.net.backbone(torch.randn(1, 3, 64, 64))
    assert torch.equal(seen["p6"], seen["c5"])
    assert [tuple(level.shape[1:]) for level in maps.values()] == [(256, n, n) for n in (8, 4, 2, 1, 1)]


def test_numbers_of_proposals_and_thresholds() -> None:
    c4, fpn, one = (meta_detector("resnet18", name=name) for name in ("faster-rcnn-c4", "mask-rcnn-fpn", "retinanet"))
    assert c4.rpn._pre_nms_top_n == {"training": 12000, "testing": 6000}
    assert c4.rpn._post_nms_top_n == {"training": 2000, "testing": 1000}
    assert fpn.rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert fpn.rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    for two in (c4, fpn):
        assert (two.rpn.nms_thresh, two.roi_heads.nms_thresh, two.roi_heads.score_thresh) == (0.7, 0.5, 0.05)
        matcher, own = two.rpn.proposal_matcher, two.roi_heads.proposal_matcher
        assert (matcher.low_threshold, matcher.high_threshold, matcher.allow_low_quality_matches) == (0.3, 0.7, True)
        assert (own.low_threshold, own.high_threshold, own.allow_low_quality_matches) == (0.5, 0.5, False)
        assert two.roi_heads.box_coder.weights == (10.0, 10.0, 5.0, 5.0) and two.roi_heads.detections_per_img == 100
    assert (one.net.proposal_matcher.low_threshold, one.net.proposal_matcher.high_threshold) == (0.4, 0.5)
    assert (one.net.score_thresh, one.net.topk_candidates, one.net.detections_per_img) == (0.05, 1000, 100)


def test_new_layers_start_as_in_detectron2() -> None:
    torch.manual_seed(0)
    box, mask = BoxPredictor(1024, 80), MaskPredictor(256, 80)
    assert box.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert box.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert mask[2].weight.std().item() == pytest.approx(0.001, rel=0.05)
    # Kaiming over the outputs, which for a transposed convolution are counted along dimension 0.
    fan_out = mask[0].weight.shape[0] * 4
    assert mask[0].weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert not any(layer.bias.any() for layer in (box.cls_score, box.bbox_pred, mask[0], mask[2]))
    head = build_detector(DetectorConfig("faster-rcnn-fpn", 3), build_encoder("resnet18")).roi_heads.box_vector
    bound = (3 / head.fc6.in_features) ** 0.5
    assert bound * 0.99 < head.fc6.weight.abs().max().item() <= bound and not head.fc6.bias.any()
    scores, offsets = box(torch.randn(2, 1024))
    assert scores.shape == (2, 81) and offsets.shape == (2, 324) and not offsets[:, :4].any()


def test_masks_are_pasted_at_the_centres_of_pixels() -> None:
    mask = torch.zeros(4, 4)
    mask[:, 2:] = 1.0
    pasted = paste_mask(mask, torch.tensor([2.0, 3.0, 10.0, 11.0]), 20, 15)
    assert pasted.shape == (20, 15)
    # Cells are two pixels wide; the step from 0 to 1 lies at x = 6, half-way between the centres of cells 1 and 2.
    assert np.flatnonzero(pasted.any(0)).tolist() == [6, 7, 8, 9]
    assert np.flatnonzero(pasted.any(1)).tolist() == list(range(3, 11))
    # Outside the box there is nothing: only at its corners does that pull a pixel below one half.
    whole = paste_mask(torch.ones(4, 4), torch.tensor([0.0, 0.0, 15.0, 20.0]), 20, 15)
    assert np.argwhere(~whole).tolist() == [[0, 0], [0, 14], [19, 0], [19, 14]]


# --- images, norms, draws ---


def test_images_are_normalised_and_padded_with_zeros() -> None:
    images = [torch.full((3, 40, 33), 255, dtype=torch.uint8), torch.zeros(3, 20, 50, dtype=torch.uint8)]
    batch = Padded(32)(images)
    assert batch.tensors.shape == (2, 3, 64, 64) and batch.image_sizes == [(40, 33), (20, 50)]
    # 255 and 0 in detectron2's RGB scale.
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(batch.tensors[0, :, 39, 32], (255 - mean) / std)
    torch.testing.assert_close(batch.tensors[1, :, 0, 0], -mean / std)
    assert not batch.tensors[0, :, 40:].any() and not batch.tensors[1, :, :, 50:].any()
    assert Padded(1)(images).tensors.shape == (2, 3, 40, 50)


@pytest.mark.parametrize("name", NAMES)
def test_norms_are_where_the_protocol_has_them(name: str) -> None:
    sync = meta_detector("resnet18", name=name, norm="sync")
    norms = [key for key, module in sync.named_modules() if isinstance(module, SyncBatchNorm)]
    plain = [key for key, module in sync.named_modules() if type(module) is nn.BatchNorm2d]
    assert not plain and any("layer4" in key or "layers.c5" in key for key in norms)
    assert ("roi_heads.box_region.norm" in norms) == name.endswith("c4")
    assert any("fpn.inner_blocks" in key for key in norms) == (not name.endswith("c4"))
    assert not any("mask_head" in key or "box_vector" in key for key in norms)
    frozen = meta_detector("resnet18", name=name, norm="frozen")
    assert not [m for m in frozen.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules()) == 20
    groups = weight_decay_groups(sync, 1e-4)
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0]
    assert sum(p.numel() for group in groups for p in group["params"]) == parameters(sync)
    assert len(groups[1]["params"]) == 2 * len(norms)


NO_NORMS = {f"{head}.{kind}" for head in ("0.0", "1.0", "2.0", "3.0") for kind in ("weight", "bias")}
NORMS = {f"{n}.{key}" for n in range(4) for key in ("0.weight", "1.weight", "1.bias")}


@pytest.mark.parametrize(
    ("box_head", "mask_norm", "wanted"),
    [
        ("2fc", "protocol", NO_NORMS),  # RegionCL's released log: mask_fcn1.{bias,weight}, and so on to mask_fcn4
        ("4conv1fc", "protocol", NORMS),  # LEWEL's configuration: mask_fcn1.weight, mask_fcn1.norm.{weight,bias}
        ("2fc", "batch", NORMS),
        ("4conv1fc", "none", NO_NORMS),
    ],
)
def test_the_mask_head_has_the_parameters_of_its_protocol(box_head: str, mask_norm: str, wanted: set[str]) -> None:
    detector = meta_detector("resnet50", name="mask-rcnn-fpn", box_head=box_head, mask_norm=mask_norm)
    names = {name.partition("mask_head.")[2] for name, _ in detector.named_parameters() if "mask_head." in name}
    assert names == wanted


def test_convolutional_box_head_has_norms_and_one_linear_layer() -> None:
    head = meta_detector("resnet18", name="faster-rcnn-fpn", box_head="4conv1fc").roi_heads.box_vector
    assert sum(isinstance(module, SyncBatchNorm) for module in head.modules()) == 4
    assert [module.out_features for module in head.modules() if isinstance(module, nn.Linear)] == [1024]


def test_frozen_norms_compute_what_evaluation_does() -> None:
    trunk = build_encoder("resnet18").eval()
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = trunk(images)
        after = freeze_batch_norm(trunk).train()(images)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


def test_draws_depend_on_seed_step_and_position_alone() -> None:
    labels = [torch.randint(-1, 2, (500,), generator=torch.Generator().manual_seed(n)).float() for n in range(3)]

    def chosen(seed: int, purpose: int, draws: list[tuple[int, int]], given: list[Tensor]) -> list[list[int]]:
        sampler = CountedSampler(64, 0.25, seed, purpose)
        sampler.draws = draws
        torch.manual_seed(int(torch.randint(1000, (1,))))  # the process's own generator has no part in it
        positive, negative = sampler(given)
        for own, up, down in zip(given, positive, negative, strict=True):
            assert (own[up.bool()] == 1).all() and (own[down.bool()] == 0).all()
            assert (int(up.sum()), int(down.sum())) == (16, 48)
        return [torch.where(mask)[0].tolist() for mask in (*positive, *negative)]

    together = chosen(0, ANCHORS, [(5, 0), (5, 1), (5, 2)], labels)
    alone = chosen(0, ANCHORS, [(5, 1)], [labels[1]])
    assert [together[1], together[4]] == alone
    for other in ((1, ANCHORS, [(5, 1)]), (0, PROPOSALS, [(5, 1)]), (0, ANCHORS, [(6, 1)]), (0, ANCHORS, [(5, 2)])):
        assert chosen(*other, [labels[1]]) != alone
    few = CountedSampler(64, 0.25, 0, ANCHORS)
    few.draws = [(0, 0)]
    positive, negative = few([torch.tensor([1.0, 0, 0, -1, 0])])
    assert positive[0].tolist() == [1, 0, 0, 0, 0] and negative[0].tolist() == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_and_detections_have_their_form(name: str) -> None:
    sizes = (16.0, 24.0, 32.0, 48.0, 64.0)
    config = DetectorConfig(name, 3, anchor_sizes=sizes, regions=8)
    torch.manual_seed(0)
    detector = build_detector(config, build_encoder("resnet18"))
    detector.train()
    found = detector([sample(0), sample(1, 50, 70)])
    wanted = {"loss_classifier", "loss_box_reg"} | ({"loss_mask"} if config.masks else set())
    wanted |= set() if name == "retinanet" else {"loss_objectness", "loss_rpn_box_reg"}
    assert set(found) == wanted
    torch.stack(list(found.values())).sum().backward()
    # The gradients of a bias under an L1 loss are signs, which may cancel.
    without = [
        key
        for key, value in detector.named_parameters()
        if value.grad is None or (value.ndim > 1 and not value.grad.any())
    ]
    assert not without
    detector.eval()
    if name != "retinanet":
        detector.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        first, second = detector([sample(0).image, sample(1, 50, 70).image])
    for detections, (height, width) in ((first, (64, 80)), (second, (50, 70))):
        boxes = detections["boxes"]
        assert len(boxes) <= 100 and boxes.shape[1] == 4
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()
        assert ((detections["labels"] >= 0) & (detections["labels"] < 3)).all()
        assert ("masks" in detections) == config.masks
        if config.masks:
            side = 14 if name.endswith("c4") else 28
            assert detections["masks"].shape == (len(boxes), side, side)
    assert name == "retinanet" or len(first["boxes"])
