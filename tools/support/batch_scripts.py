"""The text of SLURM's batch scripts: how a job is asked for, where its processes meet, how it goes on after a stop.

Training saves and ends with exit code 75 when it is told to stop. SLURM tells the batch script alone, some minutes
before the time limit. The script passes the signal on, waits, and puts the job back into the queue if the code is 75.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.errors import EXIT_REQUEUE
from train.slurm import FIRST_PORT, PORTS, STEPS


@dataclass(frozen=True)
class JobSize:
    """What a job asks for.

    Attributes:
        nodes: how many.
        gpus: of each node; 0 trains on the CPU.
        tasks: processes of each node.
        cpus: of each process.
        time: limit as SLURM writes it, `1-12:00:00`.
        notice_s: seconds before the limit at which the run is told to save.
    """

    nodes: int
    gpus: int
    tasks: int
    cpus: int
    time: str
    notice_s: int


def training_script(
    name: str, size: JobSize, launcher: str, arguments: Sequence[str], logs: Path, directives: Sequence[str]
) -> str:
    """A batch script that trains on one or several nodes.

    Args:
        name: of the job.
        size: what it asks for.
        launcher: "srun" starts every process; "torchrun" is started once a node and starts the processes of it.
        arguments: command that one process runs, with its arguments.
        logs: folder of the log, which must exist when the job starts.
        directives: further options of sbatch, as `--account=x`.
    """
    tasks, cpus = (size.tasks, size.cpus) if launcher == "srun" else (1, size.tasks * size.cpus)
    options = [
        f"--job-name={name}",
        f"--nodes={size.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",
        *([f"--gpus-per-node={size.gpus}"] if size.gpus else []),
        f"--time={size.time}",
        f"--signal=B:TERM@{size.notice_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={logs}/%x-%j.log",
        *directives,
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            *[f"#SBATCH {option}" for option in options],
            "",
            *_meeting_place(),
            "",
            *(_srun(arguments) if launcher == "srun" else _torchrun(arguments, size.tasks)),
            # Not to srun itself, which answers SIGTERM by killing its processes.
            *_until_done("$SLURM_JOB_ID", 'scancel --signal=TERM "$SLURM_JOB_ID"', code_is_kept=launcher == "srun"),
        ]
    )


def array_script(command: Sequence[str], tasks: int, processes: int) -> str:
    """A batch script that runs a command in each task of an array, with `--task` and the task's number from 0 on.

    Args:
        command: words of the command.
        tasks: how many.
        processes: processes, and GPUs, of one task.
    """
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --array=0-{tasks - 1}",
            "#SBATCH --nodes=1 --ntasks=1",
            f"#SBATCH --gpus={processes}",
            "#SBATCH --requeue --signal=B:TERM@120",
            f'{shlex.join(command)} --task "$SLURM_ARRAY_TASK_ID" &',
            *_until_done("${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"),
        ]
    )


def _meeting_place() -> list[str]:
    """Sets MASTER_ADDR and MASTER_PORT, unless they are given, from what the job knows; as `train.slurm` does."""
    return [
        "# Processes meet on the first node, at the address by which SLURM reaches it, and at a port of this job.",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "address=$(scontrol show node \"$first\" --oneliner | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')",
        '[ "$SLURM_JOB_NUM_NODES" -eq 1 ] && address=127.0.0.1',
        'export MASTER_ADDR="${MASTER_ADDR:-${address:-$first}}"',
        f'export MASTER_PORT="${{MASTER_PORT:-$(({FIRST_PORT} + SLURM_JOB_ID * {STEPS} % {PORTS}))}}"',
        'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"',
        'echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_JOB_NODELIST, $MASTER_ADDR:$MASTER_PORT"',
    ]


def _srun(arguments: Sequence[str]) -> list[str]:
    return [
        "# A rank that has saved and left must not end those that still save, whatever the cluster's defaults are.",
        f'srun --kill-on-bad-exit=0 --wait=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\\n  {shlex.join(arguments)} &',
    ]


def _torchrun(arguments: Sequence[str], processes: int) -> list[str]:
    python, *rest = arguments
    return [
        f'srun --kill-on-bad-exit=0 --wait=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\\n'
        f"  {shlex.quote(python)} -m torch.distributed.run \\\n"
        f'  --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node={processes} --rdzv_id="$SLURM_JOB_ID" \\\n'
        f'  --rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" \\\n'
        f"  {shlex.join(rest)} &",
    ]


def _until_done(job: str, tell: str = 'kill -TERM "$child"', code_is_kept: bool = True) -> list[str]:
    """Waits for the command in the background, passes SIGTERM on to it, and requeues the job where it was stopped.

    Args:
        job: what to requeue.
        tell: command that tells the run to save and stop.
        code_is_kept: False for a launcher that turns the code of a stopped run into another one.
    """
    stopped = f'[ "$code" -eq {EXIT_REQUEUE} ]' if code_is_kept else '[ -n "$told" ] && [ "$code" -ne 0 ]'
    return [
        "child=$!",
        "told=",
        "# Once only: a second signal would end the run at once, without saving.",
        # Noted before it is told: bash takes the next signal as soon as the command of telling has ended.
        f"trap '[ -n \"$told\" ] || {{ told=1; {tell}; }}; woken=1' TERM",
        "# A trapped signal ends a wait before the command has ended.",
        'while woken=; wait "$child"; code=$?; [ -n "$woken" ]; do :; done',
        "# The run was stopped and has saved: it goes on from there.",
        f'if {stopped}; then scontrol requeue "{job}"; fi',
        'exit "$code"',
        "",
    ]
