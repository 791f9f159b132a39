"""Train a backbone without labels.

`torchrun --nproc_per_node=N train/main.py --method regioncl-m --data photos.beton`
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence

from train.callbacks import Callback, check_loggers
from train.errors import EXIT_CHECKPOINT, UserMistake, run_to_exit_code
from train.launch import run_processes, starts_others
from train.resolve import resolve


def run(arguments: Sequence[str], callbacks: Sequence[Callback] = ()) -> int:
    """Train as the arguments say and tell the callbacks; returns the exit code.

    Raises:
        UserMistake: naming the flag, its value and the remedy.
    """
    config = resolve(arguments)
    if not config.run.data and config.run.loader != "synthetic":
        raise UserMistake(
            "--data is needed: pack a folder of images with `python tools/make_ffcv_dataset.py FOLDER photos.beton`, "
            "then give --data photos.beton"
        )
    check_loggers(config.run.log)
    if starts_others(config.run.processes):
        if callbacks:
            raise UserMistake(
                f"--processes {config.run.processes}: callbacks cannot reach the processes that it starts; name what "
                "makes them, --callbacks module:factory"
            )
        return run_processes(config.run.processes, __file__, arguments)
    # Here and not above: PyTorch takes seconds, which `--help` and a mistyped flag should not cost.
    from train.pretrain import go_on_or_start

    return go_on_or_start(config, arguments, callbacks)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_to_exit_code(lambda: run(arguments), disk_full=EXIT_CHECKPOINT)


if __name__ == "__main__":
    sys.exit(main())
