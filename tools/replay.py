"""Take the first step of a run that was skipped as not finite once more, and say where the bad value comes from.

`python tools/replay.py runs/regioncl-m`. The run leaves the file `non_finite.json` and the checkpoint before the step.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence

from tools.support.cli import make_parser, parse, run_main


def main(argv: Sequence[str]) -> int:
    """Replay the step and print what was found; 0, or 4 where the step is bad again.

    Raises:
        UserMistake: the run has no such step, or its data or settings cannot be used any more.
    """
    parser = make_parser("Take the first skipped step of a run once more, and say where the bad value comes from.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--data", default="", help="where the images are now; the run's own place when empty")
    arguments = parse(parser, argv)
    # Here and not above: PyTorch takes seconds, which `--help` and a mistyped flag should not cost.
    from train.replay import replay

    return replay(arguments.run, arguments.data)


if __name__ == "__main__":
    run_main(main)
