"""`bench_pipeline.py --memory-share`: the loaders where only part of the packed file fits into memory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipeline import read_ahead
from pipeline.interface import Pipeline, PipelineConfig
from pipeline.loaders import build_pipeline
from tools.bench.page_limit import PageLimit, bytes_read
from tools.bench.pipeline_contenders import stock_ffcv_epoch
from tools.bench.rows import Report

BOUNDED = ("sharded", "global", "stock-ffcv", "stock-ffcv-quasi-random")
_EXPLAINED = {
    "sharded": "ours, --order sharded",
    "global": "ours, --order global",
    "stock-ffcv": "stock FFCV, random order, mapped file",
    "stock-ffcv-quasi-random": "stock FFCV, quasi-random order, its own cache",
}
_BLOCK = 64


@contextmanager
def memory_of(size: int) -> Iterator[None]:
    """Within the block the read-ahead takes the machine to have `size` bytes of memory, as in a smaller container."""
    # The page cache is limited from outside, so the loader must be told; a real small machine would say so itself.
    original = read_ahead.memory_bytes
    read_ahead.memory_bytes = lambda: size
    try:
        yield
    finally:
        read_ahead.memory_bytes = original


def bounded_config(config: PipelineConfig, images: int, share: float) -> PipelineConfig:
    """The sharded order with windows of a quarter of what fits, so that two and a rest do."""
    return replace(config, order="sharded", block_size=_BLOCK, shard_window=max(1, int(images * share / 4) // _BLOCK))


def read_ahead_kib(path: Path) -> int | None:
    """How far the kernel reads around a page that is touched in a mapped file; None where it does not say."""
    device = os.stat(path).st_dev
    # A partition has no queue of its own; its disk's is one folder up.
    for queue in ("queue", "../queue"):
        setting = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/{queue}/read_ahead_kb")
        if setting.is_file():
            return int(setting.read_text())
    return None


def measure_bounded(
    report: Report,
    data: Path,
    config: PipelineConfig,
    images: int,
    share: float,
    rounds: int,
    setting: str,
    contenders: Sequence[str] = BOUNDED,
) -> dict[str, tuple[float, float]]:
    """Time epochs that start with nothing of the file in memory, and count what each reads.

    Args:
        report: gets three rows for each contender.
        data: packed file.
        config: views, batch and workers.
        images: records in the file.
        share: of the file, what may be in memory.
        rounds: epochs of each contender; one more comes first and is not counted.
        setting: what to say of the data.
        contenders: from `BOUNDED`.

    Returns:
        contender -> (images/s, bytes read in an epoch relative to the file's).
    """
    size = data.stat().st_size
    sharded = bounded_config(config, images, share)
    setting += (
        f"; {share:.0%} of the file fits into memory; windows of {sharded.shard_window} x {sharded.block_size} images; "
        f"the system reads ahead {read_ahead_kib(data)} KiB; nothing in memory at first"
    )
    opened: list[Pipeline] = []

    def ours(settings: PipelineConfig) -> Callable[[], int]:
        pipeline = build_pipeline("folder", settings)
        opened.append(pipeline)
        epochs = iter(range(1_000_000))

        def run() -> int:
            pipeline.set_epoch(next(epochs))
            return sum(len(batch.index) for batch in pipeline)

        return run

    settings = config.views, config.global_batch, config.workers
    makers: dict[str, Callable[[], Callable[[], int]]] = {
        "sharded": lambda: ours(sharded),
        "global": lambda: ours(config),
        "stock-ffcv": lambda: stock_ffcv_epoch(data, *settings),
        "stock-ffcv-quasi-random": lambda: stock_ffcv_epoch(data, *settings, quasi_random=True),
    }
    calls = {}
    for name in contenders:
        try:
            calls[name] = makers[name]()
        except (ImportError, ValueError) as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in calls}
    memory = int(size * share)
    with PageLimit(data, memory) as limit, memory_of(memory):
        # The first turn compiles and starts threads; it is not counted.
        for turn in range(rounds + 1):
            for name, epoch in calls.items():
                # Otherwise the next contender would find what the one before has read.
                limit.empty()
                before, begun = bytes_read(), time.perf_counter()
                count = epoch()
                rate = count / (time.perf_counter() - begun)
                if turn:
                    figures[name].append((rate, (bytes_read() - before) / size, limit.peak / size))
    for pipeline in opened:
        pipeline.close()
    found = {}
    for name, values in figures.items():
        rates, read, peaks = zip(*values, strict=True)
        speed = report.add(_EXPLAINED[name], "throughput", "images/s", rates, setting)
        amount = report.add(_EXPLAINED[name], "read in an epoch", "of the file", read, setting)
        report.add(_EXPLAINED[name], "most in the page cache", "of the file", peaks, setting)
        found[name] = speed.median, amount.median
    return found


def bounded_conclusion(found: dict[str, tuple[float, float]]) -> str:
    """The bottleneck line of this benchmark."""
    if "sharded" not in found:
        return "bottleneck: not known, the sharded order was not measured"
    rate, read = found["sharded"]
    others = [
        f"{rate / other:.2f} times {_EXPLAINED[name]}, which reads {amount:.2f} times the file"
        for name, (other, amount) in found.items()
        if name != "sharded"
    ]
    line = f"bottleneck: --order sharded reads {read:.2f} times the file in an epoch (once is the least there is)"
    return "; ".join([line, *others])
