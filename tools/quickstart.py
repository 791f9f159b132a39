"""What `bash tools/quickstart.sh [FOLDER]` does after set-up: pack, train RegionCL-M for minutes, compare, report.

Ends within six minutes on two CPU cores: a short timing decides which network and how many steps there is time for. A
machine that has no time for a hundred steps of the smallest network takes longer.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the script's folder on the path, not the checkout.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import math
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.listing import list_images
from tools.support.cli import call, make_parser, parse, run_main
from tools.support.sample_photos import cut_photos
from train.errors import RunEnd, UserMistake
from train.recipes import RECIPES
from train.record.page import build_report
from train.record.run import Run, chance_level, read_run

ROOT = Path(__file__).resolve().parents[1]
_METHOD = "regioncl-m"
_NARROW, _WIDE = "regioncl-m-quick", "regioncl-m-small"
"""A narrow ResNet-10 at 32 px, which learns in hundreds of steps, and ResNet-18 at 64 px, which needs more of each."""
_ENOUGH_NARROW = 6_000
"""From this many steps of the narrow trunk on there may be time for the wide one, so that it is timed, too."""
_ENOUGH_WIDE = 1_200
"""Steps in which the wide trunk learns more than the narrow one: on Imagenette 592 gave 45.9% 20-NN."""
_MOST_IMAGES = 20_000
"""Largest number of images to pack; a larger folder is sampled, so that packing leaves time to train."""
_MOST_SEEN = 500_000
_PUBLISHED_SEEN = 200 * 1_281_167
_WARMUP = 1.0
"""Epochs of warm-up of a run of eight epochs and more; a shorter one has its share."""
_TIMING_STEPS, _TIMING_ROW = 12, 4
_LEAST_STEPS = 100
"""Steps that are taken in any case: with fewer the trained backbone is that of before."""
_LOG_EVERY = 10
_LAST_STEPS = 50
_REPORT_S = 15.0
_MARGIN = 0.9
_INFERENCE_SHARE = 0.2
"""Cost of an image's features relative to its part of a training step: three views forward, two of them back."""
_FIGURES_SHARE = 0.08
"""More than this share of the time is not spent on figures in the middle of the run."""
_HEALTH_IMAGES = 500
"""Images that view retrieval looks at, at most."""
_MARKER = ".quickstart"


def say(text: str) -> None:
    """One line of progress."""
    print(f"quickstart: {text}", flush=True)


@dataclass(frozen=True)
class Packed:
    """What is trained on.

    Attributes:
        train: packed images to train on.
        validation: packed labelled images that are not trained on, None without labels.
        images: number of images in `train`.
        labelled: images that k-NN looks at, in both files; 0 without labels.
    """

    train: Path
    validation: Path | None
    images: int
    labelled: int


def _call(command: Sequence[str | Path]) -> None:
    """Run one of our commands; its own message and exit code end the quickstart when it fails."""
    finished = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT)
    code = finished.returncode
    if code:
        # A command that a signal ended has a negative code; shells call it 128 + signal.
        raise RunEnd(f"{Path(str(command[0])).name} ended with exit code {code}", code if code > 0 else 128 - code)


def _pack(source: Path, packed: Path) -> int:
    """Pack images with the project's own command; the number of images packed."""
    _call([ROOT / "tools" / "make_ffcv_dataset.py", source, packed, "--max-resolution", "160", "--max-bad", "0.05"])
    manifest = json.loads(packed.with_name(packed.stem + ".manifest.json").read_text(encoding="utf-8"))
    return int(manifest["images"])


def prepare_run_dir(run_dir: Path) -> None:
    """An empty run folder; an earlier quickstart's is replaced, anything else is left alone.

    Raises:
        UserMistake: when the folder holds something else.
    """
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / _MARKER).is_file():
        raise UserMistake(f"--run-dir {run_dir} holds what the quickstart did not make; choose another folder")
    try:
        # Only with the marker inside: the folder is the quickstart's own.
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        # Before anything else is written, so that an interrupted quickstart can be started again.
        (run_dir / _MARKER).touch()
    except OSError as reason:
        cause = reason.strerror or reason
        raise UserMistake(f"--run-dir {run_dir}: {cause}; choose a folder that can be written") from None


# --- which images ----------------------------------------------------------------------------------------------------


def pack_sample_photos(run_dir: Path, seed: int) -> Packed:
    """Crops of the photographs inside scikit-image; held-out parts of each are the validation images."""
    say("cutting photographs that come inside scikit-image into crops; nearest neighbours will tell them apart")
    images = run_dir / "images"
    train, validation = cut_photos(images, seed=seed)
    return _pack_both(run_dir, train, validation)


def pack_folder(folder: Path, run_dir: Path) -> Packed:
    """The images of a folder; of labelled ones a tenth is kept for validation.

    Raises:
        UserMistake: when there are no images.
    """
    train, validation = folder / "train", folder / "val"
    if train.is_dir() and validation.is_dir():
        say(f"{folder} has a train and a val folder; using them as they are")
        return _pack_both(run_dir, train, validation)
    listing = list_images(folder)
    files, labels = listing.files, listing.labels
    # Spread over the listing, which stands class by class: the first ones would be of few classes.
    chosen = np.unique(np.linspace(0, len(files) - 1, min(len(files), _MOST_IMAGES)).astype(np.int64))
    if len(chosen) < len(files):
        say(f"taking {len(chosen):,} of {len(files):,} images, so that packing leaves time to train")
    to_train, to_validate = split(labels[chosen])
    if len(to_validate):
        say(f"{len(set(labels[chosen][to_train].tolist()))} class folders: every tenth image is kept to measure k-NN")
    # Nothing to leave out: the folder is packed as it is, without links.
    elif len(chosen) == len(files):
        return _pack_both(run_dir, folder, None)
    for name, part in (("train", to_train), ("val", to_validate)):
        _link([files[chosen[position]] for position in part], folder, run_dir / "images" / name)
    images = run_dir / "images"
    return _pack_both(run_dir, images / "train", images / "val" if len(to_validate) else None)


def _link(files: Sequence[Path], root: Path, destination: Path) -> None:
    """Make links to files below `root` in `destination`, at the places that they have below `root`."""
    for path in files:
        # Links, not copies: the packer follows them, and the folder's own layout keeps the labels.
        link = destination / path.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and to validate on.

    Args:
        labels: (N,) int64, -1 where there is none.

    Returns:
        Sorted positions. With two classes or more every tenth image of each is for validation, one at least, and
        classes of a single image are left out, so that both parts have the same classes. Otherwise all are trained on.
    """
    everything = np.arange(len(labels))
    members = [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]
    # A class of one image cannot be in both parts.
    members = [positions for positions in members if len(positions) > 1]
    if len(members) < 2:
        return everything, everything[:0]
    # The tenth, twentieth, ... of each class; of a smaller class its last.
    validation = np.sort(np.concatenate([positions[min(9, len(positions) - 1) :: 10] for positions in members]))
    return np.setdiff1d(np.concatenate(members), validation), validation


def _pack_both(run_dir: Path, train: Path, validation: Path | None) -> Packed:
    images, labelled = _pack(train, run_dir / "train.beton"), 0
    packed = None
    if validation is not None:
        packed = run_dir / "val.beton"
        labelled = images + _pack(validation, packed)
    # The packed files hold everything now.
    shutil.rmtree(run_dir / "images", ignore_errors=True)
    return Packed(run_dir / "train.beton", packed, images, labelled)


# --- how long ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """What a short run showed.

    Attributes:
        step_s: seconds of one step.
        fixed_s: seconds of a run beside its steps: starting, the figures at its start and end, saving.
        figures_s: seconds of the figures once.
    """

    step_s: float
    fixed_s: float
    figures_s: float


@dataclass(frozen=True)
class Plan:
    """How long to train.

    Attributes:
        epochs: length of the schedule.
        steps: optimizer steps.
        figures_every: epochs between figures; 0 only at the start and the end.
    """

    epochs: int
    steps: int
    figures_every: int


def read_timing(run: Run, wall_s: float, labelled: int) -> Timing:
    """The timing of a short run without k-NN that took `wall_s` seconds in all.

    Args:
        run: the short run.
        wall_s: seconds from starting its process to its end.
        labelled: images that k-NN will look at.
    """
    batch = run.config["recipe"]["global_batch"]
    last = run.of_kind("train")[-1]
    # The rows before the last carry compilation and first touches of memory.
    step_s = batch / last["images_per_s"]
    # The short run leaves k-NN out, so its cost is estimated from that of a step.
    knn_s = labelled * step_s / batch * _INFERENCE_SHARE
    start = run.of_kind("start")[0]["time_s"]
    health_s = max((row["time_s"] for row in run.of_kind("health") if row["step"] == 0), default=start) - start
    # Twice, for k-NN is measured at the start and at the end.
    fixed_s = max(wall_s - last["step"] * step_s, 0.0) + 2 * knn_s
    return Timing(step_s, fixed_s, health_s + knn_s)


def make_plan(timing: Timing, left_s: float, images: int, global_batch: int) -> Plan:
    """The longest schedule that fits into `left_s` seconds: whole epochs, or part of one when it is not enough.

    Args:
        timing: of this machine.
        left_s: seconds from now until the training must have ended.
        images: images in the data.
        global_batch: images of a step.
    """
    steps_per_epoch = max(images // global_batch, 1)
    # Two more points of the curves, where they cost little of the training.
    figures = 2 if 2 * timing.figures_s < _FIGURES_SHARE * left_s else 0
    available = max(left_s - timing.fixed_s - figures * timing.figures_s, 0.0) * _MARGIN
    steps = min(int(available / timing.step_s), _MOST_SEEN // global_batch)
    # On a slow or busy machine rather late than without a result.
    steps = max(steps, _LEAST_STEPS)
    epochs = max(steps // steps_per_epoch, 1)
    steps = min(steps, epochs * steps_per_epoch)
    return Plan(epochs, steps, -(-epochs // 3) if figures else 0)


# --- what came of it --------------------------------------------------------------------------------------------------


def instance_loss(run: Run) -> float | None:
    """Mean instance loss over the last 50 steps; each row of the metrics is a mean over the steps since the last."""
    rows = run.of_kind("train")
    last = rows[-1]["step"] if rows else 0
    tail = [row["loss/ins"] for row in rows if row["step"] > last - _LAST_STEPS and "loss/ins" in row]
    return sum(tail) / len(tail) if tail else None


def queue_filled_twice(run: Run) -> bool:
    """Whether the queue had been filled twice before the last 50 steps began."""
    steps, _ = run.values("train", "loss")
    keys = (steps[-1] - _LAST_STEPS) * run.config["recipe"]["global_batch"] if steps else 0
    return keys >= 2 * run.config["model"]["queue_size"]


def comparison(run: Run) -> list[tuple[str, str, str]]:
    """(figure, untrained, trained) for each figure of the backbone that the run measured at its first and last step."""
    named = [
        ("knn", "top1", "20-NN top-1", ".1%"),
        ("health", "view_retrieval", "view retrieval", ".1%"),
        ("health", "effective_rank", "effective rank", ".1f"),
        ("health", "feature_std", "feature spread", ".3f"),
    ]
    rows = []
    for kind, name, label, form in named:
        steps, values = run.values(kind, name)
        if len(values) > 1 and steps[0] == 0:
            rows.append((label, format(values[0], form), format(values[-1], form)))
    return rows


@dataclass(frozen=True)
class Gain:
    """A share of images of which the backbone tells something right, before and after training.

    Attributes:
        label: what it is.
        before, after: untrained and trained, 0 to 1.
        images: how many were looked at.
    """

    label: str
    before: float
    after: float
    images: int

    @property
    def error(self) -> float:
        """Standard error of the difference."""
        # The shares are of the same images; taken as independent, which makes the error larger, not smaller.
        return math.sqrt((self.before * (1 - self.before) + self.after * (1 - self.after)) / self.images)

    @property
    def clear(self) -> bool:
        """Whether the trained backbone is ahead by more than twice the standard error."""
        return self.after - self.before > 2 * self.error


def gains(run: Run) -> list[Gain]:
    """20-NN top-1 and view retrieval, each where the run measured it at its start and its end."""
    knn = run.last("knn")
    images = run.config["data_images"] if knn is None else knn["val_images"]
    looked_at = {"knn": images, "health": min(images, _HEALTH_IMAGES)}
    found = []
    for kind, name, label in (("knn", "top1", "20-NN top-1"), ("health", "view_retrieval", "view retrieval")):
        rows = run.of_kind(kind)
        if len(rows) > 1:
            found.append(Gain(label, rows[0][name], rows[-1][name], looked_at[kind]))
    return found


def verdict(run: Run) -> str:
    """Which figures of the trained backbone are ahead of the untrained one's by more than twice the standard error."""
    clear: list[str] = []
    unclear: list[str] = []
    for gain in gains(run):
        (clear if gain.clear else unclear).append(f"{gain.label} ({100 * gain.error:.1f} points)")
    told = []
    if clear:
        told.append(f"The trained backbone is ahead by more than twice the standard error in {' and '.join(clear)}.")
    if unclear:
        told.append(f"It is not clearly ahead in {' and '.join(unclear)}: give it more --minutes or more images.")
    return " ".join(told)


def _tell(run: Run, packed: Packed, report: Path) -> None:
    print()
    print(f"{'backbone':<18}{'untrained':>12}{'trained':>12}")
    for label, before, after in comparison(run):
        print(f"{label:<18}{before:>12}{after:>12}")
    loss, chance = instance_loss(run), chance_level(run)
    if loss is not None and chance is not None:
        print(
            f"\ninstance loss over the last {_LAST_STEPS} steps: {loss:.2f}, {chance - loss:.2f} nats under chance, "
            f"ln(K+1) = {chance:.2f}"
        )
        if not queue_filled_twice(run):
            print("(the queue still held random keys in these steps, which makes the loss low: it says nothing yet)")
    print(f"\n{verdict(run)}")
    steps, _ = run.values("train", "loss")
    seen = int(steps[-1]) * run.config["recipe"]["global_batch"]
    print(
        f"{seen:,} images are one part in {max(round(_PUBLISHED_SEEN / seen), 1):,} of a published run: this shows "
        "that training works on these images, and cannot show what the method is worth."
    )
    places = {
        "report": report,
        "backbone": run.folder / "backbone.safetensors",
        "run": run.folder,
        "packed images": packed.train,
    }
    print()
    for name, place in places.items():
        print(f"{name:<14} {place}")


def _train(recipe: str, packed: Packed, run_dir: Path, seed: int, more: Sequence[str | Path]) -> None:
    command: list[str | Path] = [
        ROOT / "train" / "main.py",
        "--method",
        _METHOD,
        "--recipe",
        recipe,
        "--data",
        packed.train,
        "--run-dir",
        run_dir,
        "--seed",
        str(seed),
        "--resume",
        "never",
        *more,
    ]
    _call(command)


def _fit(recipe: str, packed: Packed, run_dir: Path, seed: int, ends: float) -> tuple[Timing, Plan]:
    """The timing of a recipe, from a run of a few steps that is thrown away, and the plan that ends at `ends`."""
    # A run of its own: the schedule's length must be known before the real one starts.
    timing_dir = run_dir / "timing"
    began = time.monotonic()
    short_flags = ["--max-steps", str(_TIMING_STEPS), "--log-every", str(_TIMING_ROW), "--knn-every", "0"]
    _train(recipe, packed, timing_dir, seed, short_flags)
    short = read_run(timing_dir)
    timing = read_timing(short, time.monotonic() - began, packed.labelled)
    # Its checkpoint and rows would be taken for results.
    shutil.rmtree(timing_dir)
    batch = short.config["recipe"]["global_batch"]
    return timing, make_plan(timing, ends - time.monotonic() - _REPORT_S, packed.images, batch)


def quickstart(folder: Path | None, run_dir: Path, minutes: float, seed: int) -> None:
    """Everything after set-up.

    Raises:
        RunEnd: with one line and an exit code when a step fails.
    """
    # Set first, because packing counts as well; monotonic, because the system's clock may be set meanwhile.
    ends = time.monotonic() + minutes * 60
    prepare_run_dir(run_dir)
    packed = pack_folder(folder, run_dir) if folder else pack_sample_photos(run_dir, seed)

    say("timing a few steps to see which network there is time for")
    recipe = _NARROW
    timing, plan = _fit(recipe, packed, run_dir, seed, ends)
    if (ends - time.monotonic()) / timing.step_s >= _ENOUGH_NARROW:
        wide, longer = _fit(_WIDE, packed, run_dir, seed, ends)
        if longer.steps >= _ENOUGH_WIDE:
            recipe, timing, plan = _WIDE, wide, longer

    made, seconds = RECIPES[recipe][1]()[0], plan.steps * timing.step_s + timing.fixed_s
    batch = made.global_batch
    say(
        f"{batch / timing.step_s:,.0f} images/s: training RegionCL-M on {made.arch} for {plan.steps} steps of {batch} "
        f"images ({plan.steps * batch / packed.images:.1f} epochs), about {seconds:.0f} s"
    )
    flags: list[str | Path] = ["--epochs", str(plan.epochs), "--max-steps", str(plan.steps)]
    flags += ["--knn-every", str(plan.figures_every), "--log-every", str(_LOG_EVERY)]
    # A warm-up longer than the run would never reach the rate.
    flags += ["--schedule.warmup-epochs", f"{min(_WARMUP, _WARMUP * plan.epochs / 8):.3g}"]
    if packed.validation is not None:
        flags += ["--val-data", packed.validation]
    _train(recipe, packed, run_dir, seed, flags)
    report = run_dir / "report.html"
    build_report([run_dir], report)
    _tell(read_run(run_dir), packed, report)


def start(argv: Sequence[str]) -> int:
    """Run the quickstart as the command line says."""
    parser = make_parser("Pack images, train RegionCL-M for a few minutes and compare with an untrained backbone.")
    parser.prog = "tools/quickstart.sh"
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        metavar="IMAGE_FOLDER",
        help="images to train on; class folders become labels; photographs inside scikit-image when not given",
    )
    parser.add_argument("--minutes", type=float, default=5.5, help="when to have finished, set-up not counted")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"), help="folder of the run")
    parser.add_argument("--seed", type=int, default=0, help="every random draw follows from it")
    arguments = parse(parser, argv)
    if arguments.folder is not None and not arguments.folder.is_dir():
        raise UserMistake(f"{arguments.folder} is no folder; give a folder of images, or nothing")
    if not (math.isfinite(arguments.minutes) and arguments.minutes > 0):
        raise UserMistake(f"--minutes {arguments.minutes}: must be above 0")
    # The commands run in the checkout, where a relative path would mean another place.
    folder = arguments.folder.resolve() if arguments.folder else None
    quickstart(folder, arguments.run_dir.resolve(), arguments.minutes, arguments.seed)
    return 0


def main(argv: Sequence[str]) -> int:
    """The exit code; mistakes become one line on standard error."""
    return call(start, argv)


if __name__ == "__main__":
    run_main(main)
