"""RegionCL-M: MoCo v2 with region swapping."""

from __future__ import annotations

from torch import Tensor

from ..heads import global_pool
from ..hyperparameters import RegionCLMConfig
from .base import CompileTarget, StepInputs
from .moco_v2 import Keys, MoCoV2
from .region_method import CompiledMethod, RegionMixin


class RegionCLM(RegionMixin, MoCoV2):
    """MoCo v2 whose query side also sees composites: canvas of one image, pasted region of another.

    L = L_ins + weight * (L_canvas + L_paste) / 2. Each region meets the key of its own image and the same queue; the
    composite's other region is one more negative, detached. Only instance keys enter the queue.

    Source: RegionCL (arXiv 2111.12309) sections 3.1 and 3.2, Eq. 1 to 3; Annbless/RegionCL.
    Differs: paste embeddings meet the keys of their own images for any pairing (the released code only for
    reversal); the region loss is InfoNCE at the same temperature, which the released code names but does not define.
    """

    Config = RegionCLMConfig
    config: RegionCLMConfig

    @property
    def query_views(self) -> tuple[str, ...]:  # type: ignore[override]
        """The query view of each direction."""
        return tuple(query for query, _ in self.directions)

    def compile_targets(self) -> list[CompileTarget]:
        """One graph from feature maps to losses, and the projector of the keys."""
        return [CompiledMethod(self, "queue_losses"), self.momentum_projector]

    def direction_loss(self, inputs: StepInputs, query_view: str, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        """Instance and region loss of one direction."""
        feature_map, composites = self.swapped_maps(inputs, query_view)
        paste_key = self.paste_keys(keys.key, composites)
        instance, terms = self.queue_losses(
            (self.projector,), global_pool(feature_map), composites, keys.key, paste_key, self.queue.rows
        )
        return self.joined(instance, terms, {"ins": instance.detach()})
