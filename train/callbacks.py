"""Code of one's own in a run: what it is told, and when. Loggers and the live page are made of the same calls.

Only rank 0 tells. A call comes after a row is on the disk, with numbers that the host has already, so nothing waits for
the device. Nothing here imports PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserMistake

Row = dict[str, Any]


@dataclass(frozen=True)
class Started:
    """What a callback is told of the run at its start.

    Attributes:
        run_dir: folder of the run.
        config: content of `config.json`.
        first_step: optimizer steps taken before; 0 for a run that begins.
        last_step: where the run ends.
        steps_per_epoch: optimizer steps.
        told: kind of row -> the last step of those rows that an earlier start has told and this one will tell again.
    """

    run_dir: Path
    config: Mapping[str, Any]
    first_step: int
    last_step: int
    steps_per_epoch: int
    told: Mapping[str, int] = field(default_factory=dict)


class Callback:
    """Does nothing at each of the calls; override those that you want.

    A row is one line of the run's metrics: "kind", "step", "epoch", "time_s" and its figures. It is a copy, yours to
    change. A call runs on rank 0 between two steps, which wait for it. What it raises is printed in one line, and the
    callback is left out from there on; the run goes on. `signal.raise_signal(signal.SIGTERM)` saves and ends the run.
    """

    def __str__(self) -> str:
        return type(self).__name__

    def on_start(self, run: Started) -> None:
        """Before the first row."""

    def on_row(self, row: Row) -> None:
        """Each row of any kind; as it stands here it passes rows on to the next three."""
        if row["kind"] == "train":
            self.on_step(row)
        elif row["kind"] in ("health", "knn", "probe"):
            self.on_evaluation(row)
        elif row["kind"] == "checkpoint":
            self.on_checkpoint(row)

    def on_step(self, row: Row) -> None:
        """Every `--log-every` steps: means of loss and its terms, learning rate, images per second."""

    def on_evaluation(self, row: Row) -> None:
        """After health figures ("health"), online k-NN ("knn") and the online linear classifier ("probe")."""

    def on_checkpoint(self, row: Row) -> None:
        """After a checkpoint is on the disk; its folder's name is `row["path"]`."""

    def on_end(self, outcome: str) -> None:
        """Last: "done", "stopped" (by a signal, the run may go on) or "failed"."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse a logger whose library is not installed, before anything takes time.

    Raises:
        UserMistake: it names the line to type.
    """
    for name in names:  # that of its package as well, for `import` and for pip
        if importlib.util.find_spec(name) is None:
            raise UserMistake(f"--log {name}: the package {name} is not installed; pip install {name}")


def made(factories: Sequence[str]) -> list[Callback]:
    """The callbacks of `--callbacks module:factory,...`.

    Raises:
        UserMistake: there is no such module or factory, or what it makes is no `Callback`.
    """
    return [_made(text) for text in factories]


def _made(text: str) -> Callback:
    module, _, name = text.partition(":")
    if not module or not name:
        raise UserMistake(f"--callbacks {text}: write module:factory, such as my_code:Notify")
    # As `--arch module:factory`: a user's file lies where the command is given; behind all others.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as reason:
        raise UserMistake(f"--callbacks {text}: {reason}; name a module that Python finds and what it has") from None
    callback = factory()
    if not isinstance(callback, Callback):
        raise UserMistake(
            f"--callbacks {text}: gives a {type(callback).__name__}; give a class that is derived from regatta.Callback"
        )
    return callback


class Listeners:
    """All callbacks of a run; one that raises is named in one line and left out.

    Args:
        callbacks: in the order in which they are told.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = list(callbacks)

    def start(self, run: Started) -> None:
        """Tell all of them that the run starts."""
        self._tell("on_start", run)

    def row(self, row: Row) -> None:
        """Tell all of them a row."""
        for callback in list(self._callbacks):
            self._tell_one(callback, "on_row", dict(row))

    def end(self, outcome: str) -> None:
        """Tell all of them how the run ended."""
        self._tell("on_end", outcome)

    def _tell(self, call: str, value: Any) -> None:
        for callback in list(self._callbacks):
            self._tell_one(callback, call, value)

    def _tell_one(self, callback: Callback, call: str, value: Any) -> None:
        try:
            getattr(callback, call)(value)
        except Exception as reason:  # days of training do not end for a page or a server
            self._callbacks.remove(callback)
            text = " ".join(str(reason).split())[:300]
            what = f"{callback} failed in {call} and is left out from here on: {type(reason).__name__}: {text}"
            print(f"regatta: {what}", file=sys.stderr, flush=True)
