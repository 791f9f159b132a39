"""The fused heads of the RegionCL methods: one graph, compiled once, equal to the uncompiled heads."""

import copy

import pytest
import torch

from models.methods import METHODS
from models.methods.base import StepInputs
from models.region_branch import RegionConfig, RegionHeads

BATCH, DIM, QUEUE = 4, 8, 64


def tail_inputs(step, requires_grad=True):
    generator = torch.Generator().manual_seed(step)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    unit = lambda rows: torch.nn.functional.normalize(rows, dim=1)  # noqa: E731
    pooled, mixed_map = make(BATCH, 16), make(BATCH, 16, 3, 3)
    boxes = torch.tensor([[step % 2, 0, 2, 1 + step % 2]]).expand(BATCH, 4)
    rows = [unit(make(count, DIM)) for count in (BATCH, BATCH, QUEUE)]
    if requires_grad:
        pooled.requires_grad_(), mixed_map.requires_grad_()
    return pooled, mixed_map, boxes, *rows


def losses_and_gradients(heads, projector, config, step):
    pooled, mixed_map, boxes, key, partner_key, queue = tail_inputs(step)
    losses = heads(projector, pooled, mixed_map, boxes, key, partner_key, queue, 0.2, config)
    total = sum(loss for loss in losses if loss is not None)
    wanted = [pooled, mixed_map, *projector.parameters()]
    return [loss for loss in losses if loss is not None], torch.autograd.grad(total, wanted)


@pytest.mark.parametrize("config", [RegionConfig(), RegionConfig(use_paste=False, intra_negative=False)])
def test_compiled_heads_are_one_graph_for_all_steps(config):
    projector = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, DIM))
    eager, compiled, graphs = RegionHeads(), RegionHeads(), []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled.compile(backend=count)
    for step in range(3):
        expected_losses, expected_gradients = losses_and_gradients(eager, projector, config, step)
        losses, gradients = losses_and_gradients(compiled, projector, config, step)
        torch.testing.assert_close(losses, expected_losses)
        torch.testing.assert_close(gradients, expected_gradients)
    assert len(graphs) == 1, "a second graph means a break or a recompilation"
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("queue_sumexp" in target for target in targets) == 1, "one product with the queue for all branches"


@pytest.mark.parametrize("name", ["regioncl-m", pytest.param("regioncl-d", marks=pytest.mark.slow)])
def test_methods_hand_their_heads_to_the_compiler(name):
    torch.manual_seed(0)
    cls = METHODS[name]
    method = cls(cls.Config(queue_size=16), arch="resnet18", image_size=64)
    plain = copy.deepcopy(method)
    targets = method.compile_targets()
    assert method.heads in targets and method.projector not in targets
    assert not any("heads" in key for key in method.state_dict())
    torch._dynamo.reset()
    for target in targets:
        target.compile(backend="eager")
    images = torch.randn(3, BATCH, 3, 64, 64)
    inputs = StepInputs(
        view1=images[0],
        view2=images[1],
        mixed={"view1": images[2]},
        box_cells={"view1": torch.tensor([[0, 0, 1, 1]] * BATCH)},
        partner={"view1": torch.arange(BATCH).flip(0)},
        key_permutation=(torch.arange(BATCH),),
    )
    torch.testing.assert_close(method(inputs).loss, plain(inputs).loss)


def test_a_graph_break_is_an_error():
    class Breaking(torch.nn.Module):
        def forward(self, rows):
            torch._dynamo.graph_break()
            return rows[:, :DIM]

    heads = RegionHeads()
    torch._dynamo.reset()
    heads.compile(backend="eager")
    pooled, mixed_map, boxes, key, partner_key, queue = tail_inputs(0, requires_grad=False)
    with pytest.raises(Exception, match="graph_break"):
        heads(Breaking(), pooled, mixed_map, boxes, key, partner_key, queue, 0.2, RegionConfig())
