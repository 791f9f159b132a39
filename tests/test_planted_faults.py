"""Planted faults, each with the check that catches it, per method.

| fault | check |
|---|---|
| no stop-gradient on the target (SimSiam) | loss and gradients equal the formula (method_references.py) |
| no predictor (SimSiam) | the same |
| intra-image negative missing; not detached | the same |
| paste left in composite order | the same |
| paste and canvas exchanged | the same |
| views paired wrongly: key of the query's own view | the same |
| keys left in shuffled order | the same |
| dense matches found with something else | the same |
| drop-path masks shared by two passes; drop-path in the momentum network | the same |
| the two queues of MoBY exchanged | the same |
| an embedding as its own negative; no negatives of the own view; negatives without gradient (SimCLR) | the same |
| embeddings not standardised; the diagonal's weight on all entries; both views the same (Barlow Twins) | the same |
| assignments that are not balanced; a crop predicts its own assignment; crops pass alone (SwAV) | the same |
| mixtures with themselves; shares exchanged (Un-Mix) | the same |
| pairs by number of the cell; flips forgotten; pairs of one direction for both; no propagation (PixPro) | the same |
| momentum network frozen; momentum network a copy of the online one | after_step moves all state as specified (below) |
| a momentum module left out of the average | the same |
| queue not advanced; not filled | the same |
| keys enqueued before the loss is taken | the same |

Faults in heads of LEWEL, in CARE's attention loss and in LARS are planted beside their own tests (test_lewel.py,
test_care.py, test_optim.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from models import key_queue, losses
from models.methods import (
    barlow_twins,
    densecl,
    moby,
    moco_v2,
    moco_v3,
    pixpro,
    queue_method,
    region_method,
    regioncl_s,
    simclr,
    simsiam,
    swav,
    unmix,
)
from models.methods.base import Method, StepInputs
from tests.method_references import REFERENCES, check_against_formula, ready
from tools.bench.faults import copying_momentum, no_predictor, no_stop_gradient

Patch = Callable[[pytest.MonkeyPatch], None]
REGION_WITH_NEGATIVES = ["regioncl-m", "regioncl-d", "regioncl-m3", "regioncl-moby"]
MOCO = ["moco-v2", "regioncl-m", "densecl", "regioncl-d", "unmix"]
QUEUES = [*MOCO, "moby", "regioncl-moby"]
MOMENTUM = [*QUEUES, "moco-v3", "regioncl-m3", "pixpro"]
COEFFICIENT = 0.9


def check_after_step(name: str, method: Any, inputs: StepInputs) -> None:
    """Forward leaves queue and momentum weights alone; `after_step` averages every momentum parameter and enqueues."""
    averaged = {id(p) for _, target in method.momentum_pairs() for p in target.parameters()}
    frozen = {id(p) for p in method.parameters() if not p.requires_grad}
    assert frozen == averaged
    before = copy.deepcopy(method)
    output = method(inputs)
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), method.parameters(), strict=True))
    queues = method.queues() if hasattr(method, "queues") else {}
    for queue_name, queue in queues.items():
        assert torch.equal(queue.rows, getattr(before, queue_name).rows) and queue.pointer == 0
    method.after_step(output, COEFFICIENT)
    for (online, target), (_, old) in zip(method.momentum_pairs(), before.momentum_pairs(), strict=True):
        for p, q, previous in zip(online.parameters(), target.parameters(), old.parameters(), strict=True):
            expected = COEFFICIENT * previous + (1 - COEFFICIENT) * p.detach()
            torch.testing.assert_close(q, expected, rtol=1e-9, atol=1e-12)
    for queue_name, queue in queues.items():
        fresh = [rows for key, rows in output.keys.items() if key.startswith(f"{queue_name}/")]
        assert len(fresh) == 1 and queue.pointer == len(inputs.view1)
        torch.testing.assert_close(queue.rows[: len(inputs.view1)], fresh[0])
        assert torch.equal(queue.rows[len(inputs.view1) :], getattr(before, queue_name).rows[len(inputs.view1) :])


@pytest.mark.parametrize("name", REFERENCES)
def test_after_step_moves_all_state_as_specified(name):
    check_after_step(name, *ready(name))


def no_intra_negative(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(region_method, "_intra_similarity", lambda own, *_: own.new_full((len(own), 1), -torch.inf))


def intra_negative_not_detached(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(region_method, "_intra_similarity", lambda own, other, _: (own * other).sum(1, keepdim=True))


def composite_order(patch: pytest.MonkeyPatch) -> None:
    from models.methods import regioncl_m3

    for module in (region_method, regioncl_s):
        patch.setattr(module, "paste_sources", lambda rows, partner, config: rows)
    original = region_method.source_positions
    patch.setattr(regioncl_m3, "source_positions", lambda *args: (original(*args)[0],) * 2)


def paste_and_canvas_exchanged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(region_method, "PASTE", region_method.CANVAS)
    patch.setattr(region_method, "CANVAS", 0)


def wrong_views(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(moco_v2.MoCoV2, "directions", property(lambda self: (("view1", "view1"),)))
    original = simsiam.instance_loss
    for module in (simsiam, regioncl_s):
        patch.setattr(module, "instance_loss", lambda p, z: original(p, z[::-1]))
    encode_key, first = moby.MoBY.encode_key, []

    def same_view(self, images):
        first.append(images)
        return encode_key(self, first[0])

    patch.setattr(moby.MoBY, "encode_key", same_view)
    global_keys = moco_v3.MoCoV3.global_keys
    patch.setattr(moco_v3.MoCoV3, "global_keys", lambda self, view: global_keys(self, view.flip(0)))
    nt_xent = losses.nt_xent
    patch.setattr(simclr, "nt_xent", lambda query, others, same, *rest: nt_xent(query, same, others, *rest))
    embed, seen = barlow_twins.BarlowTwins.embed, []

    def first_view(self, view):
        seen.append(view)
        return embed(self, seen[0])

    patch.setattr(barlow_twins.BarlowTwins, "embed", first_view)
    target, cells = pixpro.PixPro.target, []

    def own_cells(self, images):
        cells.append(images)
        return target(self, cells[0])

    patch.setattr(pixpro.PixPro, "target", own_cells)
    assignments = swav.SwAV.assignments
    patch.setattr(swav.SwAV, "assignments", lambda self, *args: assignments(self, *args).flip(0))


def not_standardised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        barlow_twins.BarlowTwins, "embed", lambda self, view: self.projector(self.encoder(view).mean(dim=(2, 3)))
    )


def one_weight_for_all_entries(patch: pytest.MonkeyPatch) -> None:
    def terms(correlation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.eye(len(correlation)) - correlation).square().sum(), correlation.new_zeros(())

    patch.setattr(barlow_twins, "correlation_terms", terms)


def not_balanced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(swav, "balanced_assignments", lambda scores, epsilon, _: torch.softmax(scores / epsilon, dim=-1))


def own_assignment_predicted(patch: pytest.MonkeyPatch) -> None:
    def loss(scores: torch.Tensor, assignments: torch.Tensor, temperature: float) -> torch.Tensor:
        predicted = torch.log_softmax(scores / temperature, dim=-1)
        return -(assignments.unsqueeze(1) * predicted).sum(-1).mean()

    patch.setattr(swav, "swapped_prediction", loss)


def crops_pass_alone(patch: pytest.MonkeyPatch) -> None:
    def embed(self: Any, large: Any, small: Any) -> torch.Tensor:
        return torch.cat(
            [losses.unit(self.projector(self.encoder(crop).mean(dim=(2, 3)))) for crop in (*large, *small)]
        )

    patch.setattr(swav.SwAV, "embed", embed)


def mixed_with_themselves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(unmix, "mix", lambda images, mixture: images)


def shares_exchanged(patch: pytest.MonkeyPatch) -> None:
    # In the loss alone: mixtures that change places with their shares are the same mixtures in another order.
    original = unmix._on_device
    patch.setattr(unmix, "_on_device", lambda values, like: original([1 - value for value in values], like))


def pairs_by_number(patch: pytest.MonkeyPatch) -> None:
    def same(first: Any, second: Any, grid: Any, *rest: Any) -> Any:
        return torch.eye(grid[0] * grid[1], dtype=torch.bool).expand(len(first), -1, -1)

    patch.setattr(pixpro, "near_pairs", same)


def flips_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = pixpro.near_pairs

    def upright(boxes: Any) -> Any:
        left, right = boxes[:, 0].minimum(boxes[:, 2]), boxes[:, 0].maximum(boxes[:, 2])
        return torch.stack([left, boxes[:, 1], right, boxes[:, 3], boxes[:, 4], boxes[:, 5]], dim=1)

    patch.setattr(pixpro, "near_pairs", lambda first, second, *rest: original(upright(first), upright(second), *rest))


def one_direction_s_pairs_for_both(patch: pytest.MonkeyPatch) -> None:
    original = pixpro.pair_consistency
    seen: list[Any] = []

    def first_pairs(prediction: Any, target: Any, pairs: Any) -> Any:
        seen.append(pairs)
        return original(prediction, target, seen[0])

    patch.setattr(pixpro, "pair_consistency", first_pairs)


def no_propagation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pixpro.Propagation, "forward", lambda self, x: self.transform(x))


def own_embedding_as_negative(patch: pytest.MonkeyPatch) -> None:
    def nt_xent(query: Any, others: Any, same: Any, own: Any, temperature: float) -> Any:
        logits = torch.cat([query @ others.T, query @ same.T], 1) / temperature
        return torch.nn.functional.cross_entropy(logits, own, reduction="none")

    patch.setattr(simclr, "nt_xent", nt_xent)


def no_negatives_of_the_own_view(patch: pytest.MonkeyPatch) -> None:
    def nt_xent(query: Any, others: Any, same: Any, own: Any, temperature: float) -> Any:
        return torch.nn.functional.cross_entropy(query @ others.T / temperature, own, reduction="none")

    patch.setattr(simclr, "nt_xent", nt_xent)


def negatives_without_gradient(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(simclr, "gather_with_gradient", lambda rows: rows.detach())


def keys_left_shuffled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(moco_v2, "unshuffle_rows", lambda rows, permutation: rows)


def matches_by_position(patch: pytest.MonkeyPatch) -> None:
    def identity(query_map: torch.Tensor, key_map: torch.Tensor) -> torch.Tensor:
        return torch.arange(query_map.flatten(2).shape[2]).expand(len(query_map), -1)

    patch.setattr(densecl, "best_matches", identity)


def shared_drop_path(patch: pytest.MonkeyPatch) -> None:
    original = moby.draw_branch_scale

    def first_pass(blocks, rate, seed, step, tag, *rest):
        return original(blocks, rate, seed, step, 0, *rest)

    patch.setattr(moby, "draw_branch_scale", first_pass)


def momentum_drop_path(patch: pytest.MonkeyPatch) -> None:
    def dropped(self, images):
        scale = moby.draw_branch_scale(5, 0.2, 0, 9, 9, slice(0, len(images)), len(images))
        return losses.unit(self.momentum_projector(self.momentum_encoder(images, scale).mean((2, 3)))).detach()

    patch.setattr(moby.MoBY, "encode_key", dropped)


def queues_exchanged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(moby.MoBY, "queues", lambda self: {"queue1": self.queue2, "queue2": self.queue1})


def frozen_momentum(patch: pytest.MonkeyPatch) -> None:
    for module in (queue_method, moco_v3, pixpro):
        patch.setattr(module, "ema_update", lambda pairs, m: None)


def projector_not_averaged(patch: pytest.MonkeyPatch) -> None:
    for owner in (moco_v2.MoCoV2, moco_v3.MoCoV3, moby.MoBY, densecl.DenseCL, pixpro.PixPro):
        pairs = owner.momentum_pairs
        patch.setattr(owner, "momentum_pairs", lambda self, pairs=pairs: pairs(self)[:-1])


def queue_not_advanced(patch: pytest.MonkeyPatch) -> None:
    enqueue = key_queue.KeyQueue.enqueue

    def stay(self, keys):
        enqueue(self, keys)
        self.pointer = 0

    patch.setattr(key_queue.KeyQueue, "enqueue", stay)


def queue_not_filled(patch: pytest.MonkeyPatch) -> None:
    def advance(self, keys):
        self.pointer += len(keys)

    patch.setattr(key_queue.KeyQueue, "enqueue", advance)


def enqueued_too_early(patch: pytest.MonkeyPatch) -> None:
    for owner in (moco_v2.MoCoV2, moby.MoBY):
        forward = owner.forward

        def early(self: Any, inputs: StepInputs, forward: Any = forward) -> Any:
            output = forward(self, inputs)
            for name, rows in output.keys.items():
                self.queues()[name.partition("/")[0]].enqueue(rows)
            return output

        patch.setattr(owner, "forward", early)


FAULTS: list[tuple[Patch, Callable[[str, Method, StepInputs], None], list[str]]] = [
    (no_stop_gradient, check_against_formula, ["simsiam", "regioncl-s"]),
    (no_predictor, check_against_formula, ["simsiam", "regioncl-s"]),
    (no_intra_negative, check_against_formula, REGION_WITH_NEGATIVES),
    (intra_negative_not_detached, check_against_formula, REGION_WITH_NEGATIVES),
    (composite_order, check_against_formula, [*REGION_WITH_NEGATIVES, "regioncl-s"]),
    (paste_and_canvas_exchanged, check_against_formula, [*REGION_WITH_NEGATIVES, "regioncl-s"]),
    (wrong_views, check_against_formula, list(REFERENCES)),
    (keys_left_shuffled, check_against_formula, MOCO),
    (matches_by_position, check_against_formula, ["densecl", "regioncl-d"]),
    (shared_drop_path, check_against_formula, ["moby", "regioncl-moby"]),
    (momentum_drop_path, check_against_formula, ["moby", "regioncl-moby"]),
    (queues_exchanged, check_against_formula, ["moby", "regioncl-moby"]),
    (not_standardised, check_against_formula, ["barlow-twins"]),
    (one_weight_for_all_entries, check_against_formula, ["barlow-twins"]),
    (not_balanced, check_against_formula, ["swav"]),
    (own_assignment_predicted, check_against_formula, ["swav"]),
    (crops_pass_alone, check_against_formula, ["swav"]),
    (mixed_with_themselves, check_against_formula, ["unmix"]),
    (shares_exchanged, check_against_formula, ["unmix"]),
    (pairs_by_number, check_against_formula, ["pixpro"]),
    (flips_forgotten, check_against_formula, ["pixpro"]),
    (one_direction_s_pairs_for_both, check_against_formula, ["pixpro"]),
    (no_propagation, check_against_formula, ["pixpro"]),
    (own_embedding_as_negative, check_against_formula, ["simclr"]),
    (no_negatives_of_the_own_view, check_against_formula, ["simclr"]),
    (negatives_without_gradient, check_against_formula, ["simclr"]),
    (frozen_momentum, check_after_step, MOMENTUM),
    (copying_momentum, check_after_step, MOMENTUM),
    (projector_not_averaged, check_after_step, MOMENTUM),
    (queue_not_advanced, check_after_step, [*QUEUES, "swav"]),
    (queue_not_filled, check_after_step, [*QUEUES, "swav"]),
    (enqueued_too_early, check_after_step, QUEUES),
]
CASES = [(fault, check, name) for fault, check, names in FAULTS for name in names]


@pytest.mark.parametrize(("fault", "check", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_planted_fault_is_caught(fault, check, name, monkeypatch):
    method, inputs = ready(name)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check(name, method, inputs)
