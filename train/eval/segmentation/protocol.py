"""The published segmentation protocols as values, and what the flags change of them."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import UserMistake
from ...fields import check
from ..options import SegmentConfig
from .augment import Geometry

POWER, LOWEST_LR, MOMENTUM = 0.9, 1e-4, 0.9
SCHEDULES = {"20k": 20_000, "40k": 40_000, "80k": 80_000}


@dataclass(frozen=True)
class Published:
    """A protocol of mmsegmentation.

    Attributes:
        source: whose figures it gives, and on what data.
        crop: (height, width) of a training crop.
        scale: (long, short) edge of an image before the random ratio, and at test.
        schedule: key of `SCHEDULES`.
        channels: width of the head.
        layout: data layout of the published figures.
        task: what tables call it.
    """

    source: str
    crop: tuple[int, int]
    scale: tuple[int, int]
    schedule: str
    channels: int
    layout: str
    task: str


PUBLISHED = {
    "fcn": Published("LEWEL: VOC12 by FCN, output stride 8", (512, 512), (2048, 512), "20k", 512, "voc", "VOC12 FCN"),
    "upernet": Published(
        "RegionCL: Cityscapes by UPerNet", (512, 1024), (2048, 1024), "40k", 512, "cityscapes", "Cityscapes UPerNet"
    ),
}


@dataclass(frozen=True)
class Plan:
    """A protocol with the flags applied.

    Attributes:
        steps: optimizer steps.
        geometry: sizes of a training sample; its `scale` holds at test, too.
        channels: width of the head.
        window: of sliding windows, None for whole images.
        stride: between them.
    """

    steps: int
    geometry: Geometry
    channels: int
    window: tuple[int, int] | None
    stride: tuple[int, int]

    def lr_at(self, step: int, lr: float) -> float:
        """Learning rate of the 0-based step for an initial one: polynomial decay to `LOWEST_LR`, or below as it is."""
        # A user may start below the published floor; the rate must not rise then.
        lowest = min(LOWEST_LR, lr)
        return (lr - lowest) * (1 - step / self.steps) ** POWER + lowest


def _pair(name: str, value: tuple[int, ...], default: tuple[int, int], least: int) -> tuple[int, int]:
    if not value:
        return default
    if len(value) != 2 or min(value) < least:
        raise UserMistake(f"--{name} {','.join(map(str, value))}: give two numbers of at least {least}, as 512,1024")
    return value[0], value[1]


def make_plan(config: SegmentConfig, world_size: int) -> Plan:
    """Check the flags and fill in what the protocol says.

    Raises:
        UserMistake: a value outside its range.
    """
    published = PUBLISHED[config.model]
    check(config)
    if config.ignore_index > 255:
        raise UserMistake(f"--ignore-index {config.ignore_index}: label files hold values up to 255")
    if config.channels == 1:
        raise UserMistake("--channels 1: the auxiliary head has half of it; give at least 2")
    # Ranks take equal parts of a batch.
    if config.global_batch % world_size:
        raise UserMistake(f"--global-batch {config.global_batch} must be a multiple of the {world_size} ranks")
    if config.model == "upernet" and config.global_batch // (1 if config.bn == "sync" else world_size) < 2:
        raise UserMistake(
            "--model upernet normalises one value an image where it pools the whole map; batch norm needs at least 2 "
            f"images: raise --global-batch {config.global_batch}"
        )
    if len(config.ratio) != 2 or not 0 < config.ratio[0] <= config.ratio[1]:
        raise UserMistake(f"--ratio {','.join(map(str, config.ratio))}: give low,high with 0 < low <= high")
    # Flags that nothing would look at are refused rather than ignored.
    if config.test == "whole" and (config.window or config.stride):
        raise UserMistake("--window and --stride belong to --test slide")
    crop = _pair("crop", config.crop, published.crop, 32)
    scale = _pair("scale", config.scale, published.scale, 0)
    if scale != (0, 0) and not scale[0] >= scale[1] >= 1:
        raise UserMistake(f"--scale {scale[0]},{scale[1]}: give the long edge first, or 0,0 to keep each image's size")
    window = _pair("window", config.window, crop, 32)
    stride = _pair("stride", config.stride, (max(window[0] * 2 // 3, 1), max(window[1] * 2 // 3, 1)), 1)
    schedule = published.schedule if config.schedule == "protocol" else config.schedule
    return Plan(
        config.steps or SCHEDULES[schedule],
        Geometry(crop, scale, (config.ratio[0], config.ratio[1])),
        config.channels or published.channels,
        window if config.test == "slide" else None,
        stride,
    )


def task_name(config: SegmentConfig, plan: Plan, layout: str) -> str:
    """The name of this run in the table of published figures, or a description where length or data differ from it."""
    published = PUBLISHED[config.model]
    data = {"voc": "VOC12", "cityscapes": "Cityscapes"}.get(layout, "own data")
    name = f"{data} {'FCN' if config.model == 'fcn' else 'UPerNet'}"
    lengths = {steps: key for key, steps in SCHEDULES.items()}
    # Only FCN's length goes without saying in the tables; UPerNet's figures name theirs.
    usual = plan.steps == SCHEDULES[published.schedule] and config.model == "fcn"
    return name if usual else f"{name} {lengths.get(plan.steps, f'{plan.steps} steps')}"
