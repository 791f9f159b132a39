"""Evaluate a backbone: `python train/evaluate.py PROTOCOL --checkpoint RUN_OR_FILE --data TRAIN --val-data VAL`."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Callable, Sequence
from importlib import import_module

from train.errors import EXIT_CHECKPOINT, UserMistake, run_to_exit_code
from train.eval.trials import run_trials, take_trials
from train.flags import nearest

# Module of train/eval and what the protocol is; each module has `run(argv) -> exit code`. Imported on use, because
# detection and segmentation need packages that classification does not.
PROTOCOLS: dict[str, tuple[str, str]] = {
    "knn": ("knn_protocol", "k nearest neighbours on frozen features"),
    "linear": ("linear", "linear classification on the frozen backbone"),
    "fewshot": ("fewshot", "the same on a small share of the training images"),
    "semi": ("semi", "the whole network fine-tuned on 1% or 10% of the labels"),
    "segment": ("segment", "semantic segmentation by a fine-tuned FCN or UPerNet"),
    "detect": ("detect", "Faster and Mask R-CNN and RetinaNet, fine-tuned"),
}


def usage() -> str:
    """What `--help` prints."""
    lines = [f"  {name:<8} {what}" for name, (_, what) in PROTOCOLS.items()]
    return (
        "usage: train/evaluate.py PROTOCOL --checkpoint RUN_OR_FILE --data DATA --val-data DATA [flags]\n\n"
        "protocols (PROTOCOL --help lists the flags of each):\n" + "\n".join(lines) + "\n\n"
        "flags of every protocol but knn, with --output FILE.json:\n"
        "  --trials N           run with N seeds, from --seed on; the result has means and deviations\n"
        "  --sweep-lrs A,B,...  (detect, segment) run with each rate as --lr; the best one counts"
    )


def protocol(name: str) -> Callable[[Sequence[str]], int]:
    """The `run` of a protocol.

    Raises:
        UserMistake: for a name that is none; it names the nearest.
    """
    if name not in PROTOCOLS:
        near = nearest(name, PROTOCOLS)
        advice = f"the nearest is {near}; " if near else ""
        raise UserMistake(f"unknown protocol {name}; {advice}choose from {', '.join(PROTOCOLS)}")
    run: Callable[[Sequence[str]], int] = import_module(f"train.eval.{PROTOCOLS[name][0]}").run
    return run


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments:
        raise UserMistake(f"a protocol is needed: {', '.join(PROTOCOLS)}")
    if arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    run = protocol(arguments[0])
    trials, rest = take_trials(arguments[0], arguments[1:])
    return run(rest) if trials is None else run_trials(run, trials, rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_to_exit_code(lambda: _dispatch(arguments), disk_full=EXIT_CHECKPOINT)


if __name__ == "__main__":
    sys.exit(main())
