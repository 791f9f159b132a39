"""PixPro: each cell's embedding, smoothed over cells like it, predicts the other view's cells at the same place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..cell_places import near_pairs
from ..heads import dense_head
from ..hyperparameters import PixProConfig
from ..losses import pair_consistency, unit
from ..momentum import copy_and_freeze, ema_update
from ..norm import convert_batch_norm
from ..resnet import Trunk, build_backbone
from .base import Method, StepInputs, StepOutput


class Propagation(nn.Module):
    """The pixel propagation module: every cell becomes a mean of all cells, weighed by their likeness to it.

    y_i = sum_j max(cos(x_i, x_j), 0)^gamma g(x_j), with g of `transform_layers` 1x1 convolutions.

    Args:
        config: `dim`, `sharpness`, `transform_layers` and `unit_values`.

    Source: PixPro (arXiv 2011.10043) Eq. 3 and 4; zdaxie/PixPro `featprop`, which brings g(x_j) to unit length.
    """

    def __init__(self, config: PixProConfig) -> None:
        super().__init__()
        self.sharpness, self.unit_values = config.sharpness, config.unit_values
        self.transform: nn.Module = nn.Identity()
        if config.transform_layers == 1:
            self.transform = nn.Conv2d(config.dim, config.dim, kernel_size=1)
        elif config.transform_layers == 2:
            self.transform = dense_head(config.dim, config.dim, config.dim, hidden_norm=True)

    def forward(self, x: Tensor) -> Tensor:
        """Smoothed embeddings (B, D, H, W) of x (B, D, H, W), fp32 or wider."""
        values = self.transform(x)
        with torch.autocast(x.device.type, enabled=False):
            directions = unit(x)
            values = unit(values) if self.unit_values else values.to(directions.dtype)
            weights = self._weights(directions.flatten(2))
            # The weights are symmetric, so rows and columns may change places.
            return torch.bmm(values.flatten(2), weights).unflatten(2, x.shape[2:])

    def _weights(self, directions: Tensor) -> Tensor:
        """(B, S, S) weight of each cell for each other, from unit embeddings (B, D, S)."""
        likeness = torch.bmm(directions.mT, directions).clamp(min=0)
        if self.sharpness < 1:
            # The slope of such a power is infinite at 0; the released code adds the same.
            likeness = likeness + 1e-6
        return likeness**self.sharpness


class PixPro(Method):
    """Consistency of pairs of cells that lie at the same place of the image, without negatives.

    With x = g(f(view)) the embeddings of a view's cells, y their propagation and x' the momentum network's embeddings
    of the other view: L = c mean over images of the mean over pairs (i, j) of -cos(y_i, sg x'_j), summed over both
    directions, where cells make a pair whose centres are nearer in the image than `reach` diagonals of a cell, and
    c = 2 is the released code's factor. An image whose two crops do not meet adds 0.

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a view in pixels; the network takes any.
        bn_mode: "group", "sync" or "plain" batch norm; the released code synchronises.
        bn_group_size: images of a group in mode "group"; 0 is the rank's whole batch.

    Source: PixPro (arXiv 2011.10043) section 3; zdaxie/PixPro contrast/models/PixPro.py and
    tools/pixpro_base_r50_*ep.sh. Where the two differ the code's form is the default: a hidden layer of 4096 channels,
    propagated values of unit length, distances in shares of the image's sides, twice the loss.
    Differs: the mean over an image's pairs is exact, where the code adds 1e-6 to their number. Of the paper's further
    losses, that of whole images (L = L_PixPro + L_inst) and PixContrast are not built.
    """

    Config = PixProConfig
    ema_index_offset = 1
    reads_positions = True
    reads_crop_boxes = True

    config: PixProConfig

    def __init__(
        self, config: PixProConfig, *, arch: str, image_size: int, bn_mode: str = "sync", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder: Trunk = build_backbone(arch, config.conv_init, config.zero_init_residual)
        self.projector = dense_head(self.encoder.feature_dim, config.hidden_dim, config.dim, hidden_norm=True)
        self.propagation = Propagation(config)
        # Before the copies are made, so that the momentum networks have batch norms of the same kind.
        convert_batch_norm(self, bn_mode, bn_group_size)
        self.momentum_encoder = copy_and_freeze(self.encoder)
        self.momentum_projector = copy_and_freeze(self.projector)

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Sum over both directions."""
        views = (inputs.view1, inputs.view2)
        smoothed = [self.propagation(self.projector(self.encoder(view))) for view in views]
        targets = [self.target(view) for view in views]
        pairs = self.pairs(inputs, smoothed[0])
        first = self.config.loss_scale * pair_consistency(smoothed[0], targets[1], pairs).mean()
        second = self.config.loss_scale * pair_consistency(smoothed[1], targets[0], pairs.mT).mean()
        return StepOutput(first + second, {"view1": first.detach(), "view2": second.detach()})

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """Momentum embeddings (B, D, H, W) of images (B, 3, S, S)."""
        projected: Tensor = self.momentum_projector(self.momentum_encoder(images))
        return projected

    def pairs(self, inputs: StepInputs, embedding: Tensor) -> Tensor:
        """(B, S, S) bool, which cells of the first view lie near which of the second; `embedding` has their grid."""
        rows, columns = embedding.shape[2:]
        boxes = inputs.crop_boxes
        return near_pairs(boxes["view1"], boxes["view2"], (rows, columns), self.config.reach, self.config.distance)

    @torch.no_grad()
    def after_step(self, output: StepOutput, ema_momentum: float) -> None:
        """Update the momentum network."""
        ema_update(self.momentum_pairs(), ema_momentum)
