"""The checks of an intended run in the order in which they are made: cheap ones first, what needs others last."""

from __future__ import annotations

from .devices import cards, meeting, processes
from .disk import run_folder, space
from .examination import Check
from .images import contents, openable, validation
from .limits import cores, memory_limits, open_files, scratch, shared_memory, time_limits
from .memory import fits
from .settings import batch, built
from .speed import finish, loader, step

CHECKS: tuple[Check, ...] = (
    cards,
    processes,
    meeting,
    open_files,
    shared_memory,
    scratch,
    time_limits,
    cores,
    run_folder,
    batch,
    built,
    space,
    memory_limits,
    fits,
    openable,
    contents,
    validation,
    loader,
    step,
    finish,
)
