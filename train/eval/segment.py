"""Semantic segmentation: the backbone fine-tuned inside a dilated FCN or UPerNet, measured by mean IoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.prefetch import decoding_threads

from ..errors import UserMistake
from ..state import TuningState
from .options import SegmentConfig
from .segmentation.feed import TrainingFeed
from .segmentation.labels import LabelMap, check_occurrence, check_values, inspect_all, label_map
from .segmentation.layouts import DataSet, read_layout
from .segmentation.network import build_segmenter, require_resnet
from .segmentation.protocol import PUBLISHED, Plan, make_plan, task_name
from .segmentation.training import Trainer, make_optimizer, train, validate
from .session import ProtocolSession, open_protocol, percent, result_path, table
from .tuning import TuningCheckpoints, discard_state, fingerprint, state_folder


@dataclass(frozen=True)
class Data:
    """Both data sets, looked through.

    Attributes:
        train: training images.
        val: validation images.
        labels: their classes.
        train_hash: hash of the training data.
        val_hash: hash of the validation data.
    """

    train: DataSet
    val: DataSet
    labels: LabelMap
    train_hash: str
    val_hash: str


def _names(config: SegmentConfig, train: DataSet, val: DataSet, present: Sequence[int]) -> LabelMap:
    """The classes: those of the layout or `classes.json`, else the values up to --classes or the highest label."""
    # Class numbers of two layouts mean different things, and the figure would be noise.
    if train.layout != val.layout or (train.names and val.names and train.names != val.names):
        raise UserMistake(
            f"--data {config.data} ({train.layout}) and --val-data {config.val_data} ({val.layout}) have different "
            "classes; give two parts of one data set"
        )
    known = train.names or val.names
    if config.classes and known:
        raise UserMistake(f"--classes {config.classes}: the data name their {len(known)} classes; leave it out")
    # 255 is ignored in both published layouts.
    ignored = train.ignored or val.ignored or (255,)
    if config.ignore_index >= 0:
        if train.layout != "plain":
            raise UserMistake(f"--ignore-index {config.ignore_index}: {train.layout} says what does not count")
        ignored = (config.ignore_index,)
    if not known:
        # The highest label in training; `check_values` refuses a class that only the validation images have.
        count = config.classes or max((value for value in present if value not in ignored), default=-1) + 1
        known = {value: f"class {value}" for value in range(count)}
    return label_map(known, ignored)


def open_data(session: ProtocolSession, config: SegmentConfig) -> Data:
    """List both data sets and look at every label.

    Raises:
        UserMistake: something is missing, of another size or out of range; nothing was trained then.
    """
    train = read_layout(config.data, "train", config.train_split)
    val = read_layout(config.val_data, "val", config.val_split)
    for note in (*train.notes, *val.notes):
        session.say(note)
    threads = decoding_threads(config.workers)
    # Every file of both parts before the first step: a bad one would end the run hours later.
    found = []
    for part in (train, val):
        with session.progress(f"files of {part.split}", session.share(len(part.pairs)), "images") as progress:
            found.append(inspect_all(part.pairs, session.runtime, threads, progress.step))
    labels = _names(config, train, val, found[0].present)
    for part, inspection in zip((train, val), found, strict=True):
        check_values(part.pairs, inspection, labels)
    check_occurrence(found[0], labels, "train")
    check_occurrence(found[1], labels, "val")
    return Data(train, val, labels, found[0].data_hash, found[1].data_hash)


def _settings(session: ProtocolSession, config: SegmentConfig, plan: Plan, data: Data) -> dict[str, Any]:
    """Everything that decides what is computed."""
    settings = {
        "model": config.model,
        "arch": session.arch,
        "backbone": fingerprint(session.encoder),
        "steps": plan.steps,
        "global_batch": config.global_batch,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "crop": plan.geometry.crop,
        "scale": plan.geometry.scale,
        "ratio": plan.geometry.ratio,
        "channels": plan.channels,
        "bn": config.bn,
        "seed": config.seed,
        "log_every": config.log_every,
        "eval_every": config.eval_every,
        "window": plan.window,
        "stride": plan.stride if plan.window else None,
        "dtype": str(session.runtime.dtype),
        "classes": data.labels.names,
        "values": data.labels.table.tolist(),
        "data": data.train_hash,
        "val_data": data.val_hash,
    }
    # Plain batch norm takes statistics from each rank's part, so there the number of ranks changes the result.
    if config.bn == "plain":
        settings["world_size"] = session.runtime.world_size
    return settings


def fine_tune(session: ProtocolSession, config: SegmentConfig, plan: Plan, data: Data) -> dict[str, Any]:
    """Fine-tune and validate; returns what the result file says."""
    runtime, threads = session.runtime, decoding_threads(config.workers)
    session.batch = config.global_batch
    # Taken before the network is built, which dilates the trunk in place and takes it over.
    settings = _settings(session, config, plan, data)
    trunk = require_resnet(session.encoder, session.arch)
    network = build_segmenter(trunk, config.model, data.labels.classes, plan.channels, config.seed, config.bn)
    scaler = torch.amp.GradScaler("cuda") if runtime.dtype is torch.float16 else None
    state = TuningState(network, make_optimizer(network, config), scaler)
    checkpoints = TuningCheckpoints(
        state_folder(result_path(session)), settings, runtime, config.resume == "auto", watch=session.watch
    )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    session.say(
        f"segment: {config.model} ({parameters:,} parameters), {data.train.layout} data, {len(data.train.pairs)} "
        f"images of {data.train.split}, {data.labels.classes} classes, {plan.steps} steps of {config.global_batch}, "
        f"crop {plan.geometry.crop[0]}x{plan.geometry.crop[1]}, lr {config.lr:g}"
    )

    def score(step: int) -> dict[str, Any]:
        pairs = data.val.pairs
        with session.progress("validation", session.share(len(pairs)), "images") as progress:
            scored = validate(network, pairs, data.labels, plan, runtime, threads, progress.step)
        found = scored.as_dict(data.labels.names)
        session.say(f"step {step}: mIoU {percent(found['miou'])}, pixel accuracy {percent(found['pixel_accuracy'])}")
        return found

    feed = TrainingFeed(
        data.train.pairs,
        data.labels,
        plan.geometry,
        config.global_batch,
        config.seed,
        runtime.rank,
        runtime.world_size,
        threads,
    )
    try:
        # Before the first batch is drawn: the state says at which step to begin.
        checkpoints.restore(state)
        watch, say = session.watch, session.say
        with session.progress("training", plan.steps, "steps", done=state.step) as progress:
            train(Trainer(config, plan, runtime, feed, checkpoints, watch, score, say, progress.advance), state)
    finally:
        feed.close()
    return {
        "model": config.model,
        "task": task_name(config, plan, data.train.layout),
        "recipe_source": PUBLISHED[config.model].source,
        "parameters": parameters,
        "steps": plan.steps,
        "global_batch": config.global_batch,
        "lr": config.lr,
        "crop": plan.geometry.crop,
        "scale": plan.geometry.scale,
        "test": config.test,
        "layout": data.train.layout,
        "train_split": data.train.split,
        "val_split": data.val.split,
        "train_images": len(data.train.pairs),
        "val_images": len(data.val.pairs),
        "data_hash": data.train_hash,
        "val_data_hash": data.val_hash,
        **state.record["validations"][-1][1],
        "losses": state.record["losses"],
        "validations": [[step, found["miou"]] for step, found in state.record["validations"]],
    }


def report(session: ProtocolSession, result: dict[str, Any]) -> None:
    """Print the table and write the result file."""
    rows = [
        [row["name"], percent(row["iou"]), percent(row["accuracy"]), str(row["pixels"])] for row in result["classes"]
    ]
    pixels = str(sum(row["pixels"] for row in result["classes"]))
    rows.append(["mean", percent(result["miou"]), percent(result["mean_class_accuracy"]), pixels])
    session.say(table(["class", "IoU", "accuracy", "pixels"], rows))
    session.say(
        f"{result['task']}: mIoU {percent(result['miou'])}, pixel accuracy {percent(result['pixel_accuracy'])} on "
        f"{result['val_images']} images"
    )
    session.write(result)
    discard_state(result_path(session), session.runtime)


def run(config: SegmentConfig) -> int:
    """The `segment` command."""
    # Flags are refused here, before the backbone is loaded; the number of ranks is known only inside.
    make_plan(config, 1)
    with open_protocol("segment", config, config.model) as session:
        plan = make_plan(config, session.runtime.world_size)
        require_resnet(session.encoder, session.arch)
        report(session, fine_tune(session, config, plan, open_data(session, config)))
    return 0
