"""The run's folder: whether it can be written, and whether the checkpoints have room."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from train.build import build_state
from train.checkpoint import nearest_existing, recorded_config, run_checkpoints
from train.memory_estimate import shown
from train.record.diagnosis import Finding
from train.record.run import CONFIG
from train.resolve import changed_fields, lengthened
from train.state import state_bytes

from .examination import Examination


def run_folder(examination: Examination) -> Iterator[Finding]:
    """Whether the folder can be written, and what is in it already."""
    folder = Path(examination.config.run.run_dir)
    there = nearest_existing(folder)
    if not there.is_dir():
        yield Finding("fault", f"--run-dir {folder}: {there} is a file", "choose another --run-dir")
    elif not os.access(there, os.W_OK):
        yield Finding("fault", f"--run-dir {folder}: {there} cannot be written", "choose another --run-dir")
    elif (folder / CONFIG).is_file():
        yield from _continued(examination, folder)


def _continued(examination: Examination, folder: Path) -> Iterator[Finding]:
    if examination.config.run.resume == "never":
        yield Finding("note", f"{folder} holds a run that --resume never overwrites", "choose another --run-dir")
        return
    recorded = recorded_config(folder / "checkpoints")
    if recorded is None:
        return
    current = examination.config.to_json()
    changed = changed_fields(recorded, lengthened(recorded, current))
    if changed and examination.config.run.micro_batch != "auto":
        yield Finding(
            "fault",
            f"{folder} holds a run with other settings ({', '.join(changed)})",
            "choose another --run-dir, or --resume never",
        )
    else:
        yield Finding("ok", f"goes on with the run in {folder}")


def space(examination: Examination) -> Iterator[Finding]:
    """Free space and the largest file allowed against the checkpoints that are kept."""
    if examination.method is None:
        return
    run = examination.config.run
    state = build_state(examination.config, examination.runtime, examination.method)
    each = state_bytes(state)
    # As training itself asks for it: less what is there already of a run that goes on.
    needed, free = run_checkpoints(examination.config, examination.config.to_json(), examination.runtime).space(state)
    folder = nearest_existing(Path(run.run_dir))
    text = f"checkpoints of {shown(each)} each, {shown(max(needed, 0))} more in all, {shown(free)} free at {folder}"
    if free < needed:
        remedy = "free space, choose a --run-dir on another disk"
        yield Finding("fault", text, remedy + (", or lower --keep-checkpoints" if run.keep_checkpoints > 1 else ""))
    elif run.keep_checkpoints == 0:
        yield Finding("note", f"{text}; all are kept", "--keep-checkpoints 2 keeps the newest")
    else:
        yield Finding("ok", text)
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest != resource.RLIM_INFINITY and largest < each:
        yield Finding(
            "fault",
            f"files may have {shown(largest)}, a checkpoint's have up to {shown(each)}",
            "run 'ulimit -f unlimited' in this shell first",
        )
