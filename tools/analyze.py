"""Look into backbones: `python tools/analyze.py ANALYSIS RUN_OR_FILE [RUN_OR_FILE …] --data DATA [--out PICTURE.png]`.

gradcam     where a class's score comes from, backbones side by side on one scale (CARE, figure 4)
boxes       gradient of the pre-training loss inside object boxes and k-NN, over training (RegionCL, figure 4)
align       alignment maps of LEWEL runs
neighbours  images and their nearest neighbours
embedding   features in two dimensions
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence

from tools.support.cli import make_parser, parse
from train.errors import UserMistake, run_to_exit_code

ANALYSES = ("gradcam", "boxes", "align", "neighbours", "embedding")


def _default_out(name: str, checkpoint: str) -> Path:
    """In the run's folder, where its report finds it, or beside a file."""
    path = Path(checkpoint)
    return path / f"analysis-{name}.png" if path.is_dir() else path.with_name(f"{path.stem}.analysis-{name}.png")


def run(argv: Sequence[str]) -> int:
    """The command from its arguments to its exit code."""
    parser = make_parser("Look into one or several backbones; writes a PNG and a JSON of the figures beside it.")
    parser.add_argument("analysis", choices=ANALYSES, help="what to look at")
    parser.add_argument("checkpoint", nargs="+", help="runs or backbone files (boxes and align: runs)")
    parser.add_argument("--data", required=True, help="images; boxes: the folder that --annotations belongs to")
    parser.add_argument(
        "--out", default="", help="picture to write, .png; empty: analysis-NAME.png in the first run's folder"
    )
    parser.add_argument("--annotations", default="", help="boxes: COCO instances file")
    parser.add_argument("--loader", default="auto", help="where images come from")
    parser.add_argument("--arch", default="", help="architecture; empty finds it out")
    parser.add_argument(
        "--image-size", type=int, default=0, help="side of a view; 0: the first run's, or 224 (boxes: each run's own)"
    )
    parser.add_argument(
        "--images", type=int, default=None, help="images to show or to measure on; 8, or 1000 dots for embedding"
    )
    parser.add_argument(
        "--probe-images", type=int, default=2000, help="gradcam: images that the linear probe learns from"
    )
    parser.add_argument("--neighbours", type=int, default=6, help="neighbours of each image")
    parser.add_argument("--maps", type=int, default=6, help="align: maps of each image")
    parser.add_argument("--tsne", action="store_true", help="embedding: t-SNE instead of principal axes")
    parser.add_argument("--seed", type=int, default=0, help="every random draw follows from it")
    arguments = parse(parser, argv)
    if arguments.images is None:
        arguments.images = 1000 if arguments.analysis == "embedding" else 8
    if arguments.image_size < 0:
        raise UserMistake(f"--image-size {arguments.image_size}: must not be negative")
    for name in ("images", "probe_images", "neighbours", "maps"):
        if getattr(arguments, name) < 1:
            raise UserMistake(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    out = Path(arguments.out) if arguments.out else _default_out(arguments.analysis, arguments.checkpoint[0])
    if out.suffix != ".png":
        raise UserMistake(f"--out {out}: the picture is a .png")
    arguments.out = str(out)
    # Here and not above: PyTorch takes seconds, which `--help` and a mistyped flag should not cost.
    from tools.support.analyses import write

    write(arguments)
    print(f"{arguments.analysis}: {out}, figures in {out.with_suffix('.json')}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse as the command line says; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_to_exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
