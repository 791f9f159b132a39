"""Run the commands of a table one after the other, each once; started again, what is done is passed over."""

from __future__ import annotations

from collections.abc import Sequence

from tools.reproduction.commands import Job
from tools.support.stoppable import Commands
from train.errors import UserMistake


def run(jobs: Sequence[Job], processes: int) -> int:
    """Run what has no result yet, in order.

    Args:
        jobs: commands; a later one may need an earlier one's result.
        processes: processes of a command that can use several.

    Returns:
        0 when all are done, 75 after a signal, else the exit code of the command that ended the run.
    """
    commands = Commands()
    for number, job in enumerate(jobs, 1):
        if job.done.exists():
            print(f"[{number}/{len(jobs)}] done: {job.done}", flush=True)
            continue
        print(f"[{number}/{len(jobs)}] {job.text(processes)}", flush=True)
        job.done.parent.mkdir(parents=True, exist_ok=True)
        code = commands.call(job.command(processes))
        if code:
            # Training and evaluation resume by themselves, so the whole table does.
            print(f"stopped with exit code {code}; the same command goes on from here", flush=True)
            return code
        if not job.done.exists():
            raise UserMistake(f"{job.text()} ended without {job.done}; run it alone to see why")
    return 0


def slurm_script(command: Sequence[str], tasks: int, processes: int) -> str:
    """A batch script that runs one line and seed of a table in each task of an array.

    Args:
        command: this command with `--run`, without `--task`.
        tasks: lines times seeds.
        processes: processes, and GPUs, of one task.
    """
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --array=0-{tasks - 1}",
            "#SBATCH --nodes=1 --ntasks=1",
            f"#SBATCH --gpus={processes}",
            "#SBATCH --requeue --signal=B:TERM@120",
            "# Exit code 75 says that the task was stopped and saved: it goes on from there.",
            f'{" ".join(command)} --task "$SLURM_ARRAY_TASK_ID" &',
            'child=$!; trap \'kill -TERM "$child"\' TERM; wait "$child"; code=$?',
            '[ "$code" -gt 128 ] && { wait "$child"; code=$?; }  # a trapped signal ends the first wait',
            '[ "$code" -eq 75 ] && scontrol requeue "$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"',
            'exit "$code"',
            "",
        ]
    )
