"""RegionCL-D: DenseCL with region swapping."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from ..region_branch import RegionConfig, RegionHeads
from .base import StepInputs
from .densecl import DenseCL, DenseCLConfig
from .moco_v2 import Keys, global_pool
from .regioncl_m import region_contrast, swapped_maps


@dataclass(frozen=True)
class RegionCLDConfig(DenseCLConfig):
    """Hyper-parameters of RegionCL-D."""

    region: RegionConfig = field(default_factory=RegionConfig)


class RegionCLD(DenseCL):
    """DenseCL with RegionCL-M's region loss on the global head and the global queue.

    L = (1 - lambda) L_global + lambda L_dense + weight * L_reg; the dense loss sees un-swapped views only.

    Source: RegionCL (arXiv 2111.12309) section 3.3; this variant was not released.
    """

    Config = RegionCLDConfig
    config: RegionCLDConfig

    @property
    def mixed_views(self) -> tuple[str, ...]:
        """Query views, where the region loss is on."""
        return self.config.region.mixed_views(tuple(query for query, _ in self.directions))

    @cached_property
    def heads(self) -> RegionHeads:
        """What follows the trunks on the global branch; it has no weights of its own."""
        return RegionHeads()

    def compile_targets(self) -> list[nn.Module]:
        """One graph for the global branch in place of its projector, and the heads that remain."""
        return [self.heads, *(target for target in super().compile_targets() if target is not self.projector)]

    def direction_loss(self, inputs: StepInputs, query_view: str, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        """Global, dense and region loss of one direction."""
        feature_map, mixed_map = swapped_maps(self, inputs, query_view, self.config.region)
        instance, terms = region_contrast(
            self, self.heads, inputs, query_view, global_pool(feature_map), mixed_map, keys.key, self.config.region
        )
        dense = self.dense_loss(feature_map, keys)
        loss = self.weigh(instance, dense, inputs)
        metrics = {"ins": instance.detach(), "dense": dense.detach()}
        if terms is None:
            return loss, metrics
        return loss + self.config.region.weight * terms.total(), metrics | terms.metrics()
