"""The images of a run: whether they can be opened, and what a look at them shows."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.endings import is_packed, is_tar
from pipeline.images import decode_rgb
from pipeline.interface import PipelineConfig
from pipeline.loaders import build_pipeline
from train.data import check_population
from train.errors import UserMistake
from train.measure.features import center_view
from train.record.diagnosis import Finding, Level

from .examination import Examination

SAMPLE = 2000
BUDGET_S = 8.0
_AT_A_TIME = 32
_MANY_BAD = 0.05


@dataclass(frozen=True)
class Look:
    """One image of the sample.

    Attributes:
        name: what its store calls it.
        digest: of its bytes; empty where they cannot be read.
        sides: height and width in pixels.
        blank: whether it has one colour.
        problem: why it cannot be used; empty where it can.
    """

    name: str
    digest: bytes = b""
    sides: tuple[int, int] = (0, 0)
    blank: bool = False
    problem: str = ""


def openable(examination: Examination) -> Iterator[Finding]:
    """The data that `--data` names, and whether they are enough for a batch."""
    config = examination.config
    if not config.run.data and config.run.loader != "synthetic":
        raise UserMistake(
            "--data is needed; pack a folder of images with tools/make_ffcv_dataset.py FOLDER photos.beton, then give "
            "--data photos.beton"
        )
    examination.images = _opened(examination, config.run.data)
    images = examination.images
    classes = f", {len(images.classes)} classes" if images.classes else ""
    yield Finding("ok", f"--data {config.run.data}: {images.num_samples:,} images{classes}")
    examination.trained_on = len(check_population(config, images.num_samples)[0])


def _opened(examination: Examination, data: str, classes: tuple[str, ...] = ()) -> Any:
    config = examination.config
    settings = PipelineConfig(
        data=data,
        views=(center_view(config.recipe.image_size),),
        global_batch=64,
        workers=config.run.workers,
        order="sequential",
        drop_last=False,
        classes=classes,
    )
    return build_pipeline(config.run.loader, settings, quiet=True)


def contents(examination: Examination) -> Iterator[Finding]:
    """Bad, tiny, blank and repeated images in a sample spread over the data."""
    store = getattr(examination.images, "store", None)
    if store is None:
        return  # made on the device, or behind a loader that shows no files
    looks = look(store, examination.images.num_samples)  # type: ignore[union-attr]
    total = examination.images.num_samples  # type: ignore[union-attr]
    of = f"all {total:,}" if len(looks) == total else f"{len(looks):,} of {total:,}"
    data = examination.config.run.data
    yield from _bad(looks, of, packed=is_packed(data) or is_tar(data))
    side = examination.config.recipe.image_size
    small = [each for each in looks if not each.problem and min(each.sides) < side // 2]
    yield from _some(
        small,
        of,
        f"are smaller than {side // 2} px, half of --image-size {side}, and are only enlarged",
        f"lower --image-size, or remove them (the smallest: {_smallest(small)})",
    )
    yield from _some([each for each in looks if each.blank], of, "have one colour alone", "remove them")
    yield from _some(
        _repeated(looks),
        of,
        "are copies of another, byte for byte, and would be told apart from themselves",
        "remove the copies",
    )


def _smallest(looks: list[Look]) -> str:
    height, width = min((each.sides for each in looks), key=min, default=(0, 0))
    return f"{width} x {height} px"


def look(store: Any, total: int) -> list[Look]:
    """Looks at up to `SAMPLE` images spread over a store, as many as the time allows."""
    spread = np.unique(np.linspace(0, total - 1, min(total, SAMPLE)).astype(np.int64))
    # In an order in which the first ones are spread as well, should the time end early.
    chosen = np.random.default_rng(0).permutation(spread).tolist()
    looks: list[Look] = []
    ends = time.monotonic() + BUDGET_S
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(chosen), _AT_A_TIME):
            looks += pool.map(lambda index: _look(store, index), chosen[start : start + _AT_A_TIME])
            if time.monotonic() > ends:
                break
    return looks


def _look(store: Any, index: int) -> Look:
    name = store.name(index)
    try:
        data = store.read(index)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if not store.intact(index, data):
            return Look(name, digest, problem="it has other bytes than were packed")
        pixels = decode_rgb(data)
    except (ValueError, OSError) as reason:
        return Look(name, problem=str(reason))
    # A corner of it decides for nearly all: the whole is compared only where the corner has one colour.
    blank = all(bool((part == part[0, 0]).all()) for part in (pixels[:8, :8], pixels))
    return Look(name, digest, pixels.shape[:2], blank)


def _bad(looks: list[Look], of: str, packed: bool) -> Iterator[Finding]:
    bad = [each for each in looks if each.problem]
    if not bad:
        yield Finding("ok", f"{of} images were looked at, and all can be read")
        return
    share = len(bad) / len(looks)
    level: Level = "fault" if packed or share > _MANY_BAD else "note"
    remedy = (
        "copy the packed data again, or pack again"
        if packed
        else "mend or remove them; tools/make_ffcv_dataset.py lists all of them and leaves them out"
    )
    yield Finding(
        level, f"{len(bad):,} of {of} images cannot be used: {bad[0].name} ({' '.join(bad[0].problem.split())})", remedy
    )


def _repeated(looks: list[Look]) -> list[Look]:
    seen: set[bytes] = set()
    repeated = []
    for each in looks:
        if each.digest in seen:
            repeated.append(each)
        elif each.digest:
            seen.add(each.digest)
    return repeated


def _some(found: list[Look], of: str, what: str, remedy: str) -> Iterator[Finding]:
    if found:
        yield Finding("note", f"{len(found):,} of {of} images {what}: {found[0].name}", remedy)


def validation(examination: Examination) -> Iterator[Finding]:
    """Labels and classes of `--val-data`, and whether it is what is trained on."""
    run, images = examination.config.run, examination.images
    if not run.val_data or images is None:
        return
    opened = _opened(examination, run.val_data, images.classes)
    labels, theirs = opened.labels, images.labels
    opened.close()
    if not (labels >= 0).all() or not (theirs >= 0).all():
        yield Finding(
            "fault",
            f"--val-data {run.val_data}: k-NN needs labels for every image of --data and --val-data",
            "pack folders with one sub-folder a class",
        )
    elif os.path.exists(run.val_data) and os.path.exists(run.data) and os.path.samefile(run.val_data, run.data):
        yield Finding(
            "note",
            f"--val-data {run.val_data} is --data itself, so that k-NN finds each image in its own bank",
            "give images that are not trained on",
        )
    else:
        yield Finding("ok", f"--val-data {run.val_data}: {opened.num_samples:,} labelled images")
