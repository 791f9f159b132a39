"""RegionCL-M: MoCo v2 with region swapping."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from ..heads import HeadInit
from ..options import option
from ..region_branch import RegionConfig, RegionHeads, RegionTerms, encode_swapped, paste_sources
from ..resnet import ConvInit
from .base import Method, StepInputs
from .moco_v2 import Keys, MoCoV2, MoCoV2Config, global_pool


@dataclass(frozen=True)
class RegionCLMConfig(MoCoV2Config):
    """Hyper-parameters of RegionCL-M."""

    conv_init: ConvInit = option("fan_in", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    head_init: HeadInit = option("fan_in", "how the projector starts: as in PyTorch or Kaiming-normal")
    region: RegionConfig = field(default_factory=RegionConfig)


class RegionCLM(MoCoV2):
    """MoCo v2 whose query side also sees composites: canvas of one image, pasted region of another.

    L = L_ins + weight * (L_canvas + L_paste) / 2. Each region meets the key of its own image and the same queue; the
    composite's other region is one more negative, detached. Only instance keys enter the queue.

    Source: RegionCL (arXiv 2111.12309) section 3.2, Eq. 2 to 6; Annbless/RegionCL.
    Differs: paste embeddings meet the keys of their own images for any pairing (the released code only for
    reversal); the region loss is InfoNCE at the same temperature, which the released code names but does not define.
    """

    Config = RegionCLMConfig
    config: RegionCLMConfig

    @property
    def mixed_views(self) -> tuple[str, ...]:
        """Query views, where the region loss is on."""
        return self.config.region.mixed_views(tuple(query for query, _ in self.directions))

    @cached_property
    def heads(self) -> RegionHeads:
        """What follows the trunks; without weights of its own, so it adds no key to the state."""
        return RegionHeads()

    def compile_targets(self) -> list[nn.Module]:
        """One graph from feature maps to losses, and the projector of the keys."""
        return [self.heads, self.momentum_projector]

    def direction_loss(self, inputs: StepInputs, query_view: str, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        """Instance and region loss of one direction."""
        feature_map, mixed_map = swapped_maps(self, inputs, query_view, self.config.region)
        instance, terms = region_contrast(
            self, self.heads, inputs, query_view, global_pool(feature_map), mixed_map, keys.key, self.config.region
        )
        if terms is None:
            return instance, {"ins": instance.detach()}
        loss = instance + self.config.region.weight * terms.total()
        return loss, {"ins": instance.detach(), **terms.metrics()}


def swapped_maps(method: Method, inputs: StepInputs, view: str, region: RegionConfig) -> tuple[Tensor, Tensor | None]:
    """Online feature maps (B, C, H, W) of a view, and of its composites where the method swaps it."""
    composites = inputs.mixed[view] if view in method.mixed_views else None
    return encode_swapped(method.encoder, getattr(inputs, view), composites, region)


def region_contrast(
    method: MoCoV2,
    heads: RegionHeads,
    inputs: StepInputs,
    query_view: str,
    pooled: Tensor,
    mixed_map: Tensor | None,
    key: Tensor,
    region: RegionConfig,
) -> tuple[Tensor, RegionTerms | None]:
    """Instance loss, and region terms where this view is swapped, of a method with a global head and queue.

    Args:
        method: its projector and queue are used.
        heads: what follows the trunks, compiled or not.
        inputs: the step's inputs.
        query_view: the view in the role of the query.
        pooled: (B, C) pooled features of that view.
        mixed_map: (B, C, H, W) features of its composites, or None.
        key: (B, D) unit keys of the same images.
        region: region options.
    """
    box_cells, partner_key = None, None
    if mixed_map is not None:
        box_cells = inputs.box_cells[query_view]
        partner_key = paste_sources(key, inputs.partner[query_view], region)
    instance, canvas, paste = heads(
        method.projector,
        pooled,
        mixed_map,
        box_cells,
        key,
        partner_key,
        method.queue.rows,
        method.config.temperature,
        region,
    )
    return instance, None if mixed_map is None else RegionTerms(canvas, paste)
