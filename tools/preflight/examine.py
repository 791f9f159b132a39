"""From the arguments of a run to the findings about it: each check in its turn, and what it refuses as a finding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from train.errors import UserMistake, is_refusal
from train.record.diagnosis import Finding
from train.resolve import resolve

from .examination import Check, Examination


def examine_run(arguments: Sequence[str]) -> Iterator[Finding]:
    """The findings about the run that `train/main.py` would make of these arguments; it neither starts nor writes."""
    try:
        config = resolve(arguments)
    except UserMistake as mistake:
        yield refused(mistake)
        return
    # Here and not above: PyTorch takes seconds, which a mistyped flag should not cost.
    from train.few_images import fitted
    from train.runtime import start

    from .checks import CHECKS

    # As training does, for a new run.
    arguments, advice = fitted(arguments, config)
    config = resolve(arguments)
    if advice:
        yield Finding("note", advice, "give a --recipe to choose another")
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
