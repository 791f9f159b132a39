"""The process in which candidates are proved; it reads an `Order` from standard input.

A kernel that reads a wrong address breaks every later call of its process, and one with a wrong barrier never returns.
So the run itself does not call a kernel before it has proved itself here.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from models.ops.choice import CHOICES

from ..resolve import config_of
from .prover import Candidate, prove, timer_for
from .setting import Setting

MARK = "proof: "
"""Begins every line that the waiting process reads; others come from libraries."""


@dataclass(frozen=True)
class Order:
    """What is to be proved.

    Attributes:
        setting: of the run.
        plan: "module:function", which makes the candidates from a setting.
        done: names of candidates that have their verdict.
        used: those of them whose kernels the following trials run with.
    """

    setting: Setting
    plan: str
    done: tuple[str, ...]
    used: tuple[str, ...]

    def to_json(self) -> str:
        """A document that `order_of` reads."""
        setting = {
            "config": self.setting.config.to_json(),
            "device": self.setting.device,
            "dtype": str(self.setting.dtype).removeprefix("torch."),
            "several": self.setting.several,
        }
        return json.dumps({"setting": setting, "plan": self.plan, "done": self.done, "used": self.used})


def order_of(document: dict[str, Any]) -> Order:
    """The order that `Order.to_json` wrote."""
    held = document["setting"]
    config, dtype = config_of(held["config"]), getattr(torch, held["dtype"])
    setting = Setting(config, held["device"], dtype, held["several"])
    return Order(setting, document["plan"], tuple(document["done"]), tuple(document["used"]))


def all_candidates(setting: Setting) -> list[Candidate]:
    """The kernels and then the forms of a step, which are timed with the kernels that are used."""
    from .kernels import kernel_candidates
    from .steps import step_candidates

    return [*kernel_candidates(setting), *step_candidates(setting)]


def tell(**what: object) -> None:
    """One line for the waiting process."""
    print(MARK + json.dumps(what), flush=True)


def work(order: Order) -> None:
    """Prove what is not done yet, telling which candidate begins and what its verdict is."""
    for name in order.used:
        if name in CHOICES:
            CHOICES[name].set("cuda")
    device = order.setting.runtime.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # As in the run: shapes are fixed, so convolutions are chosen by a stopwatch.
        torch.backends.cudnn.benchmark = True
    module, _, function = order.plan.partition(":")
    plan: Callable[[Setting], list[Candidate]] = getattr(importlib.import_module(module), function)
    candidates = [each for each in plan(order.setting) if each.name not in order.done]
    tell(names=[each.name for each in candidates])
    for candidate in candidates:
        tell(begin=candidate.name)
        verdict = prove(candidate, timer_for(device))
        tell(verdict=dataclasses.asdict(verdict))
        if verdict.right and verdict.faster and candidate.name in CHOICES:
            CHOICES[candidate.name].set("cuda")
        if not _works(device):
            return


def _works(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal address nothing does, and another process must go on."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.empty_cache()
        return bool((torch.ones(2, device=device) + 1).sum() == 4)
    except RuntimeError:
        return False


def main() -> None:
    """Do what the order on standard input says."""
    work(order_of(json.load(sys.stdin)))
