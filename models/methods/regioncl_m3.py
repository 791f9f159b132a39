"""RegionCL-M3: MoCo v3 with region swapping."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..losses import batch_contrast, unit
from ..region_branch import (
    RegionConfig,
    RegionTerms,
    batch_terms,
    embed_with_regions,
    pool_regions,
    source_positions,
)
from .base import StepInputs, StepOutput
from .moco_v2 import global_pool
from .moco_v3 import MoCoV3, MoCoV3Config
from .regioncl_m import swapped_maps
from .simsiam import VIEWS


@dataclass(frozen=True)
class RegionCLM3Config(MoCoV3Config):
    """Hyper-parameters of RegionCL-M3."""

    region: RegionConfig = field(default_factory=RegionConfig)


class RegionCLM3(MoCoV3):
    """MoCo v3 whose canvases and pastes contrast as well: own image's key against all keys and the other region.

    L = sum over the two directions of L_ins + weight * (L_canvas + L_paste) / 2, where L_reg of a direction is taken
    if its query view is swapped. The intra-image negative is the other region's prediction, detached.

    Source: RegionCL (arXiv 2111.12309) Table 1; this variant was not released. Instance and region features pass
    projector and predictor together by default.
    """

    Config = RegionCLM3Config
    config: RegionCLM3Config

    @property
    def mixed_views(self) -> tuple[str, ...]:
        """Both views or the first, where the region loss is on."""
        return self.config.region.mixed_views(VIEWS)

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Instance and region losses of both directions."""
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for query_view, key_view in (VIEWS, VIEWS[::-1]):
            instance, terms = self._direction(inputs, query_view, self.global_keys(getattr(inputs, key_view)))
            losses.append(instance if terms is None else instance + self.config.region.weight * terms.total())
            named = {"ins": instance.detach(), **({} if terms is None else terms.metrics())}
            for name, value in named.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        return StepOutput(torch.stack(losses).sum(), metrics)

    def _direction(self, inputs: StepInputs, view: str, keys: Tensor) -> tuple[Tensor, RegionTerms | None]:
        """Mean instance loss and region terms of one query view against the keys (G, D) of the other."""
        config, batch = self.config, inputs.view1.shape[0]
        feature_map, mixed_map = swapped_maps(self, inputs, view, self.config.region)
        pooled, regions = global_pool(feature_map), None
        if mixed_map is not None:
            regions = pool_regions(mixed_map, inputs.box_cells[view], config.region)
        projection, regions = embed_with_regions(self.projector, pooled, regions, config.region.head_batching)
        query, regions = embed_with_regions(self.predictor, projection, regions, config.region.head_batching)
        own = inputs.rank * batch + torch.arange(batch, device=keys.device)
        instance = batch_contrast(unit(query), keys, own, config.temperature).mean()
        if regions is None:
            return instance, None
        own, source = source_positions(inputs.partner[view], inputs.rank, config.region)
        return instance, batch_terms(regions.map(unit), keys, own, source, config.temperature, config.region)
