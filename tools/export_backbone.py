"""Export a backbone: `python tools/export_backbone.py RUN_OR_FILE OUT --format torchvision|timm|detectron2|hf|onnx`."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence

from tools.support.cli import make_parser, parse
from tools.support.export_place import ENDINGS, check_place
from train.errors import run_to_exit_code


def run(argv: Sequence[str]) -> int:
    """The command from its arguments to its exit code."""
    parser = make_parser("Take a backbone to another library, with a model card beside it.")
    parser.add_argument(
        "source", metavar="RUN_OR_FILE", help="a run's folder, our backbone file, or torchvision or timm weights"
    )
    parser.add_argument("out", metavar="OUT", help="file to write (hf: folder)")
    parser.add_argument("--format", choices=tuple(ENDINGS), required=True, help="library that shall read it")
    parser.add_argument("--arch", default="", help="architecture; empty finds it out")
    parser.add_argument("--image-size", type=int, default=0, help="for onnx and Swin; 0: the run's own, or 224")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    arguments = parse(parser, argv)
    out = Path(arguments.out)
    check_place(out, arguments.format, arguments.overwrite)
    # Here and not above: PyTorch takes seconds, which `--help` and a mistake in the arguments should not cost.
    from tools.support.exports import export
    from train.backbone_io import load
    from train.measure.embedding import own_image_size

    loaded = load(arguments.source, arguments.arch)
    size = own_image_size(loaded, arguments.image_size)
    card = export(loaded, out, arguments.format, size, arguments.overwrite)
    print(f"{arguments.format}: {out}; model card: {card}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the command line says; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_to_exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
