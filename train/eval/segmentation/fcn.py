"""Fully convolutional heads, and dilation of a ResNet to output stride 8.

Source: FCN (arXiv 1411.4038) as mmsegmentation's `fcn_r50-d8` builds it, which LEWEL (arXiv 2203.14898) uses on VOC12.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.collectives import rank, world
from models.resnet import ResNetTrunk

DROPOUT = 0.1
TrunkT = TypeVar("TrunkT", bound=ResNetTrunk)


class ConvNormRelu(nn.Sequential):
    """Convolution without bias, batch norm, ReLU; the size stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class ChannelDropout(nn.Module):
    """Drops whole channels of (B, C, h, w) with probability 0.1 in training and scales the others up.

    What is dropped is drawn for the global batch and then sliced: with PyTorch's generator seeded alike on all ranks,
    a rank's samples lose the channels that they would lose in one process.
    """

    def forward(self, features: Tensor) -> Tensor:
        """The features, some channels zeroed in training mode."""
        if not self.training:
            return features
        rows = features.shape[0]
        # For all ranks, in the same order on each, since their generators are seeded alike.
        drawn = torch.rand(rows * world(), features.shape[1], device=features.device)
        kept = (drawn[rank() * rows : (rank() + 1) * rows] >= DROPOUT).to(features.dtype) / (1 - DROPOUT)
        return features * kept[:, :, None, None]


class Classifier(nn.Module):
    """Drops whole channels, then classifies each position: (B, C, h, w) -> logits (B, classes, h, w)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.dropout = ChannelDropout()
        self.conv = nn.Conv2d(channels, classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of each position."""
        logits: Tensor = self.conv(self.dropout(features))
        return logits


class FcnHead(nn.Module):
    """3x3 convolutions and a classifier: (B, inputs, h, w) -> logits (B, classes, h, w).

    Args:
        inputs: channels of the feature map.
        channels: width of the convolutions.
        classes: number of classes.
        convs: how many convolutions.
        concat_input: join the input to their output and mix both by one more convolution.
    """

    def __init__(self, inputs: int, channels: int, classes: int, convs: int, concat_input: bool) -> None:
        super().__init__()
        widths = [inputs] + [channels] * convs
        self.convs = nn.Sequential(
            *(ConvNormRelu(before, after, 3) for before, after in zip(widths[:-1], widths[1:], strict=True))
        )
        self.mix = ConvNormRelu(inputs + channels, channels, 3) if concat_input else None
        self.classifier = Classifier(channels, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of each position."""
        found = self.convs(features)
        if self.mix is not None:
            found = self.mix(torch.cat([features, found], dim=1))
        logits: Tensor = self.classifier(found)
        return logits


def dilate_to_stride_8(trunk: TrunkT) -> TrunkT:
    """Keep the resolution of the second stage in the last two, which are dilated by 2 and 4 instead, in place.

    The first block of a stage has half the stage's dilation, since its input still has that of the stage before. A
    basic block is dilated in its first convolution alone, as in mmsegmentation. Weights stay as they are.
    """
    for stage, dilation in ((trunk.layer3, 2), (trunk.layer4, 4)):
        for number, block in enumerate(stage):
            assert isinstance(block, BasicBlock | Bottleneck)
            own = dilation // 2 if number == 0 else dilation
            wide = block.conv2 if isinstance(block, Bottleneck) else block.conv1
            wide.stride, wide.dilation, wide.padding = (1, 1), (own, own), (own, own)
            if number == 0 and block.downsample is not None:
                # The shortcut must keep the resolution of the path beside it.
                block.downsample[0].stride = (1, 1)
    return trunk
