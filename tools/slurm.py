"""Write a SLURM batch script that trains: `python tools/slurm.py --nodes 2 --gpus-per-node 8 -- --method byol ...`.

What stands behind `--` are arguments of `train/main.py`, which are checked before a job waits for hours. `sbatch FILE`
submits the script. The job saves before its time limit or when it is pre-empted, goes back into the queue, and goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import re
import shlex
from collections.abc import Sequence

from tools.support.batch_scripts import JobSize, training_script
from tools.support.cli import make_parser, parse, positive, run_main
from train import main as train_main
from train.config import Config
from train.errors import UserMistake
from train.flags import OneLineParser
from train.resolve import resolve

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_CPUS = 8


def _parser() -> OneLineParser:
    parser = make_parser("Write a SLURM batch script that trains. Arguments of the training stand behind --.")
    add = parser.add_argument
    add("--output", default="train.sbatch", metavar="FILE", help="script to write")
    add("--nodes", type=positive, default=1, help="machines")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of each; 0 trains on the CPU")
    add("--tasks-per-node", type=int, default=0, metavar="N", help="processes of each; 0 is one for each GPU")
    add("--cpus-per-task", type=positive, default=_CPUS, metavar="N", help="cores of each process, which decode")
    add("--time", default="24:00:00", metavar="D-HH:MM:SS", help="limit, after which the job is requeued")
    add("--notice", type=positive, default=300, metavar="SECONDS", help="how long before the limit the run is to save")
    add("--partition", default="", help="partition or queue")
    add("--launcher", default="srun", choices=["srun", "torchrun"], help="what starts the processes of a node")
    add("--name", default="", help="name of the job (default: the run's folder)")
    add("--logs", default="logs", metavar="DIR", help="folder of the logs, which is made")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="further line for sbatch, as --sbatch=--account=x",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Write the script that the command line asks for; returns the exit code.

    Raises:
        UserMistake: a value that SLURM or the training would refuse.
    """
    own, training = _divided(argv)
    options = parse(_parser(), own)
    config = _checked(training)
    size = _size(options, config)
    logs = Path(options.logs).absolute()
    logs.mkdir(parents=True, exist_ok=True)  # where it does not exist, SLURM lets the job fail without a word
    directives = [*([f"--partition={options.partition}"] if options.partition else []), *options.sbatch]
    name = options.name or Path(config.run.run_dir).name
    script = Path(options.output)
    script.write_text(training_script(name, size, options.launcher, [*train_command(), *training], logs, directives))
    print(f"{script}: {size.nodes} nodes, {size.tasks} processes each, logs in {logs}")
    print(f"next: sbatch {shlex.quote(str(script))}")
    return 0


def _divided(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before and behind `--`."""
    words = list(argv)
    if "--" not in words:
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


def _checked(training: Sequence[str]) -> Config:
    if not training:
        raise UserMistake(
            "the arguments of the training are missing; write them behind --: -- --method byol --data x.beton"
        )
    config = resolve(training)
    if not config.run.data and config.run.loader != "synthetic":
        raise UserMistake("--data is needed among the training's arguments, behind --")
    if config.run.processes != 1:
        raise UserMistake(f"--processes {config.run.processes}: under SLURM give --tasks-per-node instead")
    return config


def _size(options: argparse.Namespace, config: Config) -> JobSize:
    if not _TIME.fullmatch(options.time):
        raise UserMistake(f"--time {options.time} is no time limit of SLURM; write 24:00:00 or 2-12:00:00")
    if options.gpus_per_node < 0 or options.tasks_per_node < 0:
        raise UserMistake("--gpus-per-node and --tasks-per-node cannot be negative")
    tasks = options.tasks_per_node or options.gpus_per_node or 1
    if options.gpus_per_node and tasks != options.gpus_per_node:
        raise UserMistake(
            f"--tasks-per-node {tasks} with --gpus-per-node {options.gpus_per_node}: a process trains on one GPU"
        )
    world, batch = options.nodes * tasks, config.recipe.global_batch
    if batch % world:
        raise UserMistake(
            f"--global-batch {batch} does not divide over {options.nodes} nodes with {tasks} processes each; give a "
            f"multiple of {world}"
        )
    return JobSize(options.nodes, options.gpus_per_node, tasks, options.cpus_per_task, options.time, options.notice)


def train_command() -> list[str]:
    """The words that start one process of a training with this Python, from a checkout or an installed wheel."""
    package = train_main.__name__.partition(".")[0]
    # A wheel's module cannot be started by its file, whose imports are relative.
    how = [str(Path(train_main.__file__).resolve())] if package == "train" else ["-m", package, "train"]
    return [sys.executable, *how]


if __name__ == "__main__":
    run_main(main)
