"""Barlow Twins: the two views' embeddings correlate feature by feature and nowhere else; no negatives, no momentum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..collectives import sum_over_ranks
from ..heads import global_pool, mlp_head
from ..hyperparameters import BarlowTwinsConfig
from ..losses import correlation_terms
from ..norm import convert_batch_norm
from ..resnet import Trunk, build_backbone
from .base import Method, StepInputs, StepOutput


class BarlowTwins(Method):
    """Cross-correlation of the two views' embeddings over the global batch, drawn towards the identity matrix.

    C = BN(z1)^T BN(z2) / G, L = loss_scale * (sum_i (1 - C_ii)^2 + lambda sum_(i != j) C_ij^2), with G the global batch
    and BN without gamma and beta.

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a view in pixels; the network takes any.
        bn_mode: "group", "sync" or "plain" batch norm, that of C included; the paper synchronises.
        bn_group_size: images of a group in mode "group"; 0 is the rank's whole batch.

    Source: Barlow Twins (arXiv 2103.03230) Eq. 1 and 2; facebookresearch/barlowtwins.
    Differs: `loss_scale` says what the released code leaves to the number of devices, whose gradients it averages where
    the loss over all of them has their sum. 1 is the paper's formula.
    """

    Config = BarlowTwinsConfig

    config: BarlowTwinsConfig

    def __init__(
        self, config: BarlowTwinsConfig, *, arch: str, image_size: int, bn_mode: str = "sync", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder: Trunk = build_backbone(arch, config.conv_init, config.zero_init_residual)
        self.projector = mlp_head(
            (self.encoder.feature_dim, config.hidden_dim, config.hidden_dim, config.dim),
            biases=(False, False, False),
            hidden_norm=True,
        )
        self.embedding_norm: nn.Module = nn.BatchNorm1d(config.dim, affine=False)
        convert_batch_norm(self, bn_mode, bn_group_size)

    def forward(self, inputs: StepInputs) -> StepOutput:
        """The loss of the global batch, the same on every rank."""
        first, second = (self.embed(view) for view in (inputs.view1, inputs.view2))  # (B, D) each
        with torch.autocast(first.device.type, enabled=False):
            local = first.T @ second / (first.shape[0] * inputs.world_size)  # (D, D)
        diagonal, off_diagonal = correlation_terms(sum_over_ranks(local))
        loss = self.config.loss_scale * (diagonal + self.config.off_diagonal_weight * off_diagonal)
        return StepOutput(loss, {"diagonal": diagonal.detach(), "off_diagonal": off_diagonal.detach()})

    def embed(self, view: Tensor) -> Tensor:
        """Embeddings (B, D) of a view (B, 3, S, S), each feature with mean 0 and variance 1 over the batch; fp32."""
        embedding: Tensor = self.projector(global_pool(self.encoder(view)))
        # Half precision would lose the differences that the sums over thousands of images leave.
        wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
        normalised: Tensor = self.embedding_norm(wide)
        return normalised
