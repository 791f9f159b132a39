"""SimSiam: two views predict each other's projection; no negatives, no momentum network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..heads import global_pool, mlp_head
from ..hyperparameters import SimSiamConfig
from ..losses import negative_cosine
from ..norm import convert_batch_norm
from ..resnet import Trunk, build_backbone
from .base import Method, StepInputs, StepOutput

VIEWS = ("view1", "view2")


class SimSiam(Method):
    """L = D(p1, sg z2) / 2 + D(p2, sg z1) / 2 with D the negative cosine; range -1..1.

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a view in pixels; the network takes any.
        bn_mode: "group", "sync" or "plain" batch norm; the paper synchronises.
        bn_group_size: images of a group in mode "group"; 0 is the rank's whole batch.

    Source: SimSiam (arXiv 2011.10566) Algorithm 1; facebookresearch/simsiam.
    Differs: the projector's last Linear has no bias; the released code has one that it freezes and batch norm cancels.
    """

    Config = SimSiamConfig

    config: SimSiamConfig

    def __init__(
        self, config: SimSiamConfig, *, arch: str, image_size: int, bn_mode: str = "sync", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder: Trunk = build_backbone(arch, config.conv_init, config.zero_init_residual)
        self.projector = mlp_head(
            (self.encoder.feature_dim, config.hidden_dim, config.hidden_dim, config.dim),
            biases=(False, False, False),
            hidden_norm=True,
            output_norm="fixed",
        )
        self.predictor = mlp_head(
            (config.dim, config.predictor_hidden_dim, config.dim), biases=(False, True), hidden_norm=True
        )
        convert_batch_norm(self, bn_mode, bn_group_size)

    def fixed_lr_modules(self) -> list[nn.Module]:
        """The predictor, unless the option is off."""
        return [self.predictor] if self.config.fixed_predictor_lr else []

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Symmetric loss of the two views."""
        z1, z2 = (self.projector(global_pool(self.encoder(view))) for view in (inputs.view1, inputs.view2))
        loss = instance_loss((self.predictor(z1), self.predictor(z2)), (z1, z2))
        return StepOutput(loss, {"ins": loss.detach()})

    @torch.no_grad()
    def after_step(self, output: StepOutput, ema_momentum: float) -> None:
        """Nothing to update."""


def instance_loss(predictions: tuple[Tensor, Tensor], projections: tuple[Tensor, Tensor]) -> Tensor:
    """D(p1, sg z2) / 2 + D(p2, sg z1) / 2, batch mean; (B, D) each."""
    (p1, p2), (z1, z2) = predictions, projections
    return 0.5 * negative_cosine(p1, z2).mean() + 0.5 * negative_cosine(p2, z1).mean()
