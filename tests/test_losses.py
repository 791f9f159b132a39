"""Each loss against scalar arithmetic written from its formula, in float64 to 1e-6, gradients included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models import losses
from models.hyperparameters import RegionConfig
from models.methods.region_method import Regions, batch_terms, queue_terms

TAU = 0.2


def table(*shape: int, seed: int = 0, unit: bool = True) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows / rows.norm(dim=-1, keepdim=True) if unit else rows).requires_grad_()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def compare(loss: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    """Values and gradients of the sum; a leaf without gradient counts as zero gradient."""
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype)
    for got, want in zip(
        torch.autograd.grad((loss.flatten() * weights).sum(), leaves, allow_unused=True),
        torch.autograd.grad((expected.flatten() * weights).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("extras", [0, 1, 2])
def test_info_nce(extras):
    query, key, queue = table(5, 8), table(5, 8, seed=1), table(11, 8, seed=2)
    extra = table(5, extras, seed=3, unit=False) if extras else None
    expected = []
    for i in range(5):
        positive = ((query[i] * key[i].detach()).sum() / TAU).exp()
        others = [((query[i] * row.detach()).sum() / TAU).exp() for row in queue]
        others += [(extra[i, e] / TAU).exp() for e in range(extras)] if extra is not None else []
        expected.append(-(positive / (positive + torch.stack(others).sum())).log())
    leaves = [query, key, queue] + ([extra] if extra is not None else [])
    compare(losses.info_nce(query, key, queue, TAU, extra), torch.stack(expected), *leaves)


def test_info_nce_leaves_out_infinite_extras():
    query, key, queue = table(4, 8), table(4, 8, seed=1), table(9, 8, seed=2)
    extra = torch.full((4, 1), -torch.inf, dtype=torch.float64)
    compare(losses.info_nce(query, key, queue, TAU, extra), losses.info_nce(query, key, queue, TAU), query)


def test_info_nce_at_chance():
    """With orthogonal rows all K + 1 logits are equal: ln(K + 1)."""
    basis = torch.eye(8)
    loss = losses.info_nce(basis[:2], basis[2:4], basis[4:], TAU)
    torch.testing.assert_close(loss, torch.full((2,), math.log(5)))


@pytest.mark.parametrize("tau", [0.2, 1.0])
@pytest.mark.parametrize("extras", [0, 1])
def test_batch_contrast(tau, extras):
    query, keys = table(4, 6), table(9, 6, seed=1)
    target = torch.tensor([3, 0, 8, 3])
    extra = table(4, extras, seed=3, unit=False) if extras else None
    expected = []
    for i in range(4):
        scores = [((query[i] * k.detach()).sum() / tau).exp() for k in keys]
        extra_scores = [(extra[i, 0] / tau).exp()] if extra is not None else []
        expected.append(-2 * tau * (scores[target[i]] / torch.stack(scores + extra_scores).sum()).log())
    leaves = [query, keys] + ([extra] if extra is not None else [])
    compare(losses.batch_contrast(query, keys, target, tau, extra), torch.stack(expected), *leaves)


def test_negative_cosine_and_byol_regression():
    prediction, target = table(6, 5, unit=False), table(6, 5, seed=1, unit=False)
    cosines = torch.stack([cosine(p, z.detach()) for p, z in zip(prediction, target, strict=True)])
    compare(losses.negative_cosine(prediction, target), -cosines, prediction, target)
    cosines = torch.stack([cosine(p, z.detach()) for p, z in zip(prediction, target, strict=True)])
    compare(losses.byol_regression(prediction, target), 2 - 2 * cosines, prediction, target)
    squared = torch.stack(
        [(p / p.norm() - z / z.norm()).square().sum() for p, z in zip(prediction, target.detach(), strict=True)]
    )
    torch.testing.assert_close(losses.byol_regression(prediction, target), squared)
    assert losses.byol_regression(-target, target).tolist() == pytest.approx([4.0] * 6)


def test_unit_rows():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    assert losses.unit(rows).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    losses.unit(rows).sum().backward()
    assert rows.grad is not None and rows.grad.isfinite().all()
    assert losses.unit(rows.detach().bfloat16()).dtype == torch.float32
    dense = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(losses.unit(dense)[1, :, 2, 3], losses.unit(dense[1, :, 2, 3][None])[0])


def test_best_matches():
    query, key = table(2, 5, 3, 4, unit=False), table(2, 5, 3, 4, seed=1, unit=False)
    match = losses.best_matches(query, key)
    assert match.shape == (2, 12) and not match.requires_grad
    for b in range(2):
        for i in range(12):
            scores = [cosine(query[b].flatten(1)[:, i], key[b].flatten(1)[:, j]).item() for j in range(12)]
            assert match[b, i].item() == scores.index(max(scores))


def test_best_matches_of_a_shifted_map():
    """A map moved by one row matches itself one row away, whatever the lengths of its features."""
    feature_map = torch.randn(1, 16, 4, 4)
    lengths = torch.rand(1, 1, 4, 4) + 0.5
    match = losses.best_matches(feature_map * lengths, feature_map.roll(1, dims=2))
    assert match[0].tolist() == [(i + 4) % 16 for i in range(16)]


def test_losses_stay_fp32_under_autocast():
    query, key, queue = (table(n, 8, seed=n).detach().float() for n in (4, 4, 16))
    exact = losses.info_nce(query, key, queue, TAU)
    contrast = losses.batch_contrast(query, key, torch.arange(4), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses.info_nce(query, key, queue, TAU)
        assert rounded.dtype == torch.float32
        # Only the product with the queue runs in bf16: the error is that of its rounded inputs.
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)
        assert torch.equal(losses.batch_contrast(query, key, torch.arange(4), 1.0), contrast)
        half = losses.negative_cosine(query.bfloat16(), key.bfloat16())
        assert half.dtype == torch.float32


# Region terms on unit rows


def regions_of(partner: list[int], count: int) -> tuple[Tensor, Tensor, list[int]]:
    inverse = [partner.index(j) for j in range(count)]
    return table(count, 6, seed=4), table(count, 6, seed=5), inverse


@pytest.mark.parametrize("partner", [[1, 2, 0], [2, 0, 1], [2, 1, 0]], ids=["cycle", "other cycle", "flip"])
@pytest.mark.parametrize("intra", [True, False])
def test_queue_terms_in_source_order(partner, intra):
    """RegionCL's sum over images with the inverse permutation equals ours over composites, also on a 3-cycle."""
    query, key, queue = table(3, 6), table(3, 6, seed=1), table(7, 6, seed=2)
    canvas, paste, inverse = regions_of(partner, 3)
    config = RegionConfig(intra_negative=intra)
    instance, terms = queue_terms(query, key, Regions(canvas, paste), key[partner].detach(), queue, TAU, config)

    def contrast(row: Tensor, positive: Tensor, other: Tensor | None) -> Tensor:
        logits = [row @ positive.detach(), *[row @ q.detach() for q in queue]]
        logits += [row @ other.detach()] if other is not None else []
        scores = torch.stack(logits) / TAU
        return torch.logsumexp(scores, 0) - scores[0]

    canvas_terms = [contrast(canvas[i], key[i], paste[i] if intra else None) for i in range(3)]
    paste_terms = [contrast(paste[inverse[j]], key[j], canvas[inverse[j]] if intra else None) for j in range(3)]
    expected = torch.stack(
        [
            torch.stack([contrast(query[i], key[i], None) for i in range(3)]).mean(),
            torch.stack(canvas_terms).mean(),
            torch.stack(paste_terms).mean(),
        ]
    )
    assert terms is not None and terms.canvas is not None and terms.paste is not None
    compare(torch.stack([instance, terms.canvas, terms.paste]), expected, query, canvas, paste, key, queue)
    torch.testing.assert_close(terms.total(), (expected[1] + expected[2]) / 2)


def test_batch_terms_in_source_order():
    partner = [1, 2, 0]
    keys = table(5, 6, seed=1)  # the rank's own images are positions 2, 3, 4 of the global batch
    canvas, paste, inverse = regions_of(partner, 3)
    own = torch.tensor([2, 3, 4])
    terms = batch_terms(Regions(canvas, paste), keys, own, own[partner], 0.5, RegionConfig())

    def contrast(row: Tensor, positive: int, other: Tensor) -> Tensor:
        scores = torch.stack([*[row @ k.detach() for k in keys], row @ other.detach()]) / 0.5
        return 2 * 0.5 * (torch.logsumexp(scores, 0) - scores[positive])

    expected = torch.stack(
        [
            torch.stack([contrast(canvas[i], 2 + i, paste[i]) for i in range(3)]).mean(),
            torch.stack([contrast(paste[inverse[j]], 2 + j, canvas[inverse[j]]) for j in range(3)]).mean(),
        ]
    )
    assert terms.canvas is not None and terms.paste is not None
    compare(torch.stack([terms.canvas, terms.paste]), expected, canvas, paste, keys)


def test_a_region_term_alone_keeps_its_half():
    query, key, queue = table(3, 6), table(3, 6, seed=1), table(7, 6, seed=2)
    config = RegionConfig(use_paste=False, intra_negative=False)
    _, terms = queue_terms(query, key, Regions(table(3, 6, seed=4), None), None, queue, TAU, config)
    assert terms is not None and terms.canvas is not None and terms.paste is None
    torch.testing.assert_close(terms.total(), 0.5 * terms.canvas)
    assert set(terms.metrics()) == {"region/canvas"}
