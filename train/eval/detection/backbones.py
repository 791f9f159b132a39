"""A backbone's stages as a detector uses them: one map (C4) or a pyramid (FPN), and its batch norms."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from models.resnet import ResNetTrunk

Norm = Literal["sync", "plain", "frozen"]
NormLayer = Callable[..., nn.Module] | None
PYRAMID_WIDTH = 256
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Padded(nn.Module):
    """Normalise images and lay them into one batch, padded with zeros below and to the right.

    Args:
        divisor: the padded sides are multiples of it; 1 pads to the largest image alone.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, divisor: int) -> None:
        super().__init__()
        self.divisor = divisor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255, persistent=False)

    def forward(self, images: list[Tensor]) -> ImageList:
        """(3, H, W) uint8 images of any size -> (B, 3, H', W') fp32 and their own sizes."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        # Rounded up: each level of a pyramid halves the map and must fit the one above.
        height, width = (-(-max(side) // self.divisor) * self.divisor for side in zip(*sizes, strict=True))
        # Zeros after normalising, so that padding is the mean colour, as in detectron2.
        batch = self.mean.new_zeros(len(images), 3, height, width)
        for target, image in zip(batch, images, strict=True):
            target[:, : image.shape[1], : image.shape[2]] = (image - self.mean) / self.std
        return ImageList(batch, sizes)


class HalvedTop(ExtraFPNBlock):
    """P6 of the region detectors: every second cell of P5."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The levels with P6 appended."""
        return [*results, F.max_pool2d(results[-1], 1, 2)], [*names, "p6"]


class Stages(nn.Module):
    """The trunk's maps by name, "c2" (stride 4) to "c5" (stride 32), those that are wanted.

    Takes the trunk's modules as they are, under their own names; stages above the last wanted one are left out.
    """

    def __init__(self, trunk: ResNetTrunk, wanted: tuple[str, ...]) -> None:
        super().__init__()
        self.wanted = wanted
        self.stem = nn.ModuleDict({"conv1": trunk.conv1, "bn1": trunk.bn1})
        # C4 detectors take the fifth stage as their head, so it must not be part of the backbone as well.
        last = max(int(name[1]) for name in wanted)
        self.layers = nn.ModuleDict({f"c{n}": getattr(trunk, f"layer{n - 1}") for n in range(2, last + 1)})

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Maps of images (B, 3, H, W)."""
        x = F.max_pool2d(F.relu(self.stem["bn1"](self.stem["conv1"](images))), 3, 2, 1)
        found = OrderedDict()
        for name, layer in self.layers.items():
            x = layer(x)
            if name in self.wanted:
                found[name] = x
        return found


class Pyramid(nn.Module):
    """Feature pyramid over a trunk: images -> maps of 256 channels by level name, finest first.

    Args:
        trunk: a loaded ResNet.
        stages: those that the pyramid is built on.
        top: makes the coarsest levels.
        norm_layer: batch norm after each of the pyramid's convolutions, or none.
    """

    out_channels = PYRAMID_WIDTH

    def __init__(self, trunk: ResNetTrunk, stages: tuple[str, ...], top: ExtraFPNBlock, norm_layer: NormLayer) -> None:
        super().__init__()
        self.body = Stages(trunk, stages)
        widths = [stage_width(trunk, name) for name in stages]
        self.fpn = FeaturePyramidNetwork(widths, PYRAMID_WIDTH, top, norm_layer)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of images (B, 3, H, W)."""
        maps: dict[str, Tensor] = self.fpn(self.body(images))
        return maps


def stage_width(trunk: ResNetTrunk, name: str) -> int:
    """Channels of a stage, "c2" to "c5"."""
    return trunk.feature_dim >> (5 - int(name[1]))


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every batch norm inside by one with constant statistics, scale and shift (detectron2's FrozenBN)."""
    if isinstance(module, _BatchNorm):
        frozen: Any = FrozenBatchNorm2d(module.num_features, module.eps)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(frozen, name).copy_(getattr(module, name).detach())
        return frozen  # type: ignore[no-any-return]
    for name, child in module.named_children():
        replaced = freeze_batch_norm(child)
        if replaced is not child:
            setattr(module, name, replaced)
    return module
