"""LEWEL's head and both methods against the formulas, the ablation switches, and planted faults."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import alignment
from models.alignment import AlignmentHead, ColumnMlp, aligned_pool, alignment_maps, random_scores
from models.hyperparameters import AlignedConfig
from models.methods import METHODS, lewel_m
from models.methods.base import StepInputs
from models.methods.lewel_b import draw_random, loss_weights
from models.norm import convert_batch_norm
from tests.distributed import run_ranks
from tests.formula import assert_same_gradients, mlp, pooled, unit
from tests.method_references import gradients, ready

SMALL = {"c": 12, "h": 4}


def head_reference(head: Any, feature_map: Tensor, random: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """Section 4.1 of the method specification, position by position."""
    batch, channels = feature_map.shape[:2]
    cells = [(y, x) for y in range(feature_map.shape[2]) for x in range(feature_map.shape[3])]
    vectors = [feature_map[:, :, y, x] for y, x in cells]
    mean = pooled(feature_map)
    embedding, scores = None, random
    if head.joint:
        z = mlp(torch.stack([mean, *vectors], dim=1), head.projector)
        embedding, scores = z[:, 0], z[:, 1:]
    elif head.global_loss:
        embedding = mlp(mean[:, None], head.projector)[:, 0]
    if hasattr(head, "map_projector"):
        scores = mlp(torch.stack(vectors, dim=1), head.map_projector)
    if not head.aligned_loss:
        return embedding, None
    assert scores is not None
    dim, groups = scores.shape[2], head.groups
    maps, width = dim // groups, channels // groups
    weights = unit(scores)
    weights = torch.stack([weights[:, n].exp() for n in range(len(cells))], 1)
    weights = weights / weights.sum(1, keepdim=True)
    rows = []
    for k in range(maps):
        parts = []
        for u in range(groups):
            index = u * maps + k if head.grouping == "contiguous" else k * groups + u
            parts.append(
                sum(weights[:, n, index, None] * vectors[n][:, u * width : (u + 1) * width] for n in range(len(cells)))
            )
        rows.append(torch.cat(parts, dim=1))
    aligned = mlp(torch.stack(rows, dim=1), head.aligned_projector)
    return (embedding if head.global_loss else None), aligned


def make_head(**changes: Any) -> AlignmentHead:
    torch.manual_seed(0)
    head = AlignmentHead(16, 10, 12, 6, 2, **changes)
    for norm in head.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.uniform_(-0.5, 0.5)
    return convert_batch_norm(head, "group", 2).double()


def check_head(head: AlignmentHead) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 16, 2, 3, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    random = torch.randn(4, 6, 12, dtype=torch.float64) if head.random_maps else None
    inputs = [x, *head.parameters()]
    found = []
    for outputs in (tuple(head(x, random)), head_reference(head, x, random)):
        kept = [value for value in outputs if value is not None]
        loss = sum((value**3 + value).sum() for value in kept)
        found.append((outputs, torch.autograd.grad(loss, inputs)))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


SWITCHES: list[dict[str, Any]] = [
    {},
    {"grouping": "interleaved"},
    {"coupled": False},
    {"align": "random"},
    {"global_loss": False},
    {"aligned_loss": False},
    {"coupled": False, "global_loss": False},
    {"align": "random", "global_loss": False},
]


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_head_equals_the_formula(changes: dict[str, Any]) -> None:
    check_head(make_head(**changes))


def test_head_builds_only_what_it_uses() -> None:
    built = {str(c): {name for name, _ in make_head(**c).named_children()} for c in SWITCHES}
    both = {"projector", "aligned_projector"}
    assert built[str({})] == both and built[str({"align": "random"})] == both
    assert built[str({"coupled": False})] == both | {"map_projector"}
    assert built[str({"global_loss": False})] == both
    assert built[str({"aligned_loss": False})] == {"projector"}
    assert built[str({"coupled": False, "global_loss": False})] == {"map_projector", "aligned_projector"}
    assert built[str({"align": "random", "global_loss": False})] == {"aligned_projector"}


def test_column_mlp_is_a_conv1d_of_width_one() -> None:
    """The published head: Conv1d on (B, C, columns) with one batch norm over all columns."""
    torch.manual_seed(0)
    rows = ColumnMlp(7, 5, 3).double()
    conv = nn.Sequential(
        nn.Conv1d(7, 5, 1, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 3, 1, bias=False)
    ).double()
    conv[0].weight.data = rows[0].weight.data[..., None].clone()
    conv[3].weight.data = rows[3].weight.data[..., None].clone()
    x = torch.randn(6, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(rows(x), conv(x.transpose(1, 2)).transpose(1, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(rows[1].running_var, conv[1].running_var)
    start = ColumnMlp(400, 300, 20)[0].weight  # Kaiming-normal over the 300 outputs
    torch.testing.assert_close(start.std(), torch.tensor((2 / 300) ** 0.5), rtol=0.02, atol=0)


def test_groupings_are_a_permutation_of_channels() -> None:
    """Equation 2's interleaved index and the code's contiguous one differ by a fixed order of the maps."""
    torch.manual_seed(0)
    rows, maps = torch.randn(2, 5, 8), torch.rand(2, 5, 6)
    order = torch.arange(6).view(3, 2).T.flatten()  # map k * h + u goes to place u * M + k
    torch.testing.assert_close(
        aligned_pool(rows, maps, 2, "interleaved"), aligned_pool(rows, maps[:, :, order], 2, "contiguous")
    )
    assert not torch.allclose(aligned_pool(rows, maps, 2, "interleaved"), aligned_pool(rows, maps, 2, "contiguous"))


def test_maps_sum_to_one_and_start_near_uniform() -> None:
    maps = alignment_maps(100 * torch.randn(3, 49, 16))
    torch.testing.assert_close(maps.sum(1), torch.ones(3, 16))
    ratio = maps.amax(1) / maps.amin(1)
    assert ratio.max() <= torch.e**2 * 1.001  # inputs lie in [-1, 1]
    assert alignment_maps(torch.randn(1, 4, 8).bfloat16()).dtype == torch.float32


def test_random_scores_are_normal_and_a_function_of_their_address() -> None:
    index = torch.arange(64)
    scores = random_scores(3, 5, 0, index, 49, 16)
    assert scores.shape == (64, 49, 16)
    assert abs(scores.mean()) < 0.02 and abs(scores.std() - 1) < 0.02 and bool(torch.isfinite(scores).all())
    assert (scores.abs() < 0.6745).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(random_scores(3, 5, 0, index[17:30], 49, 16), scores[17:30])
    flat = scores.flatten(1)
    others = [random_scores(*key, index, 49, 16).flatten(1) for key in ((4, 5, 0), (3, 6, 0), (3, 5, 1))]
    for other in [*others, flat.roll(1, 0), flat.roll(1, 1)]:
        assert abs(torch.corrcoef(torch.stack([flat.flatten(), other.flatten()]))[0, 1]) < 0.02
    assert flat.unique().numel() > 0.99 * flat.numel() * 0.98


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((16, 10, 12, 6, 5), "--h 5 must divide"),
        ((16, 10, 12, 6, 0), "--h 0 must divide"),
    ],
)
def test_head_refuses_what_does_not_fit(arguments: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AlignmentHead(*arguments)
    with pytest.raises(ValueError, match="nothing to train"):
        AlignmentHead(16, 10, 12, 6, 2, global_loss=False, aligned_loss=False)
    with pytest.raises(ValueError, match="outside 0..1"):
        loss_weights(1.5, True, True)


def weights(method: Any) -> tuple[float, float]:
    config = method.config
    if config.global_loss and config.aligned_loss:
        return 1 - config.beta, config.beta
    return (1.0, 0.0) if config.global_loss else (0.0, 1.0)


def nmse(prediction: Tensor, target: Tensor) -> Tensor:
    terms = [2 - 2 * (p * t).sum() for p, t in zip(unit(prediction), unit(target.detach()), strict=True)]
    return torch.stack(terms).mean()


def lewel_b_reference(method: Any, inputs: StepInputs) -> Tensor:
    online, targets = [], []
    for number, view in enumerate((inputs.view1, inputs.view2)):
        feature_map = method.encoder(view)
        random = draw_random(method.projector, inputs, number, feature_map)
        random = None if random is None else random.double()
        online.append(head_reference(method.projector, feature_map, random))
        with torch.no_grad():
            targets.append(head_reference(method.momentum_projector, method.momentum_encoder(view), random))
    total = torch.zeros(())
    for (embedding, aligned), (wanted, wanted_aligned) in ((online[0], targets[1]), (online[1], targets[0])):
        if embedding is not None:
            predicted = mlp(embedding[:, None], method.predictor)[:, 0]
            total = total + weights(method)[0] * nmse(predicted, wanted)
        if aligned is not None:
            predicted = mlp(aligned, method.aligned_predictor)
            total = total + weights(method)[1] * nmse(predicted.flatten(0, 1), wanted_aligned.flatten(0, 1))
    return total


def lewel_m_reference(method: Any, inputs: StepInputs) -> Tensor:
    batch, config = len(inputs.view1), method.config
    order = inputs.key_permutation[0].tolist() if config.shuffle_bn else list(range(batch))
    with torch.no_grad():
        place = torch.tensor(order)
        feature_map = method.momentum_encoder(inputs.view2[place])
        random = draw_random(method.projector, inputs, 1, feature_map, place)
        keys, aligned_keys = head_reference(method.momentum_projector, feature_map, random)
    back = [order.index(i) for i in range(batch)]
    feature_map = method.encoder(inputs.view1)
    random = draw_random(method.projector, inputs, 0, feature_map)
    query, aligned = head_reference(method.projector, feature_map, random)
    total = torch.zeros(())
    if query is not None:
        losses = []
        for i, q in enumerate(unit(query)):
            logits = [q @ unit(keys)[back[i]], *(q @ row.double() for row in method.queue.rows)]
            logits = torch.stack(logits) / config.temperature
            losses.append(logits.logsumexp(0) - logits[0])
        total = total + weights(method)[0] * torch.stack(losses).mean()
    if aligned is not None:
        losses = []
        maps = aligned.shape[1]
        for i in range(batch):
            for k in range(maps):
                q = unit(aligned)[i, k]
                logits = [q @ unit(aligned_keys)[back[i], k]]
                for j in range(batch):
                    for other in range(maps) if config.aligned.negatives == "all_maps" else (k,):
                        if j != i or (other != k and config.aligned.same_image == "negatives"):
                            logits.append(q @ unit(aligned_keys)[back[j], other])
                stacked = torch.stack(logits) / config.temperature
                losses.append(stacked.logsumexp(0) - stacked[0])
        total = total + weights(method)[1] * torch.stack(losses).mean()
    return total


REFERENCES = {"lewel-b": lewel_b_reference, "lewel-m": lewel_m_reference}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("lewel-b", {}),
    ("lewel-b", {"momentum_norm": "own", "beta": 0.3, "grouping": "interleaved"}),
    ("lewel-b", {"coupled": False, "beta": 0.9}),
    ("lewel-b", {"align": "random"}),
    ("lewel-b", {"global_loss": False}),
    ("lewel-b", {"aligned_loss": False, "beta": 0.9}),
    ("lewel-m", {}),
    ("lewel-m", {"aligned": AlignedConfig(negatives="same_map"), "beta": 0.8}),
    ("lewel-m", {"aligned": AlignedConfig(same_image="negatives")}),
    ("lewel-m", {"aligned": AlignedConfig(gather=False), "shuffle_bn": False}),
    ("lewel-m", {"align": "random", "coupled": False}),
    ("lewel-m", {"global_loss": False}),
    ("lewel-m", {"aligned_loss": False}),
]


def check(name: str, method: Any, inputs: StepInputs) -> None:
    other = copy.deepcopy(method)
    expected = REFERENCES[name](other, inputs)
    output = method(inputs)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-9)
    assert_same_gradients(gradients(method, output.loss), gradients(other, expected))


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_loss_and_gradients_equal_the_formula(name: str, changes: dict[str, Any]) -> None:
    method, inputs = ready(name, **SMALL, **changes)
    check(name, method, inputs)
    assert set(method(inputs).metrics) == {
        part for part, on in (("global", method.config.global_loss), ("aligned", method.config.aligned_loss)) if on
    }


def test_beta_weights_the_aligned_loss() -> None:
    method, inputs = ready("lewel-b", **SMALL, beta=0.9)
    output = method(inputs)
    expected = 0.1 * output.metrics["global"] + 0.9 * output.metrics["aligned"]
    torch.testing.assert_close(output.loss, expected)


def test_blockwise_contrast_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query = unit(torch.randn(6, 3, 5, dtype=torch.float64)).requires_grad_()
    key, own = unit(torch.randn(12, 3, 5, dtype=torch.float64)), torch.arange(4, 10)
    for negatives in ("all_maps", "same_map"):
        whole = lewel_m.aligned_contrast(query, key, own, 0.2, negatives)
        monkeypatch.setattr(lewel_m, "LOGITS_PER_BLOCK", 3 * 36 * 2 + 1)
        blocks = lewel_m.aligned_contrast(query, key, own, 0.2, negatives)
        monkeypatch.undo()
        torch.testing.assert_close(blocks, whole)
        torch.testing.assert_close(torch.autograd.grad(blocks, query), torch.autograd.grad(whole, query))


def test_one_map_has_no_other_maps_as_negatives() -> None:
    with pytest.raises(ValueError, match="--aligned.negatives all_maps"):
        ready("lewel-m", **SMALL, aligned=AlignedConfig(negatives="same_map", same_image="negatives"))


def test_only_gathered_negatives_see_the_whole_batch() -> None:
    """Local scope and gathered scope differ once there are other ranks' keys."""
    torch.manual_seed(0)
    query, key = unit(torch.randn(4, 2, 5)), unit(torch.randn(8, 2, 5))
    method, _ = ready("lewel-m", **SMALL)
    own = torch.arange(4, 8)
    gathered = method._aligned_loss(query, key, own)
    method.config = dataclasses.replace(method.config, aligned=AlignedConfig(gather=False))
    local = method._aligned_loss(query, key, own)
    torch.testing.assert_close(local, lewel_m.aligned_contrast(query, key[4:], torch.arange(4), 0.2, "all_maps"))
    assert gathered > local


def _rank_losses(rank: int, world: int, name: str, changes: dict[str, Any]) -> tuple[float, Tensor]:
    method, everything = ready(name, **SMALL, **changes)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    inputs = dataclasses.replace(
        everything, view1=everything.view1[part], view2=everything.view2[part], rank=rank, world_size=world
    )
    output = method(inputs)
    method.after_step(output, 0.5)
    state = method.queue.rows if name == "lewel-m" else method.momentum_encoder.bn1.running_var
    return output.loss.item(), state.double()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lewel-m", {"align": "random", "coupled": False}),
        ("lewel-b", {"align": "random"}),
    ],
)
def test_random_maps_keys_and_statistics_do_not_depend_on_the_ranks(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    loss, state = _rank_losses(0, 1, name, changes)
    ranks = run_ranks(_rank_losses, 2, tmp_path, name, changes)
    assert sum(found[0] for found in ranks) / 2 == pytest.approx(loss, rel=1e-6)
    for _, found in ranks:
        torch.testing.assert_close(found, state, rtol=1e-5, atol=1e-6)


def test_parameter_counts_of_the_full_models() -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        method: Any = METHODS["lewel-b"](METHODS["lewel-b"].Config(), arch="resnet50", image_size=224)
        mini: Any = METHODS["lewel-m"](METHODS["lewel-m"].Config(queue_size=8), arch="resnet50", image_size=224)
    assert count(method.encoder) + count(method.projector) == 42_398_784
    assert count(method.predictor) == count(method.aligned_predictor) == 2_105_344
    assert count(mini.projector) == 2 * (2048 * 2048 + 2 * 2048 + 2048 * 128)


def _separate_norms(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, columns: Tensor) -> Tensor:
        first, norm, activation, second = self

        def through(part: Tensor) -> Tensor:
            return second(activation(norm(first(part).transpose(1, 2)).transpose(1, 2)))

        if columns.shape[1] != 1 + 4:  # not the joint columns of a 2 x 2 map
            return through(columns)
        return torch.cat([through(columns[:, :1]), through(columns[:, 1:])], 1)

    patch.setattr(ColumnMlp, "forward", forward)


def _other_grouping(patch: pytest.MonkeyPatch) -> None:
    original = alignment.aligned_pool
    patch.setattr(alignment, "aligned_pool", lambda rows, maps, h, grouping: original(rows, maps, h, "interleaved"))


def _no_norm_of_scores(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(alignment, "alignment_maps", lambda scores: scores.softmax(dim=1))


def _softmax_over_maps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(alignment, "alignment_maps", lambda scores: unit(scores).softmax(dim=2))


def _maps_detached(patch: pytest.MonkeyPatch) -> None:
    original = alignment.alignment_maps
    patch.setattr(alignment, "alignment_maps", lambda scores: original(scores).detach())


def _own_image_as_negative(patch: pytest.MonkeyPatch) -> None:
    def contrast(query: Tensor, key: Tensor, own: Tensor, temperature: float, *options: str) -> Tensor:
        logits = query.flatten(0, 1) @ key.flatten(0, 1).T / temperature
        place = (own[:, None] * query.shape[1] + torch.arange(query.shape[1])).flatten()
        return nn.functional.cross_entropy(logits, place)

    patch.setattr(lewel_m, "aligned_contrast", contrast)


def _keys_left_shuffled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lewel_m, "_in_global_order", lambda rows, back: rows)


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        (_separate_norms, ["lewel-b", "lewel-m"]),
        (_other_grouping, ["lewel-b", "lewel-m"]),
        (_no_norm_of_scores, ["lewel-b", "lewel-m"]),
        (_softmax_over_maps, ["lewel-b", "lewel-m"]),
        (_maps_detached, ["lewel-b", "lewel-m"]),
        (_own_image_as_negative, ["lewel-m"]),
        (_keys_left_shuffled, ["lewel-m"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_fault_is_caught(fault: Any, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names:
        method, inputs = ready(name, **SMALL)
        fault(monkeypatch)
        with pytest.raises(AssertionError):
            check(name, method, inputs)
        monkeypatch.undo()


def test_queue_advances_with_all_keys() -> None:
    method, inputs = ready("lewel-m", **SMALL)
    before = method.queue.rows.clone()
    output = method(inputs)
    method.after_step(output, 0.5)
    torch.testing.assert_close(method.queue.rows[:8], output.keys["queue/view2"])
    assert torch.equal(method.queue.rows[8:], before[8:])
    assert method.host_state() == {"queue": 8}
