"""Optimizers: parameter groups by tensor rank and role, and LARS in both published conventions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .config import OptimConfig
from .fields import check
from .schedules import scaled_lr


def _batch_norm_parameters(module: nn.Module) -> set[nn.Parameter]:
    return {p for m in module.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}


def _exclusion(method: nn.Module, rule: str) -> Callable[[str, nn.Parameter], bool]:
    """(name, parameter) -> whether the parameter is free of weight decay and trust ratio."""
    if rule == "none":
        return lambda name, p: False
    if rule == "1d":
        return lambda name, p: p.ndim <= 1
    if rule == "1d_tables":
        return lambda name, p: p.ndim <= 1 or "relative_position_bias_table" in name or name.split(".")[-1] in _TABLES
    if rule not in ("bias_bn", "bias_bn_encoder"):
        raise ValueError(f"optim.exclude {rule!r} is unknown; choose none, 1d, bias_bn, bias_bn_encoder or 1d_tables")
    # "bias_bn_encoder" decays the batch-norm scales of the heads and leaves out those of the backbone alone.
    scope = method if rule == "bias_bn" else getattr(method, "encoder", method)
    norms = _batch_norm_parameters(scope)
    return lambda name, p: p in norms or name.split(".")[-1].endswith("bias")


_TABLES = frozenset({"row", "col", "rel_h", "rel_w"})  # position tables of the attention stream


def parameter_groups(method: nn.Module, config: OptimConfig, global_batch: int) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups: adapted or excluded, scheduled or fixed learning rate.

    Each group holds "name", "params", "lr" (the peak), "lr_share" (of the schedule's rate), "weight_decay", "adapt"
    (whether LARS scales it) and "fixed_lr" (whether schedules leave it alone). The order within a group is that of
    `named_parameters`.
    """
    excluded = _exclusion(method, config.exclude)
    fixed_modules: Iterable[nn.Module] = getattr(method, "fixed_lr_modules", list)()
    # Such as SimSiam's predictor, which its paper trains without a schedule.
    fixed = {p for module in fixed_modules for p in module.parameters()}
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        # The momentum network has no gradients; it follows by EMA.
        if parameter.requires_grad:
            members.setdefault((excluded(name, parameter), parameter in fixed), []).append(parameter)
    return [
        {
            "name": f"{'excluded' if is_excluded else 'decayed'}{'/fixed_lr' if is_fixed else ''}",
            "params": parameters,
            "lr": scaled_lr(config, global_batch) * (config.excluded_lr_share if is_excluded else 1.0),
            "lr_share": config.excluded_lr_share if is_excluded else 1.0,
            "weight_decay": 0.0 if is_excluded else config.weight_decay,
            "adapt": not is_excluded,
            "fixed_lr": is_fixed,
        }
        for (is_excluded, is_fixed), parameters in sorted(members.items())
    ]


def build_optimizer(method: nn.Module, config: OptimConfig, global_batch: int) -> torch.optim.Optimizer:
    """The recipe's optimizer over the method's trainable parameters.

    Args:
        method: a `Method`, already on its device; parameters without gradient (the momentum network's) are left out.
        config: the optimizer's settings.
        global_batch: images of one step over all ranks, for the learning rate.

    Raises:
        UserMistake: a setting outside its range.
    """
    check(config, "optim.")
    groups = parameter_groups(method, config, global_batch)
    lr = scaled_lr(config, global_batch)
    # One launch on CUDA, where the fused form can also skip a step by a flag on the device, without a wait of the host.
    on_cuda = all(p.is_cuda for group in groups for p in group["params"])
    launch = {"fused": True} if on_cuda else {"foreach": True}
    if config.kind == "sgd":
        return with_momentum_buffers(torch.optim.SGD(groups, lr=lr, momentum=config.sgd_momentum, **launch))
    if config.kind == "adamw":
        betas = (config.betas[0], config.betas[1])
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, **launch)
    return Lars(
        groups,
        lr=lr,
        momentum=config.sgd_momentum,
        trust=config.lars.trust,
        lr_in_buffer=config.lars.lr_in_buffer,
        denominator=config.lars.denominator,
    )


def with_momentum_buffers(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """The optimizer itself, its momentum buffers made as zeros where it is the fused form.

    PyTorch's fused form takes memory as it comes and lets the first step fill it. A first step that is skipped by
    `found_inf`, as fp16's first loss scale often makes it, fills nothing, and the second one reads what lay there.
    A step from zeros is the same as PyTorch's first step.
    """
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give this learning rate, or a group's share of it, to every group but those whose rate is fixed."""
    for group in optimizer.param_groups:
        if not group.get("fixed_lr", False):
            # Groups of checkpoints from before there were shares have all of it.
            group["lr"] = lr * group.get("lr_share", 1.0)


@torch.no_grad()
def clip_or_measure(optimizer: torch.optim.Optimizer, config: OptimConfig) -> Tensor:
    """The norm of all gradients together before clipping, and clipping to `clip_grad_norm` where that is positive.

    Returns:
        Scalar tensor on the gradients' device; reading it is the caller's decision, here nothing waits for it.
    """
    # Of all groups at once: the norm that is clipped is that of the whole network.
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if config.clip_grad_norm > 0:
        # A factor of at most 1, because a comparison would wait for the device; 1e-6 as in PyTorch's own clipping.
        torch._foreach_mul_(gradients, (config.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled for each tensor by weight norm over gradient norm.

    With w a tensor, g its gradient, d weight decay, eta trust, mu momentum, norms over the whole tensor:

    * `lr_in_buffer` false: u = g + d w; u *= eta |w| / |u| (1 where either norm is 0); buf = mu buf + u; w -= lr buf.
    * `lr_in_buffer` true: r = eta |w| / (|g| + d |w|); buf = mu buf + r lr (g + d w); w -= buf.

    `denominator` sets what the ratio divides by apart from that: "joint" is |g + d w|, "apart" is |g| + d |w|, "larc"
    is |g| + d |w| + 1e-8, with u = g unchanged where |w| or |g| is 0.
    Groups with "adapt" false use the raw gradient: no decay, no ratio. The two forms differ in the ratio's denominator
    and, whenever the learning rate changes between steps, in what the buffer remembers. A ratio 0 / 0 counts as 1: its
    step is zero anyhow. With the norms apart a tensor of zeros has ratio 0 and so never moves, as in LEWEL's code.
    Norms stay on the device: a step does not wait for it. Like PyTorch's fused optimizers it leaves weights and buffers
    as they are where the attribute `found_inf`, a tensor on the device, is not zero.

    Source: You et al., arXiv 1708.03888; the first form is MoCo v3's, the second LEWEL's (methods of arXiv 2104.02057
    and 2203.14898). SimCLR's code (google-research/simclr) has the second with the joint denominator, SwAV's the first
    with "larc", which is NVIDIA apex's LARC without clipping.
    """

    _step_supports_amp_scaling = True  # the gradient scaler then hands over `found_inf` instead of reading it

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        lr_in_buffer: bool = False,
        denominator: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "lr_in_buffer": lr_in_buffer,
            "denominator": denominator,
            "adapt": True,
        }
        super().__init__(params, defaults)
        self._kept_sizes: dict[tuple[int, ...], Tensor] = {}
        self.found_inf: Tensor | None = None
        """Scalar on the device, 1 where this step must change nothing, as in PyTorch's fused optimizers."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._step_group(group, weights)
        return loss

    def _step_group(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        gradients = [w.grad for w in weights if w.grad is not None]
        # The gradient scaler sets these attributes before a step and deletes them after it, so they may be missing.
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            torch._foreach_div_(gradients, scale.reshape(()))
        # Copies: the steps below work in place and must not change `.grad`.
        flat, updates = _side_by_side(weights)
        torch._foreach_copy_(updates, gradients)
        if group["adapt"]:
            _adapt(flat, updates, weights, gradients, group, self._sizes(weights))
        if group["lr_in_buffer"]:
            torch._foreach_mul_(updates, group["lr"])
        buffers = self._buffers(weights)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(weights, buffers, alpha=-1.0 if group["lr_in_buffer"] else -group["lr"])
            return
        # The host does not know whether this step counts: every line below must change nothing where `bad`.
        bad = found_inf.reshape(()) > 0
        keep = torch.where(bad, 1.0, group["momentum"])
        rate = torch.where(bad, 0.0, 1.0 if group["lr_in_buffer"] else group["lr"])
        flat.masked_fill_(bad, 0.0)  # a product with zero would keep NaN
        torch._foreach_mul_(buffers, keep)
        torch._foreach_add_(buffers, updates)
        # `alpha` of the form above must be a number on the host, which would have to wait for `bad`.
        torch._foreach_sub_(weights, torch._foreach_mul(buffers, rate))

    def _sizes(self, weights: list[Tensor]) -> Tensor:
        """Elements of each weight, on the device; copied there once."""
        sizes = tuple(weight.numel() for weight in weights)
        if sizes not in self._kept_sizes:
            self._kept_sizes[sizes] = _on_device(sizes, weights[0].device)
        return self._kept_sizes[sizes]

    def _buffers(self, weights: list[Tensor]) -> list[Tensor]:
        """Momentum buffers, zero at first; state is made for each weight that first has a gradient."""
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return [self.state[weight]["momentum_buffer"] for weight in weights]


def _denominator(group: dict[str, Any]) -> str:
    """Which of "joint", "apart" and "larc" a group has."""
    # Groups of checkpoints from before there was a choice do not have the key.
    chosen: str = group.get("denominator", "auto")
    return ("apart" if group["lr_in_buffer"] else "joint") if chosen == "auto" else chosen


_LARC_EPSILON = 1e-8


def _side_by_side(weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One flat tensor, and a part of it for each weight with that weight's shape and strides.

    What PyTorch has no multi-tensor form for is done on the flat tensor in one launch instead of one for each weight.
    """
    sizes = [weight.numel() for weight in weights]
    flat = torch.empty(sum(sizes), dtype=weights[0].dtype, device=weights[0].device)
    offsets = itertools.accumulate(sizes[:-1], initial=0)
    return flat, [
        # Parameters have no gaps, so their strides fit a part of as many elements whatever their layout.
        flat.as_strided(weight.shape, weight.stride(), offset)
        for weight, offset in zip(weights, offsets, strict=True)
    ]


def _adapt(
    flat: Tensor,
    updates: list[Tensor],
    weights: list[Tensor],
    gradients: list[Tensor],
    group: dict[str, Any],
    sizes: Tensor,
) -> None:
    """Decay the gradients in `updates`, parts of `flat`, and scale each by its tensor's trust ratio, in place."""
    decay, trust = group["weight_decay"], group["trust"]
    torch._foreach_add_(updates, weights, alpha=decay)
    weight_norms = torch.stack(torch._foreach_norm(weights))
    kind = _denominator(group)
    if kind == "joint":
        update_norms = torch.stack(torch._foreach_norm(updates))
        both = (weight_norms > 0) & (update_norms > 0)
        ratios = torch.where(both, trust * weight_norms / update_norms, 1.0)
    else:
        gradient_norms = torch.stack(torch._foreach_norm(gradients))
        denominator = gradient_norms + decay * weight_norms
        if kind == "apart":
            ratios = torch.where(denominator > 0, trust * weight_norms / denominator, 1.0)
        else:
            ratios = trust * weight_norms / (denominator + _LARC_EPSILON)
            # Without a gradient nothing moves, decay included; a weight of zeros has none, so its gradient is alone.
            ratios = torch.where(weight_norms > 0, torch.where(gradient_norms > 0, ratios, 0.0), 1.0)
    # The length is given, because reading it off the sizes would wait for the device.
    flat.mul_(torch.repeat_interleave(ratios, sizes, output_size=flat.numel()))


def _on_device(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers on a device, without a wait of the host."""
    numbers = torch.tensor(sizes)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers
