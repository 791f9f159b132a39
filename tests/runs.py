"""Start training runs from tests: in forked processes that have already imported everything, one for each rank."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from train.record.run import read_run

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.runs_preload"])

TINY = (
    "--loader synthetic --data 128 --arch resnet10-w16 --image-size 64 --epochs 2 --global-batch 8 --queue-size 64 "
    "--hidden-dim 32 --dim 16 --bn.group-size 2 --optim.lr 0.05 --log-every 2 --checkpoint-every 3 --holdout 8 "
    "--knn-every 0 --device cpu --deterministic --no-report"
).split()


def last_wins(argv: Sequence[str]) -> list[str]:
    """The arguments without those flags that come again later, which the commands refuse."""
    groups: list[list[str]] = [[]]
    for argument in argv:
        if argument.startswith("--"):
            groups.append([])
        groups[-1].append(argument)
    flags = [group[0].partition("=")[0] if group else "" for group in groups]
    kept = [group for place, group in enumerate(groups) if not flags[place] or flags[place] not in flags[place + 1 :]]
    return [argument for group in kept for argument in group]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _enter(argv: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    stream = open(log, "ab", buffering=0)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    from train.main import main

    sys.exit(main(argv))


def start(argv: list[str], world_size: int = 1, log: Path | None = None, apart: bool = False) -> list[Any]:
    """Start the ranks of one run; the caller joins them.

    Args:
        argv: of every rank.
        world_size: number of ranks.
        log: file of what they say; nowhere without one.
        apart: each speaks as if on a machine of its own, where no other has said its line.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(world_size):
        ranks = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
        if apart:
            ranks["SLURM_JOB_ID"] = str(rank)
        process = _CONTEXT.Process(target=_enter, args=(argv, {**shared, **ranks}, str(log or os.devnull)))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[Any], timeout_s: float = 240.0) -> list[int]:
    """Exit codes of all ranks; kills those that outlast the time."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.1))
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    return [process.exitcode for process in processes]


def run(argv: list[str], world_size: int = 1, log: Path | None = None, apart: bool = False) -> list[int]:
    """Start a run, as `start` does, and wait for its end."""
    return finish(start(argv, world_size, log, apart))


def rows(run_dir: Path, kind: str = "") -> list[dict[str, Any]]:
    """Rows of a run's metrics, of one kind or all."""
    recorded = read_run(run_dir)
    return recorded.of_kind(kind) if kind else recorded.rows


def comparable(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, bytes]]:
    """What must be byte-identical: metric rows less their times, the plain state, and the tensor files."""
    stages = ("data_wait_share", "loader_busy_share", "augment_share", "batches_ready")
    dropped = ("time_s", "images_per_s", *stages)
    kept = [
        {name: value for name, value in row.items() if name not in dropped}
        for row in rows(run_dir)
        if row["kind"] not in ("start", "resume", "checkpoint")
    ]
    newest = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text()
    state = json.loads((newest / "state.json").read_text())
    # The byte length of the metrics depends on how many digits a time has.
    state.pop("metrics_bytes")
    state["config"]["run"].pop("run_dir")
    state["config"].pop("versions")
    tensors = {name: (newest / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    # The order of a safetensors file's metadata is not fixed; its tensors are.
    backbone = load_file(run_dir / "backbone.safetensors")
    tensors["backbone"] = b"".join(name.encode() + value.numpy().tobytes() for name, value in sorted(backbone.items()))
    return kept, state, tensors
