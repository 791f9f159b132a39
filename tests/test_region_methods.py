"""Methods with and without region swapping against their formulas in float64, with every switch of the papers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.hyperparameters import RegionConfig
from models.methods import METHODS, region_method
from models.methods.region_method import Regions, embed_with_regions, paste_sources, source_positions
from models.norm import GroupBatchNorm
from tests.method_cases import BATCH, GROUP, build, composite, make_inputs, partners, small_config
from tests.method_references import REFERENCES, check_against_formula, gap, ready, rows_n

REGION_METHODS = [name for name in REFERENCES if name.startswith("regioncl")]
QUEUE_METHODS = ["moco-v2", "regioncl-m", "densecl", "regioncl-d"]


@pytest.mark.parametrize("name", REFERENCES)
def test_loss_and_gradients_equal_the_formula(name):
    check_against_formula(name, *ready(name))


# RegionCL Table 10 and the project's own decisions, each on the methods where it computes something else.
SWITCHES = [
    *[(name, {"region_use_paste": False, "region_intra_negative": False}) for name in REGION_METHODS],
    *[(name, {"region_use_canvas": False, "region_intra_negative": False}) for name in REGION_METHODS],
    *[(name, {"region_use_paste": False, "region_use_canvas": False}) for name in ("regioncl-m", "regioncl-moby")],
    ("regioncl-s", {"region_use_paste": False, "region_use_canvas": False, "region_intra_negative": False}),
    *[(name, {"region_intra_negative": False}) for name in REGION_METHODS if name != "regioncl-s"],
    *[(name, {"region_use_canvas": False}) for name in ("regioncl-m", "regioncl-m3", "regioncl-moby")],
    *[(name, {"region_use_paste": False}) for name in ("regioncl-m", "regioncl-m3", "regioncl-moby")],
    *[(name, {"region_weight": 0.3}) for name in REGION_METHODS],
    *[(name, {"region_views": "first"}) for name in REGION_METHODS],
    *[(name, {"region_head_batching": "separate"}) for name in REGION_METHODS],
    *[(name, {"region_shared_forward": True}) for name in REGION_METHODS],
    *[(name, {"region_pairing_scope": "global"}) for name in REGION_METHODS],
]


@pytest.mark.parametrize(("name", "changes"), SWITCHES, ids=str)
def test_switches_equal_the_formula(name, changes):
    if name == "regioncl-s":
        changes = {"region_intra_negative": False, **changes}
    check_against_formula(name, *ready(name, **changes))


@pytest.mark.parametrize(
    ("name", "reduce"), [*[(name, "sum") for name in QUEUE_METHODS], ("moco-v2", "mean"), ("regioncl-m", "mean")]
)
def test_symmetric_forms_equal_the_formula(name, reduce):
    symmetric = METHODS[name].Config().symmetric
    method, inputs = ready(name, symmetric=dataclasses.replace(symmetric, enabled=True, reduce=reduce))
    assert method.key_directions == 2 and len(inputs.mixed) == (2 if "region" in name else 0)
    check_against_formula(name, method, inputs)
    output = method(inputs)
    method.after_step(output, 0.9)
    for queue_name, queue in method.queues().items():
        expected = torch.cat([output.keys[f"{queue_name}/view2"], output.keys[f"{queue_name}/view1"]])
        torch.testing.assert_close(queue.rows[: 2 * BATCH], expected)
        assert queue.pointer == 2 * BATCH


def test_symmetric_first_view_swaps_only_the_first_query():
    symmetric = METHODS["regioncl-m"].Config().symmetric
    changes = {"symmetric": dataclasses.replace(symmetric, enabled=True), "region_views": "first"}
    method, inputs = ready("regioncl-m", **changes)
    assert list(inputs.mixed) == ["view1"]
    check_against_formula("regioncl-m", method, inputs)


@pytest.mark.parametrize("name", ["moco-v2", "densecl"])
def test_without_shuffling_keys_need_no_permutation(name):
    method, inputs = ready(name, shuffle_bn=False)
    assert inputs.key_permutation == ()
    check_against_formula(name, method, inputs)


def test_dense_weight_and_warm_up():
    method, inputs = ready("densecl", dense_weight=0.2, dense_warmup_steps=2)
    warm = method(inputs)  # step 1
    torch.testing.assert_close(warm.loss.detach(), warm.metrics["ins"])
    warm.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in method.dense_projector.parameters())
    later = method(dataclasses.replace(inputs, step=2))
    torch.testing.assert_close(later.loss.detach(), 0.8 * later.metrics["ins"] + 0.2 * later.metrics["dense"])
    check_against_formula("densecl", method, dataclasses.replace(inputs, step=2))


@pytest.mark.parametrize("name", ["densecl", "regioncl-d"])
def test_warm_up_counts_optimizer_steps(name):
    """With two micro-batches passes 2 and 3 belong to optimizer step 1, passes 4 and 5 to step 2."""
    method, inputs = ready(name, dense_warmup_steps=2)
    instance, dense = torch.tensor(3.0), torch.tensor(5.0)
    for number, expected in ((3, 3.0), (4, 4.0)):
        micro = dataclasses.replace(inputs, step=number, micro_batches=2)
        assert method.weigh(instance, dense, micro).item() == expected


@pytest.mark.parametrize("name", ["densecl", "regioncl-d"])
def test_dense_queue_takes_the_mean_before_its_length(name):
    """methods.md 1.7: one key an image, the spatial mean of dense embeddings that are not yet normalised."""
    method, inputs = ready(name, shuffle_bn=False)
    with torch.no_grad():
        dense = method.momentum_dense_projector(method.momentum_encoder(inputs.view2))
    expected = rows_n(gap(dense))
    normalised_first = rows_n(gap(dense / dense.norm(dim=1, keepdim=True)))
    method.after_step(method(inputs), 0.9)
    torch.testing.assert_close(method.dense_queue.rows[:BATCH], expected.to(method.dense_queue.rows))
    assert not torch.allclose(expected, normalised_first, rtol=1e-3)


@pytest.mark.parametrize("name", QUEUE_METHODS)
def test_symmetric_forms_can_enqueue_the_first_direction_alone(name):
    symmetric = dataclasses.replace(METHODS[name].Config().symmetric, enabled=True, enqueue="first")
    method, inputs = ready(name, symmetric=symmetric)
    check_against_formula(name, method, inputs)
    output = method(inputs)
    assert set(output.keys) == {f"{queue}/view2" for queue in method.queues()}
    method.after_step(output, 0.9)
    assert all(queue.pointer == BATCH for queue in method.queues().values())


def test_projector_may_be_linear():
    check_against_formula("moco-v2", *ready("moco-v2", mlp=False))


def test_region_loss_off_is_the_base_method():
    """With both views of the composite off, RegionCL-M asks for no composite and equals MoCo v2."""
    off = {"region_use_paste": False, "region_use_canvas": False}
    method = build("regioncl-m", small_config("regioncl-m", **off))
    base = build("moco-v2", small_config("moco-v2", conv_init="fan_in", head_init="fan_in"))
    inputs = make_inputs(method, 0)
    assert method.mixed_views == () and not inputs.mixed
    assert torch.equal(method(inputs).loss, base(inputs).loss)


def test_simsiam_regions_refuse_negatives():
    with pytest.raises(ValueError, match="--region.intra-negative false"):
        build("regioncl-s", small_config("regioncl-s", region_intra_negative=True))


@pytest.mark.parametrize("name", ["regioncl-m", "regioncl-s"])
def test_one_pass_leaves_the_running_statistics_of_two(name):
    (shared, inputs), (apart, _) = ready(name, region_shared_forward=True), ready(name)
    shared(inputs)
    apart(inputs)
    for key, value in apart.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[key], value, rtol=1e-9, atol=1e-12)


# Bookkeeping


def test_paste_meets_its_own_image_on_a_three_cycle():
    """Composite i holds the region of partner[i]; image j's region then lies in composite inverse[j]."""
    partner = torch.tensor([1, 2, 0])
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 64, 64)
    mixed = composite(images, partner, (0, 0, 1, 1))
    assert mixed[:, 0, 0, 0].tolist() == [1, 2, 0] and mixed[:, 0, 63, 63].tolist() == [0, 1, 2]
    keys = torch.eye(3)
    sources = paste_sources(keys, partner, RegionConfig())
    assert sources.argmax(1).tolist() == mixed[:, 0, 0, 0].tolist()


def test_source_positions_count_from_the_rank():
    partner = torch.tensor([1, 2, 0])
    own, source = source_positions(partner, 2, RegionConfig())
    assert own.tolist() == [6, 7, 8] and source.tolist() == [7, 8, 6]
    own, source = source_positions(torch.tensor([7, 0, 3]), 1, RegionConfig(pairing_scope="global"))
    assert own.tolist() == [3, 4, 5] and source.tolist() == [7, 0, 3]


def test_pairs_of_the_test_batch_are_no_involution():
    for scope in ("group", "global"):
        partner = partners(scope)
        assert not torch.equal(partner[partner], torch.arange(BATCH)) and (partner != torch.arange(BATCH)).all()


@pytest.mark.parametrize("batching", ["joint", "separate"])
def test_joint_heads_keep_groups_of_images_together(batching):
    """Batch norm by groups in a head sees all rows of a group's images: equal to each group passed alone."""
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(5, 6), GroupBatchNorm(6)).double()
    head[1].group_size = GROUP
    instance, canvas, paste = torch.randn(3, BATCH, 5, dtype=torch.float64)
    out, regions = embed_with_regions(head, instance, Regions(canvas, paste), batching)
    assert regions is not None and head[1].group_size == GROUP
    for first in range(0, BATCH, GROUP):
        rows = slice(first, first + GROUP)
        blocks = [instance[rows], canvas[rows], paste[rows]]
        together = [blocks] if batching == "joint" else [blocks[:1], blocks[1:]]
        alone = torch.nn.Sequential(head[0], torch.nn.BatchNorm1d(6).double())
        expected = [part for group in together for part in alone(torch.cat(group)).chunk(len(group))]
        for got, want in zip((out[rows], *(part[rows] for part in regions.present())), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_only_needed_regions_are_embedded():
    config = RegionConfig(use_canvas=False, intra_negative=False)
    assert config.needs_paste and not config.needs_canvas
    assert RegionConfig(use_canvas=False).needs_canvas  # as the paste's negative
    pooled = region_method.pool_regions(torch.randn(2, 3, 2, 2), torch.tensor([[0, 0, 1, 1]] * 2), config)
    assert pooled.canvas is None and pooled.paste is not None


def test_all_region_methods_share_one_set_of_options():
    for name in REGION_METHODS:
        assert isinstance(METHODS[name].Config().region, RegionConfig)


def test_an_extra_head_has_a_queue_and_half_of_the_loss() -> None:
    """LEWEL's Table 6 control: the mean of what MoCo v2 computes with either head, and both queues take the keys."""
    method, inputs = ready("moco-v2", extra_head=True)
    losses = {}
    for prefix, queue in (("", "queue"), ("extra_", "extra_queue")):
        single, _ = ready("moco-v2")
        single.encoder.load_state_dict(method.encoder.state_dict())
        single.momentum_encoder.load_state_dict(method.momentum_encoder.state_dict())
        for name in ("projector", "momentum_projector"):
            source = name.replace("projector", f"{prefix}projector")
            getattr(single, name).load_state_dict(getattr(method, source).state_dict())
        single.queue.load_state_dict(getattr(method, queue).state_dict())
        losses[prefix] = single(inputs).loss.item()
    output = method(inputs)
    assert losses[""] != losses["extra_"]
    assert output.loss.item() == pytest.approx((losses[""] + losses["extra_"]) / 2, rel=1e-9)
    assert {name.partition("/")[0] for name in output.keys} == {"queue", "extra_queue"} == set(method.host_state())
    output.loss.backward()
    assert all(p.grad is not None for p in method.extra_projector.parameters())
    method.after_step(output, 0.9)
    assert set(method.host_state().values()) == {len(inputs.view1)}


@pytest.mark.parametrize("name", ["regioncl-m", "densecl", "regioncl-d"])
def test_an_extra_head_is_for_moco_v2_alone(name: str) -> None:
    with pytest.raises(ValueError, match="--extra-head"):
        ready(name, extra_head=True)
