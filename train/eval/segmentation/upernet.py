"""UPerNet's head: pyramid pooling on the last stage, a feature pyramid over all four, one classifier.

The decoder is that of segmentation-models-pytorch, set to what mmsegmentation's `upernet_r50` computes: 512 channels
instead of 256, pools of 1, 2, 3 and 6 with batch norm in both, and without the layer norms that segmentation-models-
pytorch puts on each stage. Channel dropout before the classifier is added, as are mmsegmentation's initial weights.

Source: UPerNet (arXiv 1807.10221); RegionCL (arXiv 2111.12309) fine-tunes it on Cityscapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserMistake
from .fcn import Classifier

POOLS = (1, 2, 3, 6)


def build_decoder(stage_channels: Sequence[int], channels: int) -> nn.Module:
    """segmentation-models-pytorch's decoder without its layer norms.

    Args:
        stage_channels: channels of the four stages, from stride 4 to stride 32.
        channels: width of the decoder.

    Raises:
        UserMistake: the package is not installed.
    """
    try:
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError as reason:
        raise UserMistake(
            f"--model upernet needs segmentation-models-pytorch ({reason}); run bash tools/setup.sh, or choose "
            "--model fcn"
        ) from None
    # Its list of channels starts at stride 1; what it would do with the first two strides it leaves out.
    decoder = UPerNetDecoder([3, 0, *stage_channels], encoder_depth=5, decoder_channels=channels)
    decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in stage_channels)
    _replace_pools(decoder)
    return decoder


class MeanPool(nn.Module):
    """Adaptive average pooling (B, C, H, W) -> (B, C, side, side), by two small matrices where that must be repeatable.

    PyTorch's own has no deterministic backward pass on CUDA and raises under `--deterministic`.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Means over the windows of `nn.AdaptiveAvgPool2d`."""
        if x.is_cuda and torch.are_deterministic_algorithms_enabled():
            return mean_pool(x, self.side)
        return F.adaptive_avg_pool2d(x, self.side)


def mean_pool(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side) in x's dtype, as adaptive average pooling but for rounding."""
    rows, columns = (_averages(length, side, x) for length in x.shape[2:])
    return rows @ x @ columns.T


def _averages(length: int, side: int, like: Tensor) -> Tensor:
    """(side, length): row i averages positions floor(i * length / side) to ceil((i + 1) * length / side)."""
    cell = torch.arange(side, device=like.device)[:, None]
    place = torch.arange(length, device=like.device)
    within = (place >= cell * length // side) & (place < -(-(cell + 1) * length // side))
    return (within / within.sum(1, keepdim=True)).to(like.dtype)


def _replace_pools(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d):
            setattr(module, name, MeanPool(int(child.output_size)))  # type: ignore[arg-type]
        else:
            _replace_pools(child)


class UPerNetHead(nn.Module):
    """Four maps (B, C_i, H/2^i, W/2^i), i = 2..5 -> logits (B, classes, H/4, W/4)."""

    def __init__(self, stage_channels: Sequence[int], channels: int, classes: int) -> None:
        super().__init__()
        self.decoder = build_decoder(stage_channels, channels)
        self.classifier = Classifier(channels, classes)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Logits at stride 4."""
        # The decoder skips the first two entries, strides 1 and 2.
        logits: Tensor = self.classifier(self.decoder([stages[0], stages[0], *stages]))
        return logits
