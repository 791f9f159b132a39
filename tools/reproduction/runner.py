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
