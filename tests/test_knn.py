"""Exact k-NN against a slow loop and scikit-learn, and the label-free health figures against what they promise."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.distributed import run_ranks
from train.eval import knn_protocol
from train.eval.options import KnnConfig
from train.measure import features as features_module
from train.measure import health
from train.measure.features import Features
from train.measure.knn import knn_classify, knn_predict, predict_over_ranks
from train.runtime import Runtime


def clusters(n: int, classes: int = 5, width: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (n,), generator=generator)
    return centres[labels] + 1.6 * torch.randn(n, width, generator=generator), labels


def slow_votes(bank, bank_labels, query, k, temperature, classes):
    similarity = [float(F.cosine_similarity(query[None].double(), row[None].double())) for row in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
    weighted, majority = [0.0] * classes, [0] * classes
    for i in nearest:
        weighted[bank_labels[i]] += math.exp(similarity[i] / temperature)
        majority[bank_labels[i]] += 1
    return weighted.index(max(weighted)), majority.index(max(majority))


@pytest.mark.parametrize("block", [1, 7, 512])
def test_predictions_are_those_of_a_slow_loop(block: int) -> None:
    bank, labels = clusters(60)
    queries, _ = clusters(25, seed=1)
    found = knn_predict(bank * 3, labels, queries * 0.2, (1, 4, 20), 0.07, 6, block)
    for k in (1, 4, 20):
        slow = [slow_votes(bank, labels.tolist(), query, k, 0.07, 6) for query in queries]
        assert found[k][0].tolist() == [w for w, _ in slow]
        assert found[k][1].tolist() == [m for _, m in slow]


@pytest.mark.parametrize(("queries", "world"), [(25, 4), (2, 3), (6, 1)])
def test_ranks_share_the_queries(queries: int, world: int) -> None:
    bank, labels = clusters(60)
    asked = clusters(queries, seed=1)[0]
    arguments = (bank, labels, asked, (1, 20), 0.07, 6, 7)
    shares = [knn_predict(bank, labels, asked[rank::world], (1, 20), 0.07, 6, 7) for rank in range(world)]
    given: list[dict] = []

    def gather(own: dict) -> list[dict]:
        given.append(own)
        return shares

    found = predict_over_ranks(world - 1, world, gather)(*arguments)  # type: ignore[arg-type]
    for k, expected in knn_predict(*arguments).items():  # type: ignore[arg-type]
        assert all(torch.equal(ours, alone) for ours, alone in zip(found[k], expected, strict=True))
    assert all(torch.equal(given[0][20][0], shares[-1][20][0]) for _ in given)


def test_a_table_in_half_precision_is_compared_in_single(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.measure.knn._PIECE", 7)
    bank, labels = clusters(60)
    queries = clusters(25, seed=1)[0]
    half = F.normalize(bank, dim=1).half()
    found = knn_predict(half, labels, queries, (4,), 0.07, 6)
    expected = knn_predict(half.float(), labels, queries, (4,), 0.07, 6)
    assert torch.equal(found[4][0], expected[4][0]) and torch.equal(found[4][1], expected[4][1])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_command_keeps_its_tables_in_half_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """ImageNet in fp32 is 10 GB for each rank, and three times that while it is put together."""
    asked: list[bool] = []

    class Session:
        progress = staticmethod(lambda what, total, unit: nullcontext(SimpleNamespace(step=lambda: None)))
        runtime = Runtime(0, 1, torch.device(device), torch.float32, False)

        def features_of(self, data: str, compact: bool) -> tuple[Features, str]:
            asked.append(compact)
            rows, labels = clusters(30)
            table = F.normalize(rows, dim=1).half() if compact else rows
            return Features(table, labels, torch.arange(30)), "hash"

        def say(self, text: str) -> None:
            assert "top-1" in text

        def write(self, result: dict) -> None:
            assert result["top1"] == 1.0

    monkeypatch.setattr(knn_protocol, "open_session", lambda *_: nullcontext(Session()))
    assert knn_protocol.run(KnnConfig(k=(1,))) == 0
    assert asked == [device == "cuda"] * 2


def rows_of_a_rank(rank: int, world: int) -> tuple[Features, Features]:
    """What a rank gets where ranks hold 5, 0 and 3 rows out of order; and what is right."""
    samples = torch.tensor([7, 0, 3, 2, 5, 6, 1, 4])
    table = (samples[:, None] + torch.tensor([0.0, 0.5])).half()
    mine = samples.split([5, 0, 3])[rank]
    part = (table.split([5, 0, 3])[rank], mine + 10, mine)
    order = samples.argsort()
    return features_module._in_storage_order(*part), Features(table[order], samples[order] + 10, samples[order])


def test_ranks_join_their_rows_in_storage_order(tmp_path: Path) -> None:
    for found, right in run_ranks(rows_of_a_rank, 3, tmp_path):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[:3], right[:3], strict=True))
    alone = torch.arange(4).half()[:, None]
    ordered = features_module._in_storage_order(alone, torch.ones(4, dtype=torch.int64), torch.arange(4))
    assert ordered.features.data_ptr() == alone.data_ptr(), "what is in order is not copied"


def test_agrees_with_scikit_learn_to_a_tenth_of_a_point() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, labels = clusters(1500, 10)
    queries, truth = clusters(1000, 10, seed=1)
    ours = knn_classify(bank, labels, queries, truth, (20, 100, 200))
    a, b = F.normalize(bank).numpy(), F.normalize(queries).numpy()
    for k, (weighted, majority) in ours.items():
        votes = {
            # Euclidean distance d of unit rows is 2 - 2 cos: exp(cos / T) = exp((1 - d^2 / 2) / T).
            "weighted": lambda d: np.exp((1 - d**2 / 2) / 0.07),
            "uniform": "uniform",
        }
        for ours_top1, weights in ((weighted, votes["weighted"]), (majority, votes["uniform"])):
            theirs = neighbors.KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(a, labels.numpy())
            assert abs(ours_top1 - theirs.score(b, truth.numpy())) <= 0.001
        assert 0.2 < weighted < 0.99, "chance or perfection would prove nothing"


def test_weights_and_majority_can_disagree() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels = torch.tensor([0, 1, 1])
    assert [p.item() for p in knn_predict(bank, labels, bank[:1], [3])[3]] == [0, 1]


def test_k_above_the_bank_uses_all_of_it_and_small_temperatures_do_not_overflow() -> None:
    bank, labels = clusters(30)
    queries, truth = clusters(10, seed=1)
    assert (
        knn_classify(bank, labels, queries, truth, (500,))[500] == knn_classify(bank, labels, queries, truth, (30,))[30]
    )
    sharp = knn_predict(bank, labels, queries, (30,), temperature=1e-3)[30][0]
    assert torch.equal(sharp, knn_predict(bank, labels, queries, (1,))[1][0])


def test_unlabelled_queries_are_left_out_and_mistakes_are_named() -> None:
    bank, labels = clusters(40)
    truth = labels.clone()
    truth[::2] = -1
    assert knn_classify(bank, labels, bank, truth, (1,))[1] == (1.0, 1.0)
    with pytest.raises(ValueError, match="unlabelled"):
        knn_predict(bank, truth, bank, (1,))
    with pytest.raises(ValueError, match="equal width"):
        knn_predict(bank, labels, bank[:, :3], (1,))
    with pytest.raises(ValueError, match="k values"):
        knn_predict(bank, labels, bank, (0,))
    with pytest.raises(ValueError, match="has a label"):
        knn_classify(bank, labels, bank, torch.full_like(labels, -1), (1,))


def test_feature_std_spread_and_collapse() -> None:
    spread = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    assert health.feature_std(spread) == pytest.approx(1.0, abs=0.02)
    assert health.feature_std(spread * torch.rand(400, 1)) == pytest.approx(1.0, abs=0.02)  # lengths do not matter
    assert health.feature_std(spread[:1].repeat(400, 1)) == pytest.approx(0.0, abs=1e-7)


def test_effective_rank_by_hand() -> None:
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    for used in (1, 2):
        features = torch.zeros(4, 8)
        features[:, :used] = signs[:, :used]
        assert health.effective_rank(features) == pytest.approx(used, abs=1e-6)
    assert health.effective_rank(torch.ones(50, 8)) == 1.0
    many = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    rows = F.normalize(many.double())
    singular = np.linalg.svd((rows - rows.mean(0)).numpy(), compute_uv=False)
    shares = singular / singular.sum()
    assert health.effective_rank(many) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    assert health.effective_rank(many.T) == pytest.approx(health.effective_rank(many.T.contiguous()))


def test_view_retrieval_counts_and_reads_collapse_as_chance() -> None:
    first = torch.eye(6)
    assert health.view_retrieval(first, first * 3) == 1.0
    assert health.view_retrieval(first, first.roll(1, 0)) == 0.0
    assert health.view_retrieval(first, torch.cat([first[:3], first[3:].roll(1, 0)])) == 0.5
    assert health.view_retrieval(torch.ones(8, 4), torch.ones(8, 4)) == pytest.approx(1 / 8)
    padded = torch.cat([torch.eye(500), torch.zeros(100, 500)])
    assert health.view_retrieval(padded, padded) == 1.0, "only the first 500 count"
    with pytest.raises(ValueError, match="must match"):
        health.view_retrieval(first, first[:3])


def test_health_row_has_the_names_of_the_contract() -> None:
    features = torch.randn(20, 8)
    assert set(health.health(features, features)) == {"feature_std", "effective_rank", "view_retrieval"}
