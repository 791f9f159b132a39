"""Parameters and multiply-adds of a classifier on a backbone: the two columns beside CARE's accuracies."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.resnet import build_backbone

CLASSES = 1000


def cost(arch: str, side: int = 224) -> tuple[float, float]:
    """(millions of parameters, billions of multiply-adds) of a backbone and a linear layer on ImageNet's classes.

    Papers count a multiply-add as one operation, so a ResNet-50 has 4.1 billion. Nothing is computed: the tensors
    have shapes only.

    Args:
        arch: backbone.
        side: of the one image, in pixels.
    """
    with torch.device("meta"):
        encoder = build_backbone(arch, "fan_out").eval()
        classifier = nn.Linear(encoder.feature_dim, CLASSES)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            classifier(encoder(torch.empty(1, 3, side, side)).mean(dim=(2, 3)))
    parameters = sum(p.numel() for module in (encoder, classifier) for p in module.parameters())
    return parameters / 1e6, counter.get_total_flops() / 2 / 1e9
