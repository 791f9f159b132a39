"""RegionCL-D: DenseCL with region swapping."""

from __future__ import annotations

from torch import Tensor

from ..heads import global_pool
from ..hyperparameters import RegionCLDConfig
from .base import CompileTarget, StepInputs
from .densecl import DenseCL
from .moco_v2 import Keys
from .region_method import CompiledMethod, RegionMixin


class RegionCLD(RegionMixin, DenseCL):
    """DenseCL with RegionCL-M's region loss on the global head and the global queue.

    L = (1 - lambda) L_global + lambda L_dense + weight * L_reg; the dense loss sees un-swapped views only.

    Source: RegionCL (arXiv 2111.12309) section 3.2, "Extension to other SSL methods"; this variant was not released.
    """

    Config = RegionCLDConfig
    config: RegionCLDConfig

    @property
    def query_views(self) -> tuple[str, ...]:  # type: ignore[override]
        """The query view of each direction."""
        return tuple(query for query, _ in self.directions)

    def compile_targets(self) -> list[CompileTarget]:
        """One graph for the global branch in place of its projector, and the heads that remain."""
        remaining = [target for target in super().compile_targets() if target is not self.projector]
        return [CompiledMethod(self, "queue_losses"), *remaining]

    def direction_loss(self, inputs: StepInputs, query_view: str, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        """Global, dense and region loss of one direction."""
        feature_map, composites = self.swapped_maps(inputs, query_view)
        paste_key = self.paste_keys(keys.key, composites)
        instance, terms = self.queue_losses(
            (self.projector,), global_pool(feature_map), composites, keys.key, paste_key, self.queue.rows
        )
        dense = self.dense_loss(feature_map, keys)
        metrics = {"ins": instance.detach(), "dense": dense.detach()}
        return self.joined(self.weigh(instance, dense, inputs), terms, metrics)
