"""Detection: Faster and Mask R-CNN and RetinaNet fine-tuned from the backbone, and their average precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from models.resnet import ResNetTrunk
from pipeline.prefetch import decoding_threads

from ..errors import UserMistake
from ..fields import check as check_fields
from ..runtime import changing_shapes, wrap_distributed
from ..state import TuningState
from .detection.cityscapes_ap import cityscapes_ap
from .detection.coco_ap import METRICS, coco_ap, coco_results
from .detection.data import format_of, read_data
from .detection.feed import TrainingFeed
from .detection.inference import Detections, detect
from .detection.models import DetectorConfig, build_detector
from .detection.proof import prove_images
from .detection.records import DetectionData, Format, check_same_classes, trainable
from .detection.schedule import DEFAULT_SCHEDULE, SIZES, Schedule, Sizes, schedule_of
from .detection.training import Course, build_state, precise_statistics, train
from .detection.voc_ap import voc_ap
from .options import DetectConfig
from .session import ProtocolSession, open_protocol, percent, result_path, table
from .tuning import TuningCheckpoints, discard_state, fingerprint, state_folder

MODEL_NAMES = {
    "faster-rcnn-c4": "Faster R-CNN C4",
    "mask-rcnn-c4": "Mask R-CNN C4",
    "faster-rcnn-fpn": "Faster R-CNN FPN",
    "mask-rcnn-fpn": "Mask R-CNN FPN",
    "retinanet": "RetinaNet FPN",
}
DATA_NAMES: dict[Format, str] = {"coco": "COCO", "voc": "VOC07+12", "cityscapes": "Cityscapes"}
# Flags that change where things are and what is said, not what is computed.
_NO_SETTING = (
    "checkpoint",
    "data",
    "val_data",
    "output",
    "workers",
    "checkpoint_every",
    "resume",
    "log_every",
    "precise_bn_steps",
    "test_side",
    "test_longest_side",
)


@dataclass(frozen=True)
class Plan:
    """The protocol that flags and data come to.

    Attributes:
        task: name of data, detector and length.
        schedule: in the wanted number of steps.
        batch: images of a step.
        peak: learning rate.
        sizes: of images.
    """

    task: str
    schedule: Schedule
    batch: int
    peak: float
    sizes: Sizes


def check(config: DetectConfig) -> None:
    """Raises UserMistake for a value outside its range, or flags that do not go together."""
    check_fields(config)
    # Flags that a detector would not look at are refused rather than ignored.
    if config.box_head != "2fc" and config.detector not in ("faster-rcnn-fpn", "mask-rcnn-fpn"):
        raise UserMistake(f"--box-head {config.box_head} is for FPN detectors with regions, not {config.detector}")
    if config.mask_norm != "protocol" and config.detector != "mask-rcnn-fpn":
        raise UserMistake(f"--mask-norm {config.mask_norm} is for mask-rcnn-fpn, not {config.detector}")
    if config.detector == "retinanet" and config.regions != 512:
        raise UserMistake("--regions: RetinaNet has none; leave it out")


def plan_of(config: DetectConfig, kind: Format) -> Plan:
    """The plan of a run: the flags' values, and the published ones where a flag was left out."""
    name = config.schedule or DEFAULT_SCHEDULE[kind]
    # A wanted number of steps keeps the shape: milestones and warm-up move in proportion.
    published = schedule_of(name, kind, config.detector)
    schedule = published.scaled_to(config.steps) if config.steps else published
    batch = config.global_batch or published.batch
    longest = config.longest_side or SIZES[kind].longest
    test_longest = config.test_longest_side or SIZES[kind].test_longest
    sizes = Sizes(config.train_sides or SIZES[kind].train, config.test_side or SIZES[kind].test, longest, test_longest)
    # A rate that the user gives is taken as it is; the published one belongs to the published batch.
    peak = config.lr or published.lr * batch / published.batch
    return Plan(task_name(config, kind, name), schedule, batch, peak, sizes)


def task_name(config: DetectConfig, kind: Format, schedule: str) -> str:
    """Data, detector and length as the table of published figures calls them; a box head other than 2fc is in it."""
    # The head is a part of the detector, so a published figure counts for runs with the same head only.
    head = "" if config.box_head == "2fc" else f" {config.box_head}"
    model = MODEL_NAMES[config.detector] + head
    if config.steps:
        return f"{DATA_NAMES[kind]} {model} {config.steps} steps"
    if schedule == "24k" and kind != "coco":
        return f"{DATA_NAMES[kind]} {model}"
    if schedule == "12k" and config.detector.startswith("mask"):
        return f"{DATA_NAMES[kind]} Mask R-CNN{head} 12k"  # the paper does not say which
    return f"{DATA_NAMES[kind]} {model} {schedule}"


def read_both(session: ProtocolSession, config: DetectConfig) -> tuple[DetectionData, DetectionData]:
    """Training and validation data.

    Raises:
        UserMistake: annotations or images cannot be read, the two differ in format or classes, or they do not suit the
            detector.
    """
    kinds = format_of(config.data), format_of(config.val_data)
    if kinds[0] != kinds[1]:
        raise UserMistake(f"--data is in the format of {kinds[0]}, --val-data in that of {kinds[1]}; give one format")
    masks, threads = config.detector.startswith("mask"), decoding_threads(config.workers)
    data = read_data(config.data, "train", masks, threads), read_data(config.val_data, "val", masks, threads)
    check_same_classes(*data)
    for note in data[0].notes:
        session.say(f"{config.data}: {note}")
    # Before training: an image that is missing or damaged would end the run at the step that draws it.
    for part in data:
        total = session.share(len(part.records))
        with session.progress(f"images of {part.origin}", total, "images") as progress:
            decoded = prove_images(part.records, session.runtime, threads, progress.step)
        session.say(f"{part.origin}: {len(part.records)} images are there, {decoded} were decoded")
    return data


def precisions(
    data: DetectionData, detections: Sequence[Detections], masks: bool
) -> dict[str, dict[str, float | None]]:
    """Metric name -> figures: COCO's AP of boxes and masks, and VOC's or Cityscapes' own."""
    kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm") if masks else ("bbox",)
    found = {
        f"COCO {'box' if kind == 'bbox' else 'mask'}": coco_ap(
            data.ground_truth, coco_results(detections, data.category_ids, kind), kind
        )
        for kind in kinds
    }
    if data.format == "voc":
        assert data.difficult is not None
        found["VOC box"] = voc_ap(detections, data.difficult, len(data.names), data.rule)
    if data.format == "cityscapes" and masks:
        found["Cityscapes mask"] = cityscapes_ap(data, detections)
    return found


def headline(found: dict[str, dict[str, float | None]]) -> dict[str, float | None]:
    """The figures that the papers report: those of the data's own metric where it has one, else COCO's."""
    sources = {
        "box": found.get("VOC box", found["COCO box"]),
        "mask": found.get("Cityscapes mask", found.get("COCO mask", {})),
    }
    return {
        f"{what}_ap{level}": figures[f"AP{level}"]
        for what, figures in sources.items()
        for level in ("", "50", "75")
        if f"AP{level}" in figures
    }


def _settings(config: DetectConfig, plan: Plan, data: DetectionData, backbone: str) -> dict[str, Any]:
    """Every setting that decides the weights; a checkpoint with other settings is refused."""
    # Flags left at 0 stand for published values, so what they come to is recorded as well.
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NO_SETTING}
    course = {
        "schedule": dataclasses.asdict(plan.schedule),
        "global_batch": plan.batch,
        "lr": plan.peak,
        "train_sides": plan.sizes.train,
        "longest_side": plan.sizes.longest,
    }
    return {**flags, **course, "data_hash": data.data_hash, "backbone": backbone}


def fine_tune(
    session: ProtocolSession, config: DetectConfig, plan: Plan, data: DetectionData
) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """Build the detector, train it to the end, and measure its batch-norm statistics.

    Returns:
        The detector, and rows of losses.
    """
    runtime = session.runtime
    # Taken first: building the detector takes the trunk over and changes it.
    backbone = fingerprint(session.encoder)
    detector = build_detector(
        DetectorConfig(
            config.detector,
            len(data.names),
            config.norm,
            config.box_head,
            config.mask_norm,
            config.anchor_sizes,
            config.regions,
            config.seed,
        ),
        session.encoder,
    ).to(runtime.device)
    if runtime.device.type == "cuda":
        # The layout in which half-precision convolutions are fastest on a GPU; nothing is gained on a CPU.
        detector = detector.to(memory_format=torch.channels_last)
    records = trainable(data)
    course = Course(
        plan.schedule, plan.peak, config.weight_decay, config.seed, config.checkpoint_every, config.log_every
    )
    feed = TrainingFeed(
        records, plan.sizes, plan.batch, config.seed, runtime.rank, runtime.world_size, decoding_threads(config.workers)
    )
    try:
        session.say(
            f"{plan.task}, {len(records)} of {len(data.records)} images with objects, {len(data.names)} classes, "
            f"{plan.schedule.steps} steps of {plan.batch}, lr {plan.peak:g} falling at {plan.schedule.milestones}"
        )
        state: TuningState = build_state(detector, course, runtime)
        settings = _settings(config, plan, data, backbone)
        folder = state_folder(result_path(session))
        checkpoints = TuningCheckpoints(folder, settings, runtime, config.resume == "auto", watch=session.watch)
        # Before DDP is built, which sends rank 0's weights to the others.
        checkpoints.restore(state)
        wrapped = wrap_distributed(detector, runtime, config.deterministic)
        watch, say = session.watch, session.say
        with session.progress("training", plan.schedule.steps, "steps", done=state.step) as progress:
            history = train(state, wrapped, feed, course, runtime, checkpoints, watch, say, progress.advance)
        # After the last step and after the checkpoints, so that a continued run measures them anew.
        with session.progress("norm statistics", config.precise_bn_steps, "batches") as progress:
            layers = precise_statistics(
                detector, feed, plan.schedule.steps, config.precise_bn_steps, runtime, progress.step
            )
        if layers:
            session.say(f"statistics of {layers} norm layers measured over {config.precise_bn_steps} batches")
        return detector, history
    finally:
        feed.close()


def run(config: DetectConfig) -> int:
    """The `detect` command."""
    check(config)
    kind = format_of(config.data)
    variant = f"{config.detector}-{config.schedule or DEFAULT_SCHEDULE[kind]}"
    # Images are padded to the largest of their batch, so nearly every step has another shape.
    with open_protocol("detect", config, variant) as session, changing_shapes():
        # Refused before annotations are read, which takes long for COCO.
        if not isinstance(session.encoder, ResNetTrunk):
            raise UserMistake(f"{session.arch} is no backbone of the published detectors; give a ResNet's checkpoint")
        plan = plan_of(config, kind)
        session.batch = plan.batch
        data, val = read_both(session, config)
        detector, history = fine_tune(session, config, plan, data)
        threads = decoding_threads(config.workers)
        # All ranks take part, although only the first one computes the figures.
        with session.progress("validation", session.share(len(val.records)), "images") as progress:
            detections = detect(detector, val.records, plan.sizes, session.runtime, threads, progress.step)
        if not session.runtime.is_main:
            return 0  # the figures and the file are the first rank's
        found = precisions(val, detections, config.detector.startswith("mask"))
        rows = [
            [name, *(percent(figures[m]) if m in figures else "" for m in METRICS)] for name, figures in found.items()
        ]
        session.say(table(["", *METRICS], rows))
        session.write(
            {
                "task": plan.task,
                "detector": config.detector,
                "train_images": len(trainable(data)),
                "val_images": len(val.records),
                "classes": len(data.names),
                "data_hash": data.data_hash,
                "val_data_hash": val.data_hash,
                "global_batch": plan.batch,
                "lr": plan.peak,
                "schedule": dataclasses.asdict(plan.schedule),
                "sizes": dataclasses.asdict(plan.sizes),
                "parameters": sum(p.numel() for p in detector.parameters()),
                "precisions": found,
                "metrics": headline(found),
                "history": history,
            }
        )
        discard_state(result_path(session), session.runtime)
    return 0
