"""The detectors: Faster and Mask R-CNN on C4 and FPN, and RetinaNet."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from models.norm import convert_batch_norm
from models.resnet import ResNetTrunk

from ...errors import UserMistake
from ..options import ANCHOR_SIZES, DetectorName, MaskNorm
from .anchors import Anchors
from .backbones import (
    PYRAMID_WIDTH,
    HalvedTop,
    Norm,
    NormLayer,
    Padded,
    Pyramid,
    Stages,
    freeze_batch_norm,
    stage_width,
)
from .feed import Sample
from .losses import focal_losses, mean_over_ranks
from .regions import AlignedPool, BoxPredictor, MaskPredictor, Proposals, RegionHeads

POSITIVES_MOMENTUM = 0.9
FIRST_POSITIVES = 50.0


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector is made of.

    Attributes:
        name: which one.
        classes: K, without background.
        norm: "sync" or "plain" batch norm everywhere but in RetinaNet's heads, or "frozen" in the backbone alone.
        box_head: of the FPN detectors: two linear layers, or four convolutions and one.
        mask_norm: batch norm in Mask R-CNN FPN's mask head: "batch", "none", or "protocol": as the box head has it.
        anchor_sizes: one for each level of the pyramid; all of them at C4's one.
        regions: proposals that an image is trained on.
        seed: of new weights and of what is drawn in training.
    """

    name: DetectorName
    classes: int
    norm: Norm = "sync"
    box_head: Literal["2fc", "4conv1fc"] = "2fc"
    mask_norm: MaskNorm = "protocol"
    anchor_sizes: tuple[float, ...] = ANCHOR_SIZES
    regions: int = 512
    seed: int = 0

    @property
    def masks(self) -> bool:
        """Whether masks are predicted."""
        return self.name.startswith("mask")


class Detector(nn.Module):
    """What all detectors share: one call for training and test.

    In training mode a call takes samples and returns named losses whose sum is to be minimised; in evaluation mode it
    takes (3, H, W) uint8 images and returns for each "boxes" (n, 4) in its pixels, "scores" (n,), "labels" (n,) from 0
    and, where predicted, "masks" (n, M, M) probabilities.
    """

    def forward(self, inputs: list[Any]) -> Any:
        """Losses of samples, or detections of images."""
        raise NotImplementedError


class TwoStage(Detector):
    """Faster and Mask R-CNN.

    Args:
        backbone: images (B, 3, H, W) -> maps by name.
        proposals: on all maps.
        heads: on the maps `used`.
        used: how many maps, finest first, the heads use.
        divisor: padded sides are multiples of it.
    """

    def __init__(self, backbone: nn.Module, proposals: Proposals, heads: RegionHeads, used: int, divisor: int) -> None:
        super().__init__()
        self.pad, self.backbone, self.rpn, self.roi_heads, self.used = Padded(divisor), backbone, proposals, heads, used

    def forward(self, inputs: list[Any]) -> Any:
        """Losses of samples, or detections of images."""
        images = self.pad([each.image for each in inputs] if self.training else inputs)
        targets = None
        if self.training:
            # torchvision counts classes from 1, with 0 as background; samples count from 0.
            targets = [{"boxes": s.boxes, "labels": s.labels + 1, "masks": s.masks} for s in inputs]
            # torchvision's interface has no room for them, so the samplers are told before each call.
            self.rpn.fg_bg_sampler.draws = self.roi_heads.fg_bg_sampler.draws = [s.draw for s in inputs]
        maps = self.backbone(images.tensors)
        proposals, losses = self.rpn(images, maps, targets)
        used = list(maps.values())[: self.used]
        # Detached: the second stage does not train the boxes of the first, as in Faster R-CNN.
        detections, more = self.roi_heads(used, [boxes.detach() for boxes in proposals], images.image_sizes, targets)
        if self.training:
            return {**losses, **more}
        for found in detections:
            found["labels"] = found["labels"] - 1
        return detections


class OneStage(Detector):
    """RetinaNet.

    Losses are divided by a moving average of the anchors with an object, which the state dict keeps: per image and over
    all ranks, so that it does not depend on how many share the batch. With two images on each rank that is
    detectron2's, which counts one rank's anchors alone.
    """

    positives: Tensor

    def __init__(self, backbone: Pyramid, classes: int, anchors: Anchors) -> None:
        super().__init__()
        head = RetinaNetHead(PYRAMID_WIDTH, anchors.num_anchors_per_location()[0], classes)
        self.pad = Padded(32)
        self.net = RetinaNet(
            backbone,
            classes,
            anchor_generator=anchors,
            head=head,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.4,
            topk_candidates=1000,
        )
        del self.net.transform  # resizes; images come in their size here
        self.register_buffer("positives", torch.tensor(FIRST_POSITIVES))

    def forward(self, inputs: list[Any]) -> Any:
        """Losses of samples, or detections of images."""
        images = self.pad([each.image for each in inputs] if self.training else inputs)
        maps = list(self.net.backbone(images.tensors).values())
        # fp32 before boxes are decoded: half precision cannot tell neighbouring pixels of a large image apart.
        outputs = {name: value.float() for name, value in self.net.head(maps).items()}
        anchors = self.net.anchor_generator(images, maps)
        if self.training:
            return self._losses(outputs, anchors, inputs)
        shapes = self.net.anchor_generator.num_anchors_per_location()
        counts = [each.shape[-2] * each.shape[-1] * count for each, count in zip(maps, shapes, strict=True)]
        split = {name: list(value.split(counts, dim=1)) for name, value in outputs.items()}
        return self.net.postprocess_detections(split, [list(a.split(counts)) for a in anchors], images.image_sizes)

    def _losses(self, outputs: dict[str, Tensor], anchors: list[Tensor], samples: list[Sample]) -> dict[str, Tensor]:
        labels, targets = [], []
        for laid, sample in zip(anchors, samples, strict=True):
            # -1 is background and -2 is between the thresholds, which is ignored.
            matched = self.net.proposal_matcher(box_iou(sample.boxes, laid))
            own = sample.labels[matched.clamp(min=0)]
            labels.append(torch.where(matched >= 0, own, matched))
            targets.append(self.net.box_coder.encode_single(sample.boxes[matched.clamp(min=0)], laid))
        joined = torch.cat(labels)
        # Over all ranks, so that the loss does not depend on how many share the batch.
        found = mean_over_ranks((joined >= 0).sum()) / len(samples)
        # One anchor for each two images at least, detectron2's one for the two of a rank.
        with torch.no_grad():
            self.positives.lerp_(found.clamp(min=0.5), 1 - POSITIVES_MOMENTUM)
        normaliser = self.positives * len(samples)
        logits, deltas = outputs["cls_logits"].flatten(0, 1), outputs["bbox_regression"].flatten(0, 1)
        classification, box = focal_losses(logits, deltas, joined, torch.cat(targets), normaliser.clone())
        return {"loss_classifier": classification, "loss_box_reg": box}


class Mean(nn.Module):
    """Mean over the cells of a map: (R, C, M, M) -> (R, C)."""

    def forward(self, maps: Tensor) -> Tensor:
        """Mean of each channel."""
        return maps.mean((2, 3))


def _c4(config: DetectorConfig, trunk: ResNetTrunk, norm_layer: NormLayer) -> TwoStage:
    """Faster or Mask R-CNN whose proposals come from the fourth stage and whose heads are the fifth.

    With batch norm there is one more after the fifth stage, as in MoCo's detection code (Res5ROIHeadsExtraNorm).
    """
    width, stride = stage_width(trunk, "c4"), 16
    region = nn.Sequential(OrderedDict(layer4=trunk.layer4))
    if norm_layer is not None:
        region.add_module("norm", norm_layer(trunk.feature_dim))
    anchors = Anchors((config.anchor_sizes,), (stride,))
    heads = RegionHeads(
        AlignedPool(14, (stride,)),
        region,
        Mean(),
        BoxPredictor(trunk.feature_dim, config.classes),
        config.regions,
        config.seed,
        None,
        nn.Identity(),
        MaskPredictor(trunk.feature_dim, config.classes) if config.masks else None,
    )
    proposals = Proposals(anchors, width, (12000, 6000), (2000, 1000), config.seed)
    return TwoStage(Stages(trunk, ("c4",)), proposals, heads, 1, 1)


def _box_head(config: DetectorConfig, norm_layer: NormLayer) -> nn.Module:
    """Vectors of 1024 from maps of 7 x 7, initialised as in detectron2."""
    if config.box_head == "2fc":
        head: nn.Module = TwoMLPHead(PYRAMID_WIDTH * 49, 1024)
    else:
        head = FastRCNNConvFCHead((PYRAMID_WIDTH, 7, 7), [PYRAMID_WIDTH] * 4, [1024], norm_layer)
    for layer in head.modules():
        # a = 1 as detectron2's c2_xavier_fill has it.
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    return head


def _mask_head(config: DetectorConfig, norm_layer: NormLayer) -> nn.Module:
    """Four convolutions on maps of 14 x 14.

    Source: in RegionCL's released configuration and log both heads have no norm (NORM ''), in LEWEL's, whose box head
    is 4conv1fc, both have one; so the norm follows the box head unless it is set.
    """
    normed = config.mask_norm == "batch" or (config.mask_norm == "protocol" and config.box_head == "4conv1fc")
    return MaskRCNNHeads(PYRAMID_WIDTH, [PYRAMID_WIDTH] * 4, 1, norm_layer if normed else None)


def _fpn(config: DetectorConfig, trunk: ResNetTrunk, norm_layer: NormLayer) -> TwoStage:
    """Faster or Mask R-CNN on a feature pyramid."""
    backbone = Pyramid(trunk, ("c2", "c3", "c4", "c5"), HalvedTop(), norm_layer)
    strides = (4, 8, 16, 32)
    anchors = Anchors(tuple((size,) for size in config.anchor_sizes), (*strides, 64))
    masks: tuple[AlignedPool | None, nn.Module, nn.Module | None] = (None, nn.Identity(), None)
    if config.masks:
        head = _mask_head(config, norm_layer)
        masks = (AlignedPool(14, strides), head, MaskPredictor(PYRAMID_WIDTH, config.classes))
    heads = RegionHeads(
        AlignedPool(7, strides),
        nn.Identity(),
        _box_head(config, norm_layer),
        BoxPredictor(1024, config.classes),
        config.regions,
        config.seed,
        *masks,
    )
    proposals = Proposals(anchors, PYRAMID_WIDTH, (2000, 1000), (1000, 1000), config.seed)
    return TwoStage(backbone, proposals, heads, len(strides), 32)


def _retinanet(config: DetectorConfig, trunk: ResNetTrunk, norm_layer: NormLayer) -> OneStage:
    """RetinaNet on the third to fifth stage; P6 is made from the fifth stage, not from P5, as in detectron2."""
    top = LastLevelP6P7(trunk.feature_dim, PYRAMID_WIDTH)
    top.use_P5 = False  # torchvision decides by the number of channels alone
    backbone = Pyramid(trunk, ("c3", "c4", "c5"), top, norm_layer)
    sizes = tuple(tuple(size * 2 ** (third / 3) for third in range(3)) for size in config.anchor_sizes)
    return OneStage(backbone, config.classes, Anchors(sizes, (8, 16, 32, 64, 128)))


def build_detector(config: DetectorConfig, trunk: nn.Module) -> TwoStage | OneStage:
    """A detector around a loaded trunk, whose modules it takes over; new weights follow from the seed.

    Raises:
        UserMistake: the trunk is no ResNet, or the anchor sizes do not fit the levels.
    """
    if not isinstance(trunk, ResNetTrunk):
        raise UserMistake("--arch swin-t has no published detector among these protocols; choose a ResNet")
    if config.name.endswith("-c4"):
        if not config.anchor_sizes:
            raise UserMistake("--anchor-sizes is empty; give sides in pixels, for example 32,64,128,256,512")
    elif len(config.anchor_sizes) != 5:
        raise UserMistake(f"--anchor-sizes {config.anchor_sizes}: a pyramid has five levels, give five sides in pixels")
    norm_layer: NormLayer = None if config.norm == "frozen" else nn.BatchNorm2d
    build: Any = {"c4": _c4, "fpn": _fpn}.get(config.name.rpartition("-")[2], _retinanet)
    # New weights follow from the seed, and the caller's generator is as before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.norm == "frozen":
            freeze_batch_norm(trunk)
        detector: TwoStage | OneStage = build(config, trunk, norm_layer)
    return detector if config.norm == "frozen" else convert_batch_norm(detector, config.norm)


def weight_decay_groups(detector: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: scales and shifts of norm layers without weight decay, all else, biases too, with it."""
    norms = {
        parameter
        for module in detector.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in module.parameters(recurse=False)
    }
    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p not in norms], "weight_decay": weight_decay},
        {"params": [p for p in trained if p in norms], "weight_decay": 0.0},
    ]


__all__ = ["Detector", "DetectorConfig", "DetectorName", "MaskNorm", "build_detector", "weight_decay_groups"]
