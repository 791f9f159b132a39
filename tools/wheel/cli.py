"""The console command: `regatta COMMAND ...`, each command the same code as its script in the checkout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from tools.support.cli import interrupt_on_sigterm, make_parser
from tools.wheel.completion import candidates, script
from train.errors import UserMistake, run_to_exit_code
from train.flags import nearest

Main = Callable[[Sequence[str]], int]

# By the names that these modules have here: the wheel has them under others than the checkout (`build.py`).
_TRAIN = run_to_exit_code.__module__.rpartition(".")[0]
_TOOLS = make_parser.__module__.rpartition(".support.")[0]

COMMANDS: dict[str, tuple[str, str]] = {
    "pack": (f"{_TOOLS}.make_ffcv_dataset", "pack images into one .beton file"),
    "shards": (f"{_TOOLS}.make_webdataset", "pack images into tar shards"),
    "train": (f"{_TRAIN}.main", "train a backbone without labels"),
    "embed": (f"{_TOOLS}.embed", "write the features of images to a file"),
    "slurm": (f"{_TOOLS}.slurm", "write a SLURM batch script that trains"),
    "evaluate": (f"{_TRAIN}.evaluate", "k-NN, linear, few-shot, semi-supervised, detection, segmentation"),
    "export": (f"{_TOOLS}.export_backbone", "take a backbone to torchvision, timm, detectron2, transformers or ONNX"),
    "analyze": (f"{_TOOLS}.analyze", "look into backbones: Grad-CAM, neighbours, alignment maps"),
    "report": (f"{_TOOLS}.report", "write a page about one or several runs"),
    "doctor": (f"{_TOOLS}.doctor", "say what is wrong with this machine, a packed file or a run"),
}
"""Command -> the module whose `main(argv)` it is, and its line in the list of commands."""
BENCHMARKS = ("pipeline", "ops", "step", "train")
_OWN = {
    "bench": f"measure: {', '.join(BENCHMARKS)}",
    "completion": "print the completion of this command for bash or zsh",
}
_SIGNALLED = ("train", "evaluate")
"""Commands that handle signals themselves: they save before they stop."""


def load(name: str) -> Main:
    """The `main(argv) -> exit code` of a command, imported on use."""
    if name == "bench":
        return bench
    main_of: Main = import_module(COMMANDS[name][0]).main
    return main_of


def usage() -> str:
    """What `regatta --help` prints."""
    lines = [f"  {name:<11} {what}" for name, (_, what) in COMMANDS.items()]
    lines += [f"  {name:<11} {what}" for name, what in _OWN.items()]
    return "usage: regatta COMMAND [...]\n\ncommands (COMMAND --help tells more):\n" + "\n".join(lines)


def bench(argv: Sequence[str]) -> int:
    """Run one of the benchmarks: `regatta bench pipeline ...`.

    Raises:
        UserMistake: no benchmark of that name.
    """
    if not argv or argv[0] not in BENCHMARKS:
        raise UserMistake(f"regatta bench {' '.join(argv[:1])}: choose from {', '.join(BENCHMARKS)}")
    measure: Main = import_module(f"{_TOOLS}.bench_{argv[0]}").main
    return measure(argv[1:])


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"regatta {version('regatta')}")
        return 0
    name, rest = argv[0], argv[1:]
    if name == "completion":
        print(script(rest[0] if rest else ""))
        return 0
    if name == "__complete":  # the shell's script calls this
        print("\n".join(candidates(rest, [*COMMANDS, *_OWN], load)))
        return 0
    if name not in {*COMMANDS, *_OWN}:
        near = nearest(name, COMMANDS)
        advice = f"the nearest is {near}; " if near else ""
        raise UserMistake(f"unknown command {name}; {advice}choose from {', '.join([*COMMANDS, *_OWN])}")
    # What argparse puts before the usage of a command.
    sys.argv[0] = f"regatta {name}"
    if name not in _SIGNALLED:
        interrupt_on_sigterm()
    return load(name)(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_to_exit_code(lambda: _run(arguments))
