"""Everything that only a GPU can tell, in the order of what it tells, within a time limit; one page at the end.

`python tools/gpu_acceptance.py [--minutes 9]`. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from models.methods import METHODS
from tools.bench.acceptance import Part, Progress, run_parts, summary
from tools.bench.acceptance_page import best_line, end_to_end_line, lever_line, method_lines, read_rows, step_lines
from tools.bench.rows import ROOT
from tools.bench.timing import choose_device
from tools.support import cli
from train.proving.choose import PLAN, device_text

Command = Callable[[int], Sequence[str]]
LEVERS = {
    "norm-kernel": ("norm-kernel",),
    "pool-kernel": ("pool-kernel",),
    "graph": ("graph",),
    "shared-forward": ("shared-forward",),
    "all levers": ("norm-kernel+pool-kernel+graph+shared-forward",),
}
ON_CUDA = {"norm-kernel", "pool-kernel", "graph", "all levers"}
PHOTOS, PHOTO_PX = 768, (500, 375)


def all_parts(options: argparse.Namespace, device: torch.device, progress: Progress) -> list[Part]:
    """The parts in the order of what they tell."""
    gpu = "" if device.type == "cuda" else "it needs a GPU"
    parts = [
        Part("GPU tests", lambda _: _python("-m", "pytest", "-m", "gpu", "-q", "-n", "0", str(ROOT / "tests")), 150),
        Part("kernels", lambda batch: _proof(options, progress, batch), 120),
        Part(
            "step",
            lambda batch: _step(options, progress, "step", batch, "--contenders", "official port", "strong eager"),
            120,
        ),
    ]
    for name, attempts in LEVERS.items():
        missing = gpu if name in ON_CUDA else ""
        parts.append(Part(f"lever {name}", _lever(options, progress, name, attempts), 60, missing=missing))
    parts += [_method_part(options, progress, method) for method in METHODS if method != "regioncl-m"]
    parts += [
        Part("host", lambda batch: _host(options, progress, batch), 90),
        Part("end to end", lambda batch: _end_to_end(options, progress, batch), 120),
        Part("DALI", lambda batch: _dali(options, progress, batch), 60, missing=gpu or _lacks("nvidia.dali")),
    ]
    return [part for part in parts if not options.parts or part.name in options.parts]


def _lacks(module: str) -> str:
    top = module.partition(".")[0]
    found = importlib.util.find_spec(top) is not None and importlib.util.find_spec(module) is not None
    return "" if found else f"{module} is not installed"


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _tool(name: str, *arguments: str) -> list[str]:
    return _python(str(ROOT / "tools" / name), *arguments)


def _model(options: argparse.Namespace, batch: int) -> list[str]:
    """Flags that the benchmarks of the step share."""
    flags = ["--batch", str(batch), "--device", options.device]
    for name, value in (("--arch", options.arch), ("--image-size", options.image_size)):
        flags += [name, str(value)] if value else []
    return flags


def _proof(options: argparse.Namespace, progress: Progress, batch: int) -> list[str]:
    output = str(progress.rows("kernels"))
    return _tool("prove_kernels.py", *_model(options, batch), "--plan", options.plan, "--output", output)


def _step(options: argparse.Namespace, progress: Progress, name: str, batch: int, *more: str) -> list[str]:
    flags = [*_model(options, batch), "--rounds", str(options.rounds), "--max-seconds", "15"]
    flags += ["--queue", str(options.queue)] if options.queue else []
    return _tool("bench_step.py", *flags, "--output", str(progress.rows(name)), *more)


def _lever(options: argparse.Namespace, progress: Progress, name: str, attempts: tuple[str, ...]) -> Command:
    return lambda batch: _step(options, progress, f"lever {name}", batch, "--ours-only", "--try", *attempts)


def _method_part(options: argparse.Namespace, progress: Progress, method: str) -> Part:
    name = f"method {method}"
    more = ["--ours-only", "--no-compile", "--method", method]
    on_swin = method in ("moby", "regioncl-moby")
    more += ["--try", "attention"] if on_swin else []

    def command(batch: int) -> list[str]:
        # A fraction of the step's images: what is looked for is a method that fails or is far off.
        flags = _step(options, progress, name, max(batch // 4, 2), *more)
        if not on_swin or "--arch" not in flags:
            return flags
        # Their trunk is a Swin; the option names one for the others.
        at = flags.index("--arch")
        return flags[:at] + flags[at + 2 :]

    return Part(name, command, 40 if options.device == "cuda" else 300, least_s=15)


def _host(options: argparse.Namespace, progress: Progress, batch: int) -> list[str]:
    flags = ["--batch", str(batch), "--rounds", str(options.rounds), "--methods", "regioncl-m"]
    flags += ["--arch", options.arch] if options.arch else []
    return _tool("bench_host.py", *flags, "--output", str(progress.rows("host")))


def _end_to_end(options: argparse.Namespace, progress: Progress, batch: int) -> list[str]:
    data = options.data or str(_photos(progress.folder / "photos", batch))
    loader = "auto" if options.data else "folder"
    flags = [*_model(options, batch), "--rounds", str(options.rounds), "--steps", str(options.steps), "--settle", "4"]
    flags += ["--queue", str(options.queue)] if options.queue else []
    return _tool(
        "bench_train.py", *flags, "--data", data, "--loader", loader, "--output", str(progress.rows("end to end"))
    )


def _dali(options: argparse.Namespace, progress: Progress, batch: int) -> list[str]:
    data = options.data or str(_photos(progress.folder / "photos", batch))
    flags = [*_model(options, batch), "--rounds", str(options.rounds), "--steps", str(options.steps), "--settle", "4"]
    return _tool("bench_train.py", *flags, "--data", data, "--loader", "dali", "--output", str(progress.rows("DALI")))


def _photos(folder: Path, batch: int) -> Path:
    """A folder of JPEG photographs' size and detail, made where it is not there: smooth shapes with grain."""
    count = max(PHOTOS, 3 * batch) if batch > 64 else 4 * batch
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(len(list(folder.glob("*.jpg"))), count):
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize(PHOTO_PX, Image.Resampling.BICUBIC), dtype=np.int16)
        grain = generator.integers(-12, 13, pixels.shape, dtype=np.int16)
        image = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
        image.save(folder / f"{number:05}.jpg", quality=88)
    return folder


def page(options: argparse.Namespace, device: torch.device, progress: Progress, parts: Sequence[Part]) -> str:
    """The page: what ran, a verdict on each lever, the distance to the bounds."""
    rows = {part.name: read_rows(progress.rows(part.name)) for part in parts}
    levers = [name for name in LEVERS if f"lever {name}" in rows]
    methods = {name.removeprefix("method "): each for name, each in rows.items() if name.startswith("method ")}
    proof = progress.outcomes.get("kernels")
    lines = [f"GPU acceptance: {progress.device}", "", *summary(progress.outcomes, parts), ""]
    lines += [proof.end if proof is not None else "kernels: not proved"]
    lines += step_lines(rows.get("step", []))
    lines += [lever_line(name, rows[f"lever {name}"]) for name in levers]
    lines += [
        best_line([each for name, each in rows.items() if name[:5] in ("step", "lever")], "H200" in progress.device)
    ]
    lines += [end_to_end_line(rows.get("end to end", []))]
    lines += ["methods:", *method_lines(methods)] if methods else []
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run what is open; 0 where every part is done or left out, 2 otherwise."""
    parser = cli.make_parser("Everything that only a GPU can tell, within a time limit; goes on where it stopped.")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of this start")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "gpu-acceptance", help="folder for rows and logs"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to measure")
    parser.add_argument("--batch", type=cli.positive, default=256, help="images a step")
    parser.add_argument("--arch", default="", help="backbone; the recipe's when empty")
    parser.add_argument("--image-size", type=int, default=0, help="side of a view; 0 is the recipe's")
    parser.add_argument("--queue", type=int, default=0, help="keys in the queue; 0 is the method's own")
    parser.add_argument("--rounds", type=cli.positive, default=5, help="figures of each contender")
    parser.add_argument("--steps", type=cli.positive, default=20, help="steps of a window of the end-to-end part")
    parser.add_argument("--data", default="", help="packed file or folder for end to end; made when empty")
    parser.add_argument("--parts", nargs="*", default=[], help="names of the parts to run; all when empty")
    parser.add_argument("--plan", default=PLAN, help="module:function that makes the kernels' candidates")
    options = cli.parse(parser, argv)
    device = choose_device(options.device)
    options.device = device.type
    progress = Progress(options.output, device_text(torch.device(device.type, 0) if device.type == "cuda" else device))
    parts = all_parts(options, device, progress)
    unknown = set(options.parts) - {part.name for part in parts}
    if unknown:
        raise ValueError(f"--parts {min(unknown)!r} is unknown; --parts takes names as the page shows them")
    deadline = time.monotonic() + 60 * options.minutes
    for part, outcome in run_parts(parts, progress, options.batch, deadline):
        print(f"{part.name}: {outcome.status}, {outcome.seconds:.0f} s; {outcome.end}", flush=True)
    text = page(options, device, progress, parts)
    (options.output / "page.txt").write_text(text + "\n")
    print(text)
    settled = all(progress.outcomes.get(part.name) is not None for part in parts)
    good = settled and all(progress.outcomes[part.name].status in ("done", "left out") for part in parts)
    return 0 if good else 2


if __name__ == "__main__":
    cli.run_main(main)
