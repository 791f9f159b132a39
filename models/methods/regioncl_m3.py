"""RegionCL-M3: MoCo v3 with region swapping."""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import global_pool
from ..hyperparameters import RegionCLM3Config
from ..losses import batch_contrast, unit
from .base import StepInputs, StepOutput
from .moco_v3 import MoCoV3
from .region_method import RegionMixin, RegionTerms, batch_terms, source_positions
from .simsiam import VIEWS


class RegionCLM3(RegionMixin, MoCoV3):
    """MoCo v3 whose canvases and pastes contrast as well: own image's key against all keys and the other region.

    L = sum over the two directions of L_ins + weight * (L_canvas + L_paste) / 2, where L_reg of a direction is taken
    if its query view is swapped. The intra-image negative is the other region's prediction, detached.

    Source: RegionCL (arXiv 2111.12309) Table 2; this variant was not released. Instance and region features pass
    projector and predictor together by default.
    """

    Config = RegionCLM3Config
    config: RegionCLM3Config

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Instance and region losses of both directions."""
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for query_view, key_view in (VIEWS, VIEWS[::-1]):
            instance, terms = self._direction(inputs, query_view, self.global_keys(getattr(inputs, key_view)))
            loss, named = self.joined(instance, terms, {"ins": instance.detach()})
            losses.append(loss)
            for name, value in named.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        return StepOutput(torch.stack(losses).sum(), metrics)

    def _direction(self, inputs: StepInputs, view: str, keys: Tensor) -> tuple[Tensor, RegionTerms | None]:
        """Mean instance loss and region terms of one query view against the keys (G, D) of the other."""
        config, batch = self.config, inputs.view1.shape[0]
        feature_map, composites = self.swapped_maps(inputs, view)
        projection, regions = self.embed(self.projector, global_pool(feature_map), self.pool(composites))
        query, regions = self.embed(self.predictor, projection, regions)
        own = inputs.rank * batch + torch.arange(batch, device=keys.device)
        instance = batch_contrast(unit(query), keys, own, config.temperature).mean()
        if regions is None:
            return instance, None
        own, source = source_positions(inputs.partner[view], inputs.rank, config.region)
        return instance, batch_terms(regions.map(unit), keys, own, source, config.temperature, config.region)
