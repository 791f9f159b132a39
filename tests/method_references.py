"""The loss of each method written from its formula with loops over images, in source order; slow and obvious.

Networks are the method's own modules; everything between features and loss is done here again.
Used by test_region_methods.py and test_planted_faults.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.methods.base import Method, StepInputs
from models.mixtures import draw_mixture
from models.swin import draw_branch_scale
from tests.method_cases import GROUP, build, make_inputs, randomise_norms, small_config, to_double

VIEWS = ("view1", "view2")


def n(v: Tensor) -> Tensor:
    return v / v.norm().clamp(min=1e-12)


def rows_n(rows: Tensor) -> Tensor:
    return torch.stack([n(row) for row in rows])


def cross_entropy_first(logits: list[Tensor]) -> Tensor:
    """-log softmax of the first of a list of scalars."""
    return torch.logsumexp(torch.stack(logits), 0) - logits[0]


def gap(feature_map: Tensor) -> Tensor:
    count = feature_map.shape[2] * feature_map.shape[3]
    return feature_map.sum((2, 3)) / count


def mean_of(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum(0) / len(terms)


def paste_and_canvas(feature_map: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Composite-order means over the cells of the box and over the others, cell by cell."""
    pastes, canvases = [], []
    for image, (top, left, height, width) in zip(feature_map, boxes.tolist(), strict=True):
        inside, outside = [], []
        for y in range(image.shape[1]):
            for x in range(image.shape[2]):
                within = top <= y < top + height and left <= x < left + width
                (inside if within else outside).append(image[:, y, x])
        pastes.append(mean_of(inside))
        canvases.append(mean_of(outside))
    return torch.stack(pastes), torch.stack(canvases)


def inverse(partner: Tensor) -> list[int]:
    result = [0] * len(partner)
    for composite, source in enumerate(partner.tolist()):
        result[source] = composite
    return result


def through_heads(heads: list[Any], blocks: list[Tensor], joint: bool) -> list[list[Tensor]]:
    """Blocks of rows after each head; joint: one batch, else the first block and the others in two batches."""
    results = []
    for head in heads:
        parts = [blocks] if joint else [blocks[:1], blocks[1:]]
        blocks = [out for part in parts if part for out in head(torch.cat(part)).chunk(len(part))]
        results.append(blocks)
    return results


def needed(region: Any, canvas: Tensor, paste: Tensor) -> dict[str, Tensor]:
    """Which regions pass the heads: each for its own term or as the other's negative."""
    both = region.intra_negative and (region.use_canvas or region.use_paste)
    wanted = {"canvas": region.use_canvas or both, "paste": region.use_paste or both}
    return {name: rows for name, rows in (("canvas", canvas), ("paste", paste)) if wanted[name]}


def region_terms(
    rows: dict[str, Tensor], partner: Tensor, region: Any, contrast: Callable[[Tensor, int, list[Tensor]], Tensor]
) -> Tensor:
    """L_reg for unit rows in composite order: a sum over source images with the inverse permutation.

    `contrast(row, source image, intra-image similarities)` is the loss of one row.
    """
    at = inverse(partner)
    total = []
    for i in range(len(partner)):
        for wanted, own, other, composite in (
            (region.use_canvas, "canvas", "paste", i),
            (region.use_paste, "paste", "canvas", at[i]),
        ):
            if wanted:
                row = rows[own][composite]
                intra = [row @ rows[other][composite].detach()] if region.intra_negative else []
                total.append(0.5 * contrast(row, i, intra) / len(partner))
    return torch.stack(total).sum()


def queue_region_losses(
    rows: dict[str, Tensor], key: Tensor, partner: Tensor, queue: Tensor, temperature: float, region: Any
) -> Tensor:
    """L_reg of methods.md 2.5: positive, intra-image negative and all of the queue."""

    def contrast(row: Tensor, i: int, intra: list[Tensor]) -> Tensor:
        logits = [row @ key[i].detach(), *intra, *[row @ q for q in queue]]
        return cross_entropy_first([logit / temperature for logit in logits])

    return region_terms(rows, partner, region, contrast)


def _moco_keys(method: Any, inputs: StepInputs, view: str, direction: int, encode: Callable[[Tensor], list[Tensor]]):
    """Outputs of `encode` on the shuffled images, put back in order one row at a time."""
    images = getattr(inputs, view)
    if not method.config.shuffle_bn:
        return encode(images)
    permutation = inputs.key_permutation[direction].tolist()
    shuffled = encode(torch.stack([images[source] for source in permutation]))
    ordered = []
    for rows in shuffled:
        back: list[Any] = [None] * len(rows)
        for position, source in enumerate(permutation):
            back[source] = rows[position]
        ordered.append(torch.stack(back))
    return ordered


@torch.no_grad()
def _global_key(method: Any, images: Tensor) -> list[Tensor]:
    return [rows_n(method.momentum_projector(gap(method.momentum_encoder(images))))]


@torch.no_grad()
def _dense_keys(method: Any, images: Tensor) -> list[Tensor]:
    feature_map = method.momentum_encoder(images)
    dense = method.momentum_dense_projector(feature_map)
    return [rows_n(method.momentum_projector(gap(feature_map))), dense, feature_map]


def _instance_queue(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    terms = [
        cross_entropy_first([q @ k / temperature, *[q @ negative / temperature for negative in queue]])
        for q, k in zip(query, key, strict=True)
    ]
    return mean_of(terms)


def _dense_loss(method: Any, feature_map: Tensor, dense_key: Tensor, key_map: Tensor) -> Tensor:
    dense = method.dense_projector(feature_map)
    positions = [(y, x) for y in range(dense.shape[2]) for x in range(dense.shape[3])]
    terms = []
    for b in range(len(dense)):
        for y, x in positions:
            similarity = [n(feature_map[b, :, y, x]) @ n(key_map[b, :, v, u]) for v, u in positions]
            v, u = positions[max(range(len(positions)), key=lambda j: similarity[j].item())]
            g = n(dense[b, :, y, x])
            logits = [g @ n(dense_key[b, :, v, u]), *[g @ negative for negative in method.dense_queue.rows]]
            terms.append(cross_entropy_first([logit / method.config.temperature for logit in logits]))
    return mean_of(terms)


def moco_family(method: Any, inputs: StepInputs) -> Tensor:
    """moco-v2, regioncl-m, densecl, regioncl-d."""
    config = method.config
    dense, region = hasattr(config, "dense_weight"), getattr(config, "region", None)
    total = []
    directions = (VIEWS, VIEWS[::-1]) if config.symmetric.enabled else (VIEWS,)
    for direction, (query_view, key_view) in enumerate(directions):
        encode = _dense_keys if dense else _global_key
        key, *rest = _moco_keys(method, inputs, key_view, direction, lambda x: encode(method, x))  # noqa: B023
        feature_map = method.encoder(getattr(inputs, query_view))
        instance = _instance_queue(
            rows_n(method.projector(gap(feature_map))), key, method.queue.rows, config.temperature
        )
        loss = instance
        if dense:
            loss = (1 - config.dense_weight) * instance + config.dense_weight * _dense_loss(method, feature_map, *rest)
        if region is not None and query_view in method.mixed_views:
            paste, canvas = paste_and_canvas(method.encoder(inputs.mixed[query_view]), inputs.box_cells[query_view])
            rows = {name: rows_n(method.projector(part)) for name, part in needed(region, canvas, paste).items()}
            loss = loss + region.weight * queue_region_losses(
                rows, key, inputs.partner[query_view], method.queue.rows, config.temperature, region
            )
        total.append(loss)
    joined = torch.stack(total).sum()
    return joined / len(total) if config.symmetric.reduce == "mean" else joined


def _cosine_distance(p: Tensor, z: Tensor) -> Tensor:
    return -mean_of([n(a) @ n(b.detach()) for a, b in zip(p, z, strict=True)])


def simsiam_family(method: Any, inputs: StepInputs) -> Tensor:
    """simsiam and regioncl-s, methods.md 2.7."""
    region = getattr(method.config, "region", None)
    projections, predictions, regions = {}, {}, {}
    for view in VIEWS:
        blocks = [gap(method.encoder(getattr(inputs, view)))]
        if view in method.mixed_views:
            paste, canvas = paste_and_canvas(method.encoder(inputs.mixed[view]), inputs.box_cells[view])
            blocks += needed(region, canvas, paste).values()
        joint = not region or region.head_batching == "joint"
        z, p = through_heads([method.projector, method.predictor], blocks, joint)
        projections[view], predictions[view] = z[0], p[0]
        if len(p) > 1:
            regions[view] = iter(p[1:])
    z1, z2 = projections["view1"], projections["view2"]
    loss = 0.5 * _cosine_distance(predictions["view1"], z2) + 0.5 * _cosine_distance(predictions["view2"], z1)
    for view, target in (("view1", z2), ("view2", z1)):
        if view not in regions:
            continue
        share = region.weight / len(regions)
        if region.use_canvas:
            loss = loss + share * 0.5 * _cosine_distance(next(regions[view]), target)
        if region.use_paste:
            at = inverse(inputs.partner[view])
            loss = loss + share * 0.5 * _cosine_distance(next(regions[view])[at], target)
    return loss


def moco_v3_family(method: Any, inputs: StepInputs) -> Tensor:
    """moco-v3 and regioncl-m3, methods.md 2.8."""
    config = method.config
    region, tau = getattr(config, "region", None), config.temperature
    total = []
    for query_view, key_view in (VIEWS, VIEWS[::-1]):
        key = _global_key(method, getattr(inputs, key_view))[0]
        blocks = [gap(method.encoder(getattr(inputs, query_view)))]
        regions: dict[str, Tensor] = {}
        if query_view in method.mixed_views:
            paste, canvas = paste_and_canvas(method.encoder(inputs.mixed[query_view]), inputs.box_cells[query_view])
            regions = needed(region, canvas, paste)
            blocks += regions.values()
        joint = not region or region.head_batching == "joint"
        outputs = through_heads([method.projector, method.predictor], blocks, joint)[1]
        query, *rest = [rows_n(rows) for rows in outputs]

        def contrast(row: Tensor, own: int, intra: list[Tensor], key: Tensor = key) -> Tensor:
            others = [row @ k for j, k in enumerate(key) if j != own]
            return 2 * tau * cross_entropy_first([logit / tau for logit in [row @ key[own], *others, *intra]])

        total.append(mean_of([contrast(row, i, []) for i, row in enumerate(query)]))
        if rest:
            embedded = dict(zip(regions, rest, strict=True))
            total.append(region.weight * region_terms(embedded, inputs.partner[query_view], region, contrast))
    return torch.stack(total).sum()


def moby_family(method: Any, inputs: StepInputs) -> Tensor:
    """moby and regioncl-moby, methods.md 1.4 and 2.8."""
    config = method.config
    region = getattr(config, "region", None)
    batch = len(inputs.view1)

    def encode(images: Tensor, tag: int) -> Tensor:
        scale = draw_branch_scale(5, config.drop_path, inputs.seed, inputs.step, tag, slice(0, batch), batch)
        return method.encoder(images, scale)

    total = []
    for direction, (query_view, key_view, queue) in enumerate(
        (("view1", "view2", method.queue2.rows), ("view2", "view1", method.queue1.rows))
    ):
        key = _global_key(method, getattr(inputs, key_view))[0]
        blocks = [gap(encode(getattr(inputs, query_view), direction))]
        regions: dict[str, Tensor] = {}
        if query_view in method.mixed_views:
            mixed_map = encode(inputs.mixed[query_view], 2 + direction)
            paste, canvas = paste_and_canvas(mixed_map, inputs.box_cells[query_view])
            regions = needed(region, canvas, paste)
            blocks += regions.values()
        joint = not region or region.head_batching == "joint"
        query, *rest = [rows_n(rows) for rows in through_heads([method.projector, method.predictor], blocks, joint)[1]]
        total.append(_instance_queue(query, key, queue, config.temperature))
        if rest:
            partner, embedded = inputs.partner[query_view], dict(zip(regions, rest, strict=True))
            total.append(region.weight * queue_region_losses(embedded, key, partner, queue, config.temperature, region))
    return torch.stack(total).sum()


def simclr(method: Any, inputs: StepInputs) -> Tensor:
    """Eq. 1 and the sum over both directions: every view against all other views of the batch."""
    tau = method.config.temperature
    z = [n(row) for view in VIEWS for row in method.projector(gap(method.encoder(getattr(inputs, view))))]
    count = len(inputs.view1)
    terms = []
    for i in range(2 * count):
        partner = (i + count) % (2 * count)
        others = [z[i] @ z[j] / tau for j in range(2 * count) if j not in (i, partner)]
        terms.append(cross_entropy_first([z[i] @ z[partner] / tau, *others]))
    return torch.stack(terms).sum() / count


def barlow_twins(method: Any, inputs: StepInputs) -> Tensor:
    """Eq. 1 and 2, entry by entry of the matrix."""
    config = method.config
    normalised = []
    for view in VIEWS:
        z = method.projector(gap(method.encoder(getattr(inputs, view))))
        mean = mean_of(list(z))
        normalised.append([(row - mean) / (mean_of([(r - mean) ** 2 for r in z]) + 1e-5).sqrt() for row in z])
    total = []
    for i in range(config.dim):
        for j in range(config.dim):
            entry = mean_of([a[i] * b[j] for a, b in zip(*normalised, strict=True)])
            total.append((1 - entry) ** 2 if i == j else config.off_diagonal_weight * entry**2)
    return config.loss_scale * torch.stack(total).sum()


def swav(method: Any, inputs: StepInputs) -> Tensor:
    """Eq. 1 to 5 and section 3.2, crop by crop; Sinkhorn-Knopp with every factor of the released code."""
    config, count = method.config, len(inputs.view1)
    pooled = [gap(method.encoder(torch.cat([inputs.view1, inputs.view2])))]
    if inputs.small_views:
        pooled.append(gap(method.encoder(torch.cat(inputs.small_views))))
    z = list(rows_n(method.projector(torch.cat(pooled))).split(count))
    prototypes = method.prototypes.weight
    total = []
    for i in (0, 1):
        queue = [method.queue1, method.queue2][i].rows if method.queued else z[i][:0]
        q = _sinkhorn(torch.cat([queue, z[i]]).detach(), prototypes.detach(), config)[len(queue) :]
        for v in range(len(z)):
            for b in range(count if v != i else 0):
                logits = torch.stack([z[v][b] @ c / config.temperature for c in prototypes])
                total.append(-sum(q[b][k] * (logits[k] - torch.logsumexp(logits, 0)) for k in range(len(prototypes))))
    return torch.stack(total).sum() / (2 * (len(z) - 1) * count)


def _sinkhorn(samples: Tensor, prototypes: Tensor, config: Any) -> list[list[Tensor]]:
    count, k = len(samples), len(prototypes)
    q = [[torch.exp(sample @ c / config.sinkhorn_epsilon) for c in prototypes] for sample in samples]
    whole = torch.stack([torch.stack(row).sum() for row in q]).sum()
    q = [[value / whole for value in row] for row in q]
    for _ in range(config.sinkhorn_iterations):
        of_prototype = [torch.stack([row[j] for row in q]).sum() for j in range(k)]
        q = [[row[j] / of_prototype[j] / k for j in range(k)] for row in q]
        q = [[value / torch.stack(row).sum() / count for value in row] for row in q]
    return [[value * count for value in row] for row in q]


def pixpro(method: Any, inputs: StepInputs) -> Tensor:
    """Eq. 1 and 3 to 5, cell by cell, with the released code's coordinates, unit values and factor."""
    config = method.config
    maps = [method.projector(method.encoder(getattr(inputs, view))) for view in VIEWS]
    values = [method.propagation.transform(each) for each in maps]
    with torch.no_grad():
        targets = [method.momentum_projector(method.momentum_encoder(getattr(inputs, view))) for view in VIEWS]
    total = []
    for image in range(len(inputs.view1)):
        places = [
            _places(inputs.crop_boxes[view][image].tolist(), maps[0].shape[2:], config.distance) for view in VIEWS
        ]
        reach = config.reach * max(diagonal for _, diagonal in places)
        for a, b in ((0, 1), (1, 0)):
            x, g = (list(each[image].flatten(1).T) for each in (maps[a], values[a]))
            smoothed = [_propagated(i, x, g, config) for i in range(len(x))]
            theirs = list(targets[b][image].flatten(1).T)
            cosines = [
                n(smoothed[i]) @ n(theirs[j])
                for i, here in enumerate(places[a][0])
                for j, there in enumerate(places[b][0])
                if math.dist(here, there) < reach
            ]
            if cosines:
                total.append(-config.loss_scale * mean_of(cosines))
        if config.instance_weight:
            total.append(config.instance_weight * config.loss_scale * _whole_images(method, inputs, image))
    return torch.stack(total).sum() / len(inputs.view1)


def _whole_images(method: Any, inputs: StepInputs, image: int) -> Tensor:
    """Minus both cosines of one image's two views in PixPro's second branch."""
    maps = [method.instance_predictor(method.instance_projector(method.encoder(getattr(inputs, v)))) for v in VIEWS]
    with torch.no_grad():
        theirs = [method.momentum_instance_projector(method.momentum_encoder(getattr(inputs, v))) for v in VIEWS]
    return -sum(n(gap(maps[a])[image]) @ n(gap(theirs[1 - a])[image]) for a in (0, 1))


def _places(box: list[float], grid: tuple[int, ...], distance: str) -> tuple[list[tuple[float, float]], float]:
    """Centres of a map's cells in the image, row by row, and the diagonal of a cell."""
    left, top, right, bottom, width, height = box
    if distance == "sides":
        # The released code has the first and the last pixel of a crop, in shares of the image's last pixel's number.
        if left < right:
            left, right = left / (width - 1), (right - 1) / (width - 1)
        else:
            left, right = (left - 1) / (width - 1), right / (width - 1)
        top, bottom = top / (height - 1), (bottom - 1) / (height - 1)
    across, down = (right - left) / grid[1], (bottom - top) / grid[0]
    cells = [(left + (x + 0.5) * across, top + (y + 0.5) * down) for y in range(grid[0]) for x in range(grid[1])]
    return cells, math.hypot(across, down)


def _propagated(i: int, x: list[Tensor], g: list[Tensor], config: Any) -> Tensor:
    """Eq. 3 and 4: the cell i as a sum over all cells."""
    added = 1e-6 if config.sharpness < 1 else 0.0
    terms = []
    for other, value in zip(x, g, strict=True):
        likeness = (n(x[i]) @ n(other)).clamp(min=0) + added
        terms.append(likeness**config.sharpness * (n(value) if config.unit_values else value))
    return torch.stack(terms).sum(0)


def unmix(method: Any, inputs: StepInputs) -> Tensor:
    """Un-Mix section 3 on MoCo v2: images mixed one by one, each mixture against both of its keys."""
    config, images = method.config, inputs.view1
    key = _moco_keys(method, inputs, "view2", 0, lambda x: _global_key(method, x))[0]
    mixed, shares, partners = [], [], []
    for i, image in enumerate(images):
        group = i // GROUP
        partner = group * GROUP + GROUP - 1 - i % GROUP
        address = (inputs.seed, inputs.step, 1, group)
        drawn = draw_mixture(*image.shape[1:], config.beta, config.global_mixtures, *address)
        if drawn.box is None:
            mixture = drawn.share * image + (1 - drawn.share) * images[partner]
        else:
            top, bottom, left, right = drawn.box
            mixture = image.clone()
            mixture[:, top:bottom, left:right] = images[partner][:, top:bottom, left:right]
        mixed.append(mixture)
        shares.append(drawn.share)
        partners.append(partner)

    def embed(batch: Tensor) -> Tensor:
        return rows_n(method.projector(gap(method.encoder(batch))))

    def loss_of(row: Tensor, positive: Tensor) -> Tensor:
        logits = [row @ positive, *[row @ negative for negative in method.queue.rows]]
        return cross_entropy_first([logit / config.temperature for logit in logits])

    total = [loss_of(row, k) for row, k in zip(embed(images), key, strict=True)]
    for row, k, share, partner in zip(embed(torch.stack(mixed)), key, shares, partners, strict=True):
        total.append(share * loss_of(row, k) + (1 - share) * loss_of(row, key[partner]))
    return torch.stack(total).sum() / len(images)


REFERENCES: dict[str, Callable[[Any, StepInputs], Tensor]] = {
    "moco-v2": moco_family,
    "regioncl-m": moco_family,
    "densecl": moco_family,
    "regioncl-d": moco_family,
    "simsiam": simsiam_family,
    "regioncl-s": simsiam_family,
    "moco-v3": moco_v3_family,
    "regioncl-m3": moco_v3_family,
    "moby": moby_family,
    "regioncl-moby": moby_family,
    "unmix": unmix,
    "simclr": simclr,
    "barlow-twins": barlow_twins,
    "swav": swav,
    "pixpro": pixpro,
}


def ready(name: str, **changes: Any) -> tuple[Method, StepInputs]:
    """A float64 method in the middle of training (momentum weights differ from the online ones), and its inputs."""
    torch.set_num_threads(1)
    method = build(name, small_config(name, **changes)).double()
    randomise_norms(method)
    with torch.no_grad():
        for online, momentum in method.momentum_pairs():
            for p, q in zip(online.parameters(), momentum.parameters(), strict=True):
                q.copy_(p + 0.05 * torch.randn_like(p) * p.abs().mean())
    return method, to_double(make_inputs(method, step=1))


def gradients(method: Method, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every online parameter, zeros where there is none."""
    named = {name: p for name, p in method.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(named.items(), found, strict=True)
    }


def check_against_formula(name: str, method: Method, inputs: StepInputs) -> None:
    """Loss and every gradient of `method` equal those of its formula to 1e-6, in float64."""
    expected = REFERENCES[name](method, inputs)
    expected_gradients = gradients(method, expected)
    loss = method(inputs).loss
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    for parameter, gradient in gradients(method, loss).items():
        torch.testing.assert_close(
            gradient, expected_gradients[parameter], rtol=1e-6, atol=1e-9, msg=lambda m, p=parameter: f"{p}: {m}"
        )
