"""The graphed step: same losses and weights as the plain one, with a capture that repeats the work on the CPU."""

import copy
import inspect
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from models.methods import METHODS
from models.methods.base import StepInputs
from tests.distributed import run_ranks
from train.cuda_graph import GradientExchange, GraphedForwardBackward, capture_cuda
from train.errors import UserMistake
from train.main import main
from train.proving.gradients import gradient_problem
from train.runtime import Runtime, wrap_distributed

CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, False)


def repeat(function):
    """Stands in for a CUDA graph: a replay does the same work and leaves its results in the same tensors."""
    owner = function.__self__
    parameters = list(owner.method.parameters())
    function()
    output, gradients = owner._output, [p.grad for p in parameters]

    def replay():
        for parameter in parameters:
            parameter.grad = None
        function()
        for parameter, first in zip(parameters, gradients, strict=True):
            if first is not None:
                first.copy_(parameter.grad)
            parameter.grad = None
        with torch.no_grad():
            output.loss.copy_(owner._output.loss)
            for name, tensor in output.keys.items():
                tensor.copy_(owner._output.keys[name])
        owner._output = output

    return replay


def capture(function):
    # A real capture launches nothing: undo what the stand-in's first run did to running statistics.
    method = function.__self__.method
    before = [buffer.clone() for buffer in method.buffers()]
    replay = repeat(function)
    for buffer, saved in zip(method.buffers(), before, strict=True):
        buffer.copy_(saved)
    return replay


def make_method(name="moco-v2"):
    torch.manual_seed(0)
    cls = METHODS[name]
    return cls(cls.Config(queue_size=16), arch="resnet18", image_size=32, bn_group_size=2)


def make_inputs(step):
    torch.manual_seed(step)
    views = torch.randn(2, 4, 3, 32, 32)
    return StepInputs(views[0], views[1], step=step, key_permutation=(torch.randperm(4),))


def train(method, forward_backward):
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for step in range(3):
        output = forward_backward(make_inputs(step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(output, 0.9)
        losses.append(float(output.loss.detach()))
    return losses


def test_equals_the_plain_step():
    method = make_method()
    plain = copy.deepcopy(method)

    def plain_step(inputs):
        output = plain(inputs)
        output.loss.backward()
        return output

    expected = train(plain, plain_step)
    assert train(method, GraphedForwardBackward(method, CPU, capture)) == pytest.approx(expected, rel=1e-6)
    for (name, ours), theirs in zip(method.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def crops(step):
    torch.manual_seed(step)
    views, small = torch.randn(2, 4, 3, 32, 32), torch.randn(2, 4, 3, 16, 16)
    return StepInputs(views[0], views[1], step=step, small_views=tuple(small))


def make_swav(queue_size):
    torch.manual_seed(0)
    config = METHODS["swav"].Config(prototypes=6, dim=8, hidden_dim=8, queue_size=queue_size)
    return METHODS["swav"](config, arch="resnet10-w16", image_size=32)


def test_small_crops_are_inputs_of_the_graph_too():
    method = make_swav(0)
    graphed, plain = GraphedForwardBackward(method, CPU, capture), copy.deepcopy(method)
    for step in range(2):
        assert float(graphed(crops(step)).loss) == pytest.approx(float(plain(crops(step)).loss.detach()), rel=1e-5)


def test_a_queue_that_begins_in_an_epoch_is_refused():
    with pytest.raises(UserMistake, match="computes with the epoch"):
        GraphedForwardBackward(make_swav(8), CPU, capture)(crops(0))


def gradients(method):
    return {name: p.grad.detach().cpu().clone() for name, p in method.named_parameters() if p.grad is not None}


def reference_gradients(method, inputs):
    """Gradients of the plain step in fp32."""
    plain = copy.deepcopy(method)
    plain(inputs).loss.backward()
    return gradients(plain)


def test_gradients_are_those_of_the_plain_step():
    method = make_method()
    graphed = GraphedForwardBackward(method, CPU, capture)
    for step in range(2):
        reference = reference_gradients(method, make_inputs(step))
        graphed(make_inputs(step))
        assert gradient_problem(gradients(method), reference, torch.float32) == ""


@pytest.mark.parametrize("factor", [2.0, 0.0, -1.0])
def test_wrong_gradients_of_the_trunk_are_seen(factor):
    method = make_method()
    reference = reference_gradients(method, make_inputs(0))
    for parameter in method.encoder.parameters():
        parameter.register_hook(lambda gradient: gradient * factor)
    GraphedForwardBackward(method, CPU, capture)(make_inputs(0))
    assert "the gradient of encoder" in gradient_problem(gradients(method), reference, torch.float32)


def test_a_method_that_reads_the_step_is_refused():
    class Reads(torch.nn.Module):
        def forward(self, inputs):
            return inputs.step

    with pytest.raises(UserMistake, match="computes with the step"):
        GraphedForwardBackward(Reads(), CPU, capture)(make_inputs(0))


def test_what_a_graph_cannot_serve_is_refused():
    method = torch.nn.Linear(1, 1)
    with pytest.raises(UserMistake, match="needs a CUDA device"):
        GraphedForwardBackward(method, CPU)
    with pytest.raises(UserMistake, match="loss scale"):
        GraphedForwardBackward(method, replace(CPU, dtype=torch.float16), capture)
    graphed = GraphedForwardBackward(make_method(), CPU, capture)
    graphed(make_inputs(0))
    smaller = make_inputs(1)
    smaller.view1 = smaller.view1[:2]
    with pytest.raises(UserMistake, match="changed their shapes"):
        graphed(smaller)


def steps_of_a_rank(rank, world, graphed):
    """Losses and state after three steps of one rank, graphed or through DDP; rank 1 starts from other weights."""
    runtime = replace(CPU, rank=rank, world_size=world)
    method = make_method()
    with torch.no_grad():
        next(method.encoder.parameters()).add_(rank)
    if graphed:
        step = GraphedForwardBackward(method, runtime, capture)
    else:
        wrapped = wrap_distributed(method, runtime, False)

        def step(inputs):
            output = wrapped(inputs)
            output.loss.backward()
            return output

    def of_this_rank(inputs):
        # Other images on each rank, and one permutation of all.
        torch.manual_seed(7)
        return step(replace(inputs, view1=inputs.view1 + rank, key_permutation=(torch.randperm(4 * world),)))

    return train(method, of_this_rank), method.state_dict()


def test_ranks_average_their_gradients_as_ddp_does(tmp_path):
    folders = [tmp_path / "graphed", tmp_path / "ddp"]
    for folder in folders:
        folder.mkdir()
    ours, ddp = (run_ranks(steps_of_a_rank, 2, folder, folder.name == "graphed") for folder in folders)
    for (losses, state), (expected, reference) in zip(ours, ddp, strict=True):
        assert losses == expected
        for name, tensor in state.items():
            assert torch.equal(tensor, reference[name]), name
    # Ranks differ in what they have seen, and in nothing that is trained.
    assert ours[0][0] != ours[1][0]
    trained = [name for name, _ in make_method().named_parameters()]
    assert all(torch.equal(ours[0][1][name], ours[1][1][name]) for name in trained)


def test_averaged_gradients_keep_dtype_and_layout():
    weight = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    gradients = [torch.randn(5), weight, torch.randn(2).double(), torch.randn(7)]
    averaged = GradientExchange(gradients, 2).averaged
    assert [each.dtype for each in averaged] == [each.dtype for each in gradients]
    assert [each.stride() for each in averaged] == [each.stride() for each in gradients]
    for number, each in enumerate(averaged):
        each.fill_(number)
    assert [each.unique().tolist() for each in averaged] == [[0], [1], [2], [3]], "none overlaps another"


def test_a_capture_leaves_other_threads_alone(monkeypatch):
    """Loaders take page-locked memory in threads of their own, which a capture in the default mode would trip over."""
    entered: list[object] = []
    known = inspect.signature(torch.cuda.graph.__init__).parameters

    @contextmanager
    def graph(*arguments, **options):
        assert set(options) <= set(known)
        entered.append(options)
        yield

    class Graph:
        def replay(self):
            entered.append("replayed")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    capture_cuda(lambda: entered.append("recorded"))()
    assert entered == [{"capture_error_mode": "thread_local"}, "recorded", "replayed"]


@pytest.mark.gpu
def test_replays_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    runtime = replace(CPU, device=torch.device("cuda"))
    method = make_method().cuda()
    plain = copy.deepcopy(method)

    def on_gpu(step):
        inputs = make_inputs(step)
        return replace(inputs, view1=inputs.view1.cuda(), view2=inputs.view2.cuda())

    graphed = GraphedForwardBackward(method, runtime)
    for step in range(3):
        reference = reference_gradients(method, on_gpu(step))
        output = graphed(on_gpu(step))
        # TF32 convolutions where PyTorch uses them: direction and length still tell a wrong gradient.
        assert gradient_problem(gradients(method), reference, torch.float32) == ""
        expected = plain(on_gpu(step))
        torch.testing.assert_close(output.loss, expected.loss.detach(), rtol=1e-3, atol=1e-3)


def test_the_flag_without_a_gpu_is_the_users_mistake(tmp_path, capsys):
    flags = "--method moco-v2 --loader synthetic --data 64 --arch resnet18 --image-size 32 --global-batch 4"
    flags += " --queue-size 8 --bn.group-size 0 --device cpu --cuda-graph --run-dir"
    assert main([*flags.split(), str(tmp_path / "run")]) == 2
    assert "--cuda-graph needs a CUDA device" in capsys.readouterr().err
