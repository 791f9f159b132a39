"""What SLURM's environment says of a job's processes: ranks, and where they meet.

`srun` starts one process a task and sets `SLURM_STEP_NUM_TASKS`. The shell of a batch script has `SLURM_NTASKS` and
`SLURM_PROCID` as well, but is one process: whoever calls Python there trains alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 15000, 16384  # below 32768, where Linux takes ports for outgoing connections from
STEPS = 8  # steps of one job at a time that get ports of their own


def step_ranks(env: Mapping[str, str]) -> tuple[int, int, int] | None:
    """(rank, world size, local rank) of a task that srun started among several; None for any other process."""
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks < 2 or "SLURM_PROCID" not in env:
        return None
    # With a GPU bound to each task, a task sees one, whose number is 0.
    bound = env.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == "1"
    return int(env["SLURM_PROCID"]), tasks, 0 if bound else int(env.get("SLURM_LOCALID", 0))


def tasks_here(env: Mapping[str, str]) -> int:
    """Tasks of a step on this node, at least 1; all of the step where the environment does not tell its nodes apart."""
    # "2(x3),1": three nodes with two tasks each, then one with one.
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return max(counts[node] if node < len(counts) else int(env.get("SLURM_STEP_NUM_TASKS", 1)), 1)


def meeting_place(env: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of a step, as far as the user has not set them.

    The address is the step's first node, where task 0 runs. The port follows from the job's and the step's number, so
    that jobs that share a node do not meet each other.

    Returns:
        Without an address where the environment names no node.
    """
    place = {}
    if "MASTER_ADDR" not in env:
        node = first_node(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
        if node:
            # A node's own name need not resolve on the node itself.
            alone = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_JOB_NUM_NODES")) == "1"
            place["MASTER_ADDR"] = "127.0.0.1" if alone else node
    if "MASTER_PORT" not in env:
        job, step = (int(env.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        place["MASTER_PORT"] = str(FIRST_PORT + (job * STEPS + step % STEPS) % PORTS)
    return place


def first_node(nodes: str) -> str:
    """The first host of a list as SLURM writes it: `gpu[03-07,9],cpu1` is gpu03."""
    # A comma within brackets separates numbers, not names.
    name = re.split(r",(?![^\[]*\])", nodes, maxsplit=1)[0].strip()
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", name)
