"""Cards, processes and the place where they meet."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import torch

from tools.support.machine import check_gpu
from train.record.diagnosis import Finding

from .examination import Examination


def cards(examination: Examination) -> Iterator[Finding]:
    """The cards of this machine against the driver and this build of PyTorch."""
    if examination.config.run.device == "cpu":
        yield Finding("ok", "runs on the CPU, as --device cpu asks")
    else:
        yield from check_gpu()


def processes(examination: Examination) -> Iterator[Finding]:
    """The number of processes against the cards, and the library that they talk through."""
    asked, on_gpu = examination.world_size, examination.runtime.device.type == "cuda"
    there = torch.cuda.device_count() if on_gpu else 0
    if on_gpu and asked > there:
        yield Finding("fault", f"--processes {asked}, but {there} GPUs are visible", f"give --processes {there}")
    elif on_gpu and asked < there and asked == 1:
        yield Finding(
            "note", f"one process uses one of {there} GPUs", f"give --processes {there}, or start torchrun with as many"
        )
    elif not on_gpu and asked > len(os.sched_getaffinity(0)):
        usable = len(os.sched_getaffinity(0))
        yield Finding(
            "note", f"--processes {asked} on {usable} cores only take turns", f"give --processes {usable} or fewer"
        )
    if asked > 1 and on_gpu:
        yield _nccl()


def _nccl() -> Finding:
    if not torch.distributed.is_nccl_available():
        return Finding("fault", "this build of PyTorch has no NCCL", "install the CUDA build of PyTorch")
    return Finding("ok", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")


def meeting(_: Examination) -> Iterator[Finding]:
    """The port that a launcher's variables name, and tasks that a batch script never starts."""
    env = os.environ
    port = env.get("MASTER_PORT", "")
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        yield Finding("fault", f"MASTER_PORT={port} is no port", "export a number from 1024 to 65535")
    elif port and env.get("MASTER_ADDR") in ("127.0.0.1", "localhost") and _in_use(int(port)):
        yield Finding("fault", f"MASTER_PORT={port} is in use by another run", "export another MASTER_PORT")
    tasks = env.get("SLURM_NTASKS", "1")
    if tasks.isdecimal() and int(tasks) > 1 and "SLURM_STEP_NUM_TASKS" not in env:
        yield Finding(
            "note", f"SLURM has {tasks} tasks, and without srun Python runs as one process", "write srun before python"
        )


def _in_use(port: int) -> bool:
    with socket.socket() as probe:
        # As PyTorch's store does, so that a port that only cools down after its last run counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
