"""UPerNet's head: pyramid pooling on the last stage, a feature pyramid over all four, one classifier.

The decoder is that of segmentation-models-pytorch, set to what mmsegmentation's `upernet_r50` computes: 512 channels
instead of 256, pools of 1, 2, 3 and 6 with batch norm in both, and without the layer norms that segmentation-models-
pytorch puts on each stage. Channel dropout before the classifier is added, as are mmsegmentation's initial weights.

Source: UPerNet (arXiv 1807.10221); RegionCL (arXiv 2111.12309) fine-tunes it on Cityscapes.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    return decoder


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
