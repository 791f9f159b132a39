"""PixPro: each cell's embedding, smoothed over cells like it, predicts the other view's cells at the same place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..cell_places import near_pairs
from ..heads import dense_head, global_pool
from ..hyperparameters import PixProConfig
from ..losses import negative_cosine, pair_consistency, unit
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

    With `instance_weight` w a second branch compares whole images: L + w c L_inst, where L_inst is the sum over both
    directions of -cos(u, sg v'), u the mean over cells of predictor(projector(f(view))) and v' that of the momentum
    networks' projector(f(other view)).

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a view in pixels; the network takes any.
        bn_mode: "group", "sync" or "plain" batch norm; the released code synchronises.
        bn_group_size: images of a group in mode "group"; 0 is the rank's whole batch.

    Source: PixPro (arXiv 2011.10043) section 3; zdaxie/PixPro contrast/models/PixPro.py and
    tools/pixpro_base_r50_*ep.sh. Where the two differ the code's form is the default: a hidden layer of 4096 channels,
    propagated values of unit length, distances in shares of the image's sides, twice the loss.
    Differs: the mean over an image's pairs is exact, where the code adds 1e-6 to their number. The paper's contrastive
    form (Eq. 2, PixContrast) is not built. Of the published backbones only those of the FPN rows 41.3 and 41.4 have the
    second branch; their weights and its weight w were not released.
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
        dims = (config.hidden_dim, config.dim)
        if config.instance_weight:
            self.instance_projector = dense_head(self.encoder.feature_dim, *dims, hidden_norm=True)
            self.instance_predictor = dense_head(config.dim, *dims, hidden_norm=True)
        # Before the copies are made, so that the momentum networks have batch norms of the same kind.
        convert_batch_norm(self, bn_mode, bn_group_size)
        self.momentum_encoder = copy_and_freeze(self.encoder)
        self.momentum_projector = copy_and_freeze(self.projector)
        if config.instance_weight:
            self.momentum_instance_projector = copy_and_freeze(self.instance_projector)

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Sum over both directions, and over both branches where there are two."""
        views = (inputs.view1, inputs.view2)
        maps = [self.encoder(view) for view in views]
        target_maps = [self.target(view) for view in views]
        first, second = self.cell_losses(inputs, maps, target_maps)
        loss, parts = first + second, {"view1": first.detach(), "view2": second.detach()}
        if self.config.instance_weight:
            instance = self.instance_loss(maps, target_maps)
            loss, parts["instance"] = loss + self.config.instance_weight * instance, instance.detach()
        return StepOutput(loss, parts)

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """Momentum features (B, C, H, W) of images (B, 3, S, S)."""
        feature_map: Tensor = self.momentum_encoder(images)
        return feature_map

    def cell_losses(
        self, inputs: StepInputs, maps: Sequence[Tensor], target_maps: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The two directions' losses of pairs of cells.

        Args:
            inputs: whose crop boxes tell where the cells lie.
            maps: features (B, C, H, W) of the first and the second view.
            target_maps: the momentum network's features of both.
        """
        smoothed = [self.propagation(self.projector(each)) for each in maps]
        with torch.no_grad():
            targets = [self.momentum_projector(each) for each in target_maps]
        pairs = self.pairs(inputs, smoothed[0])
        first = self.config.loss_scale * pair_consistency(smoothed[0], targets[1], pairs).mean()
        second = self.config.loss_scale * pair_consistency(smoothed[1], targets[0], pairs.mT).mean()
        return first, second

    def instance_loss(self, maps: Sequence[Tensor], target_maps: Sequence[Tensor]) -> Tensor:
        """The sum of both directions' losses of whole images, from features as in `cell_losses`."""
        # Cells are averaged behind the heads and not before them, as in the released code.
        online = [global_pool(self.instance_predictor(self.instance_projector(each))) for each in maps]
        with torch.no_grad():
            targets = [global_pool(self.momentum_instance_projector(each)) for each in target_maps]
        both = negative_cosine(online[0], targets[1]) + negative_cosine(online[1], targets[0])
        return self.config.loss_scale * both.mean()

    def pairs(self, inputs: StepInputs, embedding: Tensor) -> Tensor:
        """(B, S, S) bool, which cells of the first view lie near which of the second; `embedding` has their grid."""
        rows, columns = embedding.shape[2:]
        boxes = inputs.crop_boxes
        return near_pairs(boxes["view1"], boxes["view2"], (rows, columns), self.config.reach, self.config.distance)

    @torch.no_grad()
    def after_step(self, output: StepOutput, ema_momentum: float) -> None:
        """Update the momentum network."""
        ema_update(self.momentum_pairs(), ema_momentum)
