"""A backbone with a segmentation head and the auxiliary head that both published protocols train beside it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.norm import convert_batch_norm
from models.resnet import ResNetTrunk

from ...errors import UserMistake
from .fcn import Classifier, FcnHead, dilate_to_stride_8
from .labels import IGNORED
from .upernet import UPerNetHead

Model = Literal["fcn", "upernet"]
AUXILIARY_WEIGHT = 0.4


def stages_of(trunk: ResNetTrunk, images: Tensor) -> list[Tensor]:
    """Outputs of the four stages of a ResNet for images (B, 3, H, W)."""
    x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images))))
    found = []
    for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        x = stage(x)
        found.append(x)
    return found


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at the labels' resolution in fp32, summed over labelled pixels and divided by all pixels.

    Dividing by all of them, ignored ones too, is what mmsegmentation does by default, so what the published figures
    were trained with; it also makes the mean over ranks the loss of the global batch.

    Args:
        logits: (B, classes, h, w).
        labels: (B, H, W) int64, 255 where ignored.
    """
    # A sum over hundreds of thousands of pixels has no digits left in half precision.
    with torch.autocast(logits.device.type, enabled=False):
        resized = upsampled(logits.float(), (labels.shape[1], labels.shape[2]))
        losses = F.cross_entropy(resized, labels, ignore_index=IGNORED, reduction="none")
        return losses.sum() / labels.numel()


def upsampled(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (B, classes, h, w) at another size, bilinear, pixel centres on pixel centres."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes, H/s, W/s), s = 8 for FCN and 4 for UPerNet.

    Args:
        trunk: the filled ResNet; for FCN it is dilated in place.
        model: "fcn" or "upernet".
        classes: number of classes.
        channels: width of the head; the auxiliary head has half of it.
        seed: initial weights of the heads follow from it.

    Source: mmsegmentation's `fcn_r50-d8` and `upernet_r50`. Differs: the backbone has the usual 7x7 stem, which
    self-supervised backbones come with, not three 3x3 convolutions.
    """

    def __init__(self, trunk: ResNetTrunk, model: Model, classes: int, channels: int, seed: int) -> None:
        super().__init__()
        self.model = model
        self.trunk = dilate_to_stride_8(trunk) if model == "fcn" else trunk
        widths = [trunk.feature_dim // 2**below for below in (3, 2, 1, 0)]
        # The heads are made on the CPU, where the seed gives the same weights whatever the device, and follow later.
        device = next(trunk.parameters()).device
        # Initial weights follow from the seed, and the caller's generator is as before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head: nn.Module
            if model == "fcn":
                self.head = FcnHead(widths[3], channels, classes, convs=2, concat_input=True)
            else:
                self.head = UPerNetHead(widths, channels, classes)
            self.auxiliary = FcnHead(widths[2], channels // 2, classes, convs=1, concat_input=False)
            for head in (self.head, self.auxiliary):
                initialise(head)
        self.to(device).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the main head."""
        return self._main(stages_of(self.trunk, images))

    def _main(self, stages: list[Tensor]) -> Tensor:
        logits: Tensor = self.head(stages[3] if self.model == "fcn" else stages)
        return logits

    def losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the main and of the auxiliary head; what is minimised is the first plus 0.4 of the second."""
        stages = stages_of(self.trunk, images)
        return pixel_loss(self._main(stages), labels), pixel_loss(self.auxiliary(stages[2]), labels)


def initialise(head: nn.Module) -> None:
    """Initial weights as in mmsegmentation: Kaiming-normal over the outputs, classifiers N(0, 0.01), biases 0."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for module in head.modules():
        # After the convolutions: a classifier is one of them and is drawn anew.
        if isinstance(module, Classifier):
            nn.init.normal_(module.conv.weight, std=0.01)
            assert module.conv.bias is not None
            nn.init.zeros_(module.conv.bias)


def require_resnet(encoder: nn.Module, arch: str) -> ResNetTrunk:
    """The encoder, if the protocols are defined for it.

    Raises:
        UserMistake: it is no ResNet.
    """
    if not isinstance(encoder, ResNetTrunk):
        raise UserMistake(
            f"segment on {arch}: the published segmentation protocols are for ResNets; give a ResNet checkpoint"
        )
    return encoder


def build_segmenter(trunk: ResNetTrunk, model: Model, classes: int, channels: int, seed: int, bn: str) -> Segmenter:
    """The network over a filled trunk, with all batch norms of the wanted kind ("sync" or "plain")."""
    return convert_batch_norm(Segmenter(trunk, model, classes, channels, seed), bn)
