"""LEWEL-B: BYOL with aligned embeddings beside the global one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..alignment import AlignmentHead, ColumnMlp, HeadOutput, random_scores
from ..hyperparameters import LewelBConfig
from ..losses import byol_regression
from ..norm import convert_batch_norm
from ..resnet import build_backbone
from .base import StepInputs, StepOutput
from .regression_method import RegressionMethod


def loss_weights(beta: float, global_loss: bool, aligned_loss: bool) -> tuple[float, float]:
    """Weights of the global and the aligned loss: (1 - beta, beta), or 1 for the only one that is on.

    Raises:
        ValueError: beta outside 0..1.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"--beta {beta} is outside 0..1")
    if not (global_loss and aligned_loss):
        return (1.0, 0.0) if global_loss else (0.0, 1.0)
    return 1.0 - beta, beta


def aligned_dim(c: int, dim: int) -> int:
    """Width of an aligned embedding: `c`, or that of the projector's output where it is 0.

    Raises:
        ValueError: a negative width.

    Source: LEWEL (arXiv 2203.14898) section 3.3, "d = c by default"; its code has one width for both.
    """
    if c < 0:
        raise ValueError(f"--c {c} must not be negative; 0 follows --dim")
    return c or dim


class LewelB(RegressionMethod):
    """Regression of global and aligned embeddings of the other view, in both directions.

    L = sum over directions v -> w of (1 - beta) nmse(q(z_g^v), z_g'^w) + beta nmse(s(z_a^v), z_a'^w),
    nmse(p, t) = 2 - 2 mean cos(p, t); aligned embedding k of one view is matched with number k of the other.

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a view in pixels; the network takes any.
        bn_mode: "group" or "plain" with `momentum_norm` ema (EMAN), "sync" with own.
        bn_group_size: consecutive images that share batch-norm statistics; 0 is the rank's whole batch.

    Source: LEWEL (arXiv 2203.14898) section 3.3; LayneH/LEWEL for head, initialisation and EMAN.
    Differs: `beta` weights the aligned loss as in the paper; the code's flag weights the global one (equal at 0.5).
    """

    Config = LewelBConfig
    reads_positions = True
    projector: AlignmentHead

    def __init__(
        self, config: LewelBConfig, *, arch: str, image_size: int, bn_mode: str = "group", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.global_weight, self.aligned_weight = loss_weights(config.beta, config.global_loss, config.aligned_loss)
        self.encoder = build_backbone(arch, config.conv_init, config.zero_init_residual)
        self.projector = AlignmentHead(
            self.encoder.feature_dim,
            config.hidden_dim,
            config.dim,
            aligned_dim(config.c, config.dim),
            config.h,
            coupled=config.coupled,
            grouping=config.grouping,
            align=config.align,
            global_loss=config.global_loss,
            aligned_loss=config.aligned_loss,
        )
        if config.global_loss:
            self.predictor = ColumnMlp(config.dim, config.hidden_dim, config.dim)
        if config.aligned_loss:
            width = aligned_dim(config.c, config.dim)
            self.aligned_predictor = ColumnMlp(width, config.hidden_dim, width)
        # Before the copies are made, so that the momentum networks have batch norms of the same kind.
        convert_batch_norm(self, bn_mode, bn_group_size)
        self.copy_online_networks()

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Sum of both directions; metrics are the unweighted sums of each kind."""
        views = (inputs.view1, inputs.view2)
        online, targets = [], []
        for number, view in enumerate(views):
            feature_map = self.encoder(view)
            random = draw_random(self.projector, inputs, number, feature_map)
            online.append(self.projector(feature_map, random))
            with torch.no_grad():
                targets.append(self.momentum_projector(self.momentum_encoder(view), random))
        losses = [self._direction(online[0], targets[1]), self._direction(online[1], targets[0])]
        metrics = {name: torch.stack([terms[name].detach() for terms in losses]).sum() for name in losses[0]}
        weights = {"global": self.global_weight, "aligned": self.aligned_weight}
        loss = torch.stack([weights[name] * terms[name] for terms in losses for name in terms]).sum()
        return StepOutput(loss, metrics)

    def _direction(self, online: HeadOutput, target: HeadOutput) -> dict[str, Tensor]:
        """Unweighted losses of one view's online embeddings against the other's momentum embeddings."""
        terms: dict[str, Tensor] = {}
        if online.embedding is not None and target.embedding is not None:
            predicted = self.predictor(online.embedding.unsqueeze(1)).squeeze(1)
            terms["global"] = byol_regression(predicted, target.embedding).mean()
        if online.aligned is not None and target.aligned is not None:
            predicted = self.aligned_predictor(online.aligned)
            terms["aligned"] = byol_regression(predicted.flatten(0, 1), target.aligned.flatten(0, 1)).mean()
        return terms


def draw_random(
    head: AlignmentHead, inputs: StepInputs, view: int, feature_map: Tensor, image_index: Tensor | None = None
) -> Tensor | None:
    """Scores of random maps for a feature map (B, D, H, W); None where the maps are learned.

    Args:
        head: tells whether and how many.
        inputs: seed, step and rank.
        view: 0 or 1; both networks see the same maps of a view.
        feature_map: whose positions are scored.
        image_index: (B,) int64 place of each image in the global batch; by default this rank's own.
    """
    if not head.random_maps:
        return None
    batch = feature_map.shape[0]
    if image_index is None:
        image_index = torch.arange(inputs.rank * batch, (inputs.rank + 1) * batch, device=feature_map.device)
    positions = feature_map.shape[2] * feature_map.shape[3]
    return random_scores(inputs.seed, inputs.step, view, image_index, positions, head.dim)
