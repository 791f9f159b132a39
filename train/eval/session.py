"""What the protocols share: flags, the loaded backbone, the result file, and pipelines for classification."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline import augment
from pipeline.atomic import write_atomically
from pipeline.claim import claimed
from pipeline.interface import Batch, Pipeline, PipelineConfig, ViewSpec
from pipeline.loaders import build_pipeline
from pipeline.stores import data_parts

from ..backbone_io import BackboneSource, build_encoder, load
from ..config import RunConfig
from ..errors import CheckpointFailed, UserMistake
from ..measure.features import Features, center_view, extract_features
from ..memory import evaluation_remedy, naming_remedy
from ..record.run import read_config
from ..retry import persistently
from ..runtime import Runtime, start
from ..stop import EvaluationWatch, watched
from ..versions import machine, versions
from .options import EvalConfig, ProtocolConfig
from .progress import Progress
from .splits import check_classes, class_names

FEATURE_BATCH = 256
DEFAULT_IMAGE_SIZE = 224
SELDOM_S = 5.0


@dataclass
class ProtocolSession:
    """One protocol at work.

    Attributes:
        protocol: its name.
        config: flags.
        runtime: device, rank and precision.
        encoder: filled, in eval mode, on the device, channels-last.
        arch: its architecture.
        source: what was loaded.
        run: the run's `config.json`, empty for a file.
        watch: hears the signals that end an evaluation.
        variant: part of the result file's name, for a protocol with several models; may be empty.
        batch: images of a training step over all ranks, once the protocol knows it; 0 before and without training.
    """

    protocol: str
    config: ProtocolConfig
    runtime: Runtime
    encoder: nn.Module
    arch: str
    source: BackboneSource
    run: dict[str, Any]
    watch: EvaluationWatch
    variant: str = ""
    batch: int = 0
    started: float = field(default_factory=time.perf_counter)
    _said_seldom: float = field(default=-math.inf, init=False, repr=False)

    @property
    def method(self) -> str:
        """The pre-training method, empty where the checkpoint does not say."""
        return str(self.run.get("run", {}).get("method") or self.source.metadata.get("method", ""))

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Autocast dtype of the backbone, None in fp32."""
        return None if self.runtime.dtype is torch.float32 else self.runtime.dtype

    def say(self, text: str) -> None:
        """Print on the first rank."""
        if self.runtime.is_main:
            tqdm.write(text, file=sys.stdout)  # above a bar that moves
            sys.stdout.flush()

    def say_seldom(self, text: str) -> None:
        """Print on the first rank unless it said something of this kind a few seconds ago."""
        # A hundred epochs of three images would push what was said before them off the screen.
        if time.monotonic() - self._said_seldom >= SELDOM_S:
            self._said_seldom = time.monotonic()
            self.say(text)

    def progress(self, what: str, total: int, unit: str, done: int = 0) -> Progress:
        """Of a loop of `total` pieces on this rank, told on the first rank; a signal ends it between two pieces."""
        return Progress(what, total, unit, self.runtime.is_main, self.watch.check, done)

    def share(self, count: int) -> int:
        """How many of `count` pieces this rank has where the ranks take every n-th."""
        return len(range(self.runtime.rank, count, self.runtime.world_size))

    def facts(self) -> dict[str, Any]:
        """Facts about the run that every result file contains."""
        return {
            "protocol": self.protocol,
            "untrained": self.config.untrained,
            "checkpoint": self.source.origin,
            "method": self.method,
            "arch": self.arch,
            "settings": dataclasses.asdict(self.config),
            "world_size": self.runtime.world_size,
            "device": str(self.runtime.device),
            "machine": machine(self.runtime.device),
            "dtype": str(self.runtime.dtype).removeprefix("torch."),
            "versions": versions(),
            "seconds": round(time.perf_counter() - self.started, 3),
        }

    def write(self, result: dict[str, Any]) -> None:
        """Write the result file and say where it is."""
        if not self.runtime.is_main:
            return
        # One writer: every rank holds the same result.
        path = result_path(self)
        document = {**self.facts(), **result}
        if path.exists():
            # Another evaluation of one protocol has the same name, and its figures may not be those of this one.
            print(f"replaces the result of {time.strftime('%F %T', time.localtime(path.stat().st_mtime))} in {path}")
        text = json.dumps(document, indent=1) + "\n"

        def put() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())

        try:
            persistently(f"result {path}", put)
        except CheckpointFailed as reason:
            # What took hours to measure must not be lost with the disk.
            print(text, flush=True)
            raise UserMistake(f"{reason}, or choose another place with --output; the result is printed above") from None
        print(f"result: {path}")


@dataclass
class Session(ProtocolSession):
    """A classification protocol at work: images come from the pipelines that pre-training uses.

    Attributes:
        image_size: side of a view in pixels.
        bad_images: flag -> images of that data set that could not be read.
    """

    config: EvalConfig
    image_size: int = DEFAULT_IMAGE_SIZE
    bad_images: dict[str, int] = field(default_factory=dict)

    def open(
        self,
        data: str,
        views: tuple[ViewSpec, ...],
        global_batch: int = 0,
        order: str = "sequential",
        drop_last: bool = False,
        population: np.ndarray | None = None,
        augment: str = "",
    ) -> Pipeline:
        """A pipeline over labelled images; a global batch of 0 is a size that suits feature extraction.

        With the name of an augmentation profile it delivers finished views in fp32, otherwise uint8 crops.

        Raises:
            UserMistake: the data cannot be read, or an image that would be used has no label.
        """
        world = self.runtime.world_size
        settings = PipelineConfig(
            data=data,
            # Folders number the classes that they happen to have; a class that one side lacks must shift no other.
            classes=self.training_classes if data == self.config.val_data else (),
            views=views,
            # Each rank takes an equal part of a batch, so the size for feature extraction is rounded to the ranks.
            global_batch=global_batch or max(FEATURE_BATCH // world, 1) * world,
            seed=self.config.seed,
            rank=self.runtime.rank,
            world_size=world,
            workers=self.config.workers,
            device=self.runtime.device,
            order=order,
            drop_last=drop_last,
            population=population,
            augment=augment,
        )
        pipeline = build_pipeline(self.config.loader, settings, quiet=True)
        # Unlabelled images outside the population are harmless: nobody looks at them.
        used = pipeline.labels if population is None else pipeline.labels[population]
        if (used < 0).any():
            pipeline.close()
            raise UserMistake(
                f"{data}: {int((used < 0).sum())} of {len(used)} images have no label; give a folder with one "
                "sub-folder a class, or a file packed from one"
            )
        return pipeline

    @functools.cached_property
    def training_classes(self) -> tuple[str, ...]:
        """Class names of `--data`, by which validation labels are numbered; empty where it has numbers only."""
        if self.config.loader == "synthetic":
            return ()
        return tuple(class_names(self.config.data) or ())

    def open_training(self, data: str, global_batch: int, population: np.ndarray) -> Pipeline:
        """The pipeline that a probe or fine-tuning trains on: random crops and flips, normalised fp32, channels-last.

        Raises:
            UserMistake: as `open`.
        """
        views = linear_views(self.image_size)
        return self.open(data, views, global_batch, "global", drop_last=True, population=population, augment="linear")

    def features_of(
        self, data: str, population: np.ndarray | None = None, compact: bool = False
    ) -> tuple[Features, str]:
        """(features of the centre view of each image, data hash); with several ranks all of them get all rows.

        `compact` is as for `extract_features`.
        """
        pipeline = self.open(data, (center_view(self.image_size),), population=population)
        try:
            pipeline.set_epoch(0)
            return self.extract(self.encoder, pipeline, compact), pipeline.data_hash
        finally:
            pipeline.close()

    def extract(self, encoder: nn.Module, pipeline: Pipeline, compact: bool = False) -> Features:
        """Features of a pipeline's one view, without the images that cannot be read, which are counted.

        Raises:
            TooManyBad: more than `--max-bad` of them cannot be read.
        """
        device, dtype = self.runtime.device, self.autocast_dtype
        data = Path(pipeline.config.data).name
        with self.progress(f"features of {data}", len(pipeline), "batches") as progress:
            features = extract_features(
                encoder,
                pipeline,
                device,
                dtype,
                max_bad=self.config.max_bad,
                compact=compact,
                after_batch=progress.step,
            )
        self.count_bad(pipeline, "are left out")
        return features

    def count_bad(self, pipeline: Pipeline, done: str) -> None:
        """Count what any rank could not read of a data set, and say so on the first rank; every rank must call it.

        Args:
            pipeline: over the data set, after its images were read.
            done: what was done about them.
        """
        data = pipeline.config.data
        flag = "--val-data" if data == self.config.val_data else "--data"
        found: dict[int, str] = {}
        for each in self.runtime.gather_objects(pipeline.stats().bad_records):
            found |= each
        if len(found) > self.bad_images.get(flag, 0):
            self.bad_images[flag] = len(found)
            self.say(f"{data}: {len(found)} images cannot be read and {done}, for example {next(iter(found.values()))}")

    def facts(self) -> dict[str, Any]:
        """The facts of every protocol, the side of the views in pixels, and how many images could not be read."""
        return {**super().facts(), "image_size": self.image_size, "bad_images": self.bad_images}


def result_path(session: ProtocolSession) -> Path:
    """`eval-PROTOCOL[-VARIANT].json` in the run's folder; `NAME.eval-PROTOCOL[-VARIANT].json` beside a file."""
    if session.config.output:
        return Path(session.config.output)
    parts = [session.protocol, session.variant, "untrained" if session.config.untrained else ""]
    name = f"eval-{'-'.join(filter(None, parts))}.json"
    # Beside the run, where its report looks for results.
    if session.source.folder is not None:
        return session.source.folder / name
    path = Path(session.source.origin)
    return path.with_name(f"{path.stem}.{name}")


def _check_exists(name: str, data: str) -> None:
    # Addresses and shard patterns are not paths; their loader checks them.
    if not ("://" in data or "{" in data or all(Path(part).exists() for part in data_parts(data))):
        raise UserMistake(f"--{name.replace('_', '-')} {data} does not exist; give a packed file, folder or shards")


@contextmanager
def open_protocol(protocol: str, config: ProtocolConfig, variant: str = "") -> Iterator[ProtocolSession]:
    """Set the process up, load the backbone and prove that it is whole; data are the protocol's own business.

    Raises:
        UserMistake: as `load`; nothing was computed then.
    """
    # `compile` is about the heads and losses of pre-training, which no protocol has.
    process = RunConfig(
        device=config.device,
        precision=config.precision,
        seed=config.seed,
        deterministic=config.deterministic,
        compile=False,
    )
    with watched() as watch, start(process) as runtime:
        # With --untrained too: the checkpoint says which architecture is the baseline.
        loaded = load(config.checkpoint, config.arch, print if runtime.is_main else lambda _: None)
        encoder = loaded.encoder
        if config.untrained:
            # Initial weights come from PyTorch's global generator: with one seed all ranks draw the same.
            torch.manual_seed(config.seed)
            encoder = build_encoder(loaded.arch).eval()
            if runtime.is_main:
                print(f"--untrained: a fresh {loaded.arch} takes its place")
        # The pipelines deliver channels-last images; weights in the plain layout would be converted at each call.
        encoder = encoder.to(runtime.device).to(memory_format=torch.channels_last)
        watch.check()
        run = {} if loaded.source.folder is None else read_config(loaded.source.folder)
        session = ProtocolSession(protocol, config, runtime, encoder, loaded.arch, loaded.source, run, watch, variant)
        with _claimed_result(session), naming_remedy(lambda: evaluation_remedy(runtime, session.batch, 0)):
            yield session


@contextmanager
def _claimed_result(session: ProtocolSession) -> Iterator[None]:
    """Keep the result file and the checkpoints beside it to this evaluation.

    Raises:
        UserMistake: they cannot be written, or another evaluation writes them; better now than after hours.
    """
    if not session.runtime.is_main:
        yield
        return
    path = result_path(session)
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A killed evaluation may have left a whole file, which a report would take for a result.
            held.enter_context(claimed(path.with_name(f".{path.name}.lock"), f"result {path}", [path]))
        except OSError as reason:
            raise UserMistake(f"{path}: {reason.strerror or reason}; choose another place with --output") from None
        yield


@contextmanager
def open_session(protocol: str, config: EvalConfig) -> Iterator[Session]:
    """`open_protocol` for classification.

    Raises:
        UserMistake: as `load`, or for data that do not exist or have other classes; nothing was computed then.
    """
    # Paths and classes are checked before the backbone is loaded, which takes seconds; synthetic data have no path.
    if config.loader != "synthetic":
        for name in ("data", "val_data"):
            _check_exists(name, getattr(config, name))
        check_classes(config.data, config.val_data)
    with open_protocol(protocol, config) as opened:
        # A run is judged at the size it was trained at; a file does not say its size.
        size = config.image_size or int(opened.run.get("recipe", {}).get("image_size", 0)) or DEFAULT_IMAGE_SIZE
        session = Session(
            protocol,
            config,
            opened.runtime,
            opened.encoder,
            opened.arch,
            opened.source,
            opened.run,
            opened.watch,
            started=opened.started,
            image_size=size,
        )
        with naming_remedy(lambda: evaluation_remedy(session.runtime, session.batch, size)):
            yield session


def linear_views(image_size: int) -> tuple[ViewSpec, ...]:
    """The random crop of probe training and fine-tuning."""
    return augment.view_specs("linear", image_size)


def class_count(train_labels: np.ndarray, val_labels: np.ndarray) -> int:
    """Number of classes.

    Raises:
        UserMistake: the validation images have a class that no training image has.
    """
    # Only this direction: training classes without validation images cost nothing.
    unseen = sorted(set(np.unique(val_labels).tolist()) - set(np.unique(train_labels).tolist()))
    if unseen:
        raise UserMistake(
            f"--val-data has labels {unseen[:5]} that no image of --data has; give both with the same class folders"
        )
    # Labels index the rows of the classifier, so a gap in their numbers needs a row as well.
    return int(train_labels.max()) + 1


def labels_of_pixels(pipeline: Pipeline, epoch: int, batch: Batch) -> Tensor:
    """(B,) int64 labels of the images that a batch shows.

    Where an image cannot be read another one is shown, and its picture must not be learnt under the other label.
    """
    if not pipeline.stats().bad_records:
        return batch.label
    return torch.from_numpy(pipeline.labels[pipeline.shown(epoch, batch.index.numpy())])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right under a header line."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def percent(share: float | None) -> str:
    """A share in [0, 1] as percent with two decimals; `-` for None."""
    return "-" if share is None else f"{100 * share:.2f}"


__all__ = [
    "ProtocolSession",
    "Session",
    "class_count",
    "labels_of_pixels",
    "linear_views",
    "open_protocol",
    "open_session",
    "percent",
    "result_path",
    "table",
]
