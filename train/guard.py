"""Running statistics that a step which is skipped has not moved, without a wait of the host.

Batch norm moves its running statistics inside the forward pass, before anybody knows whether the loss is finite. Once a
NaN is in them an average of them (EMAN's momentum network) is lost too, and setting them to 0 and 1 would throw away
what the run has learned of its data. So they are copied before the step, as one vector, and put back after a bad one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_KINDS = ("running_mean", "running_var", "num_batches_tracked")


class StatisticsGuard:
    """The running statistics of a module as they were before a step.

    Args:
        module: the method; its buffers must stay the same tensors, changed in place.
    """

    def __init__(self, module: nn.Module) -> None:
        buffers = [buffer for name, buffer in module.named_buffers() if name.rpartition(".")[2] in _KINDS]
        # One-dimensional views, made once: to make them anew at every step cost as much as what is done with them.
        self._floating = [buffer.view(-1) for buffer in buffers if buffer.is_floating_point()]
        self._counts = [buffer.view(-1) for buffer in buffers if not buffer.is_floating_point()]
        self._before: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the statistics; called before the forward pass."""
        self._before = tuple(_flat(buffers) for buffers in (self._floating, self._counts))

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Whether every running mean and variance is finite, as a boolean scalar on the device."""
        # One vector: asking each of a hundred buffers would cost a hundred launches a step.
        return torch.isfinite(_flat(self._floating)).all()

    @torch.no_grad()
    def put_back(self, bad: Tensor) -> None:
        """Undo what the step did to the statistics where `bad`, a boolean scalar on the device, is true."""
        for buffers, before in zip((self._floating, self._counts), self._before, strict=True):
            if buffers:
                # Chosen, not multiplied by zero: NaN would stay NaN.
                _spread(torch.where(bad, before, _flat(buffers)), buffers)


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat(buffers) if buffers else torch.empty(0)


def _spread(flat: Tensor, buffers: list[Tensor]) -> None:
    torch._foreach_copy_(buffers, flat.split([buffer.numel() for buffer in buffers]))
