"""CARE's attention, transformer stream and losses against the formulas, its options, and planted faults."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.attention_stream import AttentionBlock, AttentionStream, CellAttention, Position, sincos_table
from models.methods import METHODS, care
from models.methods.base import StepInputs
from models.norm import GroupBatchNorm, SyncBatchNorm
from tests.formula import assert_same_gradients, batch_norm, mlp, pooled, unit
from tests.method_cases import build, make_inputs, small_config
from tests.method_references import gradients, ready

POSITIONS: tuple[Position, ...] = ("absolute", "relative", "sincos", "none")


def attention_reference(x: Tensor, attention: Any) -> Tensor:
    """Pair by pair: softmax over keys of (q.k + pos) / sqrt(d), heads side by side."""
    batch, _, side, _ = x.shape
    heads, dim = attention.heads, attention.head_dim
    qkv = torch.einsum("bcyx,oc->byxo", x, attention.to_qkv.weight[:, :, 0, 0])
    inner = heads * dim
    query, key, value = (
        qkv[..., i * inner : (i + 1) * inner].reshape(batch, side * side, heads, dim) for i in range(3)
    )
    cells = [(y, x) for y in range(side) for x in range(side)]
    outputs = []
    for i, (yi, xi) in enumerate(cells):
        logits = []
        q = query[:, i] * dim**-0.5
        for j, (yj, xj) in enumerate(cells):
            logit = (q * key[:, j]).sum(-1)
            if attention.pos == "absolute":
                logit = logit + (q * (attention.row[yj] + attention.col[xj])).sum(-1)
            elif attention.pos == "relative":
                table = attention.rel_w[xj - xi + side - 1] + attention.rel_h[yj - yi + side - 1]
                logit = logit + (q * table).sum(-1)
            elif attention.pos == "sincos":
                logit = logit + (q * attention.table[j]).sum(-1)
            logits.append(logit)
        stacked = torch.stack(logits).exp()  # (N, B, h)
        share = stacked / stacked.sum(0, keepdim=True)
        outputs.append(sum(share[j][..., None] * value[:, j] for j in range(len(cells))))
    out = torch.stack(outputs, dim=1).reshape(batch, side, side, inner)
    return out.permute(0, 3, 1, 2)


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_fused_attention_is_exact(pos: Position, channels_last: bool) -> None:
    """The positional term folded into keys or bias changes nothing: values and all gradients."""
    torch.manual_seed(0)
    attention = CellAttention(5, 3, heads=2, head_dim=4, pos=pos).double()
    x = torch.randn(3, 5, 3, 3, dtype=torch.float64)
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    inputs = [x, *attention.parameters()]
    actual, expected = attention(x), attention_reference(x, attention)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(actual)
    for a, b in zip(
        torch.autograd.grad((actual * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_positions_matter_and_start_as_published() -> None:
    torch.manual_seed(0)
    outputs = {}
    for pos in POSITIONS:
        torch.manual_seed(1)
        attention = CellAttention(5, 3, heads=2, head_dim=4, pos=pos)
        outputs[pos] = attention(torch.ones(1, 5, 3, 3) + torch.arange(9.0).view(1, 1, 3, 3))
    for a in POSITIONS:
        for b in POSITIONS:
            assert a == b or not torch.allclose(outputs[a], outputs[b])
    table = CellAttention(8, 40, heads=1, head_dim=64, pos="absolute").row
    assert table.std().item() == pytest.approx(1 / 8, rel=0.05)
    with pytest.raises(ValueError, match="--pos learned is unknown"):
        CellAttention(8, 4, heads=1, head_dim=4, pos="learned")  # type: ignore[arg-type]


def test_sincos_table_tells_cells_apart() -> None:
    table = sincos_table(7, 8)
    torch.testing.assert_close(
        table[9],
        torch.tensor(
            [  # y = 1, x = 2
                math.sin(2),
                math.sin(2 / 100),
                math.cos(2),
                math.cos(2 / 100),
                math.sin(1),
                math.sin(1 / 100),
                math.cos(1),
                math.cos(1 / 100),
            ]
        ),
    )
    assert torch.cdist(table, table).add(torch.eye(49) * 9).min() > 0.1
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_table(7, 6)


def conv(x: Tensor, layer: Any) -> Tensor:
    return nn.functional.conv2d(x, layer.weight, None, layer.stride, layer.padding)


def block_reference(x: Tensor, block: Any) -> Tensor:
    """Section 3.2 of the method specification, layer by layer."""
    main = batch_norm(conv(x, block.reduce), block.reduce_norm).clamp(min=0)
    main = attention_reference(main, block.attention)
    if isinstance(block.pool, nn.AvgPool2d):
        side = main.shape[2]
        cells = [main[:, :, y : y + 2, x : x + 2].mean((2, 3)) for y in range(0, side, 2) for x in range(0, side, 2)]
        main = torch.stack(cells, -1).unflatten(2, (-(-side // 2), -1))
    main = batch_norm(main, block.attention_norm).clamp(min=0)
    main = batch_norm(conv(main, block.expand), block.expand_norm)
    short = x
    if isinstance(block.shortcut, nn.Sequential):
        short = batch_norm(conv(x, block.shortcut[0]), block.shortcut[1]).clamp(min=0)
    return (main + short).clamp(min=0)


@pytest.mark.parametrize("side", [4, 5])
def test_stream_equals_the_formula(side: int) -> None:
    """A halving and a plain block, also where the side is odd."""
    torch.manual_seed(0)
    stream = AttentionStream(3, 16, side, blocks=2, heads=2, pos="absolute").double()
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    expected = x
    for block in stream:
        expected = block_reference(expected, block)
    actual = stream(x)
    assert actual.shape == (2, 16, (side + 1) // 2, (side + 1) // 2)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def care_reference(method: Any, inputs: StepInputs) -> Tensor:
    config = method.config
    parallel = config.design == "parallel"

    def embed(view: Tensor, prefix: str) -> tuple[Tensor | None, Tensor]:
        middle, last = getattr(method, f"{prefix}encoder").forward_stages(view)
        x = last if config.t_input == "layer4" or not parallel else middle
        for block in getattr(method, f"{prefix}attention_stream"):
            x = block_reference(x, block)

        def head(stream: str, feature_map: Tensor) -> Tensor:
            z = mlp(pooled(feature_map)[:, None], getattr(method, f"{prefix}{stream}_projector"))
            return unit((z if prefix else mlp(z, getattr(method, f"{stream}_predictor")))[:, 0])

        return (head("conv", last) if parallel else None), head("attn", x)

    views = (inputs.view1, inputs.view2)
    online = [embed(view, "") for view in views]
    with torch.no_grad():
        teacher = [embed(view, "momentum_") for view in views]
    total = torch.zeros(())
    batch = len(inputs.view1)
    for stream in (0, 1) if parallel else (1,):
        for q, k in ((online[0][stream], teacher[1][stream]), (online[1][stream], teacher[0][stream])):
            for row, other in zip(q, k, strict=True):
                total = total + (2 - 2 * (row * other).sum()) / batch
    if parallel:
        for c, a in online + (teacher if config.att_teacher_terms else []):
            difference = c - a.detach()
            squares = (difference**2).sum(1)
            term = squares.sum() / c.numel() if config.att_loss == "mse_mean" else squares.sqrt().sum() / batch
            total = total + config.lambda_att * term
    return total


def check(method: Any, inputs: StepInputs) -> None:
    other = copy.deepcopy(method)
    expected = care_reference(other, inputs)
    output = method(inputs)
    torch.testing.assert_close(output.loss, expected, rtol=1e-7, atol=1e-9)
    assert_same_gradients(gradients(method, output.loss), gradients(other, expected))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"pos": "relative", "att_loss": "l2norm"},
    {"pos": "none", "att_teacher_terms": False, "lambda_att": 7.0},
    {"pos": "sincos", "heads": 2, "n_blocks": 1, "t_input": "layer4"},
    {"design": "sequential"},
]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_loss_and_gradients_equal_the_formula(changes: dict[str, Any]) -> None:
    method, inputs = ready("care", **changes)
    check(method, inputs)
    names = {"attn"} if method.config.design == "sequential" else {"attn", "conv", "att"}
    assert set(method(inputs).metrics) == names


def test_parts_add_up_and_teacher_terms_are_a_constant() -> None:
    method, inputs = ready("care")
    output = copy.deepcopy(method)(inputs)
    torch.testing.assert_close(output.loss, sum(output.metrics.values()))
    without = copy.deepcopy(method)
    without.config = care.CareConfig(**{**vars(method.config), "att_teacher_terms": False})
    plain = without(inputs)
    assert output.loss > plain.loss
    assert_same_gradients(gradients(method, method(inputs).loss), gradients(without, plain.loss))


def test_attention_loss_in_closed_form() -> None:
    """100 times the mean squared difference of unit rows of 256 is 0.78125 (1 - cos)."""
    torch.manual_seed(0)
    c, a = unit(torch.randn(5, 256).double()), unit(torch.randn(5, 256).double())
    cosine = (c * a).sum(1)
    torch.testing.assert_close(100 * care.attention_loss(c, a, "mse_mean"), 0.78125 * (1 - cosine).mean())
    torch.testing.assert_close(care.attention_loss(c, a, "l2norm"), (2 - 2 * cosine).sqrt().mean())
    same = c.clone().requires_grad_()
    (grad,) = torch.autograd.grad(care.attention_loss(same, c, "l2norm"), same)
    assert bool((grad == 0).all())  # no NaN where the streams agree
    assert care.cross_view_loss([c, a], [a, c]) == pytest.approx(0.0, abs=1e-12)
    assert care.cross_view_loss([c, a], [-a, -c]) == pytest.approx(8.0)


def test_which_stream_trains_what() -> None:
    """The T-stream's loss reaches layer3 but not layer4; the attention loss trains the CNN stream only."""
    method, inputs = ready("care", lambda_att=0.0)
    online = [method.embed(view) for view in (inputs.view1, inputs.view2)]
    named = dict(method.named_parameters())

    def reached(value: Tensor) -> set[str]:
        parameters = [p for p in named.values() if p.requires_grad]
        found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
        names = {id(p): name for name, p in named.items()}
        return {names[id(p)] for p, g in zip(parameters, found, strict=True) if g is not None}

    by_attn = reached(online[0].attn.sum())
    assert any(n.startswith("encoder.layer3") for n in by_attn)
    assert not any(n.startswith(("encoder.layer4", "conv_")) for n in by_attn)
    by_supervision = reached(method._supervision(online, []))
    assert any(n.startswith("encoder.layer4") for n in by_supervision)
    assert not any(n.startswith("att") for n in by_supervision)


def test_average_covers_all_but_predictors() -> None:
    method, inputs = ready("care")
    pairs = {name for name in method._averaged}
    assert pairs == {"encoder", "attention_stream", "conv_projector", "attn_projector"}
    before = copy.deepcopy(method)
    output = method(inputs)
    statistics = copy.deepcopy(method.momentum_encoder.bn1.running_mean)
    method.after_step(output, 0.9)
    for name in pairs:
        for p, q, old in zip(
            getattr(method, name).parameters(),
            getattr(method, f"momentum_{name}").parameters(),
            getattr(before, f"momentum_{name}").parameters(),
            strict=True,
        ):
            torch.testing.assert_close(q, 0.9 * old + 0.1 * p, rtol=1e-9, atol=1e-12)
    assert torch.equal(method.momentum_encoder.bn1.running_mean, statistics)
    assert method.momentum_attention_stream.training and method.ema_index_offset == 1


def test_streams_have_batch_norms_of_their_own_kind() -> None:
    method: Any = build("care", small_config("care", t_bn_group_size=2), bn_mode="sync")
    for prefix in ("", "momentum_"):
        norms = [m for m in getattr(method, f"{prefix}attention_stream").modules() if isinstance(m, GroupBatchNorm)]
        assert norms and all(norm.group_size == 2 for norm in norms)
        for name in ("encoder", "conv_projector", "attn_projector"):
            modules = list(getattr(method, prefix + name).modules())
            assert any(isinstance(m, SyncBatchNorm) for m in modules)
            assert not any(isinstance(m, GroupBatchNorm) for m in modules)


def test_zero_init_is_an_option() -> None:
    for flag in (False, True):
        method: Any = build("care", small_config("care", t_zero_init=flag))
        gammas = [block.expand_norm.weight for block in method.attention_stream]
        assert all(bool((gamma == (0.0 if flag else 1.0)).all()) for gamma in gammas)
        assert bool((method.attention_stream[0].reduce_norm.weight == 1).all())


@pytest.mark.parametrize(
    ("size", "cells", "t_input"), [(64, 4, "layer3"), (72, 5, "layer3"), (100, 7, "layer3"), (72, 5, "layer4")]
)
def test_any_image_size(size: int, cells: int, t_input: str) -> None:
    config = small_config("care", n_blocks=2, t_input=t_input, t_bn_group_size=0)
    torch.manual_seed(0)
    method: Any = METHODS["care"](config, arch="resnet18", image_size=size)
    side = cells if t_input == "layer3" else (cells + 1) // 2
    assert method.attention_stream[0].attention.side == side
    inputs = StepInputs(torch.randn(2, 3, size, size), torch.randn(2, 3, size, size))
    assert torch.isfinite(method(inputs).loss)
    with pytest.raises(ValueError, match="--image-size"):
        method(StepInputs(torch.randn(2, 3, 160, 160), torch.randn(2, 3, 160, 160)))


def test_what_does_not_fit_is_refused() -> None:
    for changes, words in (({"n_blocks": 0}, "--n-blocks 0"), ({"heads": 3}, "--heads 3")):
        with pytest.raises(ValueError, match=words):
            build("care", small_config("care", **changes))
    with pytest.raises(ValueError, match="choose a ResNet"):
        build("care", arch="swin-narrow")
    method = build("care", small_config("care", t_bn_group_size=3))
    with pytest.raises(ValueError, match="groups of 3"):
        method(make_inputs(method, 0))


def test_parameter_counts_of_the_full_models() -> None:
    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    encoders = {"resnet50": 23_508_032, "resnet101": 42_500_160, "resnet152": 58_143_808, "resnet50-2x": 66_834_240}
    for arch, encoder in encoders.items():
        with torch.device("meta"):
            method: Any = METHODS["care"](METHODS["care"].Config(pos="absolute"), arch=arch, image_size=224)
        assert count(method.encoder) == count(method.momentum_encoder) == encoder
        assert count(method.attention_stream) == count(method.momentum_attention_stream) == 32_813_568
        assert count(method.conv_projector, method.conv_predictor) == 11_559_424
        assert count(method.attn_projector, method.attn_predictor) == 11_559_424
        assert count(method.momentum_conv_projector) == 9_449_728
        assert [block.attention.side for block in method.attention_stream] == [14, 7, 7, 7, 7]
        online = sum(p.numel() for p in method.parameters() if p.requires_grad)
        assert online == encoder + 32_813_568 + 2 * 11_559_424
        assert arch != "resnet50" or online == 79_440_448
        assert method.attention_stream[0].attention.head_dim == 128


def test_stream_traces_into_one_graph() -> None:
    method: Any = build("care", small_config("care", pos="relative"))
    assert method.attention_stream in method.compile_targets()
    x = torch.randn(8, 16, 4, 4)
    expected = copy.deepcopy(method.attention_stream)(x)
    compiled = torch.compile(method.attention_stream, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


def _supervision_not_detached(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(care, "attention_loss", lambda conv, attn, form: nn.functional.mse_loss(conv, attn))


def _same_view(patch: pytest.MonkeyPatch) -> None:
    original = care.cross_view_loss
    patch.setattr(care, "cross_view_loss", lambda online, momentum: original(online, momentum[::-1]))


def _from_last_stage(patch: pytest.MonkeyPatch) -> None:
    original = care.Care.embed

    def embed(self: Any, images: Tensor, momentum: bool = False) -> Any:
        streams = original(self, images, momentum)
        return streams._replace(conv=streams.attn)

    patch.setattr(care.Care, "embed", embed)


def _scale_after_position(patch: pytest.MonkeyPatch) -> None:
    """The scale on q k alone, the positional term unscaled."""
    original = CellAttention._key_table

    def table(self: Any) -> Any:
        found = original(self)
        return None if found is None else found * self.head_dim**0.5

    patch.setattr(CellAttention, "_key_table", table)


def _no_inner_relu(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        main = nn.functional.relu(self.reduce_norm(self.reduce(x)))
        main = self.attention_norm(self.pool(self.attention(main)))
        return nn.functional.relu(self.expand_norm(self.expand(main)) + self.shortcut(x))

    patch.setattr(AttentionBlock, "forward", forward)


def _teacher_is_the_student(patch: pytest.MonkeyPatch) -> None:
    original = care.Care.embed
    patch.setattr(care.Care, "embed", lambda self, images, momentum=False: original(self, images, False))


@pytest.mark.parametrize(
    "fault",
    [
        _supervision_not_detached,
        _same_view,
        _from_last_stage,
        _scale_after_position,
        _no_inner_relu,
        _teacher_is_the_student,
    ],
)
def test_planted_fault_is_caught(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method, inputs = ready("care", n_blocks=1, pos="absolute")
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check(method, inputs)


def test_a_frozen_momentum_network_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(care, "follow", lambda *args, **rest: None)
    with pytest.raises(AssertionError):
        test_average_covers_all_but_predictors()


@pytest.mark.parametrize(
    ("design", "setting"),
    [
        ("sequential", {"lambda_att": 10.0}),
        ("sequential", {"att_loss": "l2norm"}),
        ("sequential", {"att_teacher_terms": False}),
        ("sequential", {"t_input": "layer4"}),
        ("conv", {"lambda_att": 0.0}),
        ("conv", {"n_blocks": 2}),
        ("conv", {"pos": "absolute"}),
    ],
)
def test_a_setting_that_a_design_has_no_use_for_is_refused(design: str, setting: dict[str, Any]) -> None:
    flag = "--" + next(iter(setting)).replace("_", "-")
    with pytest.raises(ValueError, match=flag):
        build("care", care.CareConfig(design=design, **setting))


def test_the_conv_stream_alone_is_the_whole_method_without_the_other_terms() -> None:
    """L = L_c, the `conv` term of the two-stream method with the same CNN and heads; no T-stream is left."""
    whole, inputs = ready("care")
    alone: Any = build("care", small_config("care", design="conv", n_blocks=5, t_bn_group_size=0))
    alone = alone.to(next(whole.parameters()).dtype)
    missing = alone.load_state_dict(whole.state_dict(), strict=False)
    assert not missing.missing_keys and all("att" in name for name in missing.unexpected_keys)
    output = alone(inputs)
    assert set(output.metrics) == {"conv"}
    assert output.loss.item() == pytest.approx(whole(inputs).metrics["conv"].item(), rel=1e-12)
    output.loss.backward()
    assert all(p.grad is not None for p in alone.parameters() if p.requires_grad)
