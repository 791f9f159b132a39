"""ResNet trunks that end in a feature map, in torchvision's layout and key names, and the table of all backbones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock as TorchvisionBasicBlock
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck
from torchvision.models.resnet import ResNet

from .foreign import ForeignTrunk, build_foreign, is_foreign
from .hyperparameters import ConvInit
from .norm import norm_relu
from .swin import SwinTrunk
from .vit import VitTrunk


class BasicBlock(TorchvisionBasicBlock):
    """torchvision's block, with batch norm, residual sum and ReLU in one call so that they can be one operator."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/stride, W/stride)."""
        out = self.conv2(norm_relu(self.bn1, self.conv1(x)))
        identity = x if self.downsample is None else self.downsample(x)
        return norm_relu(self.bn2, out, identity)


class Bottleneck(TorchvisionBottleneck):
    """torchvision's block of three convolutions, with batch norm, sum and ReLU in one call as in `BasicBlock`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/stride, W/stride)."""
        out = norm_relu(self.bn1, self.conv1(x))
        out = self.conv3(norm_relu(self.bn2, self.conv2(out)))
        identity = x if self.downsample is None else self.downsample(x)
        return norm_relu(self.bn3, out, identity)


class ResNetTrunk(ResNet):
    """A torchvision ResNet without pooling and classifier: images (B, 3, S, S) -> map (B, C, S/32, S/32).

    `state_dict` keys are torchvision's own less `fc.weight` and `fc.bias`, so the weights load there and back.

    Args:
        block: residual block.
        layers: blocks in each of the four stages.
        width_per_group: width of the 3x3 convolution of a bottleneck, 64 is the usual one, 128 the "2x" network.
        conv_init: initialisation of the convolutions, see `initialise_convolutions`.
        zero_init_residual: start the last BN gamma of every residual branch at 0.

    Source: ResNet v1.5 as in torchvision; CARE (arXiv 2110.05340) uses the wide-bottleneck layout as its "2x".
    """

    stride: int = 32

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        width_per_group: int = 64,
        conv_init: ConvInit = "fan_out",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__(block, list(layers), zero_init_residual=zero_init_residual, width_per_group=width_per_group)
        del self.fc, self.avgpool
        self.feature_dim: int = 512 * block.expansion
        self.stage_dims: tuple[int, int] = (256 * block.expansion, 512 * block.expansion)
        initialise_convolutions(self, conv_init)

    def forward_stages(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of layer3 (B, C/2, S/16, S/16) and layer4 (B, C, S/32, S/32) for images (B, 3, S, S)."""
        x = self.maxpool(norm_relu(self.bn1, self.conv1(images)))  # S/4
        middle = self.layer3(self.layer2(self.layer1(x)))
        return middle, self.layer4(middle)

    def forward(self, images: Tensor) -> Tensor:
        """Last feature map (B, C, S/32, S/32) of images (B, 3, S, S)."""
        return self.forward_stages(images)[1]


class SmallResNet(ResNetTrunk):
    """ResNet-10 with a stem for small images: (B, 3, S, S) -> (B, 8 * width, S/16, S/16).

    The stem is that of ResNets for CIFAR with stride 2: one 3x3 convolution and no max-pooling, so a side of 32 px
    still gives a map of 2 x 2. At width 16 a training step costs about a fiftieth of ResNet-18's at 64 px.

    Args:
        width: channels of the first stage; each later one has twice as many.
        conv_init: initialisation of the convolutions, see `initialise_convolutions`.
        zero_init_residual: start the last BN gamma of every residual branch at 0.
    """

    stride = 16

    def __init__(self, width: int = 16, conv_init: ConvInit = "fan_out", zero_init_residual: bool = False) -> None:
        super().__init__(BasicBlock, (1, 1, 1, 1), conv_init=conv_init)
        # torchvision's constructor has fixed widths, so the layers are made anew with its own builder.
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1, self.maxpool = nn.BatchNorm2d(width), nn.Identity()  # type: ignore[assignment]
        self.layer1 = self._make_layer(BasicBlock, width, 1)
        self.layer2 = self._make_layer(BasicBlock, 2 * width, 1, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 4 * width, 1, stride=2)
        self.layer4 = self._make_layer(BasicBlock, 8 * width, 1, stride=2)
        self.feature_dim, self.stage_dims = 8 * width, (4 * width, 8 * width)
        initialise_convolutions(self, conv_init)
        if zero_init_residual:
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
                nn.init.zeros_(stage[0].bn2.weight)


def initialise_convolutions(module: nn.Module, scheme: ConvInit) -> None:
    """Draw all convolution weights inside `module` anew; biases stay as they are.

    Args:
        module: changed in place.
        scheme: "fan_out" is Kaiming-normal over the outputs (torchvision, MoCo), "fan_in" over the inputs (OpenSelfSup,
            on which RegionCL's and DenseCL's code is built), "torch" PyTorch's own default.
    """
    for layer in module.modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        if scheme == "torch":
            layer.reset_parameters()
        else:
            nn.init.kaiming_normal_(layer.weight, mode=scheme, nonlinearity="relu")


def _swin(
    conv_init: ConvInit,
    zero_init_residual: bool,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
) -> SwinTrunk:
    if zero_init_residual:
        raise ValueError("swin-t has no batch norm in its blocks to start at zero; pass --zero-init-residual false")
    trunk = SwinTrunk(embed_dim, depths, num_heads)
    initialise_convolutions(trunk, conv_init)
    return trunk


def _vit(conv_init: ConvInit, zero_init_residual: bool, dim: int, depth: int, heads: int) -> VitTrunk:
    """The trunk; it starts as MoCo v3 draws it, whatever is said of a ResNet's convolutions and norms."""
    return VitTrunk(dim, depth, heads)


Trunk = ResNetTrunk | SwinTrunk | VitTrunk | ForeignTrunk

BACKBONES: dict[str, Callable[..., Trunk]] = {
    "resnet10-w16": partial(SmallResNet, 16),
    "resnet10-w32": partial(SmallResNet, 32),
    "resnet18": partial(ResNetTrunk, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNetTrunk, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNetTrunk, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNetTrunk, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNetTrunk, Bottleneck, (3, 8, 36, 3)),
    "resnet50-2x": partial(ResNetTrunk, Bottleneck, (3, 4, 6, 3), width_per_group=128),
    "swin-t": partial(_swin, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "vit-s": partial(_vit, dim=384, depth=12, heads=12),
    "vit-b": partial(_vit, dim=768, depth=12, heads=12),
}


def build_backbone(arch: str, conv_init: ConvInit, zero_init_residual: bool = False) -> Trunk:
    """A new trunk by name.

    Args:
        arch: a key of `BACKBONES`, or `timm:NAME`, `torchvision:NAME`, `module:factory` (see `foreign.py`).
        conv_init: initialisation of the convolutions, see `initialise_convolutions`; foreign trunks and ViTs have
            their own.
        zero_init_residual: start every residual branch of a ResNet at 0; foreign trunks start as their library does,
            ViTs as MoCo v3's.

    Returns:
        A module from images (B, 3, S, S) to a map (B, feature_dim, S/stride, S/stride).

    Raises:
        ValueError: an unknown name, or an option the architecture does not have.
    """
    if is_foreign(arch):
        return build_foreign(arch)
    if arch not in BACKBONES:
        raise ValueError(
            f"--arch {arch} is unknown; choose one of {', '.join(BACKBONES)}, or timm:NAME, torchvision:NAME or "
            "module:factory"
        )
    return BACKBONES[arch](conv_init=conv_init, zero_init_residual=zero_init_residual)
