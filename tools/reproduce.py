"""Repeat a table or figure of the three papers: `python tools/reproduce.py TABLE [--run] --imagenet TRAIN VAL`.

Without `--run` it prints the commands of each line and the published figures beside those of ours that are there. With
`--run` it runs them one after the other and goes on where it was stopped; `--slurm FILE` writes an array job instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence

from tools.reproduction.commands import Job, Plan, jobs, pictures
from tools.reproduction.figure import plot
from tools.reproduction.runner import run
from tools.reproduction.scales import SCALES, Sources
from tools.reproduction.sheet import sheet
from tools.reproduction.tables import TABLES
from tools.reproduction.training import Line, lines
from tools.support.batch_scripts import array_script
from tools.support.cli import make_parser, parse, positive, run_main
from train.errors import UserMistake
from train.flags import OneLineParser, nearest


def _parser() -> OneLineParser:
    parser = make_parser("Repeat a table or figure of the papers.")
    parser.add_argument("table", nargs="?", default="", help="name as --list shows it")
    parser.add_argument("--list", action="store_true", help="name every table and figure, and stop")
    parser.add_argument("--scale", default="full", choices=list(SCALES), help="; ".join(map(": ".join, SCALES.items())))
    parser.add_argument("--run", action="store_true", help="run the commands instead of printing them")
    parser.add_argument("--slurm", default="", help="write a batch script with a task for each line and seed")
    parser.add_argument("--task", type=int, default=-1, help="run only this task of the array")
    parser.add_argument("--lines", type=positive, nargs="+", default=[], help="only these lines of the table")
    parser.add_argument("--out", default="runs/papers", help="folder of the runs, shared by all tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of each line for each seed")
    parser.add_argument("--processes", type=positive, default=1, help="processes, one for each GPU of this machine")
    parser.add_argument("--trials", type=positive, default=1, help="fine-tunings of a detector or segmenter")
    parser.add_argument("--sweep-lrs", type=float, nargs="+", default=[], help="fine-tuning rates; the best counts")
    parser.add_argument("--plot", default="", help="regioncl-figure1: SVG to draw")
    for name, what in (("imagenet", "ImageNet"), ("imagenet100", "ImageNet-100")):
        parser.add_argument(f"--{name}", nargs=2, default=(), metavar=("TRAIN", "VAL"), help=f"images of {what}")
    for name, what in (
        ("coco", "COCO's folder"),
        ("voc", "VOCdevkit"),
        ("cityscapes", "Cityscapes' folder"),
        ("supervised", "weights of a classifier, for the rows of that name"),
        ("real-labels", "ImageNet-ReaL's real.json"),
        ("boxes", "regioncl-figure4: COCO-format boxes of training images"),
    ):
        parser.add_argument(f"--{name}", default="", help=what)
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    if options.scale == "tiny":
        # Drawing needs torchvision, which printing the commands of a table does not.
        from tools.reproduction.drawn import drawn_sources

        sources = drawn_sources(Path(options.out) / "tiny-data")
    else:
        places = (options.coco, options.voc, options.cityscapes, options.supervised, options.real_labels, options.boxes)
        sources = Sources(tuple(options.imagenet), tuple(options.imagenet100), *places)
    return Plan(sources, options.scale, Path(options.out), options.trials, tuple(options.sweep_lrs))


def _chosen(table: str, wanted: Sequence[int]) -> dict[int, Line]:
    """The wanted lines of a table by their numbers, all of them where none are named."""
    if table not in TABLES:
        near = nearest(table, TABLES)
        raise UserMistake(
            f"unknown table {table or '(none)'}; " + (f"the nearest is {near}; " if near else "") + "see --list"
        )
    found = lines(TABLES[table])
    if wanted and max(wanted) > len(found):
        raise UserMistake(f"--lines {max(wanted)}: {table} has {len(found)} lines")
    return {number: found[number - 1] for number in wanted or range(1, len(found) + 1)}


def _tasks(found: Sequence[Line], options: argparse.Namespace, plan: Plan) -> list[list[Job]]:
    """The commands of each line and seed; lines that cannot run here are named and left out."""
    for line in found:
        if line.training.missing:
            print(f"left out: {line.training.name}, since {line.training.missing}")
    able = [line for line in found if not line.training.missing]
    return [jobs(line, seed, plan) for seed in options.seeds for line in able]


def _only(tasks: list[list[Job]], task: int) -> list[list[Job]]:
    if task < 0:
        return tasks
    if task >= len(tasks):
        raise UserMistake(f"--task {task}: there are {len(tasks)} tasks, from 0 on")
    return [tasks[task]]


def main(argv: Sequence[str]) -> int:
    """Print, run or write down what the command line asks for; returns the exit code."""
    options = parse(_parser(), argv)
    if options.list:
        print("\n".join(f"{name:<18} {table.title}" for name, table in TABLES.items()))
        return 0
    numbered = _chosen(options.table, options.lines)
    found = list(numbered.values())
    plan = _plan(options)
    tasks = _only(_tasks(found, options, plan), options.task)
    if options.slurm:
        command = ["python", "tools/reproduce.py", *argv, "--run"]
        Path(options.slurm).write_text(array_script(command, len(tasks), options.processes))
        return 0
    every = [job for task in tasks for job in task]
    if options.task < 0:
        # Pictures show several runs, so no single task can draw them.
        every += [job for seed in options.seeds for job in pictures(options.table, found, seed, plan)]
    code = run(every, options.processes) if options.run else 0
    if not options.run:
        print("\n".join(job.text(options.processes) for job in every), end="\n\n")
    print(f"{options.table}: {TABLES[options.table].title}. Scale: {SCALES[options.scale]}.")
    print(sheet(numbered, options.seeds, plan, TABLES[options.table].costs))
    if TABLES[options.table].note:
        print(f"Note: {TABLES[options.table].note}")
    if options.plot:
        plot(found, options.seeds, plan, Path(options.plot))
    return code


if __name__ == "__main__":
    run_main(main)
