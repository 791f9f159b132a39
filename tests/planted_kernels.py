"""Kernels that a CPU can run in place of the CUDA ones, right and wrong: the plans of `tests/test_proving.py`.

Each plan is a function of a `Setting`, which a proving process imports by name.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from models.ops.choice import CHOICES
from train.proving.kernels import kernel_candidates
from train.proving.prover import Candidate, Results, Trial, compare_largest
from train.proving.setting import Setting

Fault = Callable[[Tensor], Tensor]
FAULTS: dict[str, Fault] = {
    "right": lambda result: result,
    "sign": lambda result: -result,
    # As a kernel whose loop stops one short: the last element of each row of the result is not written.
    "tail": lambda result: result.index_fill(-1, torch.tensor([result.shape[-1] - 1]), 0.0),
    "nan": lambda result: result.index_fill(-1, torch.tensor([0]), float("nan")),
    "twice": lambda result: 2 * result,
    "raise": lambda result: _fail(),
}


def _fail() -> Tensor:
    raise RuntimeError("an illegal instruction was met")


class Planted:
    """Forward and backward of an operator's definition, with a fault in the first tensor of one of them."""

    def __init__(self, operator: str, fault: str, backward: bool) -> None:
        self._module = importlib.import_module(f"models.ops.{operator}")
        self._operator, self._fault, self._in_backward = operator, FAULTS[fault], backward

    def _run(self, definition: str, wrong: bool, arguments: tuple[Any, ...]) -> Any:
        results = getattr(self._module, f"{self._operator}{definition}")(*arguments)
        if not wrong:
            return results
        if isinstance(results, Tensor):
            return self._fault(results)
        return (self._fault(results[0]), *results[1:])

    def forward(self, *arguments: Any) -> Any:
        """As the definition."""
        return self._run("_definition", not self._in_backward, arguments)

    def backward(self, *arguments: Any) -> Any:
        """As the definition's gradient."""
        return self._run("_backward_definition", self._in_backward, arguments)


def plant(operator: str, fault: str, backward: bool = False) -> None:
    """From now on the operator's kernels are the planted ones, on the CPU too."""
    module = importlib.import_module(f"models.ops.{operator}")
    kernels, choice = Planted(operator, fault, backward), CHOICES[operator]
    module.kernels_for = lambda *_: kernels if choice.mode == "cuda" else None  # type: ignore[attr-defined]


def wrong_boxes(setting: Setting) -> list[Candidate]:
    """Batch norm's kernels are right, box pooling's have the wrong sign; the augmentation has none here."""
    plant("batch_norm_act", "right")
    plant("box_pool", "sign")
    return [each for each in kernel_candidates(setting) if each.name != "augmentation"]


def _stand_in(name: str, candidate: Callable[[], Results]) -> Candidate:
    def slow() -> Results:
        time.sleep(0.002)
        return {"y": torch.ones(3)}

    def exact() -> Results:
        return {"y": torch.ones(3, dtype=torch.float64)}

    def trials() -> Iterator[Trial]:
        yield Trial("3 ones", candidate, slow, exact, 1, compare_largest)

    return Candidate(name, trials)


def _ones() -> Results:
    return {"y": torch.ones(3)}


def _killed() -> Results:
    os.kill(os.getpid(), signal.SIGSEGV)
    return _ones()


def _stuck() -> Results:
    time.sleep(600)
    return _ones()


def deadly(setting: Setting) -> list[Candidate]:
    """A good candidate, one that ends its process, another good one."""
    return [_stand_in("first", _ones), _stand_in("deadly", _killed), _stand_in("last", _ones)]


def hanging(setting: Setting) -> list[Candidate]:
    """A good candidate and one that never returns."""
    return [_stand_in("first", _ones), _stand_in("hanging", _stuck), _stand_in("last", _ones)]


def unreadable(setting: Setting) -> list[Candidate]:
    """A plan that cannot even be made."""
    raise RuntimeError("no plan")


__all__ = ["FAULTS", "deadly", "hanging", "plant", "unreadable", "wrong_boxes"]
