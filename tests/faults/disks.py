"""Let the disk fail under every command that writes, at any change of a file, for a moment or for good.

`python -m tests.faults.disks --faults 300 [--report FILE]` is the long form; the short one runs in CI. A command must
end well with the right files, or with one line and an exit code; then the same command, on a sound disk, ends as one
that nothing disturbed. No file that has its final name may be a part of one.
"""

from __future__ import annotations

import argparse
import errno
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.faults.jobs import Job, jobs, make_inputs
from tests.faults.kills import Blow, Whole, clear, differences, finish_job, start_job, warm, whole_in
from tests.faults.reports import publish
from tests.faults.traps import Trap

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.ESTALE, errno.EROFS)
CODES = (2, 5)
"""With which a command may end where a file cannot be written: 5 is that of training."""


def chosen_jobs() -> list[Job]:
    """One run of training and each other command."""
    return [job for job in jobs() if not job.trains or job.name == "train moco-v2"]


def draw_fault(whole: Whole, draw: random.Random) -> Blow:
    """A failing disk, from a random change of a file on."""
    error, lasting = draw.choice(ERRORS), draw.random() < 0.5
    kind = f"{errno.errorcode[error]} {'for good' if lasting else 'once'}"
    return Blow(kind, trap=Trap("file", draw.randint(1, whole.changes), error=error, lasting=lasting))


def strike(job: Job, whole: Whole, folder: Path, inputs: Path, fault: Blow) -> str:
    """What became of a job under a fault: "went on" or "ended with CODE"; then it is given again.

    Raises:
        AssertionError: it ended with a traceback or without a line, or well with other files than it should have, or
            the same command afterwards did not end as an undisturbed one.
    """
    out = folder / "struck"
    what = f"{job.name}, {fault}"
    (code,) = finish_job(start_job(job, out, inputs, fault), what)
    said = Path(f"{out}.log").read_text()
    # TensorBoard's own thread prints one, which is not ours to keep from it.
    assert "Traceback" not in said or "regatta: TensorBoard:" in said, f"{what}: {said[-3000:]}"
    if code == 0:
        found = "; ".join(differences(whole.outcome, job.outcome(out)))
        assert not found, f"{what}: it ended well, but {found[:500]}: {said[-1000:]}"
    else:
        assert code in CODES, f"{what}: code {code}: {said[-2000:]}"
        assert said.strip().splitlines()[-1].startswith("regatta: "), f"{what}: {said[-1000:]}"
    (again,) = finish_job(start_job(job, out, inputs, None), what)
    assert again == 0, (
        f"{what}: the same command afterwards ends with {again}: {Path(f'{out}.log').read_text()[-2000:]}"
    )
    found = "; ".join(differences(whole.outcome, job.outcome(out)))
    assert not found, f"{what}: the same command afterwards: {found[:500]}"
    clear(out)
    return "went on" if code == 0 else f"ended with {code}"


def attack(
    chosen: list[Job], faults: int, seed: int, say: Callable[[str], None] | None = None
) -> Counter[tuple[str, str, str]]:
    """Outcomes of `faults` failing disks, by (job, kind, outcome), over the jobs in turn.

    Raises:
        AssertionError: as `strike`, of the first.
    """
    draw, tally = random.Random(seed), Counter[tuple[str, str, str]]()
    folder = Path(tempfile.mkdtemp(prefix="disks-"))
    make_inputs(folder / "inputs")
    warm()
    wholes: dict[int, Whole] = {}
    for number in range(faults):
        place = number % len(chosen)
        job, own = chosen[place], folder / str(place)
        if place not in wholes:
            wholes[place] = whole_in(own, job, folder / "inputs")
        fault = draw_fault(wholes[place], draw)
        outcome = strike(job, wholes[place], own, folder / "inputs", fault)
        tally[job.name, fault.kind, outcome] += 1
        if say is not None:
            say(f"{number + 1} of {faults}: {job.name}, {fault.kind}, change {fault.trap.number}: {outcome}")
    shutil.rmtree(folder, ignore_errors=True)
    return tally


def main(argv: list[str]) -> int:
    """The long form; prints a table and writes it where `--report` says."""
    parser = argparse.ArgumentParser(description="Let the disk fail under every command that writes.")
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="jobs whose name holds this")
    parser.add_argument("--report", type=Path, help="file to write")
    arguments = parser.parse_args(argv)
    chosen = [job for job in chosen_jobs() if arguments.only in job.name]
    tally = attack(chosen, arguments.faults, arguments.seed, lambda line: print(line, file=sys.stderr, flush=True))
    lines = [f"python -m tests.faults.disks --faults {arguments.faults} --seed {arguments.seed}"]
    lines += [f"{name}  {kind}  {outcome}  {count}" for (name, kind, outcome), count in sorted(tally.items())]
    lines.append(f"{tally.total()} failing disks: each command ended right or in one line, and right when given again")
    publish(lines, arguments.report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
