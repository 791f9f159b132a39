"""The online probe learns what planes can tell apart, and a run with it is the run without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train.main
from tests.runs import comparable
from tests.test_callbacks import RUN
from train.measure.probe import BATCH, LEAST_STEPS, epochs_for, fit_probe, probe_top1


def two_tables(classes: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Clouds around a centre for each class, on channels of very different scales."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 16, generator=draw)
    scales = 10.0 ** torch.linspace(-3, 3, 16)
    labels = torch.arange(600) % classes
    features = (centres[labels] + spread * torch.randn(600, 16, generator=draw)) * scales + 5
    return features[:400], labels[:400], features[400:], labels[400:]


def test_it_tells_apart_what_planes_can() -> None:
    bank, labels, queries, query_labels = two_tables(5, 0.2)
    assert probe_top1(bank, labels, queries, query_labels, 0) > 0.98
    assert probe_top1(bank, labels[torch.randperm(400)], queries, query_labels, 0) < 0.4, "labels without meaning"
    half = probe_top1(bank.half(), labels, queries.half(), query_labels, 0)
    assert half > 0.9, "as the table of a GPU holds them"
    query_labels[:100] = -1
    assert probe_top1(bank, labels, queries, query_labels, 0) > 0.97, "images without a label do not count"


def test_it_is_a_function_of_its_arguments_and_draws_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    # Several batches of the 400 rows: in one alone their order would not matter.
    monkeypatch.setattr("train.measure.probe.BATCH", 128)
    bank, labels, *_ = two_tables(5, 1.0)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.no_grad():
        weight, bias = fit_probe(bank, labels, 5, 1)
        again, _ = fit_probe(bank, labels, 5, 1)
        other, _ = fit_probe(bank, labels, 5, 2)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(weight, again)
    assert weight.shape == (5, 16) and bias.shape == (5,) and not weight.requires_grad
    assert not torch.equal(weight, other)


def test_few_images_are_passed_over_often() -> None:
    assert epochs_for(400) == 100 and epochs_for(1_281_167) == 3
    assert epochs_for(10 * BATCH) * 10 >= LEAST_STEPS


def test_a_run_with_it_is_the_run_without_it(tmp_path: Path) -> None:
    flags = [*RUN, "--deterministic", "--val-data", "32"]
    ends = []
    for name, more in (("without", []), ("with", ["--probe"])):
        assert train.main.main([*flags, *more, "--run-dir", str(tmp_path / name)]) == 0
        rows, state, tensors = comparable(tmp_path / name)
        ends.append((rows, state, tensors))
    (rows, state, tensors), (with_rows, with_state, with_tensors) = ends
    probes = [row for row in with_rows if row["kind"] == "probe"]
    assert [row["step"] for row in probes] == [0, 4, 6] and all(0 <= row["top1"] <= 1 for row in probes)
    assert [row for row in with_rows if row["kind"] != "probe"] == rows
    assert with_state["config"]["run"].pop("probe") and not state["config"]["run"].pop("probe")
    assert with_state == state and with_tensors == tensors


def test_it_needs_labels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train.main.main([*RUN, "--probe", "--run-dir", str(tmp_path / "run")]) == 2
    assert "--probe needs --val-data" in capfd.readouterr().err
