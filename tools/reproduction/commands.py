"""The commands of a line of a table: pre-training first, then one for each measurement."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.reproduction.scales import Scale, Sources, evaluation_flags, training_flags
from tools.reproduction.tables import Cell
from tools.reproduction.training import Line, Training
from tools.support.stoppable import ROOT
from train.errors import UserMistake


@dataclass(frozen=True)
class Job:
    """One command and the file that is there when it is done.

    Attributes:
        argv: the command's arguments after the interpreter, its script first.
        done: result that a finished command leaves.
        distributed: whether it runs on several processes where there are several.
    """

    argv: tuple[str, ...]
    done: Path
    distributed: bool

    def command(self, processes: int = 1) -> list[str]:
        """The whole command for one machine."""
        launcher = [sys.executable]
        if processes > 1 and self.distributed:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [*launcher, str(ROOT / self.argv[0]), *self.argv[1:]]

    def text(self, processes: int = 1) -> str:
        """The command as a user types it in the checkout."""
        many = processes > 1 and self.distributed
        launcher = f"torchrun --standalone --nproc_per_node={processes}" if many else "python"
        return f"{launcher} {shlex.join(self.argv)}"


@dataclass(frozen=True)
class Plan:
    """What all commands of a reproduction share.

    Attributes:
        sources: where the data are.
        scale: size of the reproduction.
        out: folder of the runs.
        trials: times that a transfer is fine-tuned, with different seeds.
        sweep: fine-tuning rates to try on the transfers; the best one counts.
    """

    sources: Sources
    scale: Scale
    out: Path
    trials: int = 1
    sweep: tuple[float, ...] = ()


def jobs(line: Line, seed: int, plan: Plan) -> list[Job]:
    """The commands of one line with one seed.

    Raises:
        UserMistake: the line needs data that the user did not name. It names the flag.
    """
    training = line.training
    # One run of k-NN has the results of every number of neighbours.
    measured = {result_file(cell, training, seed, plan): cell for cell in line.cells if cell.protocol != "analyze"}
    trained = [] if training.method == "supervised" else [_training(training, seed, plan)]
    return trained + [_measurement(cell, training, done, seed, plan) for done, cell in measured.items()]


def pictures(table: str, lines: Sequence[Line], seed: int, plan: Plan) -> list[Job]:
    """The commands that draw what a figure shows of all its runs at once, when these are trained.

    Args:
        table: name of the figure.
        lines: its lines.
        seed: of the runs.
        plan: what all commands share.
    """
    runs = [str(run_folder(line.training, seed, plan)) for line in lines]
    names = dict.fromkeys(cell.task for line in lines for cell in line.cells if cell.protocol == "analyze")
    found = []
    for name in names:
        done = plan.out / "pictures" / f"{table}-{name}-seed{seed}.png"
        data, held_out = _images(lines[0].training, plan)
        argv = ["tools/analyze.py", name, *runs, "--data", data if name == "boxes" else held_out]
        argv += evaluation_flags("analyze", plan.scale)
        argv += ["--annotations", _named(plan.sources.boxes, "--boxes")] if name == "boxes" else []
        found.append(Job((*argv, "--out", str(done)), done, False))
    return found


def run_folder(training: Training, seed: int, plan: Plan) -> Path:
    """Folder of a pre-training; one run serves every table that needs it."""
    return plan.out / "runs" / training.name / f"seed{seed}"


def result_file(cell: Cell, training: Training, seed: int, plan: Plan) -> Path:
    """Where a measurement's result is."""
    name = cell.protocol if cell.protocol == "knn" else cell.name
    return run_folder(training, seed, plan) / f"eval-{name}.json"


def _training(training: Training, seed: int, plan: Plan) -> Job:
    run = run_folder(training, seed, plan)
    data, held_out = _images(training, plan)
    argv = ["train/main.py", "--method", training.method, "--recipe", training.recipe]
    argv += ["--data", data, "--val-data", held_out, "--run-dir", str(run), "--seed", str(seed)]
    return Job((*argv, *training_flags(training, plan.scale)), run / "backbone.safetensors", True)


def _measurement(cell: Cell, training: Training, done: Path, seed: int, plan: Plan) -> Job:
    run = str(run_folder(training, seed, plan))
    weights = run if training.method != "supervised" else _named(plan.sources.supervised, "--supervised")
    argv = ["train/evaluate.py", cell.protocol, "--checkpoint", weights, "--seed", str(seed)]
    if plan.scale == "tiny":
        argv += ["--device", "cpu"]
    argv += _protocol_flags(cell, training, plan)
    if cell.protocol in ("detect", "segment"):
        argv += ["--trials", str(plan.trials)] if plan.trials > 1 else []
        argv += ["--sweep-lrs", ",".join(f"{lr:g}" for lr in plan.sweep)] if plan.sweep else []
    return Job((*argv, "--output", str(done)), done, True)


def _protocol_flags(cell: Cell, training: Training, plan: Plan) -> list[str]:
    """Data and settings of one measurement."""
    small = evaluation_flags(cell.protocol, plan.scale)
    if cell.protocol == "detect":
        detector = _detector(cell)
        # A mask head trains on a quarter of them, which costs a CPU more than all else; RetinaNet has no proposals.
        regions = ["--regions", "16"] if plan.scale == "tiny" and "retinanet" not in detector else []
        return [*_pair(_detection_data(cell, plan)), *detector, *_long_side(training, detector, plan), *small, *regions]
    if cell.protocol == "segment":
        return [*_pair(_segmentation_data(cell, plan)), *_segmenter(cell), *small]
    data, held_out = _images(training, plan)
    flags = ["--data", data, "--val-data", held_out, *small]
    if cell.protocol in ("fewshot", "semi"):
        # A hundredth of the few drawn pictures would leave classes without any.
        share = 0.5 if plan.scale == "tiny" else float(cell.task.rstrip("%")) / 100
        flags += ["--fraction", f"{share:g}"]
    if cell.protocol == "linear" and training.arch in ("vit-s", "vit-b"):
        # A class token wants another rate than the pooled map of a ResNet.
        flags += ["--recipe", "moco-v3-vit"]
    if cell.protocol in ("linear", "knn") and plan.sources.real_labels and plan.scale == "full":
        flags += ["--real-labels", plan.sources.real_labels]
    return flags


def _detection_data(cell: Cell, plan: Plan) -> str:
    for name, place in (("COCO", "coco"), ("VOC", "voc"), ("Cityscapes", "cityscapes")):
        if cell.task.startswith(name):
            return _named(getattr(plan.sources, place), f"--{place}")
    raise AssertionError(f"no data for {cell.task}")


def _detector(cell: Cell) -> list[str]:
    words = cell.task.replace("RetinaNet FPN", "RetinaNet").lower()
    names = {"mask r-cnn c4": "mask-rcnn-c4", "faster r-cnn c4": "faster-rcnn-c4", "retinanet": "retinanet"}
    # The paper does not name the detector of the 12k steps.
    detector = next((name for text, name in names.items() if text in words), "mask-rcnn-fpn")
    flags = ["--detector", detector]
    if "4conv1fc" in words:
        flags += ["--box-head", "4conv1fc"]
    length = words.split()[-1]
    # A tiny run has its own number of steps, which takes the place of the schedule's.
    return flags + (["--schedule", length] if length in ("1x", "2x", "12k") else [])


def _long_side(training: Training, detector: Sequence[str], plan: Plan) -> list[str]:
    """RegionCL's C4 logs have 1200 px in training, where MoCo's configuration, which the others take, has 1333."""
    own = training.method.startswith("regioncl") and "mask-rcnn-c4" in detector and plan.scale != "tiny"
    return ["--longest-side", "1200"] if own else []


def _segmentation_data(cell: Cell, plan: Plan) -> str:
    place = "voc" if cell.task.startswith("VOC") else "cityscapes"
    return _named(getattr(plan.sources, place), f"--{place}")


def _segmenter(cell: Cell) -> list[str]:
    model = "fcn" if "FCN" in cell.task else "upernet"
    length = cell.task.split()[-1]
    return ["--model", model] + (["--schedule", length] if length in ("40k", "80k") else [])


def _images(training: Training, plan: Plan) -> tuple[str, str]:
    small = plan.scale == "in100" or training.recipe.endswith("-in100")
    place, flag = (plan.sources.imagenet100, "--imagenet100") if small else (plan.sources.imagenet, "--imagenet")
    if len(place) != 2:
        raise UserMistake(f"{flag} TRAIN VAL is needed: training and validation images, packed files or folders")
    return place[0], place[1]


def _pair(data: str) -> list[str]:
    return ["--data", data, "--val-data", data]


def _named(place: str, flag: str) -> str:
    if not place:
        raise UserMistake(f"{flag} is needed for this table; give its folder or file")
    return place
