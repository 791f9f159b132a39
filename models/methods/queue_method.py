"""What methods with queues share, most with a momentum network: the events after an optimizer step, and their state."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from ..collectives import all_gather_rows
from ..key_queue import KeyQueue
from ..momentum import ema_update
from .base import Method, StepOutput


class QueueMethod(Method):
    """A method whose `forward` returns keys under "<queue>/<anything>", each (B, D) of this rank."""

    @abstractmethod
    def queues(self) -> dict[str, KeyQueue]:
        """Key memories by name."""

    @torch.no_grad()
    def after_step(self, output: StepOutput, ema_momentum: float) -> None:
        """Enqueue the keys of all ranks in the order of the global batch, then update the momentum network."""
        queues = self.queues()
        # All ranks gather in the order in which `forward` filled the dictionary, so the collectives match.
        for name, rows in output.keys.items():
            queues[name.partition("/")[0]].enqueue(all_gather_rows(rows))
        ema_update(self.momentum_pairs(), ema_momentum)

    def host_state(self) -> dict[str, Any]:
        """Write positions of the queues."""
        return {name: queue.pointer for name, queue in self.queues().items()}

    def load_host_state(self, state: dict[str, Any]) -> None:
        """Restore the write positions."""
        for name, queue in self.queues().items():
            queue.pointer = state[name]
