"""Write the features of images to a file: `python tools/embed.py RUN_OR_FILE DATA OUT.npz`."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence

from tools.support.cli import call, make_parser, parse, positive, run_main


def write(argv: Sequence[str]) -> int:
    """Measure the images that the command line names, and write the file."""
    parser = make_parser("Write the features of images to a file: the backbone's last feature map, averaged.")
    parser.add_argument("source", metavar="RUN_OR_FILE", help="a run's folder, our backbone file, or other weights")
    parser.add_argument("data", metavar="DATA", help="images: packed file, folder, list or shard pattern")
    parser.add_argument("out", metavar="OUT", help=".npz: features, labels and names; .npy: features alone")
    parser.add_argument("--arch", default="", help="architecture; empty finds it out")
    parser.add_argument("--image-size", type=int, default=0, help="side of the centre square; 0: the run's own, or 224")
    parser.add_argument("--batch", type=positive, default=256, help="images at a time; only memory depends on it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--workers", type=int, default=0, help="decoding threads; 0 follows from the cores")
    parser.add_argument("--loader", default="auto", help="where images come from")
    arguments = parse(parser, argv)
    # Here and not above: PyTorch takes seconds, which `--help` and a mistyped flag should not cost.
    from train.measure.embedding import embed

    made = embed(
        arguments.data,
        checkpoint=arguments.source,
        out=arguments.out,
        arch=arguments.arch,
        image_size=arguments.image_size,
        batch_size=arguments.batch,
        device=arguments.device,
        workers=arguments.workers,
        loader=arguments.loader,
    )
    count, width = made.features.shape
    bad = f", {made.bad} images could not be read" if made.bad else ""
    print(f"{arguments.out}: {count} images, {width} features each{bad}")
    return 0


def main(argv: Sequence[str]) -> int:
    """The exit code; mistakes become one line on standard error."""
    return call(write, argv)


if __name__ == "__main__":
    run_main(main)
