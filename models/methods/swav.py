"""SwAV: each crop of an image predicts to which prototypes its two large crops were assigned; no pairs, no momentum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..collectives import world
from ..heads import global_pool, mlp_head
from ..hyperparameters import SwAVConfig
from ..key_queue import KeyQueue
from ..losses import swapped_prediction, unit
from ..norm import convert_batch_norm
from ..resnet import Trunk, build_backbone
from ..sinkhorn import balanced_assignments
from .base import StepInputs, StepOutput
from .queue_method import QueueMethod


class SwAV(QueueMethod):
    """Online clustering with swapped assignments over two large and any number of small crops.

    With z_v the unit embedding of crop v, C the unit prototypes and tau the temperature: q_1 and q_2 are the
    assignments of the large crops, Sinkhorn-Knopp of z C^T over the global batch, without gradient, and
    L = 1/2 sum_(i = 1, 2) mean_(v != i) CE(q_i, softmax(z_v C^T / tau)). With a queue the embeddings of earlier steps
    take part in the assignments, so that a small batch too has enough samples for all prototypes.

    Crops of one size pass the encoder together and all crops the projector together, as in the released code: with
    "sync" and "plain" batch norm, and with whole batches as groups, they share statistics. In groups of images each
    crop's images have statistics of their own.

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a large crop in pixels; the network takes any.
        bn_mode: "group", "sync" or "plain" batch norm; the paper synchronises.
        bn_group_size: images of a group in mode "group"; 0 is the rank's whole batch.

    Source: SwAV (arXiv 2006.09882) Eq. 1 to 5 and Algorithm 1; facebookresearch/swav main_swav.py;
    SimSiam (arXiv 2011.10566) appendix C for `projector_layers` 3.
    Differs: the prototypes are normalised after each optimizer step instead of before the next one, which gives the
    same weights. The queue is one of the global batch instead of one on each device, which holds the same embeddings.
    """

    Config = SwAVConfig

    config: SwAVConfig

    def __init__(
        self, config: SwAVConfig, *, arch: str, image_size: int, bn_mode: str = "sync", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder: Trunk = build_backbone(arch, config.conv_init, config.zero_init_residual)
        self.projector = mlp_head(
            (self.encoder.feature_dim, *[config.hidden_dim] * (config.projector_layers - 1), config.dim),
            biases=[True] * config.projector_layers,
            hidden_norm=True,
        )
        self.prototypes = nn.Linear(config.dim, config.prototypes, bias=False)
        self._normalise_prototypes()
        convert_batch_norm(self, bn_mode, bn_group_size)
        if config.queue_size:
            self.queue1 = KeyQueue(config.queue_size, config.dim)
            self.queue2 = KeyQueue(config.queue_size, config.dim)
        self.queued = 0
        """Embeddings in each queue, at most its size."""

    def queues(self) -> dict[str, KeyQueue]:
        """Embeddings of earlier steps by large crop; empty without a queue."""
        return {"queue1": self.queue1, "queue2": self.queue2} if self.config.queue_size else {}

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Loss of this rank's crops against the assignments within the global batch."""
        count = inputs.view1.shape[0]
        embedding = self.embed((inputs.view1, inputs.view2), inputs.small_views)  # (V * B, D)
        scores = self.scores(embedding).unflatten(0, (-1, count))  # (V, B, K)
        assignments = self.assignments(scores[:2].detach(), inputs)
        loss = swapped_prediction(scores, assignments, self.config.temperature)
        return StepOutput(loss, {"swapped": loss.detach()}, self._to_enqueue(embedding.detach(), inputs))

    def embed(self, large: tuple[Tensor, ...], small: tuple[Tensor, ...]) -> Tensor:
        """Unit embeddings (V * B, D), crop after crop, of crops (B, 3, S, S) each."""
        # One forward pass a size, because batch norm takes its statistics over all crops of a pass.
        pooled = [global_pool(self.encoder(torch.cat(crops))) for crops in (large, small) if crops]
        return unit(self.projector(torch.cat(pooled)))

    def scores(self, embedding: Tensor) -> Tensor:
        """Similarities (N, K) of unit rows (N, D) to the prototypes, in fp32 or wider."""
        # Not in autocast's dtype: divided by epsilon, the rounding of bf16 would move an assignment by some percent.
        with torch.autocast(embedding.device.type, enabled=False):
            return F.linear(embedding, self.prototypes.weight)

    @torch.no_grad()
    def assignments(self, scores: Tensor, inputs: StepInputs) -> Tensor:
        """Assignments (2, B, K) of the large crops from their scores (2, B, K)."""
        count = scores.shape[1]
        # A queue that is not full yet would put random rows among the samples.
        if self.config.queue_size and self.queued == self.config.queue_size:
            # Each rank takes a part of the rows, which all ranks hold: together they count once.
            rows = [queue.rows[inputs.rank :: inputs.world_size] for queue in self.queues().values()]
            scores = torch.cat([self.scores(torch.stack(rows)), scores], dim=1)
        found = balanced_assignments(scores, self.config.sinkhorn_epsilon, self.config.sinkhorn_iterations)
        return found[:, -count:]

    def _to_enqueue(self, embedding: Tensor, inputs: StepInputs) -> dict[str, Tensor]:
        """This rank's embeddings as "<queue>/<view>", once the queues have started."""
        if not self.config.queue_size or inputs.epoch < self.config.queue_start_epoch:
            return {}
        count = inputs.view1.shape[0]
        return {"queue1/view1": embedding[:count], "queue2/view2": embedding[count : 2 * count]}

    def before_update(self, step: int) -> None:
        """Leave the prototypes as they are in the first steps, where embeddings still say little."""
        if step < self.config.freeze_prototypes_steps:
            # None, not zeros: no decay and no momentum either, as in the released code.
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, output: StepOutput, ema_momentum: float) -> None:
        """Enqueue the embeddings of all ranks and put the prototypes back to unit length; nothing is averaged."""
        super().after_step(output, ema_momentum)
        if output.keys:
            total = len(output.keys["queue1/view1"]) * world()
            self.queued = min(self.queued + total, self.config.queue_size)
        self._normalise_prototypes()

    @torch.no_grad()
    def _normalise_prototypes(self) -> None:
        weight = self.prototypes.weight
        weight.copy_(F.normalize(weight, dim=1))

    def host_state(self) -> dict[str, Any]:
        """Write positions of the queues, and how many embeddings they hold."""
        return super().host_state() | {"queued": self.queued}

    def load_host_state(self, state: dict[str, Any]) -> None:
        """Inverse of `host_state`."""
        super().load_host_state(state)
        self.queued = state["queued"]
