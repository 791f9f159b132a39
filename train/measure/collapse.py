"""The figures that tell a collapse and its cause, measured on the inputs of a step that was just taken.

The look is a second forward pass without gradient, at a few steps only (`is_due`), so no training step waits for the
host on its account. Weights, running statistics, queues and draws are as they were before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.key_queue import KeyQueue
from models.methods.base import Method, StepInputs, StepOutput
from models.running import moved_together

from ..guard import StatisticsGuard
from ..record.collapse import Signs, may_be_alike
from ..runtime import Runtime
from .features import pool
from .health import effective_rank, feature_std

_OFTEN, _OFTEN_UNTIL, _SELDOM = 40, 400, 500
_IMAGES = 64
_ROWS = 256
"""Rows of a table that are looked at; more would make the eigenvalues slow and tell nothing new."""


def is_due(step: int, log_every: int) -> bool:
    """Whether the log row after `step` steps comes with a look: each 40 steps at first, each 500 after step 400.

    A function of the two numbers alone, so that a run that goes on looks at the same steps as one that did not stop.
    """
    every = _OFTEN if step <= _OFTEN_UNTIL else _SELDOM
    return step // every > max(step - log_every, 0) // every


def signs(method: Method, inputs: StepInputs, runtime: Runtime, loss: float | None, temperature: float | None) -> Signs:
    """Measure; every rank must call it at the same step, and all get the figures of rank 0.

    Args:
        method: the method itself, not its DDP wrapper.
        inputs: of the step that was just taken; of several micro-batches one.
        runtime: this process.
        loss: newest mean of the instance loss, None where the method records none.
        temperature: of the method, None where it has none.

    Returns:
        The figures; `around_predictor` only where the embeddings are alike, since it takes a backward pass.
    """
    with _outputs(method) as seen, torch.no_grad(), _forward(method, inputs, runtime):
        found = _measured(method, inputs, seen, loss, temperature)
    # One rank's word for all: the next pass exchanges between ranks, so none may differ over whether to take it.
    found = runtime.gather_objects(found)[0]
    if may_be_alike(found) and _predictors(method):
        found = dataclasses.replace(found, around_predictor=_around_predictor(method, inputs, runtime))
        found = runtime.gather_objects(found)[0]
    return found


def _measured(
    method: Method,
    inputs: StepInputs,
    seen: dict[str, tuple[Tensor | None, Tensor]],
    loss: float | None,
    temperature: float | None,
) -> Signs:
    spreads = {name: _spread(output) for name, (_, output) in seen.items()}
    part = min(spreads, key=lambda name: spreads[name][0])
    queues = [module.rows for module in method.modules() if isinstance(module, KeyQueue)]
    # A part of a large batch tells as much, and the copy in fp32 stays small beside the step's own memory.
    views = [view[:_IMAGES].float() for view in (inputs.view1, inputs.view2)]
    return Signs(
        pixels_apart=views[0].std(dim=(2, 3)).mean().item(),
        images_apart=views[0].std(dim=0).mean().item(),
        views_apart=(views[0] - views[1]).abs().mean().item(),
        part=part,
        embedding_std=spreads[part][0],
        embedding_rank=min(rank for _, rank in spreads.values()),
        weight_scale=_weight_scale(method),
        target_distance=_target_distance(method),
        predictor_effect=_predictor_effect(method, seen),
        queue_std=min((_spread(rows)[0] for rows in queues), default=None),
        temperature=temperature,
        chance=math.log(len(queues[0]) + 1) if queues else None,
        loss=loss,
    )


def _spread(table: Tensor) -> tuple[float, float]:
    """`feature_std` and `effective_rank` of up to `_ROWS` rows spread over the table; (1, 2) for too few to tell."""
    rows = table[:: max(len(table) // _ROWS, 1)][:_ROWS]
    # Three rows have a rank of two at most.
    return (feature_std(rows), effective_rank(rows)) if len(rows) > 3 and rows.isfinite().all() else (1.0, 2.0)


def _heads(method: Method) -> dict[str, nn.Module]:
    """The online projectors and predictors by name."""
    named = method.named_children()
    return {name: child for name, child in named if ("project" in name or "predict" in name) and "momentum" not in name}


def _predictors(method: Method) -> dict[str, nn.Module]:
    return {name: head for name, head in _heads(method).items() if "predict" in name}


@contextmanager
def _outputs(method: Method) -> Iterator[dict[str, tuple[Tensor | None, Tensor]]]:
    """Within the block the first (input, output) rows of the encoder and of each online head, by name."""
    seen: dict[str, tuple[Tensor | None, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
            rows = _rows(returned)
            if rows is not None:
                seen.setdefault(name, (_rows(given), rows))

        return hook

    watched = {"encoder": method.encoder, **_heads(method)}
    handles = [module.register_forward_hook(note(name)) for name, module in watched.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _rows(values: Any) -> Tensor | None:
    """(B, D) detached fp32 of the first tensor in a module's arguments or output, maps pooled; None without one."""
    if isinstance(values, list | tuple):
        return next((rows for value in values if (rows := _rows(value)) is not None), None)
    if dataclasses.is_dataclass(values):
        return _rows([getattr(values, field.name) for field in dataclasses.fields(values)])
    if not isinstance(values, Tensor) or values.ndim < 2:
        return None
    # (B, M, D) are several embeddings of an image: the first stands for all.
    return pool(values.detach()) if values.ndim != 3 else values.detach()[:, 0].float()


@contextmanager
def _forward(method: Method, inputs: StepInputs, runtime: Runtime) -> Iterator[StepOutput]:
    """A forward pass of the method, whose running statistics are as before it when the block ends."""
    guard = StatisticsGuard(method)
    guard.keep()
    # Compiled heads would be compiled again for the hooks, or ignore them.
    eager = torch.compiler.set_stance("force_eager") if runtime.compile else contextlib.nullcontext()
    with eager, runtime.autocast(), moved_together():
        output: StepOutput = method(inputs)
    try:
        yield output
    finally:
        # Not before the block's end: a backward pass in it reads the statistics that the forward pass has seen.
        guard.put_back(torch.ones((), dtype=torch.bool, device=inputs.view1.device))


def _around_predictor(method: Method, inputs: StepInputs, runtime: Runtime) -> float:
    """Norm of the encoder's gradient when no gradient passes through a predictor: zero where targets are detached."""
    handles = [each.register_forward_pre_hook(_detached) for each in _predictors(method).values()]
    weights = [weight for weight in method.encoder.parameters() if weight.requires_grad]
    try:
        with _forward(method, inputs, runtime) as output:
            if not output.loss.requires_grad:
                return 0.0
            # Not `backward`: neither the parameters' gradients nor DDP may take notice.
            gradients = torch.autograd.grad(output.loss, weights, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    sizes = [each.float().norm() for each in gradients if each is not None]
    return torch.stack(sizes).norm().item() if sizes else 0.0


def _detached(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in given)


@torch.no_grad()
def _weight_scale(method: Method) -> float:
    """The largest root mean square of the weights of a linear layer or convolution, times the root of its inputs."""
    layers = [module.weight for module in method.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    sizes = [layer.float().square().mean().sqrt() * layer[0].numel() ** 0.5 for layer in layers if layer.requires_grad]
    return torch.stack(sizes).max().item() if sizes else 0.0


@torch.no_grad()
def _target_distance(method: Method) -> float | None:
    """Distance of the momentum network's weights from the online ones, relative to these; None without one."""
    pairs = [
        (online, momentum)
        for source, target in method.momentum_pairs()
        for online, momentum in zip(source.parameters(), target.parameters(), strict=True)
    ]
    if not pairs:
        return None
    apart = torch.stack([(online.float() - momentum.float()).norm() for online, momentum in pairs]).norm()
    return (apart / torch.stack([online.float().norm() for online, _ in pairs]).norm()).item()


def _predictor_effect(method: Method, seen: dict[str, tuple[Tensor | None, Tensor]]) -> float | None:
    """1 minus the mean cosine between the rows that a predictor is given and those it returns; the smallest of all."""
    effects = []
    for name in _predictors(method):
        given, returned = seen.get(name, (None, None))
        if given is not None and returned is not None and given.shape == returned.shape:
            effects.append(1.0 - F.cosine_similarity(given, returned).mean().item())
    return min(effects, default=None)
