"""SwAV beside its formula: queue of samples, frozen prototypes, crops of two sizes from the loader to the loss."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.methods.swav import SwAV
from models.sinkhorn import balanced_assignments
from pipeline.interface import Batch, PipelineConfig
from pipeline.loaders import build_pipeline
from tests.method_cases import BATCH, SIZE, build, make_inputs, make_optimizer, small_config, take_step, to_double
from tests.method_references import check_against_formula, gradients, ready
from train.build import build_method, build_state, feature_grid
from train.config import Config
from train.inputs import InputBuilder, finished_views, train_views
from train.loop import take_step as train_step
from train.resolve import resolve
from train.runtime import Runtime

CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, False)
TOY = (
    "--method swav --arch resnet10-w16 --image-size 32 --small-size 16 --global-batch 8 --data 64 --loader synthetic "
    "--prototypes 12 --hidden-dim 24 --dim 16"
).split()


def ready_swav(**changes: Any) -> tuple[Any, Any]:
    return ready("swav", **changes)


@pytest.mark.parametrize("layers", [2, 3])
def test_without_small_crops_the_loss_is_the_formula_s(layers: int) -> None:
    check_against_formula("swav", *ready_swav(small_crops=0, projector_layers=layers))


@pytest.mark.parametrize("name", ["swav", "simclr"])
def test_a_projector_of_three_layers_is_the_repetition_in_the_simsiam_paper(name: str) -> None:
    """A batch norm and a ReLU after each but the last of three layers, of which the first two are equally wide."""
    method, inputs = ready(name, projector_layers=3)
    check_against_formula(name, method, inputs)
    linears = [layer for layer in method.projector if isinstance(layer, nn.Linear)]
    hidden = method.config.hidden_dim
    assert [layer.out_features for layer in linears] == [hidden, hidden, method.config.dim]
    assert [isinstance(layer, nn.ReLU) for layer in method.projector[:6]] == [False, False, True] * 2
    assert [layer.weight.shape == (hidden,) for layer in method.projector[1:6:3]] == [True, True]


def test_a_full_queue_takes_part_in_the_assignments_as_the_formula_says() -> None:
    method, inputs = ready_swav(queue_size=BATCH)
    before = method(inputs).loss
    method.after_step(method(to_double(make_inputs(method, 0))), 0.9)
    assert method.queued == BATCH and method.queue1.rows.norm(dim=1) == pytest.approx(1)
    assert method(inputs).loss != before
    check_against_formula("swav", method, inputs)


@pytest.mark.parametrize("queued", [0, BATCH])
def test_a_queue_that_is_not_full_takes_no_part(queued: int) -> None:
    method, inputs = ready_swav(queue_size=2 * BATCH)
    method.queued = queued
    other = copy.deepcopy(method)
    torch.nn.init.normal_(other.queue1.rows)
    assert torch.equal(method(inputs).loss, other(inputs).loss)
    other.queued = method.queued = 2 * BATCH
    assert not torch.equal(method(inputs).loss, other(inputs).loss)


def test_the_queue_fills_from_its_epoch_on_with_the_newest_embeddings() -> None:
    method: Any = build("swav", small_config("swav", queue_start_epoch=2))
    optimizer = make_optimizer(method)
    for step, (epoch, held) in enumerate([(0, 0), (1, 0), (2, BATCH), (2, 2 * BATCH), (3, 2 * BATCH)]):
        inputs = dataclasses.replace(make_inputs(method, step), epoch=epoch)
        output = method(inputs)
        assert set(output.keys) == ({"queue1/view1", "queue2/view2"} if held else set())
        method.after_step(output, 0.9)
        assert method.queued == held
        for name, rows in output.keys.items():
            queue = method.queues()[name.partition("/")[0]]
            end = queue.pointer or 2 * BATCH
            torch.testing.assert_close(queue.rows[end - BATCH : end], rows)
    take_step(method, method, optimizer, make_inputs(method, 9))


def test_assignments_are_rows_of_weight_one_that_use_every_prototype_equally() -> None:
    scores = torch.rand(2, 60, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few, many = (balanced_assignments(scores, 0.05, iterations) for iterations in (3, 200))
    for found in (few, many):
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 60, dtype=torch.float64))
    torch.testing.assert_close(many.sum(-2), torch.full((2, 7), 60 / 7, dtype=torch.float64))
    assert (few.sum(-2) - 60 / 7).abs().max() > 1e-3, "three iterations are not at the end"
    # Each problem by itself.
    torch.testing.assert_close(balanced_assignments(scores[1], 0.05, 3), few[1])


def test_assignments_get_no_gradient() -> None:
    """The gradient is that of the predictions alone: the same as with the assignments given as numbers."""
    method, inputs = ready_swav()
    found: list[Tensor] = []
    assignments = method.assignments

    def kept(scores: Tensor, given: Any) -> Tensor:
        assert not scores.requires_grad
        found.append(assignments(scores, given))
        return found[-1]

    method.assignments = kept
    whole = gradients(method, method(inputs).loss)
    method.assignments = lambda *_: found[0].clone()
    for name, gradient in gradients(method, method(inputs).loss).items():
        torch.testing.assert_close(gradient, whole[name], msg=name)


def test_scores_are_not_rounded_under_autocast() -> None:
    method: Any = build("swav")
    rows = torch.nn.functional.normalize(torch.randn(6, 16), dim=1)
    exact = rows.double() @ method.prototypes.weight.double().T
    with torch.autocast("cpu", torch.bfloat16):
        scores = method.scores(rows)
    assert float((scores - exact).abs().max()) < 1e-6


def toy(*flags: str) -> Config:
    return resolve([*TOY, *flags])


def inputs_of(config: Config, method: Any, epoch: int = 0) -> Any:
    pipeline = build_pipeline("synthetic", finished_views(PipelineConfig("64", (), 8), config, CPU), quiet=True)
    batch = next(iter(pipeline))
    return InputBuilder(config, method, CPU, feature_grid(method, 32)).build(batch, 0, epoch)


def test_prototypes_stay_for_their_steps_and_stay_unit_vectors() -> None:
    """Through the loop's own step, with the recipe's optimizer: no decay and no momentum moves them before."""
    config = toy("--freeze-prototypes-steps=2", "--schedule.warmup-epochs=0", "--optim.lr=30")
    method = build_method(config, CPU)
    assert isinstance(method, SwAV)
    state = build_state(config, CPU, method)
    job: Any = SimpleNamespace(
        config=config, runtime=CPU, wrapped=method, graphed=None, total_steps=80, steps_per_epoch=8
    )
    inputs = inputs_of(config, method)
    moved, last = [], method.prototypes.weight.detach().clone()
    projector = method.projector[0].weight.detach().clone()
    for step in range(4):
        train_step(job, state, step, inputs)
        now = method.prototypes.weight.detach().clone()
        moved.append(float((now - last).abs().max()))
        last = now
        assert now.norm(dim=1) == pytest.approx(1)
    # A vector of unit length may change its last bit when it is normalised again.
    assert max(moved[:2]) < 1e-6 < 1e-4 < min(moved[2:])
    assert not torch.equal(method.projector[0].weight, projector)


def test_every_crop_has_its_size_its_area_and_draws_of_its_own() -> None:
    config = resolve(["--method", "swav", "--data", "x"])
    specs = train_views(config)
    assert [(spec.name, spec.size, spec.scale) for spec in specs] == [
        (f"view{number}", *((224, (0.14, 1.0)) if number <= 2 else (96, (0.05, 0.14)))) for number in range(1, 9)
    ]
    assert [spec.draw_id for spec in specs] == list(range(8))
    small = toy()
    pipeline = build_pipeline("synthetic", finished_views(PipelineConfig("64", (), 8), small, CPU), quiet=True)
    views = next(iter(pipeline)).views
    assert [tuple(view.shape) for view in views.values()] == [(8, 3, 32, 32)] * 2 + [(8, 3, 16, 16)] * 6
    crops = list(views.values())[2:]
    assert all(not torch.equal(a, b) for i, a in enumerate(crops) for b in crops[:i])


def test_micro_batches_have_their_part_of_every_crop() -> None:
    config = toy("--micro-batch=4")
    method = build_method(config, CPU)
    views = {spec.name: torch.randn(8, 3, spec.size, spec.size) for spec in train_views(config)}
    index = torch.arange(8)
    parts = InputBuilder(config, method, CPU, 1).build(Batch(views, index, index), 3, epoch=5)
    assert [(each.step, each.epoch, each.micro_batches) for each in parts] == [(6, 5, 2), (7, 5, 2)]
    for number, each in enumerate(parts):
        assert len(each.small_views) == 6
        for name, view in zip(list(views)[2:], each.small_views, strict=True):
            assert torch.equal(view, views[name][4 * number : 4 * number + 4])


def test_two_crops_alone_are_the_loader_s_two_views() -> None:
    """Any method's two views are what they were: named profile, no further view."""
    config = resolve(["--method", "swav", "--small-crops", "0", "--data", "x"])
    settings = finished_views(PipelineConfig("x", (), 8), config, CPU)
    assert settings.augment == "swav" and [spec.size for spec in settings.views] == [224, 224]
    method = build("swav", small_config("swav", small_crops=0))
    assert make_inputs(method, 0).small_views == () and SIZE == 64
