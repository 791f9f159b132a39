"""`bench_pipeline.py --levers`: what each device of the loader is worth, all others on.

Only what can be switched without a switch in production code is here: flags of a decoding job, the instruction set, how
the decoder is called, and the buffers. Colour conversion at the size of the view, instead of the size of the photo, is
part of how the decoder is built and cannot be taken out.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipeline import simd
from pipeline.augmenter import BatchAugmenter
from pipeline.decoder import native_library
from pipeline.interface import Pipeline, PipelineConfig
from pipeline.layouts import CHECK_CRC, JOB, LIBJPEG_ONLY, WHOLE_IMAGE, view_array
from pipeline.loaders import build_pipeline
from pipeline.refusal import MAX_PIXELS
from pipeline.stores import PackedStore
from tools.bench.rows import Report, Summary
from tools.bench.timing import time_interleaved

IMAGES = 512
_LEVELS = {"no SIMD": "plain", "AVX2 instead of AVX-512": "avx2"}


class _Decoder:
    """The native decoder on the first images of a file, callable with its levers."""

    def __init__(self, data: Path, config: PipelineConfig):
        library = native_library(instead=None)
        assert library is not None
        self.library, self.store = library, PackedStore(str(data))
        self.count = min(IMAGES, len(self.store.labels))
        self.workers = config.workers
        self.checksums = [zlib.crc32(self.store.read(number)) for number in range(self.count)]
        sides = [spec.size for spec in config.views]
        self.views = [np.zeros((self.count, side, side, 3), dtype=np.uint8) for side in sides]
        self.specs = [view_array([spec]) for spec in config.views]
        self.all_specs = view_array(config.views)
        # The pool does not tell its threads, so they are found by what is new.
        before = set(os.listdir("/proc/self/task"))
        self.pool = library.rg_pool_open(config.workers)
        self.threads = [int(name) for name in set(os.listdir("/proc/self/task")) - before]
        self.single = library.rg_pool_open(1)

    def close(self) -> None:
        """End the threads."""
        self.library.rg_pool_close(self.pool)
        self.library.rg_pool_close(self.single)

    def jobs(self, add: int = 0, drop: int = 0) -> np.ndarray:
        """Jobs for all images, with flags added to and dropped from the usual ones."""
        jobs, index = np.zeros(self.count, dtype=JOB), np.arange(self.count)
        jobs["index"], jobs["slot"] = index, index
        self.store.fill(jobs, index)
        jobs["crc"], jobs["flags"] = self.checksums, CHECK_CRC  # as of a file with its manifest
        jobs["flags"] = (jobs["flags"] & ~np.uint32(drop)) | np.uint32(add)
        return jobs

    def run(self, jobs: np.ndarray, pool: int | None = None, apart: bool = False) -> None:
        """Decode into `views`; `apart` decodes once for each view."""
        rounds = (
            [(self.all_specs, self.views)]
            if not apart
            else [(spec, [view]) for spec, view in zip(self.specs, self.views, strict=True)]
        )
        for specs, views in rounds:
            outs = np.array([view.ctypes.data for view in views], dtype=np.uint64)
            failed = self.library.rg_decode(
                pool or self.pool,
                jobs.ctypes.data,
                self.count,
                specs.ctypes.data,
                len(views),
                outs.ctypes.data,
                0,
                0,
                MAX_PIXELS,
            )
            # A record that is skipped would make the lever look fast.
            if failed:
                raise RuntimeError(f"{failed} of {self.count} images could not be decoded")

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Each decoding thread on a core of its own, the calling one too."""
        cores = sorted(os.sched_getaffinity(0))
        threads = [0, *self.threads]  # 0 is the caller
        for number, thread in enumerate(threads):
            os.sched_setaffinity(thread, {cores[number % len(cores)]})
        try:
            yield
        finally:
            for thread in threads:
                os.sched_setaffinity(thread, cores)


def _decoder_calls(decoder: _Decoder) -> dict[str, Callable[[], None]]:
    """Name -> one pass over the images; the first has every lever."""
    usual, whole = decoder.jobs(), decoder.jobs(add=WHOLE_IMAGE)
    libjpeg, trusting = decoder.jobs(add=LIBJPEG_ONLY), decoder.jobs(drop=CHECK_CRC)

    def at_level(level: str) -> None:
        with simd.at_most(level):
            decoder.run(usual)

    def pinned() -> None:
        with decoder.pinned():
            decoder.run(usual)

    best = simd.LEVELS.index(simd.level())
    lower = {name: level for name, level in _LEVELS.items() if simd.LEVELS.index(level) < best}
    return {
        "everything": lambda: decoder.run(usual),
        "decoding to the last row": lambda: decoder.run(whole),
        "one decode per view": lambda: decoder.run(usual, apart=True),
        "libjpeg's entropy decoder": lambda: decoder.run(libjpeg),
        **{name: (lambda level=level: at_level(level)) for name, level in lower.items()},  # type: ignore[misc]
        "no checksums": lambda: decoder.run(trusting),
        "threads pinned to cores": pinned,
        "one thread": lambda: decoder.run(usual, decoder.single),
    }


def _check_decoder(decoder: _Decoder, calls: dict[str, Callable[[], None]]) -> None:
    """Every lever leaves the pixels as they are, but for rounding between instruction sets."""
    calls["everything"]()
    wanted = [view.copy() for view in decoder.views]
    for name, call in calls.items():
        for view in decoder.views:
            # Cleared, so that a lever which writes nothing cannot pass by the pixels of the one before.
            view[:] = 0
        call()
        for view, right in zip(decoder.views, wanted, strict=True):
            difference = int(np.abs(view.astype(np.int16) - right).max())
            # Instruction sets round differently in the last grey level; everything else must be equal.
            if difference > (1 if name in _LEVELS else 0):
                raise RuntimeError(f"{name}: pixels differ by {difference} grey levels")


def _augmented_calls(config: PipelineConfig, count: int) -> tuple[dict[str, Callable[[], None]], list[Pipeline]]:
    """Name -> one epoch of the first `count` images; the first has every lever. And the pipelines to close."""
    config = replace(config, population=np.arange(count), global_batch=min(config.global_batch, count))
    opened: list[Pipeline] = []

    def loader(fresh: bool = False, **settings: object) -> Callable[[], None]:
        pipeline = build_pipeline("folder", replace(config, **settings))  # type: ignore[arg-type]
        opened.append(pipeline)
        if fresh:
            pipeline._buffers._keep = 0  # type: ignore[attr-defined]

        def epoch() -> None:
            for batch in pipeline:
                del batch  # its buffers are free for the next

        return epoch

    crops = build_pipeline("folder", config)
    opened.append(crops)
    second_pass = BatchAugmenter(replace(config, augment="mocov2"))

    def two_passes() -> None:
        for batch in crops:
            second_pass(batch, 0)

    return {
        "augmented": loader(augment="mocov2"),
        "augmented, bfloat16": loader(augment="mocov2", dtype=torch.bfloat16),
        "augmented, new buffers for each batch": loader(fresh=True, augment="mocov2"),
        "augmented in a second pass over each batch": two_passes,
    }, opened


def measure_levers(
    report: Report, data: Path, config: PipelineConfig, rounds: int, max_seconds: float, setting: str
) -> str:
    """Time the decoder, and the loader with augmentation, with one lever changed at a time.

    Args:
        report: gets a row of microseconds per image for each.
        data: packed file.
        config: views, batch and workers.
        rounds: figures of each.
        max_seconds: limit for each of the two groups.
        setting: what to say of the data.

    Returns:
        The conclusion: what changing each lever costs.
    """
    decoder = _Decoder(data, config)
    calls = _decoder_calls(decoder)
    _check_decoder(decoder, calls)
    setting += f"; {decoder.count} images at a time"
    costs = _compare(report, "decoder", calls, decoder.count, rounds, max_seconds, setting)
    decoder.close()
    augmented, opened = _augmented_calls(config, decoder.count)
    costs |= _compare(report, "loader", augmented, decoder.count, rounds, max_seconds, setting)
    for pipeline in opened:
        pipeline.close()
    return "bottleneck: time relative to everything on: " + ", ".join(f"{k} {v:.2f}" for k, v in costs.items())


def _compare(
    report: Report,
    what: str,
    calls: dict[str, Callable[[], None]],
    count: int,
    rounds: int,
    max_seconds: float,
    setting: str,
) -> dict[str, float]:
    """Rows of one group, and its times relative to the first of it."""
    times: dict[str, Summary] = {}
    for name, seconds in time_interleaved(calls, rounds=rounds, warmup=1, max_seconds=max_seconds).items():
        per_image = [value / count * 1e6 for value in seconds]
        times[name] = report.add(f"{what}: {name}", "time", "us/image", per_image, setting)
    base, *others = times.items()
    return {name: time.median / base[1].median for name, time in others}
