"""Run a function on several gloo processes and bring back what each returns."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# One server for all test files: it has imported everything, so that a rank starts in milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.runs_preload"])


def _worker(rank: int, function: Callable[..., Any], world: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        result = function(rank, world, *arguments)
    except Exception:
        result = traceback.format_exc()
    finally:
        dist.destroy_process_group()
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(result))


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """Results of `function(rank, world, *arguments)` on every rank, in rank order.

    The function must be importable, and what it returns must hold no autograd graph.
    """
    processes = [
        _CONTEXT.Process(target=_worker, args=(rank, function, world, str(folder), arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        if process.is_alive():
            process.kill()
    results = [pickle.loads(Path(folder, f"{rank}.pkl").read_bytes()) for rank in range(world)]
    for result in results:
        assert not (isinstance(result, str) and result.startswith("Traceback")), result
    return results
