"""RegionCL-M's training step as the released code takes it, slow habits included: what `bench_step.py` is faster than.

Written by us from the description of that code, so that it runs beside ours on the same inputs and weights. With the
default options it does what the released code does: fp32, standard memory format, two backbone and two head passes,
full-size masks, three matrices of logits against a copied queue, an EMA launch for each parameter, and host waits for
region coordinates, queue pointer and loss. `PortOptions` removes one habit at a time, so that each can be measured.

Source: Annbless/RegionCL (OpenSelfSup) as described in its paper, arXiv 2111.12309, and read for its behaviour.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from models.methods.moco_v2 import MoCoV2
from models.momentum import ema_update
from models.ops import box_pool, queue_contrast

TEMPERATURE = 0.2


@dataclass(frozen=True)
class PortOptions:
    """What is changed from the released code; the first three together are "strong eager".

    Attributes:
        amp: autocast dtype, or None for fp32.
        channels_last: memory format of weights and images.
        fused_sgd: one launch for the optimizer (one `foreach` group on the CPU).
        box_pool: `models.ops.box_pool` instead of full-size masks.
        queue_contrast: `models.ops.queue_contrast` on stacked rows instead of three matrices of logits.
        fused_ema: one launch for the EMA.
        no_waits: region and queue pointer stay on the host, the loss is not read.
        compile_head: the projector compiled.
    """

    amp: torch.dtype | None = None
    channels_last: bool = False
    fused_sgd: bool = False
    box_pool: bool = False
    queue_contrast: bool = False
    fused_ema: bool = False
    no_waits: bool = False
    compile_head: bool = False


class PortedNetwork(nn.Module):
    """ResNet trunk and two-layer neck."""

    def __init__(self, arch: str, hidden_dim: int, dim: int) -> None:
        super().__init__()
        trunk = torchvision.models.get_model(arch, weights=None)
        width = trunk.fc.in_features
        self.trunk = nn.Sequential(*list(trunk.children())[:-2])
        self.neck = nn.Sequential(nn.Linear(width, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, dim))

    def embed(self, feature_map: Tensor) -> Tensor:
        """Average-pool, project and normalise: (B, D)."""
        pooled = F.adaptive_avg_pool2d(feature_map, 1).flatten(1)
        return F.normalize(self.neck(pooled).float(), dim=1)


class PortedStep:
    """Network pair, queue, optimizer; one call is one training step.

    Args:
        method: our RegionCL-M (or MoCo v2), whose weights and queue are copied.
        arch: torchvision's name of the trunk.
        regions: with the region branch, or MoCo v2 alone.
        lr: learning rate.
        options: what is changed from the released code.
    """

    def __init__(self, method: MoCoV2, arch: str, regions: bool, lr: float, options: PortOptions) -> None:
        self.options, self.regions = options, regions
        device = next(method.parameters()).device
        online = PortedNetwork(arch, method.config.hidden_dim, method.config.dim).to(device)
        _copy_by_order(method.encoder, online.trunk)
        _copy_by_order(method.projector, online.neck)
        if options.channels_last:
            online = online.to(memory_format=torch.channels_last)
        # Both start equal, as in the released code.
        self.online, self.momentum = online, copy.deepcopy(online)
        for parameter in self.momentum.parameters():
            parameter.requires_grad_(False)
        self.embed = torch.compile(online.embed) if options.compile_head else online.embed
        self.queue = method.queue.rows.detach().clone().T.contiguous()  # (D, K), one key a column
        self.pointer: Any = 0 if options.no_waits else torch.zeros(1, dtype=torch.int64, device=device)
        launch = {"fused": True} if options.fused_sgd and device.type == "cuda" else {"foreach": options.fused_sgd}
        self.optimizer = torch.optim.SGD(online.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, **launch)  # type: ignore[arg-type]
        self.generator = torch.Generator().manual_seed(0)
        self.loss_value: float | None = None

    def __call__(self, view1: Tensor, view2: Tensor, region: tuple[int, int, int, int] | None = None) -> Tensor:
        """Take one step; returns the detached loss.

        Args:
            view1: (B, 3, S, S) normalised fp32, the query view.
            view2: the same of the key view.
            region: top, left, height, width in feature cells; drawn anew where it is None.
        """
        loss, key = self.forward(view1, view2, region)
        late = self.options.queue_contrast  # its backward pass reads the queue again
        # The released code enqueues before the backward pass, which it can because it copies the queue.
        if not late:
            self._enqueue(key)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if late:
            self._enqueue(key)
        if not self.options.no_waits:
            self.loss_value = loss.item()
        return loss.detach()

    def forward(
        self, view1: Tensor, view2: Tensor, region: tuple[int, int, int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and keys of the step; the momentum network is updated first, as in the released code."""
        self._update_momentum()
        amp = self.options.amp
        with torch.autocast(view1.device.type, dtype=amp) if amp else contextlib.nullcontext():
            layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
            view1, view2 = (view.contiguous(memory_format=layout) for view in (view1, view2))
            query = self.embed(self.online.trunk(view1))
            pooled = self._region_features(view1, region) if self.regions else None
            key = self._keys(view2)
        compute = self._fused_loss if self.options.queue_contrast else self._loss
        return compute(query, pooled, key), key

    @torch.no_grad()
    def _update_momentum(self) -> None:
        if self.options.fused_ema:
            ema_update([(self.online, self.momentum)], 0.999)
            return
        for online, momentum in zip(self.online.parameters(), self.momentum.parameters(), strict=True):
            # One launch a parameter and a new tensor each: the habit that `fused_ema` removes.
            momentum.data = momentum.data * 0.999 + online.data * (1.0 - 0.999)

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        """Keys with the images in a random order, put back afterwards (an exchange between ranks, where there are)."""
        order = torch.randperm(len(view), generator=self.generator)
        order = order.to(view.device)
        return self.momentum.embed(self.momentum.trunk(view[order]))[torch.argsort(order)]

    def _draw_region(self, grid: int) -> tuple[int, int, int, int]:
        """Cells of a region, drawn on the CPU; tensors, as in the released code, unless waits are removed."""
        low, high = max(1, round(3 * grid / 7)), min(grid - 1, round(5 * grid / 7))
        sides = torch.randint(low, high + 1, (2,), generator=self.generator)
        origin = [int(torch.randint(0, grid - int(side) + 1, (1,), generator=self.generator)) for side in sides]
        return origin[0], origin[1], int(sides[0]), int(sides[1])

    def _region_features(self, view: Tensor, region: tuple[int, int, int, int] | None) -> tuple[Tensor, Tensor]:
        """Pooled features (B, C) of canvas and paste of the composites, in composite order."""
        stride = 32
        grid = max(view.shape[2] // stride, 1)
        top, left, height, width = region or self._draw_region(grid)
        if not self.options.no_waits:  # device tensors as slice bounds: four waits
            bounds = torch.tensor([top, left, height, width], device=view.device)
            top, left, height, width = (int(bound) for bound in bounds)
        # A copy, since the plain view is encoded as well.
        mixed = view.clone(memory_format=torch.preserve_format)
        rows = slice(top * stride, (top + height) * stride)
        columns = slice(left * stride, (left + width) * stride)
        mixed[:, :, rows, columns] = view.flip(0)[:, :, rows, columns]
        feature_map = self.online.trunk(mixed)
        if self.options.box_pool:
            box = torch.tensor([top, left, height, width]).to(view.device, non_blocking=True).expand(len(view), 4)
            pooled = box_pool(feature_map, box)
            return pooled[:, 1], pooled[:, 0]
        mask = torch.zeros_like(feature_map)
        mask[:, :, top : top + height, left : left + width] = 1.0
        paste = (feature_map * mask).sum(dim=(2, 3)) / (height * width)
        canvas = (feature_map * (1.0 - mask)).sum(dim=(2, 3)) / (grid * grid - height * width)
        return canvas, paste

    def _region_rows(self, pooled: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Unit embeddings of canvas and paste, both in source order (the pairing is a reversal)."""
        device, amp = pooled[0].device.type, self.options.amp
        with torch.autocast(device, dtype=amp) if amp else contextlib.nullcontext():
            embedded = F.normalize(self.online.neck(torch.cat(pooled)).float(), dim=1)
        canvas, paste = embedded.chunk(2)
        return canvas, paste.flip(0)

    def _loss(self, query: Tensor, pooled: tuple[Tensor, Tensor] | None, key: Tensor) -> Tensor:
        """Cross-entropy over materialised logits, each head against its own copy of the queue."""
        loss = _first_class_loss(self._logits(query, key))
        if pooled is None:
            return loss
        canvas, paste = self._region_rows(pooled)
        # The partner in the composite: canvas i shares it with paste flip(i), whose source is the partner image.
        against_paste = (canvas * paste.flip(0).detach()).sum(dim=1, keepdim=True)
        against_canvas = (paste * canvas.flip(0).detach()).sum(dim=1, keepdim=True)
        logits = torch.cat([self._logits(canvas, key, against_paste), self._logits(paste, key, against_canvas)])
        return loss + _first_class_loss(logits)

    def _logits(self, rows: Tensor, key: Tensor, extra: Tensor | None = None) -> Tensor:
        """Positive, extra and queue similarities over the temperature: (B, 1 + E + K)."""
        device, amp = rows.device.type, self.options.amp
        positive = torch.einsum("nc,nc->n", rows, key)[:, None]
        with torch.autocast(device, dtype=amp) if amp else contextlib.nullcontext():
            # Copied for each head, as in the released code: enqueueing would change what backward reads.
            negative = torch.einsum("nc,ck->nk", rows, self.queue.clone().detach())
        return torch.cat([positive, *([] if extra is None else [extra]), negative.float()], dim=1) / TEMPERATURE

    def _fused_loss(self, query: Tensor, pooled: tuple[Tensor, Tensor] | None, key: Tensor) -> Tensor:
        """The loss of `_loss`, computed from one blockwise product of all rows with the queue."""
        rows, keys, extra = [query], [key], [query.new_full((len(query), 1), -torch.inf)]
        if pooled is not None:
            canvas, paste = self._region_rows(pooled)
            rows += [canvas, paste]
            keys += [key, key]
            extra.append((canvas * paste.flip(0).detach()).sum(dim=1, keepdim=True))
            extra.append((paste * canvas.flip(0).detach()).sum(dim=1, keepdim=True))
        stacked = torch.cat(rows)
        positive = (stacked * torch.cat(keys)).sum(dim=1)
        dtype = self.options.amp or stacked.dtype
        losses = queue_contrast(stacked.to(dtype), self.queue.T, positive, TEMPERATURE, torch.cat(extra))
        means = losses.view(len(rows), -1).mean(dim=1)
        return means[0] if pooled is None else means[0] + 0.5 * (means[1] + means[2])

    @torch.no_grad()
    def _enqueue(self, key: Tensor) -> None:
        """Overwrite the oldest columns; K must be a multiple of the batch, as in the released code."""
        start = int(self.pointer)
        self.queue[:, start : start + len(key)] = key.T
        self.pointer = (start + len(key)) % self.queue.shape[1]
        if not self.options.no_waits:
            self.pointer = torch.tensor([self.pointer], device=key.device)


def _first_class_loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def _copy_by_order(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers in the order in which both modules list them; shapes must agree.

    Raises:
        ValueError: they do not.
    """
    ours, theirs = list(source.state_dict().values()), list(target.state_dict().values())
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        raise ValueError("the port has another network than the method; measure it on a ResNet")
    for left, right in zip(ours, theirs, strict=True):
        right.copy_(left)
