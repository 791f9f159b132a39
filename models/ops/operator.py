"""Registration of a differentiable operator: one body, called as a plain autograd function or as a custom operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Record = Callable[[str, tuple[Any, ...]], None]
_recorders: list[Record] = []


@contextlib.contextmanager
def recording(record: Record) -> Iterator[None]:
    """Within the block `record` is told the name and the arguments of every call of an operator in eager code."""
    _recorders.append(record)
    try:
        yield
    finally:
        _recorders.remove(record)


def tell_recorders(name: str, arguments: tuple[Any, ...]) -> None:
    """Tell those who are `recording` of one call."""
    for record in _recorders:
        record(name, arguments)


def _own(output: Any) -> Any:
    """Results that are views inside the operator, as tensors of their own on the same memory.

    Autograd refuses an in-place operation (a ReLU behind a batch norm) on a view that was made inside a function.
    """
    if isinstance(output, tuple):
        return tuple(_own(each) for each in output)
    return output.data if output._is_view() else output


def differentiable(
    name: str,
    *,
    forward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """A function that computes `forward` with the gradient `backward`.

    Compiled code calls the custom operators `regatta::<name>` and `regatta::<name>_backward`, which a graph holds as
    one node each. Eager code calls the same bodies through an `autograd.Function`. With bodies that only allocate,
    forward and backward of `batch_norm_act` took 280 µs of the host that way and 696 µs through the custom operator
    (one core of an EPYC, torch 2.15); a ResNet-50 has 53 batch norms in each pass.

    Args:
        name: of the operator.
        forward: tensors and settings -> result or results.
        forward_fake: same arguments -> empty results of the right shape, dtype and layout.
        backward: what computes the gradients; called by `gradients`.
        backward_fake: arguments of `backward` -> empty gradients.
        setup_context: (ctx, inputs, output), saves what `gradients` needs.
        gradients: (backward, ctx, *gradients of the results) -> one gradient or None for each argument of `forward`.
            Only the first result has a gradient; those of the others are None or zeros.
    """
    operator = torch.library.custom_op(f"regatta::{name}", forward, mutates_args=())
    operator.register_fake(forward_fake)
    backward_operator = torch.library.custom_op(f"regatta::{name}_backward", backward, mutates_args=())
    backward_operator.register_fake(backward_fake)

    def compiled_gradients(ctx: Any, *grads: Any) -> Any:
        return gradients(backward_operator, ctx, *grads)

    operator.register_autograd(compiled_gradients, setup_context=setup_context)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:  # type: ignore[override]
            output = _own(forward(*inputs))
            # Results without a gradient (statistics, masks) would otherwise get zeros allocated in each backward pass.
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable  # as for the custom operator: the kernels have no second derivative
        def backward(ctx: Any, *grads: Any) -> Any:
            if grads[0] is None:  # nothing that depends on the first result, the only one with a gradient, was used
                return (None,) * len(ctx.needs_input_grad)
            return gradients(backward, ctx, *grads)

    Eager.__name__ = Eager.__qualname__ = name

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*inputs)
        tell_recorders(name, inputs)
        return Eager.apply(*inputs)

    return call
