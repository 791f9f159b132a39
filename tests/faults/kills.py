"""Kill every command anywhere, give the same command again, and see that the end is byte for byte the same.

`python -m tests.faults.kills --kills 1000 [--report FILE]` is the long form; the short one runs in CI.
Networks are narrowed to a block a stage, so that a kill costs less than a second; everything else is what users run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.jobs import Job, jobs, make_inputs
from tests.faults.reports import publish
from tests.faults.traps import Trap, count_changes, lay
from tests.runs import _CONTEXT, free_port
from train.errors import EXIT_HUNG

LIMIT_S = 180.0
"""Seconds within which every process must have ended; one that has not is a hang, which is a failure."""
MOST_BLOWS = 5
"""On one run, after which it may end in peace."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Blow:
    """What one attempt at a job suffers.

    Attributes:
        kind: for the report.
        after_s: seconds after the start at which `number` is sent; None where the trap does it.
        number: signal.
        rank: process that is hit; None for all of them.
        trap: laid in process `rank`.
    """

    kind: str
    after_s: float | None = None
    number: int = signal.SIGKILL
    rank: int | None = None
    trap: Trap | None = None


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed: what it left, its seconds, and how often it changed a file."""

    outcome: Any
    seconds: float
    changes: int


def _narrow_networks() -> None:
    from models.resnet import BACKBONES
    from tests.method_cases import NarrowResNet, _narrow_swin

    BACKBONES.update({"resnet18": NarrowResNet, "swin-t": _narrow_swin})  # type: ignore[dict-item]


def _enter(
    command: str, argv: list[str], environment: dict[str, str], out: Path, trap: Trap | None, changes: Path | None
) -> None:
    os.environ.update(environment)
    stream = open(f"{out}.log", "ab", buffering=0)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    if argv[0].startswith("--method"):
        _narrow_networks()
    if trap is not None:
        if trap.error:
            import train.retry

            # What is tried is whether a write is attempted again, not how long it waits.
            train.retry.PAUSES_S = (0.0, 0.0, 0.0)  # type: ignore[assignment]
        lay(trap, out)
    if changes is not None:
        count_changes(out, changes)
    from train.errors import run_to_exit_code

    sys.exit(run_to_exit_code(lambda: importlib.import_module(command).main(argv)))


def start_job(job: Job, out: Path, inputs: Path, blow: Blow | None, changes: Path | None = None) -> list[Any]:
    """Start the processes of a job, which write to `out` and say what they say to the `.log` beside it.

    Args:
        job: what to run.
        out: folder of its output.
        inputs: folder of `make_inputs`.
        blow: what the process that it is meant for suffers from within; None for nothing.
        changes: file in which each change of a file is counted; None counts none.
    """
    out.mkdir(exist_ok=True)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(job.ranks):
        own = {"RANK": str(rank), "WORLD_SIZE": str(job.ranks), "LOCAL_RANK": str(rank)} if job.ranks > 1 else {}
        trap = blow.trap if blow is not None and rank == (blow.rank or 0) else None
        arguments = (job.command, job.argv(out, inputs), {**shared, **own}, out, trap, changes if rank == 0 else None)
        process = _CONTEXT.Process(target=_enter, args=arguments)
        process.start()
        processes.append(process)
    return processes


def _strike(processes: list[Any], blow: Blow) -> None:
    assert blow.after_s is not None
    # Woken early by a process that ends: what has ended cannot be hit.
    processes[blow.rank or 0].join(blow.after_s)
    for process in processes if blow.rank is None else [processes[blow.rank]]:
        # It may end, and be reaped by the fork server, between the question and the blow.
        with contextlib.suppress(ProcessLookupError):
            if process.is_alive():
                os.kill(process.pid, blow.number)


def finish_job(processes: list[Any], what: str) -> list[int]:
    """Exit codes of all processes.

    Raises:
        AssertionError: one did not end within `LIMIT_S`; it is killed first.
    """
    deadline = time.monotonic() + LIMIT_S
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.1))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    assert not hung, f"{what}: processes {hung} did not end within {LIMIT_S:g} s"
    return [process.exitcode for process in processes]


def run_whole(job: Job, folder: Path, inputs: Path) -> Whole:
    """The job without a disturbance.

    Raises:
        AssertionError: it did not end well.
    """
    started, out, changes = time.monotonic(), folder / "whole", folder / "changes"
    codes = finish_job(start_job(job, out, inputs, None, changes), job.name)
    assert set(codes) == {0}, f"{job.name}: {codes}: {_last_lines(out)}"
    return Whole(job.outcome(out), time.monotonic() - started, changes.stat().st_size if changes.exists() else 0)


def _last_lines(out: Path) -> str:
    return Path(f"{out}.log").read_text()[-2000:]


def draw_blow(job: Job, whole: Whole, draw: random.Random) -> Blow:
    """A blow for one attempt: at a random moment from outside, or at a random place from within."""
    rank = draw.randrange(job.ranks)
    moment = draw.uniform(0.0, whole.seconds)
    traps: list[Blow] = [Blow("SIGKILL before a file changes", trap=Trap("file", draw.randint(1, whole.changes)))]
    outside = [Blow("SIGKILL at a moment", moment)]
    if job.ranks > 1:
        outside.append(Blow("SIGKILL of one rank at a moment", moment, rank=rank))
    if job.trains:
        stop = draw.choice(STOPS)
        outside.append(Blow(f"{stop.name} to one rank", moment, stop, rank))
        save = draw.randint(1, 12)
        traps += [
            Blow("SIGKILL in a save", trap=Trap("save", save)),
            Blow("a second signal in the save", trap=Trap("save", save, (stop, stop))),
            Blow("SIGKILL at an evaluation", rank=rank, trap=Trap("evaluation", draw.randint(1, 2))),
            Blow("SIGKILL at the turn of an epoch", rank=rank, trap=Trap("epoch", draw.randint(1, 2))),
        ]
    return draw.choice(draw.choice([outside, traps]))


def strike_until_whole(
    job: Job, whole: Whole, folder: Path, inputs: Path, draw: random.Random, most: int
) -> Iterator[str]:
    """Give a job's command until it ends well, with up to `most` blows; yields the kind of each that hit.

    Raises:
        AssertionError: the end differs from the undisturbed one, a process hung, or one ended with another code than
            the blow explains.
    """
    out = folder / "struck"
    for attempt in range(most + 1):
        blow = draw_blow(job, whole, draw) if attempt < most else None
        processes = start_job(job, out, inputs, blow)
        if blow is not None and blow.after_s is not None:
            _strike(processes, blow)
        codes = finish_job(processes, f"{job.name}, {blow}")
        if set(codes) == {0}:
            break
        _check_codes(job, blow, codes, out)
        assert blow is not None
        yield blow.kind
    differing = "; ".join(differences(whole.outcome, job.outcome(out)))
    assert not differing, f"{job.name}: the end differs ({differing[:500]}) after blows, the last but one {blow}"
    clear(out)


def clear(out: Path) -> None:
    """Remove what a job has written, and what it has said."""
    shutil.rmtree(out)
    Path(f"{out}.log").unlink()


def differences(expected: Any, found: Any, place: str = "") -> list[str]:
    """Where two outcomes differ, as `place: expected -> found`; empty for equal ones."""
    if isinstance(expected, dict) and isinstance(found, dict):
        names = sorted({*expected, *found})
        return [each for name in names for each in differences(expected.get(name), found.get(name), f"{place}/{name}")]
    both_listed = isinstance(expected, list | tuple) and isinstance(found, list | tuple)
    if both_listed and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [each for number, (a, b) in pairs for each in differences(a, b, f"{place}/{number}")]
    return [] if expected == found else [f"{place}: {str(expected)[:100]} -> {str(found)[:100]}"]


def _check_codes(job: Job, blow: Blow | None, codes: list[int], out: Path) -> None:
    """A run may end by the signal that hit it, with 75 after saving, or with 1 or 6 where another rank has gone."""
    assert blow is not None, f"{job.name}: {codes} in peace: {_last_lines(out)}"
    # Python's own answer to an interrupt before training watches for signals: 130, or 1 in the middle of an import.
    allowed = {0, 75, 1, EXIT_HUNG, 130, *(-int(number) for number in (signal.SIGKILL, *STOPS))}
    assert set(codes) <= allowed, f"{job.name}: {codes} after {blow}: {_last_lines(out)}"
    one_died = any(code < 0 for code in codes)
    assert job.ranks == 1 or one_died or set(codes) & {75, 130, 1}, f"{job.name}: {codes} after {blow}"


def attack(
    chosen: list[Job], kills: int, seed: int, say: Any = None, seconds: float = math.inf
) -> Counter[tuple[str, str]]:
    """How many blows hit, by (job, kind); at least `kills` in all, over the jobs in turn, or as many as time allows.

    Raises:
        AssertionError: with the first run whose end is not that of an undisturbed one.
    """
    draw, tally, ends = random.Random(seed), Counter[tuple[str, str]](), time.monotonic() + seconds
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        make_inputs(folder / "inputs")
        warm()
        wholes: dict[int, Whole] = {}
        while tally.total() < kills and time.monotonic() < ends:
            for number, job in enumerate(chosen):
                if number not in wholes:
                    wholes[number] = whole_in(folder / str(number), job, folder / "inputs")
                for kind in strike_until_whole(
                    job, wholes[number], folder / str(number), folder / "inputs", draw, MOST_BLOWS
                ):
                    tally[job.name, kind] += 1
                if say is not None:
                    say(f"{tally.total()} blows, {job.name} whole")
                if tally.total() >= kills or time.monotonic() > ends:
                    break
    except AssertionError as fault:
        # Here and now: of several attacks at once only the first fault ends up with the caller.
        print(f"left for you to look at: {folder}: {str(fault)[:1000]}", file=sys.stderr, flush=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return tally


def attack_at_once(chosen: list[Job], kills: int, seed: int, seconds: float, at_once: int) -> Counter[tuple[str, str]]:
    """`attack` several times at once, each with a share of the blows, with draws and with folders of its own.

    Raises:
        AssertionError: as `attack`.
    """

    def one(number: int) -> Counter[tuple[str, str]]:
        # Each begins at another job, so that a short time is spread over all of them.
        first = number * len(chosen) // at_once
        return attack(
            [*chosen[first:], *chosen[:first]],
            -(-kills // at_once),
            seed + number,
            lambda line: print(f"{number}: {line}", file=sys.stderr, flush=True),
            seconds,
        )

    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(one, range(at_once)), Counter())


def warm() -> None:
    """Start the fork server with all that the jobs import: the first run would otherwise seem longer than it is."""
    _CONTEXT.set_forkserver_preload(["tests.runs_preload", "tests.faults.preload"])
    process = _CONTEXT.Process(target=time.monotonic)
    process.start()  # type: ignore[attr-defined]
    process.join()  # type: ignore[attr-defined]


def whole_in(folder: Path, job: Job, inputs: Path) -> Whole:
    """As `run_whole`, in a new folder."""
    folder.mkdir()
    return run_whole(job, folder, inputs)


def main(argv: list[str]) -> int:
    """The long form; prints a table and writes it where `--report` says."""
    parser = argparse.ArgumentParser(description="Kill every command anywhere and see that the same command mends it.")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end earlier, after the run that is under way")
    parser.add_argument("--only", default="", help="jobs whose name holds this")
    parser.add_argument("--ranks", type=int, default=0, help="jobs of this many processes; 0: of any number")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once: one that has lost a rank waits idle for it")
    parser.add_argument("--report", type=Path, help="file to write")
    arguments = parser.parse_args(argv)
    chosen = [
        job for job in jobs() if arguments.only in job.name and (not arguments.ranks or job.ranks == arguments.ranks)
    ]
    tally = attack_at_once(chosen, arguments.kills, arguments.seed, 60 * arguments.minutes, arguments.jobs)
    command = " ".join(
        ["python -m tests.faults.kills", *argv[: argv.index("--report") if "--report" in argv else None]]
    )
    lines = [command, *(f"{name}  {kind}  {count}" for (name, kind), count in sorted(tally.items()))]
    lines.append(f"{tally.total()} blows that hit, every run ended byte for byte as one that nothing disturbed")
    publish(lines, arguments.report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
