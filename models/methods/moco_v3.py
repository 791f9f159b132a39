"""MoCo v3: two views, keys of the whole global batch, no queue."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import all_gather_rows
from ..heads import global_pool, mlp_head
from ..hyperparameters import MoCoV3Config
from ..losses import batch_contrast, unit
from ..momentum import copy_and_freeze, ema_update
from ..norm import convert_batch_norm
from ..resnet import Trunk, build_backbone
from .base import Method, StepInputs, StepOutput


class MoCoV3(Method):
    """L = ctr(q1, k2) + ctr(q2, k1); ctr = 2 tau CE over the keys of the whole global batch.

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a view in pixels; the network takes any.
        bn_mode: "group", "sync" or "plain" batch norm; the paper synchronises.
        bn_group_size: images of a group in mode "group"; 0 is the rank's whole batch.

    Source: MoCo v3 (arXiv 2104.02057) Algorithm 1; facebookresearch/moco-v3, by default the heads of the ResNet model;
    `projector_layers` 3 and `predictor_norm` give those of the ViT model.
    """

    Config = MoCoV3Config
    ema_index_offset = 1

    config: MoCoV3Config

    def __init__(
        self, config: MoCoV3Config, *, arch: str, image_size: int, bn_mode: str = "sync", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder: Trunk = build_backbone(arch, config.conv_init, config.zero_init_residual)
        self.projector = mlp_head(
            (self.encoder.feature_dim, *[config.hidden_dim] * (config.projector_layers - 1), config.dim),
            biases=[False] * config.projector_layers,
            hidden_norm=True,
            output_norm="fixed",
        )
        self.predictor = mlp_head(
            (config.dim, config.hidden_dim, config.dim),
            biases=(False, False),
            hidden_norm=True,
            output_norm="fixed" if config.predictor_norm else "none",
        )
        # Before the copies are made, so that the momentum networks have batch norms of the same kind.
        convert_batch_norm(self, bn_mode, bn_group_size)
        self.momentum_encoder = copy_and_freeze(self.encoder)
        self.momentum_projector = copy_and_freeze(self.projector)

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Both directions against the gathered keys."""
        queries = [self.predict(view) for view in (inputs.view1, inputs.view2)]
        keys = [self.global_keys(view) for view in (inputs.view2, inputs.view1)]
        own = inputs.rank * inputs.view1.shape[0] + torch.arange(inputs.view1.shape[0], device=inputs.view1.device)
        terms = [
            batch_contrast(query, key, own, self.config.temperature).mean()
            for query, key in zip(queries, keys, strict=True)
        ]
        loss = torch.stack(terms).sum()
        return StepOutput(loss, {"ins": loss.detach()})

    def predict(self, view: Tensor) -> Tensor:
        """Unit predictions (B, D) of a view (B, 3, S, S)."""
        return unit(self.predictor(self.projector(global_pool(self.encoder(view)))))

    @torch.no_grad()
    def global_keys(self, view: Tensor) -> Tensor:
        """Unit keys (G, D) of all ranks' images."""
        return all_gather_rows(unit(self.momentum_projector(global_pool(self.momentum_encoder(view)))))

    @torch.no_grad()
    def after_step(self, output: StepOutput, ema_momentum: float) -> None:
        """Update the momentum network."""
        ema_update(self.momentum_pairs(), ema_momentum)
