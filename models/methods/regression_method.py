"""What methods share that regress embeddings of a momentum network, without negatives."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from ..momentum import copy_and_freeze, follow
from .base import Method, StepOutput


class RegressionMethod(Method):
    """A method with an encoder and a projector, and momentum networks of both.

    `config.momentum_norm` says which batch norm the momentum networks have: "own" batch statistics, or "ema", the
    online network's running statistics averaged like its weights (EMAN, arXiv 2101.08482).
    """

    ema_index_offset = 0
    config: Any
    encoder: nn.Module
    projector: nn.Module

    def copy_online_networks(self) -> None:
        """Make the momentum networks; call it last in `__init__`, once the batch norms are of their kind."""
        self.momentum_encoder = copy_and_freeze(self.encoder)
        self.momentum_projector = copy_and_freeze(self.projector)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Training mode; averaged batch norms stay in evaluation mode, which uses their running statistics."""
        super().train(mode)
        if self.config.momentum_norm == "ema":
            for _, momentum in self.momentum_pairs():
                momentum.eval()
        return self

    @torch.no_grad()
    def after_step(self, output: StepOutput, ema_momentum: float) -> None:
        """EMA of parameters, and of running statistics with averaged batch norms."""
        follow(self.momentum_pairs(), ema_momentum, whole_state=self.config.momentum_norm == "ema")
