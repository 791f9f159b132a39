"""Forward and backward of a step as one CUDA graph: thousands of launches become one.

Learning rate, EMA coefficient and queue position change from step to step on the host, so optimizer, EMA and
enqueueing stay outside; with fused forms they are a handful of launches. `train/proving` decides whether a run on one
GPU uses it.

With several processes the exchanges of the forward pass (batch norm over ranks, keys) are recorded too, and gradients
are averaged after the replay, in one exchange: DDP starts its exchanges from hooks that a replay does not call.

Source: CUDA graphs as PyTorch documents them (whole-network capture).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.methods.base import Method, StepInputs, StepOutput
from models.running import moved_together

from .errors import UserMistake
from .runtime import Runtime

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]
# As in PyTorch's example of whole-network capture.
WARMUP = 3


def capture_cuda(function: Callable[[], None]) -> Replay:
    """Record what `function` launches; calling the result launches it again. `function` must have run before."""
    graph = torch.cuda.CUDAGraph()
    # A loader's thread may take page-locked memory meanwhile, which the default mode would count as an error of ours.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


class _FixedInputs(StepInputs):
    """Inputs of a graph: the contents of tensors may change; reading a number is refused, as it would be frozen."""

    def __getattribute__(self, name: str) -> object:
        if name in ("step", "seed", "epoch"):
            raise UserMistake(
                f"--cuda-graph: this method computes with the {name} on the host, which a graph would freeze; "
                "leave the flag out"
            )
        return super().__getattribute__(name)


def _tensors(inputs: StepInputs) -> list[Tensor]:
    """Every tensor of the inputs in a fixed order."""
    return [*inputs.tensors(), *inputs.key_permutation]


class GradientExchange:
    """Averages gradients over ranks in one exchange for each dtype.

    Each is divided first and then summed, as DDP does it, so that two ranks get DDP's bits.

    Args:
        gradients: what the backward pass writes, at every step into the same tensors; equal shapes on all ranks.
        world_size: number of ranks.

    Attributes:
        averaged: a tensor for each gradient, in its layout; valid until the next call.
    """

    def __init__(self, gradients: Sequence[Tensor], world_size: int) -> None:
        self._gradients, self._world_size = list(gradients), world_size
        sizes: dict[torch.dtype, int] = {}
        places: list[int] = []
        for gradient in self._gradients:
            places.append(sizes.setdefault(gradient.dtype, 0))
            sizes[gradient.dtype] += gradient.numel()
        device = self._gradients[0].device
        self._flat = {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
        # Strides too: fused optimizers walk over weight and gradient in the order of memory.
        self.averaged = [
            self._flat[gradient.dtype].as_strided(gradient.shape, gradient.stride(), place)
            for gradient, place in zip(self._gradients, places, strict=True)
        ]

    def __call__(self) -> None:
        """Fill `averaged` from what the gradients hold now; every rank must call it."""
        torch._foreach_copy_(self.averaged, self._gradients)
        for flat in self._flat.values():
            dist.all_reduce(flat.div_(self._world_size))


@torch.no_grad()
def share_state(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0, as DDP does when it is made."""
    for tensor in [*module.parameters(), *module.buffers()]:
        # A collective takes what is dense in the default layout; weights are channels-last.
        sent = tensor.detach().contiguous()
        dist.broadcast(sent, 0)
        tensor.copy_(sent)


class GraphedForwardBackward:
    """Calls like `loss = method(inputs).loss; loss.backward()`, replayed from a graph after the first call.

    With several processes gradients are averaged over them after each replay; the method must not be wrapped in DDP.

    Args:
        method: its parameters, buffers and queues must keep their storage, as in-place updates do.
        runtime: device, precision and ranks.
        capture: how to record; `capture_cuda` but in tests.

    Raises:
        UserMistake: where a graph cannot serve: no CUDA device, or fp16 with its loss scale.
    """

    def __init__(self, method: Method, runtime: Runtime, capture: Capture = capture_cuda) -> None:
        # Tests pass a capture of their own, which works on the CPU.
        if capture is capture_cuda and runtime.device.type != "cuda":
            raise UserMistake("--cuda-graph needs a CUDA device; leave it out on the CPU")
        # The loss scale is a number that changes between steps.
        if runtime.dtype is torch.float16:
            raise UserMistake("--cuda-graph works without fp16's loss scale; leave it out or take --precision bf16")
        self.method, self.runtime, self.capture = method, runtime, capture
        self._replay: Replay | None = None
        self._exchange: GradientExchange | None = None
        if runtime.world_size > 1:
            share_state(method)

    def __call__(self, inputs: StepInputs) -> StepOutput:
        """Loss, metrics and keys of the step, detached, valid until the next call; gradients are in `.grad`."""
        if self._replay is None:
            self._record(inputs)
        # After recording as well: warm-up and capture have not computed this step's result.
        self._load(inputs)
        assert self._replay is not None
        self._replay()
        if self._exchange is not None:
            self._exchange()
        # The optimizer's `zero_grad` drops gradients; the graph writes to these tensors, whoever points to them.
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._output

    def _record(self, inputs: StepInputs) -> None:
        device = self.runtime.device
        # The graph reads these addresses at each replay, so the tensors are its own: a loader uses its buffers again.
        copied = {
            name: {key: tensor.to(device).clone() for key, tensor in getattr(inputs, name).items()}
            for name in ("mixed", "box_cells", "partner", "crop_boxes")
        }
        values = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)} | copied
        for name in ("view1", "view2"):
            # In the layout of the views: another one would choose other convolutions.
            values[name] = getattr(inputs, name).clone(memory_format=torch.preserve_format)
        values["small_views"] = tuple(view.clone(memory_format=torch.preserve_format) for view in inputs.small_views)
        values["key_permutation"] = tuple(tensor.to(device).clone() for tensor in inputs.key_permutation)
        self._inputs = _FixedInputs(**values)
        self._slots = _tensors(self._inputs)
        # Before the capture: at first use libraries allocate memory and time their algorithms, which a capture forbids.
        self._warm_up()
        self._replay = self.capture(self._forward_backward)
        # Kept here, because the optimizer drops its references after each step.
        self._gradients = [(p, p.grad) for p in self.method.parameters() if p.grad is not None]
        if self.runtime.world_size > 1:
            self._exchange = GradientExchange([gradient for _, gradient in self._gradients], self.runtime.world_size)
            self._gradients = [
                (p, averaged) for (p, _), averaged in zip(self._gradients, self._exchange.averaged, strict=True)
            ]

    def _warm_up(self) -> None:
        """Let libraries choose and compile, then put back the running statistics that this has moved."""
        before = [buffer.clone() for buffer in self.method.buffers()]
        if self.runtime.device.type == "cuda":
            # PyTorch asks for warm-up on a side stream, ordered by hand with the current one.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._warm_up_steps()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            self._warm_up_steps()
        for buffer, saved in zip(self.method.buffers(), before, strict=True):
            buffer.copy_(saved)

    def _warm_up_steps(self) -> None:
        for _ in range(WARMUP):
            self._forward_backward()
            # The capture must allocate the gradients itself, in the memory that belongs to the graph.
            for parameter in self.method.parameters():
                parameter.grad = None

    def _forward_backward(self) -> None:
        with self.runtime.autocast(), moved_together():
            output: StepOutput = self.method(self._inputs)
        output.loss.backward()
        # Detached: the graph's own autograd nodes must not be kept alive between steps.
        self._output = StepOutput(output.loss.detach(), output.metrics, output.keys)

    def _load(self, inputs: StepInputs) -> None:
        given = _tensors(inputs)
        # `copy_` would broadcast a batch of one without a word.
        if [tensor.shape for tensor in given] != [slot.shape for slot in self._slots]:
            raise UserMistake("--cuda-graph: the inputs changed their shapes; every step needs a whole batch")
        for slot, tensor in zip(self._slots, given, strict=True):
            slot.copy_(tensor, non_blocking=True)
