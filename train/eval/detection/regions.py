"""The second stage: features of each proposed box, class, box and mask, with detectron2's values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import roi_align

from . import losses
from .anchors import Anchors
from .draws import ANCHORS, PROPOSALS, CountedSampler

ANCHORS_PER_IMAGE = 256
CANONICAL_SIDE, CANONICAL_LEVEL = 224.0, 4


class Fp32ProposalHead(RPNHead):
    """Torchvision's head with fp32 outputs, for boxes are decoded from them."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness and box offsets of each level."""
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class Proposals(RegionProposalNetwork):
    """Region proposal network with detectron2's losses and numbers of proposals.

    Args:
        anchors: of its levels.
        channels: of the maps.
        before: proposals kept of each level before suppression, in training and at test.
        after: proposals kept of an image after it.
        seed: of the choice of anchors.
    """

    def __init__(
        self, anchors: Anchors, channels: int, before: tuple[int, int], after: tuple[int, int], seed: int
    ) -> None:
        head = Fp32ProposalHead(channels, anchors.num_anchors_per_location()[0])
        names = ("training", "testing")
        super().__init__(
            anchors,
            head,
            0.7,
            0.3,
            ANCHORS_PER_IMAGE,
            0.5,
            dict(zip(names, before, strict=True)),
            dict(zip(names, after, strict=True)),
            0.7,
        )
        self.fg_bg_sampler = CountedSampler(ANCHORS_PER_IMAGE, 0.5, seed, ANCHORS)

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Objectness and box loss of the sampled anchors, as `losses.proposal_losses` defines them."""
        # The sampler answers image by image; the losses take all anchors in one row.
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in self.fg_bg_sampler(labels))
        return losses.proposal_losses(
            objectness.flatten(),
            pred_bbox_deltas,
            torch.cat(labels),
            torch.cat(regression_targets),
            (positive, negative),
            float(ANCHORS_PER_IMAGE * len(labels)),
        )


class AlignedPool(nn.Module):
    """Aligned RoIAlign with as many samples a cell as it has pixels, each box from the level that fits its size.

    Differs from torchvision's `MultiScaleRoIAlign`: half a pixel less of offset ("aligned"), adaptive sampling.

    Args:
        side: cells of the result.
        strides: of the levels, finest first.

    Source: Mask R-CNN (arXiv 1703.06870) section 3; FPN (arXiv 1612.03144) equation 1; detectron2's ROIAlignV2.
    """

    def __init__(self, side: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.side, self.strides = side, strides

    def levels(self, boxes: Tensor) -> Tensor:
        """(R,) index of the level of each box: stride 16 for a side of 224 pixels."""
        # The root of a negative area is NaN, and the level would be arbitrary.
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=0).sqrt()
        wanted = torch.floor(CANONICAL_LEVEL + torch.log2(sides / CANONICAL_SIDE + 1e-8)).long()
        # Strides are powers of two, so the bit length tells the level's number.
        finest = self.strides[0].bit_length() - 1
        return wanted.clamp(finest, finest + len(self.strides) - 1) - finest

    def forward(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """(R, C, side, side) features of the boxes (r_i, 4) of each image, in order."""
        numbers = [torch.full((len(own), 1), float(image), device=own.device) for image, own in enumerate(boxes)]
        rois = torch.cat([torch.cat(numbers), torch.cat(boxes)], dim=1)
        # C4 has one level, so no box needs to be told which.
        if len(self.strides) == 1:
            return roi_align(maps[0], rois, self.side, 1 / self.strides[0], 0, aligned=True)
        level = self.levels(rois[:, 1:])
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], self.side, self.side)
        for number, (feature, stride) in enumerate(zip(maps, self.strides, strict=True)):
            # A level without a box is pooled as well: each rank's graph must hold the same parameters.
            own = torch.where(level == number)[0]
            part = roi_align(feature, rois[own], self.side, 1 / stride, 0, aligned=True)
            pooled = pooled.index_put((own,), part.to(pooled.dtype))
        return pooled


class BoxPredictor(nn.Module):
    """Class scores and box offsets of each class from region vectors, initialised as in detectron2.

    Args:
        width: of a vector.
        classes: K, without background.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, classes + 1)
        self.bbox_pred = nn.Linear(width, classes * 4)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(R, K + 1) scores, background first, and (R, 4 (K + 1)) offsets, those of the background constant 0."""
        deltas = self.bbox_pred(vectors).float()
        return self.cls_score(vectors).float(), F.pad(deltas, (4, 0))


class MaskPredictor(nn.Sequential):
    """Doubled resolution and a mask for each class, initialised as in detectron2: (R, C, M, M) -> (R, K, 2M, 2M)."""

    def __init__(self, channels: int, classes: int, width: int = 256) -> None:
        up, out = nn.ConvTranspose2d(channels, width, 2, 2), nn.Conv2d(width, classes, 1)
        super().__init__(up, nn.ReLU(inplace=True), out)
        nn.init.kaiming_normal_(up.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(out.weight, std=0.001)
        for layer in (up, out):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


class RegionHeads(RoIHeads):
    """Classify, refine and outline proposals.

    Args:
        box_pool: cuts features of a box out of the maps.
        box_region: from the cut features to a map of each region (C4: the last stage).
        box_vector: from that map to a vector.
        predictor: of classes and boxes.
        per_image: proposals that an image is trained on; a quarter of them objects.
        seed: of their choice.
        mask_pool: cuts features for masks; None takes the maps of `box_region` (C4).
        mask_head: before the predictor of masks.
        mask_predictor: None for a detector without masks.
    """

    def __init__(
        self,
        box_pool: AlignedPool,
        box_region: nn.Module,
        box_vector: nn.Module,
        predictor: BoxPredictor,
        per_image: int,
        seed: int,
        mask_pool: AlignedPool | None,
        mask_head: nn.Module,
        mask_predictor: nn.Module | None,
    ) -> None:
        super().__init__(
            box_pool, nn.Sequential(), predictor, 0.5, 0.5, per_image, 0.25, (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 100
        )
        self.box_region, self.box_vector = box_region, box_vector
        self.mask_pool, self.mask_head, self.mask_predictor = mask_pool, mask_head, mask_predictor
        self.fg_bg_sampler = CountedSampler(per_image, 0.25, seed, PROPOSALS)

    def has_mask(self) -> bool:
        """Whether masks are predicted."""
        return self.mask_predictor is not None

    def forward(  # type: ignore[override]
        self,
        features: list[Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections (at test) and losses (in training).

        Args:
            features: maps, finest first.
            proposals: (r_i, 4) boxes of each image.
            image_shapes: (height, width) of each.
            targets: in training "boxes" (n, 4), "labels" (n,) from 1, and "masks" (n, H, W) uint8 where predicted.
        """
        if self.training:
            return [], self._training_losses(features, proposals, targets)
        region = self.box_region(self.box_roi_pool(features, proposals))
        logits, deltas = self.box_predictor(self.box_vector(region))
        found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        detections = [
            {"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in zip(*found, strict=True)
        ]
        if self.mask_predictor is not None:
            self._add_masks(features, detections)
        return detections, {}

    def _training_losses(self, features: list[Tensor], proposals: list[Tensor], targets: Any) -> dict[str, Tensor]:
        # Matching is a choice; no gradient passes through it.
        with torch.no_grad():
            boxes, matched, labels, regression = self.select_training_samples(proposals, targets)
        region = self.box_region(self.box_roi_pool(features, boxes))
        logits, deltas = self.box_predictor(self.box_vector(region))
        joined = torch.cat(labels)
        classification, box = losses.region_losses(logits, deltas, joined, torch.cat(regression))
        found = {"loss_classifier": classification, "loss_box_reg": box}
        if self.mask_predictor is not None:
            # Masks are trained on objects alone: background has none.
            objects = [torch.where(own > 0)[0] for own in labels]
            chosen = [own[keep] for own, keep in zip(boxes, objects, strict=True)]
            shared = region[torch.where(joined > 0)[0]] if self.mask_pool is None else None
            outlined = self._mask_logits(features, chosen, shared)
            wanted = [
                losses.mask_targets(target["masks"], own, match[keep], outlined.shape[-1])
                for target, own, match, keep in zip(targets, chosen, matched, objects, strict=True)
            ]
            found["loss_mask"] = losses.mask_loss(outlined, joined[joined > 0] - 1, torch.cat(wanted))
        return found

    def _mask_logits(self, features: list[Tensor], boxes: list[Tensor], region: Tensor | None) -> Tensor:
        """(R, K, M, M) fp32; `region` spares the C4 head from computing its maps again."""
        assert self.mask_predictor is not None
        if self.mask_pool is not None:
            region = self.mask_pool(features, boxes)
        elif region is None:
            region = self.box_region(self.box_roi_pool(features, boxes))
        logits: Tensor = self.mask_predictor(self.mask_head(region))
        return logits.float()

    def _add_masks(self, features: list[Tensor], detections: list[dict[str, Tensor]]) -> None:
        """Give each detection the (n, M, M) probabilities of its class's mask."""
        labels = torch.cat([found["labels"] for found in detections])
        logits = self._mask_logits(features, [found["boxes"] for found in detections], None)
        # Of the K masks only that of the predicted class counts.
        own = logits[torch.arange(len(labels), device=labels.device), labels - 1].sigmoid()
        for found, masks in zip(detections, own.split([len(found["labels"]) for found in detections]), strict=True):
            found["masks"] = masks
