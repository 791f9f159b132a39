"""BYOL: predict the momentum network's embedding of the other view, without negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import global_pool, mlp_head
from ..hyperparameters import ByolConfig
from ..losses import byol_regression
from ..norm import convert_batch_norm
from ..resnet import build_backbone
from .base import StepInputs, StepOutput
from .regression_method import RegressionMethod


class Byol(RegressionMethod):
    """Regression of the other view's momentum embedding, in both directions.

    z = g(GAP f(x)), L = mean[2 - 2 cos(q(z1), sg z'2)] + mean[2 - 2 cos(q(z2), sg z'1)], range 0..8.

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a view in pixels; the network takes any.
        bn_mode: "group", "sync" or "plain" batch norm: "sync" for BYOL, "group" and `momentum_norm` ema for EMAN.
        bn_group_size: consecutive images that share batch-norm statistics; 0 is the rank's whole batch.

    Source: BYOL (arXiv 2006.07733) section 3.1, Eq. 2; EMAN (arXiv 2101.08482) for averaged batch norms.
    Differs: heads without biases by default, as in the EMAN and LEWEL code; `head_bias` gives the BYOL paper's.
    """

    Config = ByolConfig

    def __init__(
        self, config: ByolConfig, *, arch: str, image_size: int, bn_mode: str = "sync", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_backbone(arch, config.conv_init, config.zero_init_residual)
        biases = [config.head_bias] * 2
        sizes = (self.encoder.feature_dim, config.hidden_dim, config.dim)
        self.projector = mlp_head(sizes, biases=biases, hidden_norm=True)
        self.predictor = mlp_head((config.dim, config.hidden_dim, config.dim), biases=biases, hidden_norm=True)
        # Before the copies are made, so that the momentum networks have batch norms of the same kind.
        convert_batch_norm(self, bn_mode, bn_group_size)
        self.copy_online_networks()

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Sum over both directions."""
        views = (inputs.view1, inputs.view2)
        predictions = [self.predictor(self.projector(global_pool(self.encoder(view)))) for view in views]
        targets = [self.target(view) for view in views]
        first = byol_regression(predictions[0], targets[1]).mean()
        second = byol_regression(predictions[1], targets[0]).mean()
        return StepOutput(first + second, {"view1": first.detach(), "view2": second.detach()})

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """Momentum embeddings (B, D) of images (B, 3, S, S)."""
        projected: Tensor = self.momentum_projector(global_pool(self.momentum_encoder(images)))
        return projected
