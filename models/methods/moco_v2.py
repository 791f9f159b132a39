"""MoCo v2: contrast with a queue of keys from a momentum network, asymmetric or symmetric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..collectives import shuffle_rows, unshuffle_rows
from ..heads import global_pool, initialise_linear, mlp_head
from ..hyperparameters import MoCoV2Config
from ..key_queue import KeyQueue
from ..losses import info_nce, unit
from ..momentum import copy_and_freeze
from ..norm import convert_batch_norm
from ..resnet import Trunk, build_backbone
from .base import StepInputs, StepOutput
from .queue_method import QueueMethod


@dataclass
class Keys:
    """What the momentum network gives for one view, in the order of this rank's batch, without gradient.

    Attributes:
        key: (B, D) unit embeddings.
    """

    key: Tensor


@dataclass
class ExtraKeys(Keys):
    """Keys of both projectors, of the extra one in `extra`: (B, D) unit embeddings."""

    extra: Tensor


class MoCoV2(QueueMethod):
    """Momentum contrast with an MLP head and a queue.

    Per direction: q = n(g(GAP f(x_q))), k = sg n(g'(GAP f'(x_k))), L = CE([q.k, q.Q] / temperature, 0). With
    `extra_head` L is the mean of this loss and that of a second projector on the same pooled features: the control of
    LEWEL (arXiv 2203.14898) Table 6 for its second projector; how the paper joins the losses it does not say.

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a view in pixels; the network takes any.
        bn_mode: "group", "sync" or "plain" batch norm.
        bn_group_size: consecutive images that share batch-norm statistics; 0 is the rank's whole batch.

    Source: MoCo (arXiv 1911.05722) Algorithm 1; MoCo v2 (arXiv 2003.04297); facebookresearch/moco.
    Differs: batch norm by groups of the global batch instead of by device; EMA and enqueueing after the optimizer step,
    which gives the same weights as an EMA at the start of the next step.
    """

    Config = MoCoV2Config
    ema_index_offset = 1

    keys_type: type[Keys] = Keys
    """What `momentum_forward` returns, field by field."""

    config: MoCoV2Config
    encoder: Trunk

    def __init__(
        self, config: MoCoV2Config, *, arch: str, image_size: int, bn_mode: str = "group", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_backbone(arch, config.conv_init, config.zero_init_residual)
        feature_dim = self.encoder.feature_dim
        self.projector = self._new_projector(feature_dim)
        # Before the copies are made, so that the momentum networks have batch norms of the same kind.
        convert_batch_norm(self.encoder, bn_mode, bn_group_size)
        self.momentum_encoder = copy_and_freeze(self.encoder)
        self.momentum_projector = copy_and_freeze(self.projector)
        self.queue = KeyQueue(config.queue_size, config.dim)
        if config.extra_head:
            self._add_extra_head(feature_dim)

    def _new_projector(self, feature_dim: int) -> torch.nn.Sequential:
        config = self.config
        sizes = (feature_dim, config.hidden_dim, config.dim) if config.mlp else (feature_dim, config.dim)
        projector = mlp_head(sizes, biases=[True] * (len(sizes) - 1), hidden_norm=False)
        initialise_linear(projector, config.head_init)
        return projector

    def _add_extra_head(self, feature_dim: int) -> None:
        if type(self) is not MoCoV2:
            # Their losses read the first head alone: the second would be carried along untrained.
            raise ValueError("--extra-head true is for --method moco-v2 alone; leave it out")
        self.keys_type = ExtraKeys
        self.extra_projector = self._new_projector(feature_dim)
        self.momentum_extra_projector = copy_and_freeze(self.extra_projector)
        self.extra_queue = KeyQueue(self.config.queue_size, self.config.dim)

    @property
    def directions(self) -> tuple[tuple[str, str], ...]:
        """(query view, key view) of each loss term."""
        return (("view1", "view2"), ("view2", "view1")) if self.config.symmetric.enabled else (("view1", "view2"),)

    @property
    def key_directions(self) -> int:
        """One ShuffleBN permutation for each direction."""
        return len(self.directions) if self.config.shuffle_bn else 0

    def queues(self) -> dict[str, KeyQueue]:
        """Key memories by the name under which `forward` returns their keys."""
        return {"queue": self.queue} | ({"extra_queue": self.extra_queue} if self.config.extra_head else {})

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Loss of one or two directions against the queue before this step's keys."""
        share = 0.5 if len(self.directions) == 2 and self.config.symmetric.reduce == "mean" else 1.0
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        new_keys: dict[str, Tensor] = {}
        for direction, (query_view, key_view) in enumerate(self.directions):
            keys = self.encode_keys(inputs, key_view, direction)
            loss, terms = self.direction_loss(inputs, query_view, keys)
            losses.append(share * loss)
            for name, term in terms.items():
                metrics[name] = metrics[name] + share * term if name in metrics else share * term
            # Collected, not enqueued: the second direction must meet the queue that the first one met.
            if direction == 0 or self.config.symmetric.enqueue == "both":
                new_keys |= self.keys_to_enqueue(keys, key_view)
        return StepOutput(torch.stack(losses).sum(), metrics, new_keys)

    def direction_loss(self, inputs: StepInputs, query_view: str, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one direction and its detached terms."""
        pooled = global_pool(self.encoder(getattr(inputs, query_view)))
        query = unit(self.projector(pooled))  # (B, D)
        loss = info_nce(query, keys.key, self.queue.rows, self.config.temperature).mean()
        if not isinstance(keys, ExtraKeys):
            return loss, {"ins": loss.detach()}
        query = unit(self.extra_projector(pooled))
        extra = info_nce(query, keys.extra, self.extra_queue.rows, self.config.temperature).mean()
        return 0.5 * (loss + extra), {"ins": loss.detach(), "extra": extra.detach()}

    @torch.no_grad()
    def encode_keys(self, inputs: StepInputs, view: str, direction: int) -> Keys:
        """Keys of this rank's images in their own order, computed in the order of ShuffleBN."""
        images = getattr(inputs, view)
        if not self.config.shuffle_bn:
            return self.keys_type(*self.momentum_forward(images))
        # A query and its key in one batch-norm group would recognise each other by the group's statistics.
        permutation = inputs.key_permutation[direction]
        shuffled = self.momentum_forward(shuffle_rows(images, permutation))
        return self.keys_type(*(unshuffle_rows(rows, permutation) for rows in shuffled))

    def momentum_forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The fields of `Keys` for images (B, 3, S, S) in any order."""
        pooled = global_pool(self.momentum_encoder(images))
        heads = [self.momentum_projector] + ([self.momentum_extra_projector] if self.config.extra_head else [])
        return tuple(unit(head(pooled)) for head in heads)

    def keys_to_enqueue(self, keys: Keys, key_view: str) -> dict[str, Tensor]:
        """This rank's new keys as "<queue>/<view>"."""
        extra = {f"extra_queue/{key_view}": keys.extra} if isinstance(keys, ExtraKeys) else {}
        return {f"queue/{key_view}": keys.key, **extra}
