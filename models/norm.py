"""Batch normalisation whose statistics belong to the recipe, not to the machine.

`convert_batch_norm` replaces every batch norm of a module: "group" takes statistics over groups of consecutive images
of this rank's batch, "sync" over the images of all ranks, "plain" is PyTorch's own. Names of parameters and buffers
stay, so state dicts are interchangeable. Dimension 0 of the input counts images; a head that works on several columns
an image takes (B, C, columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .collectives import world
from .grouped_norm import grouped_batch_norm, statistics_dtype
from .ops.batch_norm_act import batch_norm_act, move_running_statistics
from .ops.choice import NORM
from .running import is_moved_together, leave, move, move_pending
from .sync_norm import sync_batch_norm

MODES = ("group", "sync", "plain")
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _ViewsBatchNorm(_BatchNorm):
    """What both kinds share: `views` stacked batches in one forward, each normalised as if it came alone."""

    views: int = 1
    """Batches stacked along dimension 0 of the next inputs; see `stacked_views`."""

    source_dims: int = 2
    """Which of PyTorch's classes this replaces: 1 or 2, for the way back to "plain"."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm needs (N, C, ...), got {tuple(input.shape)}")

    @property
    def _uses_batch_statistics(self) -> bool:
        return self.training or self.running_mean is None

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...); updates running statistics in training mode."""
        self._check_input_dim(input)
        if NORM.asked_for and (groups := self.groups_to_fuse(input)) is not None:
            return self.forward_fused(input, None, False, groups)
        # As (N, C, L, 1) a column tensor with channels innermost is channels-last, for which there are fast kernels.
        x = input.unsqueeze(-1) if input.ndim == 3 else input
        if not self._uses_batch_statistics:
            move_pending()
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        else:
            y = self._normalise(x)
        return y.squeeze(-1) if input.ndim == 3 else y

    def _normalise(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _local_groups(self, rows: int) -> int | None:
        """Equal parts of the rows that have statistics of their own; None where other ranks have a part in them."""
        raise NotImplementedError

    def groups_to_fuse(self, x: Tensor) -> int | None:
        """Groups of images for `forward_fused`; None where x is no map (N, C, H, W) or other ranks have a part."""
        return self._local_groups(x.shape[0]) if x.ndim == 4 and self._uses_batch_statistics else None

    def forward_fused(self, x: Tensor, residual: Tensor | None, relu: bool, groups: int) -> Tensor:
        """Batch norm of (N, C, H, W) by groups, sum with a residual of its shape, and ReLU, as one operator."""
        y, mean, variance = batch_norm_act(
            x, self.weight, self.bias, groups=groups, eps=self.eps, residual=residual, relu=relu
        )
        if self.training and self.running_mean is not None:
            self._move_fused(mean, variance, x.numel() // (groups * x.shape[1]))
        return y

    def _move_fused(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """As `_move_by_views`, from biased variances over `count` values."""
        # The usual case first: to find it out costs the host as much as to do it, and a step has hundreds of layers.
        if self.views == 1 and self.momentum is not None and leave(self, mean, variance, count / (count - 1)):
            return
        running = (self.running_mean, self.running_var, self.num_batches_tracked)
        if self.momentum is None or is_moved_together():
            self._move_by_views(mean, variance, count / (count - 1))
        else:  # a layer by itself: one launch
            move_running_statistics(*running, mean, variance, count, self.views, self.momentum)  # type: ignore[arg-type]

    def _move_by_views(self, mean: Tensor, variance: Tensor, correction: float = 1.0) -> None:
        """Running statistics take a step for each view, from (groups, C) means and variances as `running.move`."""
        if not self.training or self.running_mean is None:
            return
        if self.views == 1:  # the usual case, without the work of cutting
            self._move_one(mean, variance, correction)
            return
        for means, variances in zip(mean.chunk(self.views), variance.chunk(self.views), strict=True):
            self._move_one(means, variances, correction)

    def _move_one(self, means: Tensor, variances: Tensor, correction: float = 1.0) -> None:
        if self.momentum is None:
            self._average_cumulatively(means.mean(0), (variances * correction).mean(0))
        else:
            move(self, means, variances, correction)

    def _normalise_whole(self, x: Tensor) -> Tensor:
        """PyTorch's batch norm over all rows."""
        mean, variance, share = self.running_mean, self.running_var, self.momentum
        if not self.training:
            mean = variance = None  # no running statistics are kept
        elif self.num_batches_tracked is not None and share is not None:
            self.num_batches_tracked.add_(1)
        if share is None:  # cumulative average: move running statistics outside the kernel, which wants a host number
            mean = torch.zeros(x.shape[1], dtype=statistics_dtype(x), device=x.device)
            variance = torch.zeros_like(mean)
        y = F.batch_norm(x, mean, variance, self.weight, self.bias, True, 1.0 if share is None else share, self.eps)
        if share is None and self.training and self.running_mean is not None:
            self._average_cumulatively(mean, variance)  # type: ignore[arg-type]
        return y

    @torch.no_grad()
    def _average_cumulatively(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        """Count a batch and move running statistics (C,) to the average over all batches so far, as PyTorch does."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased_variance)):
            running.lerp_(new.to(running.dtype), share)


class GroupBatchNorm(_ViewsBatchNorm):
    """Batch norm over groups of `group_size` consecutive rows; 0 is the whole batch of this rank.

    Running statistics move towards the mean over this rank's groups of mean and unbiased variance: averaged over ranks
    afterwards they are those of all groups of the global batch, however many ranks share it. With an input of fp16 or
    bf16 the statistics are fp32.

    Source: per-device statistics of MoCo (arXiv 1911.05722, section 3.3) with the device made a parameter.
    """

    group_size: int = 0

    def _groups_per_view(self, rows: int) -> int:
        size = self.group_size or rows
        if rows % size:
            raise ValueError(
                f"{rows} images of one rank are not a whole number of batch-norm groups of {size}; choose a global "
                f"batch whose per-rank part is a multiple of bn.group_size, or bn.group_size 0 for the whole part"
            )
        return rows // size

    def _local_groups(self, rows: int) -> int:
        if rows % self.views:
            raise ValueError(f"{rows} rows are not {self.views} stacked views of equal size")
        return self._groups_per_view(rows // self.views) * self.views

    def _normalise(self, x: Tensor) -> Tensor:
        groups = self._local_groups(x.shape[0])
        if x.numel() // (groups * x.shape[1]) < 2:
            raise ValueError("batch norm needs more than one value per channel in a group; use larger groups")
        if groups == 1:  # PyTorch's own kernel moves the running statistics itself
            return self._normalise_whole(x)
        y, means, variances = grouped_batch_norm(x, self.weight, self.bias, groups, self.eps)
        self._move_by_views(means, variances)
        return y

    def extra_repr(self) -> str:
        """PyTorch's description and the group size."""
        return f"{super().extra_repr()}, group_size={self.group_size}"


class SyncBatchNorm(_ViewsBatchNorm):
    """Batch norm over the images of all ranks; ordinary batch norm where there is one process.

    PyTorch's `nn.SyncBatchNorm` refuses CPU tensors and makes the host wait in every layer; this one does neither.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        # A compiled graph would have to trace the collectives. Not a decorator: that imports the compiler, 1.4 s of
        # CPU time, with this module, also for whoever only exports a backbone.
        self._over_ranks = torch.compiler.disable(sync_batch_norm)

    def _local_groups(self, rows: int) -> int | None:
        if rows % self.views:
            raise ValueError(f"{rows} rows are not {self.views} stacked views of equal size")
        return self.views if world() == 1 else None

    def _normalise(self, x: Tensor) -> Tensor:
        self._local_groups(x.shape[0])  # refuses rows that are not whole views
        if self.views == 1:
            return self._normalise_one(x)
        # View after view, in the same order on all ranks: each view is a collective.
        return torch.cat([self._normalise_one(part) for part in x.chunk(self.views)])

    def _normalise_one(self, x: Tensor) -> Tensor:
        if world() == 1:
            return self._normalise_whole(x)
        y, mean, variance = self._over_ranks(x, self.weight, self.bias, self.eps)
        if self.training and self.running_mean is not None:
            self._move_one(mean[None], variance[None])
        return y


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual), as one operator where that was chosen (`ops/choice.py`) and the norm can.

    Args:
        norm: a batch norm, converted or PyTorch's own; PyTorch's own is never fused.
        x: (N, C, H, W).
        residual: of the same shape, or None for no sum.
    """
    if NORM.asked_for and isinstance(norm, _ViewsBatchNorm) and (groups := norm.groups_to_fuse(x)) is not None:
        return norm.forward_fused(x, residual, True, groups)
    y: Tensor = norm(x)
    # In place, as torchvision does: batch norm's backward pass needs its input, not its output.
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True)


def _replacement(old: _BatchNorm, mode: str, group_size: int) -> _BatchNorm:
    """A batch norm of the wanted kind that owns the very parameters and buffers of the old one."""
    kinds: dict[str, type[_BatchNorm]] = {"group": GroupBatchNorm, "sync": SyncBatchNorm}
    if mode == "plain":
        if not isinstance(old, _ViewsBatchNorm):
            return old
        kind: type[_BatchNorm] = nn.BatchNorm2d if old.source_dims == 2 else nn.BatchNorm1d
    else:
        kind = kinds[mode]
    new = kind(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
    # The tensors themselves move over: an optimizer made before the conversion goes on holding them.
    new.weight, new.bias = old.weight, old.bias
    new.running_mean, new.running_var = old.running_mean, old.running_var
    new.num_batches_tracked = old.num_batches_tracked
    new.train(old.training)
    if isinstance(new, GroupBatchNorm):
        new.group_size = group_size
    # The way back to "plain" must know whether rows or maps were normalised, also after a second conversion.
    if isinstance(new, _ViewsBatchNorm):
        own = isinstance(old, _ViewsBatchNorm)
        new.source_dims = old.source_dims if own else 1 if isinstance(old, nn.BatchNorm1d) else 2  # type: ignore
    return new


def _with_activation(new: _BatchNorm, old: _BatchNorm) -> _BatchNorm:
    """The new norm, which ends in the same activation as the old one; timm's `BatchNormAct2d` holds one as `act`."""
    if new is not old and isinstance(getattr(old, "act", None), nn.Module):
        new.act = old.act
        new.register_forward_hook(_activate)
    return new


def _activate(norm: nn.Module, inputs: object, normalised: Tensor) -> Tensor:
    activated: Tensor = norm.act(normalised)  # type: ignore[operator]
    return activated


def convert_batch_norm(module: ModuleT, mode: str = "group", group_size: int = 0) -> ModuleT:
    """Replace every batch norm inside a module, in place; parameters and buffers stay the same tensors.

    Args:
        module: a module that may contain batch norms, or itself be one.
        mode: "group", "sync" or "plain".
        group_size: images that share statistics in "group" mode; 0 is the rank's whole batch.

    Returns:
        The module, or its replacement where the module itself is a batch norm.

    Raises:
        ValueError: an unknown mode, or a negative group size.
    """
    if mode not in MODES:
        raise ValueError(f"batch-norm mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if group_size < 0:
        raise ValueError(f"bn.group_size {group_size} is negative; give a number of images, or 0 for the whole batch")
    if isinstance(module, _BatchNorm):
        return _with_activation(_replacement(module, mode, group_size), module)  # type: ignore[return-value]
    for name, child in module.named_children():
        replaced = convert_batch_norm(child, mode, group_size)
        if replaced is not child:
            setattr(module, name, replaced)
    return module


@contextmanager
def stacked_views(module: nn.Module, views: int) -> Iterator[None]:
    """Within the block, inputs are `views` batches stacked along dimension 0, each normalised as if it came alone.

    One forward pass over stacked views equals a forward pass for each in turn, running statistics included. It has no
    effect on PyTorch's own ("plain") batch norm, so it refuses a module that holds any.

    Raises:
        ValueError: the module contains PyTorch's own batch norm and views > 1.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    plain = [m for m in norms if not isinstance(m, _ViewsBatchNorm)]
    if plain and views > 1:
        raise ValueError("stacked views need converted batch norms; call convert_batch_norm(module, 'group') first")
    for norm in norms:
        if isinstance(norm, _ViewsBatchNorm):
            norm.views = views
    try:
        yield
    finally:
        # Also after an error: a later pass over one view must not be cut in parts.
        for norm in norms:
            if isinstance(norm, _ViewsBatchNorm):
                norm.views = 1


def running_buffers(module: nn.Module) -> list[Tensor]:
    """Running means and variances of the batch norms in training mode: those that a step changes."""
    buffers: list[Tensor] = []
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.training and norm.running_mean is not None:
            assert norm.running_var is not None
            buffers += [norm.running_mean, norm.running_var]
    return buffers
