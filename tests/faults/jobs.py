"""Tiny jobs of every command that writes something, each with what must be equal however often it was interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from models.hyperparameters import CONFIGS
from tests.runs import comparable, last_wins
from train.backbone_io import build_encoder, save_backbone

TRAINING = (
    "--loader synthetic --data 48 --val-data 16 --arch resnet18 --image-size 64 --epochs 2 --global-batch 8 "
    "--bn.group-size 2 --optim.lr 0.05 --log-every 2 --checkpoint-every 3 --knn-every 1 --device cpu --deterministic "
    "--no-report"
).split()
SIZES = {"queue_size": "64", "hidden_dim": "32", "dim": "16", "t_bn_group_size": "2"}
SIZES |= {"prototypes": "20", "small_crops": "2", "small_size": "32", "queue_start_epoch": "0"}
_TIMES = ("seconds", "settings", "versions", "list", "created", "time")


@dataclass(frozen=True)
class Job:
    """A command that is killed and given again.

    Attributes:
        name: for the report.
        command: module whose `main` takes the arguments.
        arguments: of the command; `{out}` is the folder of its output, `{inputs}` that of `make_inputs`.
        outcome: comparable values of what stands in the folder of output when the command has ended well.
        ranks: processes that work together.
        trains: whether it is pre-training, which has epochs and evaluations.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    outcome: Callable[[Path], Any]
    ranks: int = 1
    trains: bool = False

    def argv(self, out: Path, inputs: Path) -> list[str]:
        """The command line for one folder of output."""
        return [argument.format(out=out, inputs=inputs) for argument in self.arguments]


def make_inputs(folder: Path) -> None:
    """Twelve images in two classes and a backbone, as the commands read them."""
    draw = torch.Generator().manual_seed(0)
    for number in range(12):
        pixels = torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8, generator=draw)
        path = folder / "images" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    torch.manual_seed(0)
    save_backbone(build_encoder("resnet18"), folder / "r18.safetensors", arch="resnet18", method="moco-v2")


def _training(method: str, ranks: int) -> Job:
    fields = {field.name for field in dataclasses.fields(CONFIGS[method])}
    own = [part for name, value in SIZES.items() if name in fields for part in (f"--{name.replace('_', '-')}", value)]
    arch = ["--arch", "swin-t"] if "moby" in method else []
    # A rank that is killed before it has come leaves the others waiting, here without a launcher that ends them.
    waits = ["--hang-timeout", "60"] if ranks > 1 else []
    arguments = last_wins(["--method", method, "--run-dir", "{out}", *TRAINING, *own, *arch, *waits])
    return Job(f"train {method}", "train.main", tuple(arguments), comparable, ranks, trains=True)


def _result(out: Path) -> Any:
    """Result files of an evaluation less what a clock says, and the names of whatever else is there."""
    found: dict[str, Any] = {}
    for path in sorted(out.iterdir()):
        document = json.loads(path.read_text()) if path.suffix == ".json" else None
        if isinstance(document, dict):
            found[path.name] = {name: value for name, value in document.items() if name not in _TIMES}
        elif path.suffix not in (".log",):
            found[path.name] = None
    return found


def _evaluation(protocol: str, flags: str) -> Job:
    fixed = (
        "--checkpoint {inputs}/r18.safetensors --loader synthetic --data 32 --val-data 16 --image-size 32 --device cpu"
    )
    arguments = (protocol, *fixed.split(), "--output", "{out}/result.json", *flags.split())
    return Job(f"evaluate {protocol}", "train.evaluate", arguments, _result)


def _digests(out: Path) -> Any:
    """Names and contents of all files that have their final name."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def jobs() -> list[Job]:
    """Pre-training by each method, on one, two and four processes in turn, and one of each other command."""
    trained = [_training(method, ranks) for method, ranks in zip(CONFIGS, itertools.cycle((1, 1, 2, 1, 1, 4, 1)))]
    return [
        *trained,
        _evaluation("linear", "--lrs 0.1,1 --epochs 3 --global-batch 16"),
        _evaluation("fewshot", "--recipe simsiam --fraction 0.5 --epochs 3 --global-batch 8"),
        _evaluation("semi", "--fraction 0.5 --epochs 3 --global-batch 8 --eval-every 1"),
        _evaluation("knn", "--k 5"),
        Job("pack", "tools.make_ffcv_dataset", ("{inputs}/images", "{out}/photos.beton", "--overwrite"), _digests),
        Job(
            "shards",
            "tools.make_webdataset",
            ("{inputs}/images", "{out}/shards", "--shard-size-mib", "0.02", "--overwrite"),
            _digests,
        ),
        Job(
            "export timm",
            "tools.export_backbone",
            ("{inputs}/r18.safetensors", "{out}/timm.safetensors", "--format", "timm", "--overwrite"),
            _digests,
        ),
        Job(
            "export detectron2",
            "tools.export_backbone",
            ("{inputs}/r18.safetensors", "{out}/d2.pkl", "--format", "detectron2", "--overwrite"),
            _digests,
        ),
    ]
