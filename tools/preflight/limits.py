"""What the system lets a process have: files, shared memory, time, cores."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from models.ops.nvrtc import cache_folder
from pipeline.prefetch import decoding_threads
from train.checkpoint import nearest_existing
from train.memory_estimate import estimate, shown
from train.record.diagnosis import Finding

from .examination import Examination

SHM = Path("/dev/shm")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_FILES_LEAST, _FILES_GOOD = 256, 1024
_SHM_A_PROCESS = 256 << 20
"""NCCL's buffers between two processes of a machine; Docker's 64 MiB are too few for two."""
_SCRATCH = 256 << 20
_UNLIMITED = resource.RLIM_INFINITY


def open_files(examination: Examination) -> Iterator[Finding]:
    """How many files may be open at a time against what the loader, the checkpoints and the metrics open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES_LEAST + 4 * decoding_threads(examination.config.run.workers)
    if soft == _UNLIMITED or soft >= max(needed, _FILES_GOOD):
        return
    remedy = f"run 'ulimit -n {min(4096, hard) if hard != _UNLIMITED else 4096}' in this shell first"
    level = "fault" if soft < needed else "note"
    yield Finding(level, f"open files are limited to {soft}, a run may need {needed}", remedy)  # type: ignore[arg-type]


def shared_memory(examination: Examination) -> Iterator[Finding]:
    """Room in /dev/shm for the exchange between processes of this machine."""
    count = examination.world_size
    if count == 1:
        return
    free = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
    if free < _SHM_A_PROCESS * count:
        yield Finding(
            "fault" if examination.runtime.device.type == "cuda" else "note",
            f"shared memory ({SHM}) has {shown(free)} free, {count} processes want {shown(_SHM_A_PROCESS * count)}",
            "start the container with --shm-size=8g (Kubernetes: an emptyDir of medium Memory on /dev/shm)",
        )


def scratch(_: Examination) -> Iterator[Finding]:
    """Folders that libraries write to: temporary files and compiled code."""
    for what, folder, variable in (
        ("temporary files", Path(_temporary()), "TMPDIR"),
        ("compiled kernels", cache_folder(), "XDG_CACHE_HOME"),
    ):
        there = nearest_existing(folder)
        if not (there.is_dir() and os.access(there, os.W_OK)):
            yield Finding("fault", f"the folder of {what}, {folder}, cannot be written", f"export {variable}=FOLDER")
        elif shutil.disk_usage(there).free < _SCRATCH:
            free = shown(shutil.disk_usage(there).free)
            yield Finding(
                "note", f"the folder of {what}, {folder}, has {free} free", f"free space or export {variable}=FOLDER"
            )


def _temporary() -> str:
    # Python's own choice passes over a folder that it cannot write to; other libraries take the variable as it is.
    return os.environ.get("TMPDIR") or tempfile.gettempdir()


def time_limits(examination: Examination) -> Iterator[Finding]:
    """A limit on processor time, which ends a run without a word."""
    soft, _ = resource.getrlimit(resource.RLIMIT_CPU)
    if soft != _UNLIMITED:
        yield Finding(
            "fault", f"the system ends the run after {soft:,} s of processor time", "run 'ulimit -t unlimited' first"
        )


def cores(examination: Examination) -> Iterator[Finding]:
    """Decoding threads and PyTorch's own against the cores and the container's share of them."""
    usable, workers = len(os.sched_getaffinity(0)), examination.config.run.workers
    quota = _quota()
    if quota and quota < usable:
        yield Finding(
            "note",
            f"the container may use {quota:.1f} of {usable} cores, which threads that wait for one another slow down",
            f"give --workers {max(1, int(quota))}",
        )
    elif workers > 2 * usable:
        yield Finding("note", f"--workers {workers} on {usable} cores", "leave it out: 0 follows from the cores")
    elif workers and workers * 2 <= usable // examination.world_size:
        yield Finding(
            "note", f"--workers {workers} leaves most of {usable} cores idle", "leave it out: 0 follows from the cores"
        )
    threads = os.environ.get("OMP_NUM_THREADS", "")
    alone_on_cpu = examination.runtime.device.type == "cpu" and examination.world_size == 1
    if alone_on_cpu and threads.isdecimal() and int(threads) < usable:
        yield Finding(
            "note", f"OMP_NUM_THREADS={threads} keeps the step on {threads} of {usable} cores", "unset OMP_NUM_THREADS"
        )


def _quota() -> float:
    """Cores' worth of time that the control group gives; 0 for no limit."""
    try:
        share, period = CPU_QUOTA.read_text().split()
    except (OSError, ValueError):
        return 0.0
    return int(share) / int(period) if share.isdecimal() else 0.0


def memory_limits(examination: Examination) -> Iterator[Finding]:
    """A limit on the address space, under which PyTorch fails with errors of many kinds."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == _UNLIMITED or examination.method is None:
        return
    runtime = examination.runtime
    needed = estimate(examination.whole, examination.world_size, runtime.device, runtime.dtype).total(runtime.device)
    # A process with PyTorch maps some GiB that it never touches.
    needed += 8 << 30
    if soft < needed:
        yield Finding(
            "fault",
            f"the address space is limited to {shown(soft)}, the run maps about {shown(needed)}",
            "run 'ulimit -v unlimited' in this shell first",
        )
