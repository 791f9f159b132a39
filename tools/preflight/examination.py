"""An intended run under examination: what its checks share, and the order in which they are made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from train.config import Config
from train.errors import UserMistake, is_refusal
from train.few_images import fitted
from train.record.diagnosis import Finding
from train.resolve import resolve

if TYPE_CHECKING:
    from models.methods.base import Method
    from pipeline.interface import Pipeline
    from train.runtime import Runtime


@dataclass
class Examination:
    """What is known of an intended run so far; later checks leave out what an earlier one could not find.

    Attributes:
        config: of the run.
        runtime: this process, as a process of the run would be: device and precision.
        world_size: processes of the run.
        method: with its weights on the device; None where it cannot be built.
        images: the training images, opened for a look at them; None where they cannot be opened.
        trained_on: number of images that an epoch has; 0 where that is not known.
        loader_rate: source images a second that the loader delivers, over all processes.
        loader_busy: share of the usable cores that it kept busy meanwhile.
        step_rate: source images a second that the steps take, over all processes.
        host_share: share of a step's time that the host takes to launch it; 0 on a CPU.
    """

    config: Config
    runtime: Runtime
    world_size: int
    method: Method | None = None
    images: Pipeline | None = None
    trained_on: int = 0
    loader_rate: float = 0.0
    loader_busy: float = 0.0
    step_rate: float = 0.0
    host_share: float = 0.0


Check = Callable[[Examination], Iterator[Finding]]


def examine_run(arguments: Sequence[str]) -> Iterator[Finding]:
    """The findings about the run that `train/main.py` would make of these arguments; it neither starts nor writes."""
    try:
        config = resolve(arguments)
        # As training does, for a new run.
        arguments, advice = fitted(arguments, config)
        config = resolve(arguments)
    except UserMistake as mistake:
        yield refused(mistake)
        return
    if advice:
        yield Finding("note", advice, "give a --recipe to choose another")
    # Here and not above: PyTorch takes seconds, which a mistyped flag should not cost.
    from train.runtime import start

    from .checks import CHECKS

    alone = replace(config.run, processes=1, compile=False, hang_timeout=0)
    with contextlib.ExitStack() as open_things:
        try:
            runtime = open_things.enter_context(start(alone))
        except (ValueError, OSError) as reason:
            yield refused(reason)
            return
        examination = Examination(config, runtime, config.run.processes)
        for check in CHECKS:
            yield from guarded(check, examination)
        if examination.images is not None:
            examination.images.close()


def guarded(check: Check, examination: Examination) -> Iterator[Finding]:
    """The findings of one check; what it refuses is a finding as well, so that the next check is still made."""
    try:
        yield from check(examination)
    except (ValueError, OSError, ImportError) as reason:
        # A fault of the program keeps its traceback, as in every command.
        if isinstance(reason, ValueError) and not is_refusal(reason):
            raise
        yield refused(reason)


def refused(reason: BaseException) -> Finding:
    """A mistake in one line as a finding: its last part is what to do."""
    text, mark, remedy = " ".join(str(reason).split()).rpartition("; ")
    return Finding("fault", text, remedy) if mark else Finding("fault", remedy, "check the path and its permissions")


def plain(finding: Finding) -> dict[str, Any]:
    """A finding as JSON values."""
    return {"level": finding.level, "text": finding.text, "remedy": finding.remedy}
