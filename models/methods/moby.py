"""MoBY: Swin-T, projector and predictor, one key queue for each view, drop-path on the online side only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import global_pool, mlp_head
from ..hyperparameters import MoBYConfig
from ..key_queue import KeyQueue
from ..losses import info_nce, unit
from ..momentum import copy_and_freeze
from ..norm import convert_batch_norm
from ..resnet import Trunk, build_backbone
from ..swin import SwinTrunk, draw_branch_scale
from .base import StepInputs, StepOutput
from .queue_method import QueueMethod
from .simsiam import VIEWS


class MoBY(QueueMethod):
    """L = CE([p1.k2, p1.Q2] / tau) + CE([p2.k1, p2.Q1] / tau); Q1, Q2 hold keys of view 1 and of view 2.

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a view in pixels; the network takes any.
        bn_mode: "group", "sync" or "plain" batch norm in the heads; the paper synchronises.
        bn_group_size: images of a group in mode "group"; 0 is the rank's whole batch.

    Source: MoBY (arXiv 2105.04553) Algorithm 1; SwinTransformer/Transformer-SSL.
    Differs: drop-path masks are drawn from (seed, step, pass) for the global batch; windows at sizes that 7 does not
    divide are padded as torchvision does.
    """

    Config = MoBYConfig
    ema_index_offset = 1

    config: MoBYConfig

    def __init__(
        self, config: MoBYConfig, *, arch: str, image_size: int, bn_mode: str = "sync", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder: Trunk = build_backbone(arch, config.conv_init, config.zero_init_residual)
        if config.drop_path and not isinstance(self.encoder, SwinTrunk):
            raise ValueError(f"{arch} has no drop-path; pass --drop-path 0 or --arch swin-t")
        sizes = (config.hidden_dim, config.dim)
        self.projector = mlp_head((self.encoder.feature_dim, *sizes), biases=(True, True), hidden_norm=True)
        self.predictor = mlp_head((config.dim, *sizes), biases=(True, True), hidden_norm=True)
        # Before the copies are made, so that the momentum networks have batch norms of the same kind.
        convert_batch_norm(self, bn_mode, bn_group_size)
        self.momentum_encoder = copy_and_freeze(self.encoder)
        self.momentum_projector = copy_and_freeze(self.projector)
        self.queue1 = KeyQueue(config.queue_size, config.dim)
        self.queue2 = KeyQueue(config.queue_size, config.dim)

    def queues(self) -> dict[str, KeyQueue]:
        """Keys of view 1 and of view 2."""
        return {"queue1": self.queue1, "queue2": self.queue2}

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Both directions, each against the queue of the other view's earlier keys."""
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        new_keys: dict[str, Tensor] = {}
        for direction, (query_view, key_view) in enumerate((VIEWS, VIEWS[::-1])):
            name = "queue" + key_view.removeprefix("view")
            key = self.encode_key(getattr(inputs, key_view))
            loss, terms = self.direction_loss(inputs, direction, query_view, key, self.queues()[name].rows)
            losses.append(loss)
            for term, value in terms.items():
                metrics[term] = metrics[term] + value if term in metrics else value
            new_keys[f"{name}/{key_view}"] = key
        return StepOutput(torch.stack(losses).sum(), metrics, new_keys)

    def direction_loss(
        self, inputs: StepInputs, direction: int, query_view: str, key: Tensor, queue: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one direction and its detached terms."""
        feature_map = self.encode(getattr(inputs, query_view), inputs, (direction,))
        query = unit(self.predictor(self.projector(global_pool(feature_map))))
        loss = info_nce(query, key, queue, self.config.temperature).mean()
        return loss, {"ins": loss.detach()}

    def encode(self, images: Tensor, inputs: StepInputs, passes: tuple[int, ...]) -> Tensor:
        """Online map of P stacked batches (P * B, 3, S, S), each with the drop-path masks of its pass of the step."""
        if not (self.training and self.config.drop_path):
            feature_map: Tensor = self.encoder(images)
            return feature_map
        assert isinstance(self.encoder, SwinTrunk)
        batch = images.shape[0] // len(passes)
        rows, total = slice(inputs.rank * batch, (inputs.rank + 1) * batch), inputs.world_size * batch
        blocks, rate = self.encoder.num_blocks, self.config.drop_path
        drawn = [draw_branch_scale(blocks, rate, inputs.seed, inputs.step, tag, rows, total) for tag in passes]
        scale = torch.cat(drawn, dim=1)
        if images.is_cuda:
            scale = scale.pin_memory()
        return self.encoder(images, scale.to(images.device, non_blocking=True))

    @torch.no_grad()
    def encode_key(self, images: Tensor) -> Tensor:
        """Unit keys (B, D) of the momentum network, without drop-path."""
        return unit(self.momentum_projector(global_pool(self.momentum_encoder(images))))
