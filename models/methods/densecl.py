"""DenseCL: MoCo v2 with a second contrast between matched positions of the two feature maps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..heads import dense_head, global_pool
from ..hyperparameters import DenseCLConfig
from ..key_queue import KeyQueue
from ..losses import best_matches, info_nce, unit
from ..momentum import copy_and_freeze
from .base import StepInputs
from .moco_v2 import Keys, MoCoV2


@dataclass
class DenseKeys(Keys):
    """What the momentum network gives for one view, without gradient.

    Attributes:
        dense_pooled: (B, D) unit mean of the dense embeddings over positions: what the dense queue holds.
        dense: (B, D, H, W) unit embeddings of each position.
        feature_map: (B, C, H, W) backbone features, for matching.
    """

    dense_pooled: Tensor
    dense: Tensor
    feature_map: Tensor


class DenseCL(MoCoV2):
    """MoCo v2 with a dense head: each position of the query contrasts with the matching position of the key.

    L = (1 - lambda) L_global + lambda L_dense. The match maximises the similarity of backbone features; the dense
    negatives are pooled dense embeddings of earlier images.

    Source: DenseCL (arXiv 2011.09157) section 3; WXinlong/DenseCL.
    """

    Config = DenseCLConfig
    reads_positions = True
    keys_type = DenseKeys
    config: DenseCLConfig

    def __init__(
        self, config: DenseCLConfig, *, arch: str, image_size: int, bn_mode: str = "group", bn_group_size: int = 0
    ) -> None:
        super().__init__(config, arch=arch, image_size=image_size, bn_mode=bn_mode, bn_group_size=bn_group_size)
        self.dense_projector = dense_head(self.encoder.feature_dim, config.hidden_dim, config.dim)
        self.momentum_dense_projector = copy_and_freeze(self.dense_projector)
        self.dense_queue = KeyQueue(config.queue_size, config.dim)

    def queues(self) -> dict[str, KeyQueue]:
        """The global and the dense key memory."""
        return {"queue": self.queue, "dense_queue": self.dense_queue}

    def momentum_forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The fields of `DenseKeys` for images (B, 3, S, S) in any order."""
        feature_map = self.momentum_encoder(images)
        key = unit(self.momentum_projector(global_pool(feature_map)))
        dense = self.momentum_dense_projector(feature_map)
        return key, unit(global_pool(dense)), unit(dense), feature_map

    def keys_to_enqueue(self, keys: Keys, key_view: str) -> dict[str, Tensor]:
        """One global and one dense key for each image."""
        assert isinstance(keys, DenseKeys)
        return {**super().keys_to_enqueue(keys, key_view), f"dense_queue/{key_view}": keys.dense_pooled}

    def direction_loss(self, inputs: StepInputs, query_view: str, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        """Global and dense loss of one direction."""
        feature_map = self.encoder(getattr(inputs, query_view))
        query = unit(self.projector(global_pool(feature_map)))
        instance = info_nce(query, keys.key, self.queue.rows, self.config.temperature).mean()
        dense = self.dense_loss(feature_map, keys)
        return self.weigh(instance, dense, inputs), {"ins": instance.detach(), "dense": dense.detach()}

    def dense_loss(self, feature_map: Tensor, keys: Keys) -> Tensor:
        """Mean contrastive loss over the positions of the query's map (B, C, H, W)."""
        assert isinstance(keys, DenseKeys)
        dense = unit(self.dense_projector(feature_map)).flatten(2)  # (B, D, S)
        match = best_matches(feature_map, keys.feature_map)  # (B, S)
        positive = keys.dense.flatten(2).gather(2, match[:, None, :].expand(-1, dense.shape[1], -1))  # (B, D, S)
        return info_nce(_rows(dense), _rows(positive), self.dense_queue.rows, self.config.temperature).mean()

    def weigh(self, instance: Tensor, dense: Tensor, inputs: StepInputs) -> Tensor:
        """(1 - lambda) * instance + lambda * dense, lambda 0 during warm-up."""
        warmup = self.config.dense_warmup_steps
        warming = warmup > 0 and inputs.step // inputs.micro_batches < warmup
        share = 0.0 if warming else self.config.dense_weight
        return (1.0 - share) * instance + share * dense


def _rows(dense: Tensor) -> Tensor:
    """(B, D, S) -> (B * S, D)."""
    return dense.mT.reshape(-1, dense.shape[1])
