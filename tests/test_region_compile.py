"""What follows the trunks of a RegionCL method: one graph, compiled once, equal to the uncompiled method."""

import copy

import pytest
import torch

from models.hyperparameters import RegionConfig
from models.methods import METHODS
from models.methods.base import StepInputs
from models.methods.region_method import CompiledMethod, Composites

BATCH, DIM, QUEUE = 4, 8, 64


def region_method(config, projector):
    """RegionCL-M with a projector of 16 features; its trunk is not used."""
    cls = METHODS["regioncl-m"]
    method = cls(cls.Config(queue_size=QUEUE, dim=DIM, region=config), arch="resnet18", image_size=64)
    method.projector = projector
    return method


def tail_inputs(step, requires_grad=True):
    generator = torch.Generator().manual_seed(step)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    unit = lambda rows: torch.nn.functional.normalize(rows, dim=1)  # noqa: E731
    pooled, mixed_map = make(BATCH, 16), make(BATCH, 16, 3, 3)
    boxes = torch.tensor([[step % 2, 0, 2, 1 + step % 2]]).expand(BATCH, 4)
    rows = [unit(make(count, DIM)) for count in (BATCH, BATCH, QUEUE)]
    if requires_grad:
        pooled.requires_grad_(), mixed_map.requires_grad_()
    return pooled, Composites(mixed_map, boxes, torch.arange(BATCH).flip(0)), *rows


def losses_and_gradients(method, step):
    pooled, composites, *rows = tail_inputs(step)
    instance, terms = method.queue_losses((method.projector,), pooled, composites, *rows)
    losses = [loss for loss in (instance, terms.canvas, terms.paste) if loss is not None]
    wanted = [pooled, composites.feature_map, *method.projector.parameters()]
    return losses, torch.autograd.grad(sum(losses), wanted)


@pytest.mark.parametrize("config", [RegionConfig(), RegionConfig(use_paste=False, intra_negative=False)])
def test_compiled_heads_are_one_graph_for_all_steps(config):
    projector = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, DIM))
    eager, compiled, graphs = region_method(config, projector), region_method(config, projector), []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled.compile_targets()[0].compile(backend=count)
    for step in range(3):
        expected_losses, expected_gradients = losses_and_gradients(eager, step)
        losses, gradients = losses_and_gradients(compiled, step)
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
    whole = [target for target in targets if isinstance(target, CompiledMethod)]
    assert [target.name for target in whole] == ["queue_losses"] and method.projector not in targets
    torch._dynamo.reset()
    for target in targets:
        target.compile(backend="eager")
    assert method.state_dict().keys() == plain.state_dict().keys()
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

    method = region_method(RegionConfig(), Breaking())
    torch._dynamo.reset()
    method.compile_targets()[0].compile(backend="eager")
    with pytest.raises(Exception, match="graph_break"):
        method.queue_losses((method.projector,), *tail_inputs(0, requires_grad=False))
