"""What the five RegionCL methods share: region options, rows of paste and canvas, and the arithmetic of their losses.

A method inherits `RegionMixin` and calls `swapped_maps`, then `queue_losses` (RegionCL-M, -D, MoBY) or `embed` and the
loss that fits it (RegionCL-M3, -S). The arithmetic is in `queue_terms` and `batch_terms` of this file.

All region embeddings are kept in composite order: row i comes from the composite whose canvas is image i and whose
pasted region is from image partner[i]. Its canvas row therefore meets key i, its paste row key partner[i], and the two
rows are each other's intra-image negative. That is the paper's loss with the sum over images written as a sum over
composites: with partner = pi, paste embedding p_j of image j is the paste row of composite pi^-1(j).

Source: RegionCL (Xu et al., ECCV 2022, arXiv 2111.12309) section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives import all_gather_rows
from ..hyperparameters import RegionConfig
from ..losses import batch_contrast, info_nce, row_dots, unit
from ..norm import GroupBatchNorm, stacked_views
from ..ops.box_pool import box_pool
from .base import Method, StepInputs

PASTE, CANVAS = 0, 1  # rows of box_pool's result


@dataclass
class Regions:
    """Canvas and paste of one batch of composites, in composite order: features or embeddings, (B, C) each.

    Attributes:
        canvas: row i belongs to image i; None where no loss needs it.
        paste: row i belongs to image partner[i]; None where no loss needs it.
    """

    canvas: Tensor | None
    paste: Tensor | None

    def present(self) -> list[Tensor]:
        """What there is, canvas first."""
        return [rows for rows in (self.canvas, self.paste) if rows is not None]

    def replaced(self, rows: list[Tensor]) -> Regions:
        """Regions with other rows in place of those that there are, canvas first."""
        remaining = iter(rows)
        return Regions(*(None if old is None else next(remaining) for old in (self.canvas, self.paste)))

    def map(self, function: Callable[[Tensor], Tensor]) -> Regions:
        """`function` applied to what there is."""
        return self.replaced([function(rows) for rows in self.present()])


def pool_regions(feature_map: Tensor, box_cells: Tensor, config: RegionConfig) -> Regions:
    """Mean feature of each composite's paste and canvas.

    Args:
        feature_map: (B, C, H, W) of the composites.
        box_cells: (B, 4) int64 top, left, height, width of the paste in cells.
        config: which of the two are needed.

    Returns:
        (B, C) each, in composite order.
    """
    pooled = box_pool(feature_map, box_cells)  # (B, 3, C)
    return Regions(
        canvas=pooled[:, CANVAS] if config.needs_canvas else None,
        paste=pooled[:, PASTE] if config.needs_paste else None,
    )


@contextmanager
def _rows_per_image(head: nn.Module, count: int) -> Iterator[None]:
    """Within the block each image has `count` adjacent rows, which batch norm by groups of images keeps together."""
    grouped = [norm for norm in head.modules() if isinstance(norm, GroupBatchNorm)]
    sizes = [norm.group_size for norm in grouped]
    for norm, size in zip(grouped, sizes, strict=True):
        norm.group_size = size * count
    try:
        yield
    finally:
        for norm, size in zip(grouped, sizes, strict=True):
            norm.group_size = size


def embed_with_regions(
    head: nn.Module, instance: Tensor, regions: Regions | None, batching: str
) -> tuple[Tensor, Regions | None]:
    """Pass instance rows (B, C) and region rows through a head, together or apart.

    Args:
        head: rows -> rows; with batch norm inside, what passes together shares statistics.
        instance: (B, C).
        regions: (B, C) each, or None.
        batching: "joint": one call on all rows; "separate": one call for the instance rows, one for the region rows.

    Returns:
        Embedded instance rows and regions.
    """
    rows = [] if regions is None else regions.present()
    if regions is None or not rows:
        return head(instance), None
    if batching == "joint":
        count = len(rows) + 1
        # Rows of one image side by side, so that groups of images stay together in one batch-norm group.
        with _rows_per_image(head, count):
            first, *rest = head(torch.stack([instance, *rows], dim=1).flatten(0, 1)).unflatten(0, (-1, count)).unbind(1)
    else:
        first = head(instance)
        with _rows_per_image(head, len(rows)):
            rest = list(head(torch.stack(rows, dim=1).flatten(0, 1)).unflatten(0, (-1, len(rows))).unbind(1))
    return first, regions.replaced(rest)


def paste_sources(rows: Tensor, partner: Tensor, config: RegionConfig) -> Tensor:
    """For each composite the row of the image its paste is from: (B, D) rows of this rank -> (B, D), detached.

    With pairs over the global batch the rows of all ranks are gathered first.
    """
    # Detached in both cases: a key is a target, and for RegionCL-S so is the other view's projection.
    pool = all_gather_rows(rows) if config.pairing_scope == "global" else rows.detach()
    return pool.index_select(0, partner)


def source_positions(partner: Tensor, rank: int, config: RegionConfig) -> tuple[Tensor, Tensor]:
    """Positions in the global batch of the images that a rank's canvases and pastes are from: two (B,) int64."""
    first = rank * partner.shape[0]
    own = torch.arange(first, first + partner.shape[0], device=partner.device)
    return own, partner if config.pairing_scope == "global" else partner + first


@dataclass
class Composites:
    """What a swapped view adds to a step: B composites, each with the region of another image.

    Attributes:
        feature_map: (B, C, H, W) by the online encoder.
        box_cells: (B, 4) int64 top, left, height, width of each region in cells.
        partner: (B,) int64, whose region each composite holds; see `StepInputs.partner`.
    """

    feature_map: Tensor
    box_cells: Tensor
    partner: Tensor


@dataclass
class RegionTerms:
    """Means of the region losses over this rank's composites.

    Attributes:
        canvas: scalar, or None where it is switched off.
        paste: scalar, or None where it is switched off.
    """

    canvas: Tensor | None
    paste: Tensor | None

    def total(self) -> Tensor:
        """Half of canvas plus half of paste: one that is switched off leaves the other its half."""
        terms = [0.5 * term for term in (self.canvas, self.paste) if term is not None]
        return torch.stack(terms).sum()

    def metrics(self) -> dict[str, Tensor]:
        """Detached scalars by name."""
        named = {"region/canvas": self.canvas, "region/paste": self.paste}
        return {name: term.detach() for name, term in named.items() if term is not None}


def _intra_similarity(own: Tensor, other: Tensor | None, config: RegionConfig) -> Tensor:
    """Similarity with the composite's other region (detached) as the extra negative (B, 1); -inf where it is off."""
    if not config.intra_negative:
        return own.new_full((own.shape[0], 1), -torch.inf)
    assert other is not None
    return row_dots(own, other.detach())[:, None]


def queue_terms(
    query: Tensor,
    key: Tensor,
    regions: Regions | None,
    partner_key: Tensor | None,
    queue: Tensor,
    temperature: float,
    config: RegionConfig,
) -> tuple[Tensor, RegionTerms | None]:
    """Instance and region losses against one queue, with one matrix product for all rows.

    Args:
        query: (B, D) unit rows of the whole view.
        key: (B, D) unit keys of the same images.
        regions: unit rows in composite order, or None for the instance loss alone.
        partner_key: (B, D) unit keys of the images that the pastes are from; may be None where no paste loss is taken.
        queue: (K, D) unit rows.
        temperature: positive.
        config: which terms and negatives.

    Returns:
        Mean instance loss and region terms.

    Source: RegionCL Eq. 1 and 2; K + 1 logits for the instance, K + 2 for paste and canvas.
    """
    # Instance rows have no other region: -inf adds nothing to their sum, and all rows share one matrix product.
    rows, keys, extra = [query], [key], [query.new_full((query.shape[0], 1), -torch.inf)]
    if regions is not None and config.use_canvas:
        assert regions.canvas is not None
        rows.append(regions.canvas)
        keys.append(key)
        extra.append(_intra_similarity(regions.canvas, regions.paste, config))
    if regions is not None and config.use_paste:
        assert regions.paste is not None and partner_key is not None
        rows.append(regions.paste)
        keys.append(partner_key)
        extra.append(_intra_similarity(regions.paste, regions.canvas, config))
    losses = info_nce(torch.cat(rows), torch.cat(keys), queue, temperature, torch.cat(extra))
    means = losses.view(len(rows), -1).mean(dim=1)
    return means[0], _named_terms(means[1:], config) if regions is not None else None


def batch_terms(
    regions: Regions,
    keys: Tensor,
    canvas_target: Tensor,
    paste_target: Tensor,
    temperature: float,
    config: RegionConfig,
) -> RegionTerms:
    """Region losses against all keys of the global batch.

    Args:
        regions: unit rows in composite order.
        keys: (G, D) unit keys of all ranks.
        canvas_target: (B,) int64 position of each canvas' image in the global batch.
        paste_target: (B,) int64 position of the image that each paste is from.
        temperature: positive.
        config: which terms and negatives.

    Source: MoCo v3's loss with RegionCL's extra negative.
    """
    means = []
    for wanted, own, other, target in (
        (config.use_canvas, regions.canvas, regions.paste, canvas_target),
        (config.use_paste, regions.paste, regions.canvas, paste_target),
    ):
        if wanted:
            assert own is not None
            extra = _intra_similarity(own, other, config)
            means.append(batch_contrast(own, keys, target, temperature, extra).mean())
    return _named_terms(means, config)


def _named_terms(means: Any, config: RegionConfig) -> RegionTerms:
    """Means in the order canvas, paste, of those that are switched on."""
    remaining = iter(means)
    canvas = next(remaining) if config.use_canvas else None
    return RegionTerms(canvas, next(remaining) if config.use_paste else None)


class CompiledMethod:
    """A method of a module as a target of `--compile`: one whole graph for the shapes of the run.

    Args:
        owner: the module.
        name: of its method, which is replaced in this instance alone; the owner's state keeps its names.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name

    def compile(self, **options: Any) -> None:
        """Compile in place; a break in the graph is an error, for then each branch would be read and written apart."""
        compiled = torch.compile(getattr(self.owner, self.name), **{"fullgraph": True, "dynamic": False, **options})
        setattr(self.owner, self.name, compiled)


class RegionMixin(Method):
    """The region branch of a method: which views are swapped, and what their composites go through.

    It stands before the method that it extends, whose `encoder` it uses, and reads `config.region`.
    """

    reads_positions = True

    config: Any
    query_views: tuple[str, ...] = ("view1", "view2")
    """Views in the role of the query."""

    @property
    def mixed_views(self) -> tuple[str, ...]:
        """Both query views or the first, where the region loss is on."""
        return self.config.region.mixed_views(self.query_views)

    def swapped_maps(self, inputs: StepInputs, view: str) -> tuple[Tensor, Composites | None]:
        """Online feature map (B, C, H, W) of a view, and its composites where the method swaps it.

        Composites have batch statistics of their own, in two passes of the encoder or in one.
        """
        images = getattr(inputs, view)
        if view not in self.mixed_views:
            return self.encode_online(images, inputs, (view,)), None
        mixed = inputs.mixed[view]
        if self.config.region.shared_forward:
            with stacked_views(self.encoder, 2):
                both = self.encode_online(torch.cat([images, mixed]), inputs, (view, f"mixed {view}"))
            feature_map, mixed_map = both.chunk(2)
        else:
            feature_map = self.encode_online(images, inputs, (view,))
            mixed_map = self.encode_online(mixed, inputs, (f"mixed {view}",))
        return feature_map, Composites(mixed_map, inputs.box_cells[view], inputs.partner[view])

    def encode_online(self, images: Tensor, inputs: StepInputs, passes: tuple[str, ...]) -> Tensor:
        """Feature maps of stacked batches, one for each of `passes`, the names of what they show."""
        feature_map: Tensor = self.encoder(images)
        return feature_map

    def embed(self, head: nn.Module, rows: Tensor, regions: Regions | None) -> tuple[Tensor, Regions | None]:
        """Instance and region rows through a head, together or apart as `region.head_batching` says."""
        return embed_with_regions(head, rows, regions, self.config.region.head_batching)

    def pool(self, composites: Composites | None) -> Regions | None:
        """Pooled paste and canvas of the composites, where there are any."""
        if composites is None:
            return None
        return pool_regions(composites.feature_map, composites.box_cells, self.config.region)

    def paste_keys(self, key: Tensor, composites: Composites | None) -> Tensor | None:
        """Keys (B, D) of the images that the pastes are from, given those of this rank's images."""
        return None if composites is None else paste_sources(key, composites.partner, self.config.region)

    def queue_losses(
        self,
        heads: tuple[nn.Module, ...],
        pooled: Tensor,
        composites: Composites | None,
        key: Tensor,
        paste_key: Tensor | None,
        queue: Tensor,
    ) -> tuple[Tensor, RegionTerms | None]:
        """Instance loss and region terms of one direction against one queue, in one product with the queue.

        `--compile` makes one graph of it, with box pooling and the blockwise product as opaque operators inside.
        `paste_keys` stays outside, since it may gather over ranks.

        Args:
            heads: projector, and predictor where there is one.
            pooled: (B, C) pooled features of the view itself.
            composites: of the view, or None for the instance loss alone.
            key: (B, D) unit keys of the same images.
            paste_key: (B, D) unit keys of the images that the pastes are from.
            queue: (K, D) unit rows.
        """
        query, regions = pooled, self.pool(composites)
        # Projector and predictor alike see instance and region rows together, so that batch norm treats them alike.
        for head in heads:
            query, regions = self.embed(head, query, regions)
        regions = None if regions is None else regions.map(unit)
        return queue_terms(unit(query), key, regions, paste_key, queue, self.config.temperature, self.config.region)

    def joined(
        self, loss: Tensor, terms: RegionTerms | None, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A direction's loss with the weighted region loss, and its metrics with the region terms."""
        if terms is None:
            return loss, metrics
        return loss + self.config.region.weight * terms.total(), metrics | terms.metrics()
