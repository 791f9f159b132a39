"""Optimizers against their formulas in float64, one tensor at a time."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from train.config import LarsConfig, OptimConfig
from train.optim import (
    Lars,
    build_optimizer,
    clip_or_measure,
    parameter_groups,
    set_learning_rate,
)

RATES = (0.5, 0.5, 0.1, 0.4)  # changing, so that a learning rate inside or outside the buffer is told apart


class Toy(nn.Module):
    """Encoder, head with batch norm, predictor with a fixed rate, position table, frozen copy."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
        self.predictor = nn.Linear(5, 2)
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))
        self.norm = nn.LayerNorm(2)
        self.momentum_head = copy.deepcopy(self.head)
        self.momentum_head.requires_grad_(False)
        self.fixed: list[nn.Module] = []

    def fixed_lr_modules(self) -> list[nn.Module]:
        return self.fixed


def excluded(rule: str) -> set[str]:
    torch.manual_seed(0)
    toy = Toy()
    names = {p: name for name, p in toy.named_parameters()}
    groups = parameter_groups(toy, OptimConfig(exclude=rule, weight_decay=0.1), 256)
    assert sorted(len(g["params"]) for g in groups) and sum(len(g["params"]) for g in groups) == 13
    for group in groups:
        assert group["weight_decay"] == (0.1 if group["adapt"] else 0.0)
    return {names[p] for group in groups if not group["adapt"] for p in group["params"]}


def test_who_is_excluded_from_weight_decay() -> None:
    biases = {"encoder.0.bias", "head.0.bias", "predictor.bias", "norm.bias"}
    encoder_norm, head_norm = {"encoder.1.weight", "encoder.1.bias"}, {"head.1.weight", "head.1.bias"}
    assert excluded("none") == set()
    assert excluded("1d") == biases | encoder_norm | head_norm | {"norm.weight"}
    assert excluded("1d_tables") == excluded("1d") | {"relative_position_bias_table"}
    assert excluded("bias_bn") == biases | encoder_norm | head_norm
    assert excluded("bias_bn_encoder") == biases | encoder_norm | {"head.1.bias"}
    with pytest.raises(ValueError, match="optim.exclude 'all' is unknown"):
        excluded("all")


def test_momentum_network_is_no_part_and_fixed_rates_stay() -> None:
    toy = Toy()
    toy.fixed = [toy.predictor]
    optimizer = build_optimizer(toy, OptimConfig(lr=0.05, lr_reference_batch=256, exclude="1d"), 512)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == {p for p in toy.parameters() if p.requires_grad}
    set_learning_rate(optimizer, 0.007)
    for group in optimizer.param_groups:
        is_predictor = {p in set(toy.predictor.parameters()) for p in group["params"]}
        assert len(is_predictor) == 1
        assert group["lr"] == (0.1 if is_predictor == {True} else 0.007)


def weights_and_gradients(steps: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(4, 3, 2, 2), (5, 4), (2, 2), (7,), (1, 6), (3, 2)]
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    gradients = [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(steps)]
    weights[4].zero_()  # zero weight
    weights[5].zero_()  # zero weight and zero gradient
    for each in gradients:
        each[5].zero_()
        each[2].zero_()  # zero gradient
    return weights, gradients


def lars_reference(weights: list[Tensor], gradients: list[list[Tensor]], in_buffer: bool, decay: float) -> list[Tensor]:
    """Tensor by tensor with Python numbers for the norms."""
    weights = [w.clone() for w in weights]
    buffers: list[Any] = [None] * len(weights)
    for rate, step in zip(RATES, gradients, strict=True):
        for i, gradient in enumerate(step):
            w, g = weights[i], gradient.clone()
            ratio = 1.0
            if w.ndim > 1:
                size_w, size_g = math.sqrt(w.square().sum().item()), math.sqrt(g.square().sum().item())
                if in_buffer:
                    bottom = size_g + decay * size_w
                    ratio = 0.001 * size_w / bottom if bottom else 1.0
                    g = g + decay * w
                else:
                    g = g + decay * w
                    size_g = math.sqrt(g.square().sum().item())
                    ratio = 0.001 * size_w / size_g if size_w and size_g else 1.0
            update = ratio * (rate if in_buffer else 1.0) * g
            buffers[i] = update if buffers[i] is None else 0.9 * buffers[i] + update
            weights[i] = w - (1.0 if in_buffer else rate) * buffers[i]
    return weights


def run_lars(weights: list[Tensor], gradients: list[list[Tensor]], in_buffer: bool, decay: float) -> list[Tensor]:
    parameters = [nn.Parameter(w.clone()) for w in weights]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "adapt": True, "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim == 1], "adapt": False, "weight_decay": 0.0},
    ]
    optimizer = Lars(groups, lr=1.0, lr_in_buffer=in_buffer)
    for rate, step in zip(RATES, gradients, strict=True):
        set_learning_rate(optimizer, rate)
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for parameter, gradient in zip(parameters, step, strict=True):
            assert torch.equal(parameter.grad, gradient)  # gradients are the caller's
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("in_buffer", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lars_to_the_formula(in_buffer: bool, decay: float) -> None:
    weights, gradients = weights_and_gradients(len(RATES))
    actual = run_lars(weights, gradients, in_buffer, decay)
    for a, b in zip(actual, lars_reference(weights, gradients, in_buffer, decay), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert bool(torch.isfinite(a).all())
    assert torch.equal(actual[5], weights[5])  # 0 / 0 does no harm


def test_the_lars_of_simclr_has_the_joint_norm_and_the_rate_in_the_buffer() -> None:
    """google-research/simclr: v = 0.9 v + lr r (g + d w) with r = eta |w| / |g + d w|, 1 where a norm is 0; w -= v."""
    weights, gradients = weights_and_gradients(len(RATES))
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = Lars(parameters, lr=1.0, weight_decay=0.3, lr_in_buffer=True, denominator="joint")
    expected, buffers = [w.clone() for w in weights], [torch.zeros_like(w) for w in weights]
    for rate, step in zip(RATES, gradients, strict=True):
        set_learning_rate(optimizer, rate)
        for i, g in enumerate(step):
            parameters[i].grad = g.clone()
            u = g + 0.3 * expected[i]
            sizes = [math.sqrt(t.square().sum().item()) for t in (expected[i], u)]
            ratio = 0.001 * sizes[0] / sizes[1] if all(sizes) else 1.0
            buffers[i] = 0.9 * buffers[i] + rate * ratio * u
            expected[i] = expected[i] - buffers[i]
        optimizer.step()
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-14)


def test_the_lars_of_swav_is_larc() -> None:
    """NVIDIA apex, LARC with clip=False: where |w| and |g| are not 0, g = (g + d w) eta |w| / (|g| + d |w| + 1e-8)."""
    weights, gradients = weights_and_gradients(len(RATES))
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = Lars(parameters, lr=1.0, weight_decay=0.3, denominator="larc")
    expected, buffers = [w.clone() for w in weights], [torch.zeros_like(w) for w in weights]
    zeros = set()
    for rate, step in zip(RATES, gradients, strict=True):
        set_learning_rate(optimizer, rate)
        for i, g in enumerate(step):
            parameters[i].grad = g.clone()
            size_w, size_g = (math.sqrt(t.square().sum().item()) for t in (expected[i], g))
            zeros |= {(size_w == 0, size_g == 0)}
            if size_w and size_g:
                g = (g + 0.3 * expected[i]) * (0.001 * size_w / (size_g + 0.3 * size_w + 1e-8))
            buffers[i] = 0.9 * buffers[i] + g
            expected[i] = expected[i] - rate * buffers[i]
        optimizer.step()
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-14)
    assert {(False, False), (True, False), (False, True)} <= zeros, "weights and gradients of zeros take part"


def test_a_checkpoint_from_before_the_denominator_was_a_choice_goes_on_as_it_was() -> None:
    parameter, twin = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.zeros(3, 4))
    old = Lars([parameter], lr=0.5, weight_decay=0.1, lr_in_buffer=True)
    new = Lars([twin], lr=0.5, weight_decay=0.1, lr_in_buffer=True)
    twin.data = parameter.data.clone()
    state = new.state_dict()
    del state["param_groups"][0]["denominator"]
    new.load_state_dict(state)
    parameter.grad = torch.randn(3, 4)
    twin.grad = parameter.grad.clone()
    old.step()
    new.step()
    assert torch.equal(parameter, twin)


def test_the_two_conventions_differ_when_the_rate_changes() -> None:
    """With one rate and no decay they agree; a planted swap of the two would pass only then."""
    weights, gradients = weights_and_gradients(len(RATES))
    weights, gradients = weights[:2], [g[:2] for g in gradients]
    inside, outside = (run_lars(weights, gradients, flag, 0.0) for flag in (True, False))
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(inside, outside, strict=True))
    first = [g[:2] for g in gradients[:1]]
    one_inside, one_outside = (_one_step(weights, first, flag) for flag in (True, False))
    for a, b in zip(one_inside, one_outside, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def _one_step(weights: list[Tensor], gradients: list[list[Tensor]], in_buffer: bool) -> list[Tensor]:
    parameters = [nn.Parameter(w.clone()) for w in weights]
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = gradient.clone()
    Lars(parameters, lr=0.5, lr_in_buffer=in_buffer).step()
    return [p.detach() for p in parameters]


def test_zero_weights_never_move_in_lewels_form() -> None:
    """Documented: its ratio is zero there; MoCo v3's form treats it as 1."""
    zero, gradient = [torch.zeros(2, 2, dtype=torch.float64)], [[torch.ones(2, 2, dtype=torch.float64)]]
    assert bool((_one_step(zero, gradient, True)[0] == 0).all())
    torch.testing.assert_close(_one_step(zero, gradient, False)[0], torch.full((2, 2), -0.5, dtype=torch.float64))


@pytest.mark.parametrize("in_buffer", [False, True])
def test_lars_leaves_everything_alone_on_a_bad_step(in_buffer: bool) -> None:
    parameter = nn.Parameter(torch.randn(3, 4))
    optimizer = Lars([parameter], lr=0.5, weight_decay=0.1, lr_in_buffer=in_buffer)
    parameter.grad = torch.randn(3, 4)
    optimizer.step()
    weight, buffer = parameter.detach().clone(), optimizer.state[parameter]["momentum_buffer"].clone()
    parameter.grad = torch.full((3, 4), float("nan"))
    optimizer.found_inf = torch.ones(1)  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(parameter, weight) and torch.equal(optimizer.state[parameter]["momentum_buffer"], buffer)
    # A good step with the flag present is the ordinary step.
    twin = nn.Parameter(weight.clone())
    other = Lars([twin], lr=0.5, weight_decay=0.1, lr_in_buffer=in_buffer)
    other.state[twin]["momentum_buffer"] = buffer.clone()
    parameter.grad = torch.randn(3, 4)
    twin.grad = parameter.grad.clone()
    optimizer.found_inf = torch.zeros(1)  # type: ignore[attr-defined]
    optimizer.step()
    other.step()
    torch.testing.assert_close(parameter, twin)


class Launches(TorchDispatchMode):
    """Operations of PyTorch that do work: a view of a tensor and room for one start nothing on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not is_view and func is not torch.ops.aten.empty.memory_format:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def launches_of_a_step(count: int, denominator: str, in_buffer: bool, scaled: bool) -> list[str]:
    """What the second step of LARS starts for `count` weights and as many excluded ones."""
    weights, biases = ([nn.Parameter(torch.randn(*shape)) for _ in range(count)] for shape in ((3, 2), (5,)))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "adapt": False}]
    optimizer = Lars(groups, lr=0.5, lr_in_buffer=in_buffer, denominator=denominator)
    for parameter in (*weights, *biases):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.zeros(())  # type: ignore[attr-defined]
    with Launches() as launches:
        optimizer.step()
    return launches.names


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("in_buffer", [False, True])
@pytest.mark.parametrize("denominator", ["joint", "apart", "larc"])
def test_a_step_of_lars_starts_as_many_operations_for_many_parameters(
    denominator: str, in_buffer: bool, scaled: bool
) -> None:
    """A ResNet-50 has 161 parameters; one launch for each would cost the host more than the step's arithmetic."""
    few, many = (launches_of_a_step(count, denominator, in_buffer, scaled) for count in (2, 60))
    assert few == many and any("_foreach_norm" in name for name in few)
    assert len(many) < 60, "less than one for each of 120 parameters"


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lars"])
def test_state_round_trips_exactly(kind: str) -> None:
    """Saved, loaded into a new optimizer and continued equals not stopping, bit for bit."""

    def step(toy: Toy, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in toy.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate(optimizer, 0.1 + 0.01 * seed)
        optimizer.step()

    torch.manual_seed(0)
    config = OptimConfig(kind=kind, exclude="bias_bn", weight_decay=0.05, lars=LarsConfig(lr_in_buffer=True))
    straight = Toy()
    optimizer = build_optimizer(straight, config, 256)
    for seed in range(2):
        step(straight, optimizer, seed)
    resumed = copy.deepcopy(straight)
    second = build_optimizer(resumed, config, 256)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [g["name"] for g in second.param_groups] == [g["name"] for g in optimizer.param_groups]
    for seed in (2, 3):
        step(straight, optimizer, seed)
        step(resumed, second, seed)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_sgd_and_adamw_to_the_formula() -> None:
    for kind in ("sgd", "adamw"):
        torch.manual_seed(0)
        toy = Toy().double()
        parameter = toy.predictor.weight
        w = parameter.detach().clone()
        config = OptimConfig(kind=kind, lr=0.1, lr_reference_batch=0, weight_decay=0.2, betas=(0.8, 0.95), eps=1e-3)
        optimizer = build_optimizer(toy, config, 64)
        buffer, first, second = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
        for t, rate in enumerate((0.1, 0.3), start=1):
            set_learning_rate(optimizer, rate)
            g = torch.randn_like(w)
            parameter.grad = g.clone()
            optimizer.step()
            if kind == "sgd":
                buffer = 0.9 * buffer + g + 0.2 * w
                w = w - rate * buffer
            else:
                first, second = 0.8 * first + 0.2 * g, 0.95 * second + 0.05 * g * g
                unbiased = (second / (1 - 0.95**t)).sqrt() + 1e-3
                w = w * (1 - rate * 0.2) - rate * (first / (1 - 0.8**t)) / unbiased
            torch.testing.assert_close(parameter.detach(), w, rtol=1e-10, atol=1e-12)


def test_clipping_and_its_measure() -> None:
    toy = Toy()
    optimizer = build_optimizer(toy, OptimConfig(), 256)
    assert clip_or_measure(optimizer, OptimConfig()) == 0.0
    for parameter in toy.parameters():
        parameter.grad = torch.randn_like(parameter)
    trained = [p for p in toy.parameters() if p.requires_grad]
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in trained))
    before = [p.grad.clone() for p in trained]
    assert clip_or_measure(optimizer, OptimConfig()).item() == pytest.approx(norm, rel=1e-5)
    assert all(torch.equal(p.grad, b) for p, b in zip(trained, before, strict=True))
    assert clip_or_measure(optimizer, OptimConfig(clip_grad_norm=2 * norm)).item() == pytest.approx(norm, rel=1e-5)
    assert all(torch.equal(p.grad, b) for p, b in zip(trained, before, strict=True))
    clip_or_measure(optimizer, OptimConfig(clip_grad_norm=0.5))
    for parameter, b in zip(trained, before, strict=True):
        torch.testing.assert_close(parameter.grad, b * (0.5 / norm), rtol=1e-4, atol=1e-7)


def test_wrong_settings_are_named() -> None:
    for changes, words in (
        ({"kind": "adam"}, "optim.kind 'adam' is unknown"),
        ({"lr": -1.0}, "optim.lr -1.0 is negative"),
        ({"betas": (0.9,)}, "must be two numbers"),
        ({"sgd_momentum": 1.0}, "outside 0..1"),
    ):
        with pytest.raises(ValueError, match=words):
            build_optimizer(Toy(), OptimConfig(**changes), 256)


def test_every_setting_has_help() -> None:
    from train.config import EmaConfig, ScheduleConfig
    from train.fields import flatten

    for config in (OptimConfig, LarsConfig, ScheduleConfig, EmaConfig):
        for leaf in flatten(config()).values():
            assert leaf.option.help, leaf.name


def test_excluded_parameters_may_have_a_share_of_the_learning_rate() -> None:
    config = OptimConfig(kind="lars", lr=0.2, lr_reference_batch=256, exclude="1d", excluded_lr_share=0.024)
    optimizer = build_optimizer(Toy(), config, 2048)

    def rates() -> dict[bool, float]:
        return {group["adapt"]: group["lr"] for group in optimizer.param_groups}

    assert rates() == {True: pytest.approx(1.6), False: pytest.approx(0.0384)}
    set_learning_rate(optimizer, 0.5)
    assert rates() == {True: pytest.approx(0.5), False: pytest.approx(0.012)}
