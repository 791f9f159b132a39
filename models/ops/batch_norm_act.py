"""Batch norm by groups of images, with the residual sum and ReLU that follow: definition, registration, dispatch.

    y = relu((x - mean[g]) * weight / sqrt(variance[g] + eps) + bias + residual)

with mean and biased variance over the images and positions of group g, groups being contiguous and of equal size. The
kernels read x twice and the residual once, and write y once: half of what batch norm, sum and ReLU move one by one.

Source: batch normalisation (arXiv 1502.03167), Algorithm 1, its gradient in section 3; NVIDIA's fused channels-last
batch norm with addition and ReLU (MLPerf) has the idea of a bit mask in place of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch_norm_act_kernels import kernels_for, kernels_to_move, launched_from_host, pack_size, plan_from_host
from .layout import layout_of, like_layout
from .operator import differentiable
from .precision import accumulation_dtype


def check_batch_norm_act(x: Tensor, residual: Tensor | None, groups: int) -> None:
    """Refuse shapes that do not fit each other, and groups with nothing to take a variance of."""
    if x.ndim != 4:
        raise ValueError(f"batch_norm_act takes a map (N, C, H, W), got {tuple(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"the residual {tuple(residual.shape)} {residual.dtype} does not fit the map {tuple(x.shape)} {x.dtype}"
        )
    if groups < 1 or x.shape[0] % groups:
        raise ValueError(f"{x.shape[0]} images are not {groups} groups of equal size")
    if x.shape[0] // groups * x.shape[2] * x.shape[3] < 2:
        raise ValueError("batch norm needs more than one value per channel in a group; use larger groups")


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(N, C, H, W) as (G, N/G, C, H, W) in the accumulation dtype."""
    return x.unflatten(0, (groups, x.shape[0] // groups)).to(accumulation_dtype(x.dtype))


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """A parameter (C,) or statistics (G, C), to go with `_grouped`."""
    return values.to(like.dtype).view(-1, 1, values.shape[-1], 1, 1)


def _scale(parts: Tensor, variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    inverse_std = torch.rsqrt(_columns(variance, parts) + eps)
    return inverse_std if weight is None else inverse_std * _columns(weight, parts)


def _normalise(
    parts: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Grouped values before residual and ReLU."""
    normalised = (parts - _columns(mean, parts)) * _scale(parts, variance, weight, eps)
    return normalised if bias is None else normalised + _columns(bias, parts)


def _passes(values: Tensor) -> Tensor:
    """What a ReLU lets through: values above zero, and NaN, which must not be lost on the way to the loss."""
    return ~(values <= 0)


def _pack_mask(on: Tensor, pack: int) -> Tensor:
    """Booleans (N, C, H, W) as bytes: bit v of byte i is element `pack * i + v` in channels-last order."""
    bits = on.permute(0, 2, 3, 1).reshape(-1, pack).to(torch.uint8)
    return (bits << torch.arange(pack, dtype=torch.uint8, device=on.device)).sum(1, dtype=torch.uint8)


def _unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Inverse of `_pack_mask` for a map of x's shape and dtype."""
    pack = pack_size(x.shape[1], x.dtype)
    bits = mask[:, None] >> torch.arange(pack, dtype=torch.uint8, device=mask.device) & 1
    batch, channels, height, width = x.shape
    return bits.view(batch, height, width, channels).permute(0, 3, 1, 2).bool()


def batch_norm_act_definition(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    relu: bool,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mathematics in plain PyTorch; arguments as for `batch_norm_act`.

    Returns:
        y (N, C, H, W); mean and biased variance (G, C) in the accumulation dtype; and, where it is to be kept and both
        ReLU and residual are there, which elements the ReLU let through, as bytes, else an empty tensor.
    """
    with torch.autocast(x.device.type, enabled=False):
        parts = _grouped(x, groups)
        # One pass with deviations from the mean; a mean of squares would cancel for a channel far from zero.
        variance, mean = torch.var_mean(parts, (1, 3, 4), correction=0)
        values = _normalise(parts, mean, variance, weight, bias, eps).flatten(0, 1)
        if residual is not None:
            values = values + residual
        mask = x.new_empty(0, dtype=torch.uint8)
        if relu:
            on = _passes(values)
            values = torch.where(on, values, 0)
            if keep_mask and residual is not None:
                mask = _pack_mask(on, pack_size(x.shape[1], x.dtype))
        return like_layout(values.to(x.dtype), x), mean, variance, mask


def batch_norm_act_backward_definition(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    mask: Tensor,
    eps: float,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, residual (empty unless `residual`), weight and bias, statistics being functions of x.

    With dy the gradient where the ReLU let y through and n the number of values of a channel in a group,
    dx = weight / std * (dy - sum(dy) / n - (x - mean) / std^2 * sum(dy * (x - mean)) / n). Without a mask the ReLU's
    decision is worked out again from x, which a residual would forbid.
    """
    groups, channels = mean.shape
    with torch.autocast(x.device.type, enabled=False):
        parts, dy = _grouped(x, groups), _grouped(grad, groups)
        if relu:
            if mask.numel():
                on = _unpack_mask(mask, x).unflatten(0, dy.shape[:2])
            else:
                on = _passes(_normalise(parts, mean, variance, weight, bias, eps))
            dy = torch.where(on, dy, 0)
        inverse_std = torch.rsqrt(_columns(variance, parts) + eps)
        centred = (parts - _columns(mean, parts)) * inverse_std
        dims = (1, 3, 4)
        sum_dy, sum_product = dy.sum(dims, keepdim=True), (dy * centred).sum(dims, keepdim=True)
        count = parts.numel() // (groups * channels)
        grad_x = (dy - sum_dy / count - centred * (sum_product / count)) * _scale(parts, variance, weight, eps)
        grad_weight, grad_bias = (total.sum(0).flatten() for total in (sum_product, sum_dy))
        empty = x.new_empty(0)
        return (
            like_layout(grad_x.flatten(0, 1).to(x.dtype), x),
            like_layout(dy.flatten(0, 1).to(x.dtype), x) if residual else empty,
            grad_weight,
            grad_bias,
        )


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    relu: bool,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = kernels_for(x, weight, bias, groups)
    if kernels is None:
        return batch_norm_act_definition(x, residual, weight, bias, groups, eps, relu, keep_mask)
    y, mean, variance, mask = kernels.forward(x, residual, weight, bias, groups, eps, relu, keep_mask)
    return like_layout(y, x), mean, variance, mask


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    relu: bool,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, variance = (x.new_empty((groups, x.shape[1]), dtype=accumulation_dtype(x.dtype)) for _ in range(2))
    masked = keep_mask and relu and residual is not None
    mask = x.new_empty(x.numel() // pack_size(x.shape[1], x.dtype) if masked else 0, dtype=torch.uint8)
    return torch.empty_like(x, memory_format=layout_of(x)), mean, variance, mask


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    mask: Tensor,
    eps: float,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = kernels_for(x, weight, bias, mean.shape[0])
    if kernels is None:
        return batch_norm_act_backward_definition(grad, x, weight, bias, mean, variance, mask, eps, relu, residual)
    grad_x, grad_residual, grad_weight, grad_bias = kernels.backward(
        grad, x, weight, bias, mean, variance, mask, eps, relu, residual
    )
    return like_layout(grad_x, x), like_layout(grad_residual, x) if residual else grad_residual, grad_weight, grad_bias


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    mask: Tensor,
    eps: float,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    maps = [torch.empty_like(x, memory_format=layout_of(x)) for _ in range(2)]
    grad_weight, grad_bias = (mean.new_empty(mean.shape[1]) for _ in range(2))
    return maps[0], maps[1] if residual else x.new_empty(0), grad_weight, grad_bias


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, _, ctx.eps, ctx.relu, keep_mask = inputs
    _, mean, variance, mask = output
    ctx.residual = residual is not None
    # The mask was left out because nothing required a gradient then; a gradient now would be silently wrong.
    ctx.maskless = ctx.relu and ctx.residual and not keep_mask
    ctx.mark_non_differentiable(mean, variance, mask)
    ctx.save_for_backward(x, weight, bias, mean, variance, mask)


def _gradients(backward, ctx, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    if ctx.maskless:
        raise RuntimeError("batch_norm_act: a ReLU behind a residual sum needs keep_mask for its gradient")
    x, weight, bias, mean, variance, mask = ctx.saved_tensors
    # Without a ReLU the residual's gradient is that of y itself, so no second map is written.
    wants_residual = ctx.residual and ctx.needs_input_grad[1]
    grad_x, grad_residual, grad_weight, grad_bias = backward(
        grad, x, weight, bias, mean, variance, mask, ctx.eps, ctx.relu, wants_residual and ctx.relu
    )
    return (
        grad_x if ctx.needs_input_grad[0] else None,
        (grad_residual if ctx.relu else grad) if wants_residual else None,
        grad_weight.to(weight.dtype) if weight is not None and ctx.needs_input_grad[2] else None,
        grad_bias.to(bias.dtype) if bias is not None and ctx.needs_input_grad[3] else None,
        None,
        None,
        None,
        None,
    )


_batch_norm_act = differentiable(
    "batch_norm_act",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    groups: int = 1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with statistics of each group of images, then the sum with a residual, then ReLU.

    Args:
        x: (N, C, H, W), any floating dtype, either memory format; the kernels want channels-last.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        groups: equal, contiguous parts of the N images that have statistics of their own; 1 is plain batch norm.
        eps: added to the variance.
        residual: of x's shape and dtype, or None.
        relu: whether a ReLU comes last.

    Returns:
        y in x's shape, dtype and layout; mean and biased variance (groups, C), float32 (float64 for float64), without
        gradient. All sums are in that dtype.

    Raises:
        ValueError: shapes that do not fit each other, or groups of a single value.
    """
    eager = not torch.compiler.is_compiling()
    # Before the checks: it knows the shapes that have passed them, and looks at the rest itself.
    launched = launched_from_host(x, residual, weight, bias, groups, eps, relu) if eager else None
    if launched is None:
        check_batch_norm_act(x, residual, groups)
        if eager and plan_from_host(x, weight, bias, groups):
            launched = launched_from_host(x, residual, weight, bias, groups, eps, relu)
    if launched is not None:
        return launched
    # A pass without gradients (the momentum network, evaluation) need not write the mask.
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias))
    # Such a pass has no use for an autograd function either, which costs the host as much as the launches do.
    operator = _batch_norm_act if wanted or not eager else _forward
    y, mean, variance, _ = operator(x, residual, weight, bias, groups, eps, relu, wanted)
    return y, mean, variance


def move_running_definition(
    running_mean: Tensor,
    running_variance: Tensor,
    batches: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: int,
    views: int,
    momentum: float,
) -> None:
    """The mathematics of `move_running_statistics` in plain PyTorch."""
    batches.add_(views)
    unbiased = variance * (count / (count - 1))  # PyTorch's running variance is the unbiased one
    for running, new in ((running_mean, mean), (running_variance, unbiased)):
        for groups in new.chunk(views):
            running.lerp_(groups.mean(0).to(running.dtype), momentum)


def _move(
    running_mean: Tensor,
    running_variance: Tensor,
    batches: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: int,
    views: int,
    momentum: float,
) -> None:
    kernels = kernels_to_move(running_mean, running_variance, batches, mean, variance)
    move = move_running_definition if kernels is None else kernels.move_running
    move(running_mean, running_variance, batches, mean, variance, count, views, momentum)


_move_operator = torch.library.custom_op(
    "regatta::move_running", _move, mutates_args=("running_mean", "running_variance", "batches")
)


@_move_operator.register_fake
def _(
    running_mean: Tensor,
    running_variance: Tensor,
    batches: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: int,
    views: int,
    momentum: float,
) -> None:
    return None


def move_running_statistics(
    running_mean: Tensor,
    running_variance: Tensor,
    batches: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: int,
    views: int,
    momentum: float,
) -> None:
    """Move running statistics, in place, towards the mean over a view's groups of mean and unbiased variance.

    Args:
        running_mean: (C,).
        running_variance: (C,).
        batches: scalar int64 that counts batches; a view is one.
        mean: (G, C) as `batch_norm_act` gives them.
        variance: (G, C), biased.
        count: values of a channel in a group.
        views: equal parts of the groups that come one after the other, as if each were a batch.
        momentum: how far each view moves them: new = (1 - momentum) * old + momentum * view.
    """
    changed = (running_mean, running_variance, batches)
    if torch.compiler.is_compiling():
        _move_operator(*changed, mean, variance, count, views, momentum)
        return
    with torch.no_grad():
        _move(*changed, mean, variance, count, views, momentum)
    # A kernel writes behind autograd's back: what saved these tensors must learn that they have changed.
    torch.autograd.graph.increment_version(changed)
