"""RegionCL-S: SimSiam with region swapping."""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import global_pool
from ..hyperparameters import RegionCLSConfig
from ..losses import negative_cosine
from .base import StepInputs, StepOutput
from .region_method import RegionMixin, Regions, RegionTerms, paste_sources
from .simsiam import VIEWS, SimSiam, instance_loss


class RegionCLS(RegionMixin, SimSiam):
    """SimSiam whose canvases and pastes also predict the projection of their own image's other view.

    L = L_simsiam + weight * L_reg, L_reg the mean over swapped views of (D(canvas, z) + D(paste, z)) / 2 with z the
    detached projection of the un-swapped other view. There are no negatives.

    Source: RegionCL (arXiv 2111.12309) section 3.2, "Extension to other SSL methods"; this variant was not released.
    Instance and region features pass the heads together by default, as the paper's text says.
    """

    Config = RegionCLSConfig
    config: RegionCLSConfig

    def __init__(
        self, config: RegionCLSConfig, *, arch: str, image_size: int, bn_mode: str = "sync", bn_group_size: int = 0
    ) -> None:
        if config.region.intra_negative:
            raise ValueError("regioncl-s has no negatives; pass --region.intra-negative false")
        super().__init__(config, arch=arch, image_size=image_size, bn_mode=bn_mode, bn_group_size=bn_group_size)

    def forward(self, inputs: StepInputs) -> StepOutput:
        """Symmetric instance loss and the region losses of the swapped views."""
        encoded = [self._encode(inputs, view) for view in VIEWS]
        (z1, p1, _), (z2, p2, _) = encoded
        instance = instance_loss((p1, p2), (z1, z2))
        terms = [
            (self._region_terms(regions, target, inputs.partner[view]))
            for view, (_, _, regions), target in zip(VIEWS, encoded, (z2, z1), strict=True)
            if regions is not None
        ]
        if not terms:
            return StepOutput(instance, {"ins": instance.detach()})
        region = torch.stack([term.total() for term in terms]).mean()
        return StepOutput(instance + self.config.region.weight * region, {"ins": instance.detach()} | _mean(terms))

    def _encode(self, inputs: StepInputs, view: str) -> tuple[Tensor, Tensor, Regions | None]:
        """Projection and prediction (B, D) of a view, and predictions of its composites' regions."""
        feature_map, composites = self.swapped_maps(inputs, view)
        projection, regions = self.embed(self.projector, global_pool(feature_map), self.pool(composites))
        prediction, regions = self.embed(self.predictor, projection, regions)
        return projection, prediction, regions

    def _region_terms(self, regions: Regions, target: Tensor, partner: Tensor) -> RegionTerms:
        """Mean negative cosines of regions in composite order with the projection of their own images' other view."""
        config, canvas, paste = self.config.region, None, None
        if config.use_canvas:
            assert regions.canvas is not None
            canvas = negative_cosine(regions.canvas, target).mean()
        if config.use_paste:
            assert regions.paste is not None
            paste = negative_cosine(regions.paste, paste_sources(target, partner, config)).mean()
        return RegionTerms(canvas, paste)


def _mean(terms: list[RegionTerms]) -> dict[str, Tensor]:
    """Mean of each metric over the swapped views."""
    named = [term.metrics() for term in terms]
    return {name: torch.stack([each[name] for each in named]).mean() for name in named[0]}
