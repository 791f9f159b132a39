"""What a run is made of, as data: every configuration dataclass of training, each field with its help and bounds.

How arguments become a `Config` is in `resolve.py`, which values the recipes have in `recipes.py`. Neither these modules
nor what they import import PyTorch: a mistyped flag is answered before the seconds that PyTorch takes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from models.hyperparameters import ARCHITECTURES, CONFIGS
from models.options import option
from pipeline.profiles import PROFILES

from .measure import MAX_BAD

BnMode = Literal["group", "sync", "plain"]
TWO_VIEW_PROFILES = tuple(name for name, profile in PROFILES.items() if profile.num_views == 2)


@dataclass(frozen=True)
class RunConfig:
    """What varies between runs of one recipe; every field is a flag."""

    method: str = option("", "method to train: " + ", ".join(CONFIGS))
    data: str = option(
        "",
        "packed file, folder, list or shard pattern of images; a number of images for --loader synthetic",
        free_on_resume=True,
    )
    run_dir: str = option("", "folder of the run; runs/METHOD when empty", free_on_resume=True)
    val_data: str = option("", "labelled images for online k-NN, classes as in --data", free_on_resume=True)
    loader: Literal["auto", "ffcv", "dali", "webdataset", "folder", "synthetic"] = option(
        "auto", "where images come from", free_on_resume=True
    )
    recipe: str = option("", "recipe by name; the method's own when empty", free_on_resume=True)
    max_steps: int = option(
        0, "stop after this many optimizer steps in total; 0 runs all epochs", least=0, free_on_resume=True
    )
    seed: int = option(0, "every random draw follows from it", least=0, most=2**31 - 1)
    order: Literal["global", "sharded"] = option("global", "order of samples: any sample next, or blocks in turn")
    init: str = option(
        "",
        "backbone weights to start from: a run, our backbone file, or a checkpoint of torchvision, timm, MoCo, "
        "DenseCL, SimSiam, BYOL, CARE, LEWEL, Lightning, lightly or solo-learn",
        free_on_resume=True,
    )
    freeze: str = option(
        "",
        "parts of the backbone that stay as they are, comma-separated, for example conv1,bn1,layer1: not in the "
        "optimizer, their norms in eval mode",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: bf16 from Ampere on, fp16 before, fp32 on CPU"
    )
    compile: bool | None = option(
        None,
        "compile heads and losses; none: on for CUDA where Triton and a C compiler are there, off for CPU",
        free_on_resume=True,
    )
    kernels: Literal["auto", "off", "on"] = option(
        "auto",
        "our GPU kernels. auto: those that prove right and faster than PyTorch's on this card before the first step; "
        "on: those that prove right; off: none",
        free_on_resume=True,
    )
    cuda_graph: bool | None = option(
        None,
        "replay forward and backward as one CUDA graph; none: on one GPU, where --kernels proves it right and faster",
        free_on_resume=True,
    )
    deterministic: bool = option(
        False, "deterministic kernels and a fixed order of summation, for byte-identical runs", free_on_resume=True
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to train", free_on_resume=True)
    processes: int = option(
        1,
        "processes to start on this machine, one a GPU; their exit code is the run's, which torchrun's is not",
        least=1,
        free_on_resume=True,
    )
    workers: int = option(
        0, "decoding threads of this process; 0 follows from the cores it may use", least=0, free_on_resume=True
    )
    micro_batch: int | Literal["auto"] = option(
        0,
        "images per device and forward pass; 0 is the whole batch per device; auto: the largest that fits the device's "
        "memory with BN groups whole, found before the first step and recorded",
        least=0,
    )
    knn_every: int = option(
        10,
        "epochs between online k-NN and health figures; 0 only at the start and the end",
        least=0,
        free_on_resume=True,
    )
    probe: bool = option(
        False,
        "with each online k-NN train a linear classifier on the same frozen features, beside the run and its result",
        free_on_resume=True,
    )
    checkpoint_every: int = option(
        1000, "steps between checkpoints; the end of the run always has one", least=1, free_on_resume=True
    )
    keep_checkpoints: int = option(2, "newest checkpoints kept; 0 keeps all", least=0, free_on_resume=True)
    resume: Literal["auto", "never"] = option(
        "auto", "auto continues from the run folder's newest good checkpoint", free_on_resume=True
    )
    log_every: int = option(
        10, "steps between rows of metrics; the only time the host waits for the device", least=1, free_on_resume=True
    )
    hang_timeout: int = option(
        1800,
        "seconds without progress, as of a rank that was stopped or a disk that went away, after which the job ends "
        "with code 6 and names the culprit; 0: never",
        least=0,
        free_on_resume=True,
    )
    max_bad: float = option(
        MAX_BAD,
        "share of the images that may be unreadable; others take their place. Above it the run ends with code 3, from "
        "1000 images on or, of fewer, after one epoch",
        least=0,
        most=1,
        free_on_resume=True,
    )
    on_non_finite: Literal["stop", "rollback"] = option(
        "stop",
        "after 25 steps in a row with a loss or gradient that is not finite: stop with code 4, or take the newest "
        "checkpoint from before them and go on with the batches behind them",
        free_on_resume=True,
    )
    holdout: int = option(
        0,
        "images kept out of training for the health figures where there is no --val-data (at most 5 percent); 0: the "
        "figures come from images that are trained on",
        least=0,
    )
    report: bool = option(True, "write report.html into the run's folder at the end", free_on_resume=True)
    log: tuple[Literal["wandb", "mlflow", "trackio"], ...] = option(
        (),
        "services that get the rows as well, comma-separated, through their own libraries and settings: wandb, mlflow, "
        "trackio",
        free_on_resume=True,
    )
    callbacks: tuple[str, ...] = option(
        (),
        "code of your own that is told the rows, as module:factory, comma-separated; the factory gives a "
        "regatta.Callback",
        free_on_resume=True,
    )
    live_report: int = option(
        0,
        "seconds between pages while the run goes: report.html with the curves, which a browser loads again by itself; "
        "0: only at the end, because drawing takes up to 2 percent of the host's time from the steps",
        least=0,
        free_on_resume=True,
    )
    dry_run: bool = option(
        False,
        "print what would run, take a few steps and stop: speed, memory, disk, finish; the run's folder stays as it is",
        free_on_resume=True,
    )


@dataclass(frozen=True)
class LarsConfig:
    """Details in which published LARS implementations differ."""

    trust: float = option(1e-3, "trust coefficient: a layer's step relative to its weight norm")
    lr_in_buffer: bool = option(
        False, "learning rate inside the momentum buffer (LEWEL) or applied outside it (MoCo v3)"
    )
    denominator: Literal["auto", "joint", "apart", "larc"] = option(
        "auto",
        "what a weight's norm is divided by: the norm of gradient and decay together (MoCo v3, SimCLR), or the sum of "
        "their norms (LEWEL); larc: that sum plus 1e-8, and a weight of zeros takes its gradient as it is (SwAV); "
        "auto: apart where lr_in_buffer",
    )


@dataclass(frozen=True)
class OptimConfig:
    """Which optimizer, and what it does to which parameter."""

    kind: Literal["sgd", "adamw", "lars"] = option("sgd", "optimizer")
    lr: float = option(0.03, "base learning rate, at lr_reference_batch images a step", least=0)
    lr_reference_batch: int = option(
        256, "global batch that lr belongs to; lr grows linearly with it; 0: no scaling", least=0
    )
    weight_decay: float = option(
        1e-4, "weight decay: added to the gradient in sgd and lars, decoupled in adamw", least=0
    )
    exclude: Literal["none", "1d", "bias_bn", "bias_bn_encoder", "1d_tables"] = option(
        "none",
        "what has no weight decay and no LARS trust ratio: nothing; 1d: vectors (MoCo v3; MoBY, whose 2-D position "
        "tables are decayed); bias_bn: biases and batch norms; bias_bn_encoder: the same, but batch-norm scales only "
        "inside the encoder (LEWEL's code with SyncBN); 1d_tables: vectors and relative-position tables",
    )
    excluded_lr_share: float = option(
        1.0, "learning rate of what is excluded, as a share of lr (Barlow Twins, whose biases learn slowly)", above=0
    )
    sgd_momentum: float = option(0.9, "momentum of sgd and lars", least=0, below=1)
    betas: tuple[float, float] = option((0.9, 0.999), "decay rates of adamw's two averages")
    eps: float = option(1e-8, "adamw's addition to the denominator")
    clip_grad_norm: float = option(0.0, "largest norm of all gradients together; 0: no clipping", least=0)
    lars: LarsConfig = field(default_factory=LarsConfig)


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves between the start and the end of a run."""

    decay: Literal["cosine-epoch", "cosine-step", "steps", "constant"] = option(
        "cosine-epoch",
        "after warm-up: half a cosine, evaluated once an epoch or every step; steps: a tenth at each milestone; or no "
        "change",
    )
    milestones: tuple[int, ...] = option(
        (),
        "epochs from which on the rate is a tenth of what it was, comma-separated, with decay steps (MoCo v1)",
        least=1,
    )
    final: float = option(0.0, "learning rate that the cosine ends at", least=0)
    cosine_origin: Literal["warmup-end", "run-start"] = option(
        "warmup-end", "where the cosine begins; run-start cuts its first part off by the warm-up, as timm does (MoBY)"
    )
    warmup_epochs: float = option(0.0, "epochs of linear warm-up, step by step", least=0)
    warmup_start: float = option(0.0, "learning rate at which the warm-up begins", least=0)
    warmup_offset: int = option(
        0, "0: step t of the warm-up has the share t / W of the rise; 1: (t + 1) / W (LEWEL)", least=0
    )
    scale_ends: bool = option(
        False, "scale final and warmup_start with the global batch like the base learning rate (MoBY)"
    )


@dataclass(frozen=True)
class EmaConfig:
    """How slowly the momentum network follows."""

    momentum: float = option(0.999, "EMA coefficient, at the first step where it changes", least=0, most=1)
    schedule: Literal["constant", "cosine"] = option("constant", "constant, or half a cosine up to 1 at the last step")


@dataclass(frozen=True)
class BnConfig:
    """Which images share batch-normalisation statistics."""

    mode: BnMode = option(
        "group", "group: consecutive images of the global batch; sync: all of it; plain: the rank's batch"
    )
    group_size: int = option(
        0,
        "images that share statistics in mode group, and that exchange regions in any; 0 is the rank's whole batch",
        least=0,
    )


@dataclass(frozen=True)
class AugmentConfig:
    """Which augmentation profile runs, and what of it is changed."""

    profile: str = option("mocov2", "augmentation profile: " + ", ".join(TWO_VIEW_PROFILES), choices=TWO_VIEW_PROFILES)
    min_scale: float = option(0.0, "smallest crop area relative to the image; 0 keeps the profile's", least=0, most=1)
    implementation: Literal["auto", "reference", "native"] = option(
        "auto", "which code applies the augmentation; the GPU kernel is --kernels' to choose"
    )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is computed. Values and their sources are in `recipes.py`."""

    arch: str = option(
        "resnet50",
        "backbone: " + ", ".join(ARCHITECTURES) + "; timm:NAME, torchvision:NAME, or module:factory of your own",
    )
    image_size: int = option(224, "side of a view in pixels", least=8)
    epochs: int = option(
        200,
        "epochs to train; with more epochs than it had, a finished run goes on, from its last step by the schedule of "
        "the new length",
        least=1,
    )
    global_batch: int = option(256, "images of one optimizer step over all devices and micro-batches", least=2)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    bn: BnConfig = field(default_factory=BnConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class Config:
    """A resolved run: three dataclasses whose fields never collide, so that each is one flat set of flags."""

    run: RunConfig
    recipe: Recipe
    model: Any

    def to_json(self) -> dict[str, Any]:
        """Nested plain values, as in `config.json`."""
        return {part: dataclasses.asdict(getattr(self, part)) for part in ("run", "recipe", "model")}
