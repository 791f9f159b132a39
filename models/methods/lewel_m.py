"""LEWEL-M: MoCo v2 with aligned embeddings contrasted within the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..alignment import AlignmentHead, HeadOutput
from ..collectives import all_gather_rows, shuffle_rows
from ..hyperparameters import LewelMConfig, Negatives, SameImage
from ..key_queue import KeyQueue
from ..losses import info_nce, unit
from ..momentum import copy_and_freeze
from ..norm import convert_batch_norm
from ..resnet import build_backbone
from .base import StepInputs, StepOutput
from .lewel_b import aligned_dim, draw_random, loss_weights
from .queue_method import QueueMethod

LOGITS_PER_BLOCK = 2**24
"""Similarities held at a time, 64 MiB in fp32; a batch that needs more is worked off in blocks of images."""


def aligned_contrast(
    query: Tensor,
    key: Tensor,
    own: Tensor,
    temperature: float,
    negatives: Negatives,
    same_image: SameImage = "ignored",
) -> Tensor:
    """Contrast each aligned embedding with those of other images.

    For image i and map k the positive is key[own[i], k]; the negatives are all maps of the other images ("all_maps") or
    their map k ("same_map"). Other maps of the same image are neither, or with "all_maps" negatives on request.

    Args:
        query: (B, M, c) unit rows.
        key: (G, M, c) unit rows of the momentum network; receive no gradient.
        own: (B,) int64, the place of each query's image among the G.
        temperature: positive.
        negatives: which embeddings of the other images count.
        same_image: whether other maps of the same image are negatives; only with "all_maps".

    Returns:
        Scalar mean over B and M, fp32 or wider. Memory stays under a few times `LOGITS_PER_BLOCK`.

    Source: LEWEL (arXiv 2203.14898) section 3.3, Eq. 4; scope of the negatives as methods of this project decide.
    """
    maps = query.shape[1]
    columns = key.shape[0] * (maps if negatives == "all_maps" else 1)
    images = max(1, LOGITS_PER_BLOCK // (maps * columns))
    key = key.detach()
    settings = temperature, negatives, same_image
    if query.shape[0] <= images:
        return _block_contrast(query, key, own, *settings).sum() / (query.shape[0] * maps)
    parts = [
        checkpoint(_block_contrast, q, key, o, *settings, use_reentrant=False, preserve_rng_state=False)
        for q, o in zip(query.split(images), own.split(images), strict=True)
    ]
    return torch.cat(parts).sum() / (query.shape[0] * maps)


def _block_contrast(
    query: Tensor, key: Tensor, own: Tensor, temperature: float, negatives: Negatives, same_image: SameImage
) -> Tensor:
    """Losses (B * M,) of some images."""
    batch, maps = query.shape[:2]
    if negatives == "same_map":
        logits = torch.einsum("bkd,gkd->bkg", query, key) / temperature
        return F.cross_entropy(logits.flatten(0, 1), own.repeat_interleave(maps), reduction="none")
    logits = (query.flatten(0, 1) @ key.flatten(0, 1).T / temperature).view(batch, maps, -1, maps)  # (B, M, G, M)
    if same_image == "ignored":
        image = torch.arange(key.shape[0], device=own.device) == own[:, None]  # (B, G)
        other_map = ~torch.eye(maps, dtype=torch.bool, device=own.device)  # (M, M)
        logits = logits.masked_fill(image[:, None, :, None] & other_map[None, :, None, :], float("-inf"))
    target = own[:, None] * maps + torch.arange(maps, device=own.device)
    return F.cross_entropy(logits.flatten(0, 1).flatten(1), target.flatten(), reduction="none")


class LewelM(QueueMethod):
    """Momentum contrast of global embeddings with a queue and of aligned embeddings within the batch.

    L = (1 - beta) CE([z_g.k_g, z_g.Q] / tau, 0) + beta mean_k CE over the batch's aligned keys; view1 gives queries,
    view2 keys; no predictors.

    Args:
        config: hyper-parameters.
        arch: key of `BACKBONES`.
        image_size: side of a view in pixels; the network takes any.
        bn_mode: "group", "sync" or "plain" batch norm.
        bn_group_size: consecutive images that share batch-norm statistics; 0 is the rank's whole batch.

    Source: LEWEL (arXiv 2203.14898) section 3.3; not released, so what the paper leaves open is decided by options.
    Differs: as MoCo v2 here, batch norm by groups of the global batch and EMA after the optimizer step.
    """

    Config = LewelMConfig
    reads_positions = True
    ema_index_offset = 1

    def __init__(
        self, config: LewelMConfig, *, arch: str, image_size: int, bn_mode: str = "group", bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        if config.aligned.same_image == "negatives" and config.aligned.negatives == "same_map":
            raise ValueError("--aligned.same-image negatives are other maps; pass --aligned.negatives all_maps")
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
        # Before the copies are made, so that the momentum networks have batch norms of the same kind.
        convert_batch_norm(self, bn_mode, bn_group_size)
        self.momentum_encoder = copy_and_freeze(self.encoder)
        self.momentum_projector = copy_and_freeze(self.projector)
        if config.global_loss:
            self.queue = KeyQueue(config.queue_size, config.dim)

    @property
    def key_directions(self) -> int:
        """One ShuffleBN permutation."""
        return 1 if self.config.shuffle_bn else 0

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Weighted sum of the losses that are on; metrics are unweighted."""
        keys, own = self.encode_keys(inputs)
        feature_map = self.encoder(inputs.view1)
        query: HeadOutput = self.projector(feature_map, draw_random(self.projector, inputs, 0, feature_map))
        terms: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        new_keys: dict[str, Tensor] = {}
        if query.embedding is not None and keys.embedding is not None:
            local = keys.embedding.index_select(0, own)
            loss = info_nce(unit(query.embedding), local, self.queue.rows, self.config.temperature).mean()
            terms.append(self.global_weight * loss)
            metrics["global"] = loss.detach()
            new_keys["queue/view2"] = local
        if query.aligned is not None and keys.aligned is not None:
            loss = self._aligned_loss(query.aligned, keys.aligned, own)
            terms.append(self.aligned_weight * loss)
            metrics["aligned"] = loss.detach()
        return StepOutput(torch.stack(terms).sum(), metrics, new_keys)

    def _aligned_loss(self, query: Tensor, keys: Tensor, own: Tensor) -> Tensor:
        """Mean aligned contrast of this rank's queries (B, M, c) with the keys (G, M, c) in the wanted scope."""
        if not self.config.aligned.gather:
            keys, own = keys.index_select(0, own), torch.arange(own.shape[0], device=own.device)
        with torch.autocast(query.device.type, enabled=False):
            aligned = self.config.aligned
            return aligned_contrast(
                unit(query, dim=2), keys, own, self.config.temperature, aligned.negatives, aligned.same_image
            )

    @torch.no_grad()
    def encode_keys(self, inputs: StepInputs) -> tuple[HeadOutput, Tensor]:
        """Unit keys of all ranks' images in the order of the global batch, and this rank's places (B,) in it."""
        images = inputs.view2
        batch, device = images.shape[0], images.device
        own = torch.arange(inputs.rank * batch, (inputs.rank + 1) * batch, device=device)
        order: Tensor | None = None
        placed = own
        if self.config.shuffle_bn:
            order = inputs.key_permutation[0]
            images = shuffle_rows(images, order)
            placed = order[inputs.rank * batch : (inputs.rank + 1) * batch].to(device, non_blocking=True)
        feature_map = self.momentum_encoder(images)
        found = self.momentum_projector(feature_map, draw_random(self.projector, inputs, 1, feature_map, placed))
        back = None if order is None else torch.argsort(order).to(device, non_blocking=True)
        embedding = None if found.embedding is None else _in_global_order(unit(found.embedding), back)
        aligned = None if found.aligned is None else _in_global_order(unit(found.aligned, dim=2), back)
        return HeadOutput(embedding, aligned), own

    def queues(self) -> dict[str, KeyQueue]:
        """The memory of global keys, where there is a global loss."""
        return {"queue": self.queue} if self.config.global_loss else {}


def _in_global_order(rows: Tensor, back: Tensor | None) -> Tensor:
    """Rows (B, ...) of all ranks, un-permuted: (G, ...)."""
    gathered = all_gather_rows(rows)
    return gathered if back is None else gathered.index_select(0, back)
