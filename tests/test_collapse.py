"""Collapse is announced with its cause within 200 steps; healthy runs of every method never trigger it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models.methods.simsiam
import train.measure.collapse
from models.losses import row_dots, unit
from models.methods import METHODS
from models.methods.base import Method, StepInputs
from tests.distributed import run_ranks
from tests.method_cases import build, make_inputs, online_parameters, small_config
from tests.runs import TINY, last_wins, rows
from train.main import main
from train.measure.collapse import is_due, signs
from train.record.collapse import Collapse, Signs, collapse
from train.record.diagnosis import diagnose
from train.record.run import read_run
from train.record.trouble import alarms
from train.runtime import Runtime

ALONE = Runtime(0, 1, torch.device("cpu"), torch.float32, False)
WITHIN = 200
HEALTHY = Signs(1.0, 1.0, 0.5, "projector", 0.5, 6.0, 1.0)


def announcements(
    name: str,
    steps: int = WITHIN,
    config: Any = None,
    lr: float = 0.05,
    ema: float = 0.99,
    change: Callable[[Method], None] = lambda method: None,
    seen: Callable[[StepInputs], None] = lambda inputs: None,
    at_once: bool = False,
    until_found: bool = True,
) -> list[Collapse]:
    """What a small run announces, looked at as often as training looks; `at_once` after each third step as well."""
    torch.set_num_threads(1)
    method = build(name, config)
    change(method)
    optimizer = torch.optim.SGD(online_parameters(method).values(), lr=lr, momentum=0.9, weight_decay=1e-4)
    found = []
    for step in range(steps):
        inputs = make_inputs(method, step)
        seen(inputs)
        output = method(inputs)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(output, ema)
        if is_due(step + 1, 1) or (at_once and step % 3 == 2):
            loss = output.metrics["ins"].item() if "ins" in output.metrics else None
            announced = collapse(signs(method, inputs, ALONE, loss, getattr(method.config, "temperature", None)))
            found += [announced] if announced else []
            if found and until_found:
                break
    return found


def without_predictor(method: Method) -> None:
    method.predictor = nn.Identity()


def one_key_for_all(method: Method) -> None:
    queue: Any = method.queue
    enqueue, key = queue.enqueue, unit(torch.ones(1, queue.rows.shape[1]))
    queue.enqueue = lambda keys: enqueue(key.expand_as(keys))


def black(inputs: StepInputs) -> None:
    inputs.view1.fill_(-2.0)
    inputs.view2.fill_(-2.0)


def one_picture(inputs: StepInputs) -> None:
    for view in (inputs.view1, inputs.view2):
        view.copy_(view[:1].expand_as(view).clone())


def equal_views(inputs: StepInputs) -> None:
    inputs.view2.copy_(inputs.view1)


def leaking_cosine(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -row_dots(unit(prediction), unit(target))


INJECTED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "no stop-gradient": ("simsiam", {}, "reaches the encoder around the predictor", "stop-gradient"),
    "no predictor": ("byol", {"change": without_predictor}, "the predictor changes nothing", "predictor"),
    "temperature far too high": (
        "moco-v2",
        {"config": small_config("moco-v2", temperature=100.0)},
        "lets cosines move the loss by 0.02 at most",
        "--temperature",
    ),
    "temperature far too low": (
        "moco-v2",
        {"config": small_config("moco-v2", temperature=1e-4), "lr": 1e-3},
        "multiplies cosines and gradients by 10000",
        "--temperature",
    ),
    "learning rate far too large": ("moco-v2", {"lr": 100.0}, "steps are far too large", "--optim.lr"),
    "black images": ("moco-v2", {"seen": black, "at_once": True}, "of one colour", "--augment.min-scale"),
    "copies of one image": ("byol", {"seen": one_picture, "at_once": True}, "copies of one picture", "--data"),
    "views that are equal": (
        "simsiam",
        {"seen": equal_views, "at_once": True},
        "nothing is cropped",
        "--augment.profile",
    ),
    "one key in the whole queue": (
        "moco-v2",
        {"change": one_key_for_all, "at_once": True},
        "one key fills the queue",
        "enqueues",
    ),
}


@pytest.mark.parametrize("name", INJECTED)
def test_an_injected_collapse_is_named_with_its_cause(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, settings, cause, look_at = INJECTED[name]
    if name == "no stop-gradient":
        monkeypatch.setattr(models.methods.simsiam, "negative_cosine", leaking_cosine)
    found = announcements(method, **settings)
    assert found, f"not announced within {WITHIN} steps"
    assert cause in found[0].cause and look_at in found[0].look_at, found[0]


def test_a_target_that_is_the_online_network_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With momentum 0 and a predictor BYOL is SimSiam, which need not collapse; where it does, this is the cause."""
    method = build("byol")
    method.after_step(method(make_inputs(method, 0)), 0.0)
    found = signs(method, make_inputs(method, 1), ALONE, None, None)
    assert found.target_distance == 0.0
    announced = collapse(replace(HEALTHY, embedding_std=0.01, target_distance=found.target_distance))
    assert announced is not None and announced.look_at == "--ema.momentum"


@pytest.mark.parametrize("name", METHODS)
def test_healthy_runs_are_not_accused(name: str) -> None:
    """Ten steps of every method, as the golden curves take them, and a look after each fifth."""
    torch.set_num_threads(1)
    method = build(name)
    optimizer = torch.optim.SGD(online_parameters(method).values(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for step in range(10):
        inputs = make_inputs(method, step)
        output = method(inputs)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(output, 0.9)
        if step % 5 == 4:
            loss = output.metrics["ins"].item() if "ins" in output.metrics else None
            found = signs(method, inputs, ALONE, loss, getattr(method.config, "temperature", None))
            assert collapse(found) is None, (step, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_healthy_runs_are_not_accused_in_two_hundred_steps(name: str) -> None:
    assert announcements(name, until_found=False) == []


@pytest.mark.parametrize("name", ["byol", "moco-v2", "regioncl-s", "care"])
def test_a_look_leaves_no_trace(name: str) -> None:
    torch.set_num_threads(1)
    method = build(name)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    host = method.host_state()
    inputs = make_inputs(method, 0)
    alike = replace(HEALTHY, embedding_std=0.0)
    # Forced into the second pass, which has a gradient.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.measure.collapse._measured", lambda *_: alike)
        found = signs(method, inputs, ALONE, None, None)
    assert found.around_predictor in (None, 0.0), "targets of this method are detached"
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert method.host_state() == host and all(parameter.grad is None for parameter in method.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in method.modules())


def test_certain_collapse_without_a_known_cause_says_so() -> None:
    announced = collapse(replace(HEALTHY, embedding_std=0.001, embedding_rank=1.0))
    assert announced is not None and announced.cause.startswith("none of the known ones")
    assert collapse(replace(HEALTHY, embedding_std=0.15)) is None, "low for a while is no collapse"
    young = replace(HEALTHY, embedding_std=0.03, queue_std=0.015)
    assert collapse(young) is None, "keys of a young network are as alike as its embeddings"
    assert collapse(HEALTHY) is None


def test_a_look_is_due_within_two_hundred_steps_whatever_the_rows() -> None:
    for log_every in (1, 2, 7, 10, 40, 64, 100, 200):
        due = [step for step in range(log_every, 2001, log_every) if is_due(step, log_every)]
        assert due[0] <= 200 and len(due) <= 14, (log_every, due)


def test_a_collapse_is_a_line_a_row_a_finding_and_a_box(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    run_dir = tmp_path / "run"
    small = ("--arch", "resnet10-w16", "--image-size", "32", "--checkpoint-every", "100", "--epochs", "9")
    flags = ("--optim.lr", "300", "--max-steps", "40", "--log-every", "20")
    assert main(last_wins(["--method", "moco-v2", "--run-dir", str(run_dir), *TINY, *small, *flags])) == 0
    (row,) = rows(run_dir, "collapse")
    assert row["step"] == 40 and "steps are far too large" in row["cause"] and "--optim.lr" in row["look_at"]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[collapse]")]
    assert row["cause"] in line
    recorded = read_run(run_dir)
    (finding,) = [found for found in diagnose(recorded) if "collapsed at step 40" in found.text]
    assert finding.level == "fault" and "--optim.lr" in finding.remedy
    assert "has collapsed" in alarms([recorded]) and "steps are far too large" in alarms([recorded])


def _look_on_a_rank(rank: int, world: int) -> tuple[float, float | None, bool]:
    method = build("byol", bn_mode="sync", bn_group_size=0)
    inputs = make_inputs(method, 0, rank, world)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    # One rank alone would not look a second time; what rank 0 has measured decides for all.
    mine = replace(HEALTHY, embedding_std=0.0 if rank == 0 else 0.9)
    train.measure.collapse._measured = lambda *_: mine
    runtime = Runtime(rank, world, torch.device("cpu"), torch.float32, False, torch.distributed.group.WORLD)
    found = signs(method, inputs, runtime, None, None)
    untouched = all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    return found.embedding_std, found.around_predictor, untouched


def test_ranks_look_together(tmp_path: Path) -> None:
    """Both passes of a look exchange statistics between ranks, as synchronised batch norms do."""
    assert run_ranks(_look_on_a_rank, 2, tmp_path) == [(0.0, 0.0, True)] * 2
