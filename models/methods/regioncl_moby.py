"""RegionCL on MoBY: region swapping on Swin tokens."""

from __future__ import annotations

from torch import Tensor

from ..heads import global_pool
from ..hyperparameters import RegionCLMoBYConfig
from .base import StepInputs
from .moby import MoBY
from .region_method import RegionMixin


class RegionCLMoBY(RegionMixin, MoBY):
    """MoBY whose canvases and pastes, pooled from the tokens after the last LayerNorm, contrast as well.

    L = sum over the two directions of L_ins + weight * (L_canvas + L_paste) / 2, each against the queue of its
    direction and the composite's other region, detached.

    Source: RegionCL (arXiv 2111.12309) Table 8; this variant was not released.
    """

    Config = RegionCLMoBYConfig
    config: RegionCLMoBYConfig

    def direction_loss(
        self, inputs: StepInputs, direction: int, query_view: str, key: Tensor, queue: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Instance and region loss of one direction."""
        feature_map, composites = self.swapped_maps(inputs, query_view)
        heads, paste_key = (self.projector, self.predictor), self.paste_keys(key, composites)
        instance, terms = self.queue_losses(heads, global_pool(feature_map), composites, key, paste_key, queue)
        return self.joined(instance, terms, {"ins": instance.detach()})

    def encode_online(self, images: Tensor, inputs: StepInputs, passes: tuple[str, ...]) -> Tensor:
        """Feature maps of a view or its composites, each with drop-path masks of its own."""
        order = ("view1", "view2", "mixed view1", "mixed view2")
        return self.encode(images, inputs, tuple(order.index(name) for name in passes))
