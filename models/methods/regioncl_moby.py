"""RegionCL on MoBY: region swapping on Swin tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..losses import unit
from ..norm import stacked_views
from ..region_branch import RegionConfig, embed_with_regions, paste_sources, pool_regions, queue_terms
from .base import StepInputs
from .moby import MoBY, MoBYConfig
from .moco_v2 import global_pool
from .simsiam import VIEWS


@dataclass(frozen=True)
class RegionCLMoBYConfig(MoBYConfig):
    """Hyper-parameters of RegionCL on MoBY."""

    region: RegionConfig = field(default_factory=RegionConfig)


class RegionCLMoBY(MoBY):
    """MoBY whose canvases and pastes, pooled from the tokens after the last LayerNorm, contrast as well.

    L = sum over the two directions of L_ins + weight * (L_canvas + L_paste) / 2, each against the queue of its
    direction and the composite's other region, detached.

    Source: RegionCL (arXiv 2111.12309) Table 1, Swin-T rows; this variant was not released.
    """

    Config = RegionCLMoBYConfig
    config: RegionCLMoBYConfig

    @property
    def mixed_views(self) -> tuple[str, ...]:
        """Both views or the first, where the region loss is on."""
        return self.config.region.mixed_views(VIEWS)

    def direction_loss(
        self, inputs: StepInputs, direction: int, query_view: str, key: Tensor, queue: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Instance and region loss of one direction."""
        config, regions, partner_key = self.config, None, None
        feature_map, mixed_map = self._maps(inputs, direction, query_view)
        pooled = global_pool(feature_map)
        if mixed_map is not None:
            regions = pool_regions(mixed_map, inputs.box_cells[query_view], config.region)
            partner_key = paste_sources(key, inputs.partner[query_view], config.region)
        projection, regions = embed_with_regions(self.projector, pooled, regions, config.region.head_batching)
        query, regions = embed_with_regions(self.predictor, projection, regions, config.region.head_batching)
        regions = None if regions is None else regions.map(unit)
        instance, terms = queue_terms(unit(query), key, regions, partner_key, queue, config.temperature, config.region)
        if terms is None:
            return instance, {"ins": instance.detach()}
        return instance + config.region.weight * terms.total(), {"ins": instance.detach(), **terms.metrics()}

    def _maps(self, inputs: StepInputs, direction: int, view: str) -> tuple[Tensor, Tensor | None]:
        """Feature maps of a view and of its composites, each with drop-path masks of its own."""
        images = getattr(inputs, view)
        if view not in self.mixed_views:
            return self.encode(images, inputs, (direction,)), None
        first, second = direction, direction + len(VIEWS)
        composites = inputs.mixed[view]
        if not self.config.region.shared_forward:
            return self.encode(images, inputs, (first,)), self.encode(composites, inputs, (second,))
        # Swin has no batch norm; a ResNet in its place keeps the statistics of the two apart.
        with stacked_views(self.encoder, 2):
            feature_map, mixed_map = self.encode(torch.cat([images, composites]), inputs, (first, second)).chunk(2)
        return feature_map, mixed_map
