"""Evaluate a backbone: `python train/evaluate.py PROTOCOL --checkpoint RUN_OR_FILE --data TRAIN --val-data VAL`."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from train.errors import EXIT_CHECKPOINT, UserMistake, run_to_exit_code
from train.eval.options import PROTOCOLS, parse
from train.eval.trials import run_trials, take_trials
from train.flags import nearest
from train.stop import watched


def usage() -> str:
    """What `--help` prints."""
    lines = [f"  {name:<8} {protocol.summary}" for name, protocol in PROTOCOLS.items()]
    return (
        "usage: train/evaluate.py PROTOCOL --checkpoint RUN_OR_FILE --data DATA --val-data DATA [flags]\n\n"
        "protocols (PROTOCOL --help lists the flags of each):\n" + "\n".join(lines) + "\n\n"
        "flags of every protocol but knn, with --output FILE.json:\n"
        "  --trials N           run with N seeds, from --seed on; the result has means and deviations\n"
        "  --sweep-lrs A,B,...  (detect, segment) run with each rate as --lr; the best one counts"
    )


def protocol(name: str) -> Callable[[Any], int]:
    """The `run(config) -> exit code` of a protocol.

    Imported on use: detection and segmentation need packages that classification does not.

    Raises:
        UserMistake: for a name that is none; it names the nearest.
    """
    check_name(name)
    # By its package's own name, which is another one in the wheel.
    folder = parse.__module__.rpartition(".")[0]
    run_protocol: Callable[[Any], int] = import_module(f"{folder}.{PROTOCOLS[name].module}").run
    return run_protocol


def check_name(name: str) -> None:
    """Refuse a name that is no protocol.

    Raises:
        UserMistake: naming the nearest.
    """
    if name not in PROTOCOLS:
        near = nearest(name, PROTOCOLS)
        advice = f"the nearest is {near}; " if near else ""
        raise UserMistake(f"unknown protocol {name}; {advice}choose from {', '.join(PROTOCOLS)}")


def _run(name: str, argv: Sequence[str]) -> int:
    # Before the protocol and with it PyTorch is imported, so that a mistyped flag costs no seconds.
    config = parse(name, argv)
    return protocol(name)(config)


def run(arguments: Sequence[str]) -> int:
    """Evaluate as the arguments say; returns the exit code.

    Raises:
        UserMistake: naming the protocol or flag, its value and the remedy.
    """
    if not arguments:
        raise UserMistake(f"a protocol is needed: {', '.join(PROTOCOLS)}")
    name = arguments[0]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    check_name(name)
    trials, rest = take_trials(name, arguments[1:])
    one = partial(_run, name)
    return one(rest) if trials is None else run_trials(one, trials, rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # From here on, so that a signal while PyTorch is imported gets the project's exit code as well.
    with watched(leave=True):
        return run_to_exit_code(lambda: run(arguments), disk_full=EXIT_CHECKPOINT)


if __name__ == "__main__":
    sys.exit(main())
