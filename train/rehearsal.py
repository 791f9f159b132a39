"""What `--dry-run` finds out: a few real steps, and from them speed, memory, disk and the finish of the whole run.

Nothing is written into the run's folder. The weights that the steps change are thrown away with the process.
"""

from __future__ import annotations

import datetime
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.interface import Batch, Pipeline

from .backbone_io import BACKBONE_FILE, save_backbone
from .checkpoint import checkpoint_name, nearest_existing, write_checkpoint
from .data import RunData
from .errors import UserMistake
from .inputs import VIEWS
from .loop import Job, take_step
from .measure.features import evaluation_mode, normalise, normalised_rows, pool
from .measure.knn import knn_predict
from .measure.online import KNN_NEIGHBOURS
from .state import TrainState, state_bytes, to_files

WARM_UP = 3
"""First steps, which pay for compilation and for the choice of algorithms and are not measured."""
LEAST_S = 5.0
MOST_S = 60.0
_STEADY = 0.05
_SAMPLE_S = 5.0
_BANK_ROWS, _QUERY_ROWS = 1 << 15, 64


@dataclass(frozen=True)
class Pace:
    """How fast steps are.

    Attributes:
        step_s: seconds of a step once the speed is steady.
        measured: steps that were measured.
        wait_share: share of the time in which the host waited for data.
        warm_up_s: what the first steps took beyond `WARM_UP` steady ones.
    """

    step_s: float
    measured: int
    wait_share: float
    warm_up_s: float


@dataclass(frozen=True)
class Repeated:
    """Something that interrupts the steps: how often, and how many seconds each time."""

    count: int
    seconds: float

    @property
    def total_s(self) -> float:
        """Seconds of all of them."""
        return self.count * self.seconds


@dataclass(frozen=True)
class Forecast:
    """What a run will take on this machine.

    Attributes:
        run_dir: folder of the run.
        images: that it trains on.
        global_batch: images of a step.
        steps_per_epoch: optimizer steps.
        first_step: where the run begins; above 0 where it goes on.
        last_step: where it ends.
        pace: of its steps.
        start_s: seconds from the command to the first step.
        evaluations: health figures and k-NN.
        checkpoints: with the backbone file that is written beside each.
        host_bytes: largest resident memory of each process, in rank order.
        device_bytes: largest reserved memory of each GPU, in rank order; empty on the CPU.
        device_total: memory of the smallest GPU; 0 on the CPU.
        checkpoint_bytes: size of one checkpoint.
        disk_needed: bytes that checkpoints take beyond what is on the disk already.
        disk_free: bytes that the disk has free.
    """

    run_dir: str
    images: int
    global_batch: int
    steps_per_epoch: int
    first_step: int
    last_step: int
    pace: Pace
    start_s: float
    evaluations: Repeated
    checkpoints: Repeated
    host_bytes: list[int]
    device_bytes: list[int]
    device_total: int
    checkpoint_bytes: int
    disk_needed: int
    disk_free: int

    @property
    def images_per_s(self) -> float:
        """Source images a second over all ranks, as the run's own rows count them."""
        return self.global_batch / self.pace.step_s

    @property
    def steps_s(self) -> float:
        """Seconds of all steps that are left."""
        return self.pace.step_s * (self.last_step - self.first_step)

    @property
    def seconds(self) -> float:
        """From the command to its end, `report.html` not counted."""
        return self.start_s + self.pace.warm_up_s + self.steps_s + self.evaluations.total_s + self.checkpoints.total_s

    def text(self) -> str:
        """Five lines for people."""
        left = f", {self.last_step - self.first_step:,} left" if self.first_step else ""
        ends = datetime.datetime.now() + datetime.timedelta(seconds=self.seconds)
        return "\n".join(
            (
                f"steps: {self.steps_per_epoch:,} an epoch of {self.images:,} images, {self.last_step:,} in all{left}",
                f"speed: {self.images_per_s:,.4g} images/s ({self.pace.measured} steps after {WARM_UP} of warm-up), "
                f"{self.pace.wait_share:.0%} of the time waiting for data",
                f"memory: {_memory(self.host_bytes)} of host memory{self._device()} at the peak of each process",
                f"disk: checkpoints of {_size(self.checkpoint_bytes)}, {_size(self.disk_needed)} more are needed at "
                f"{self.run_dir}, {_size(self.disk_free)} are free",
                f"time: {duration(self.seconds)}, done at {ends:%Y-%m-%d %H:%M} if it starts now (steps "
                f"{duration(self.steps_s)}, evaluations {self.evaluations.count} x {self.evaluations.seconds:.1f} s, "
                f"checkpoints {self.checkpoints.count} x {self.checkpoints.seconds:.1f} s, start "
                f"{self.start_s + self.pace.warm_up_s:.0f} s)",
            )
        )

    def _device(self) -> str:
        if not self.device_bytes:
            return ""
        return f" and {_memory(self.device_bytes)} of {_size(self.device_total)} of GPU memory"


def duration(seconds: float) -> str:
    """Time as hours, minutes and seconds, such as "2:05:09"; days stand before it."""
    return str(datetime.timedelta(seconds=round(seconds)))


def _size(count: float) -> str:
    """Bytes in decimal units, with three digits."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _memory(each: list[int]) -> str:
    low, high = min(each), max(each)
    # Ranks differ a little; two figures that are nearly equal would only be longer to read.
    return _size(high) if high - low < 0.05 * high else f"{_size(low)} to {_size(high)}"


def rehearse(job: Job, state: TrainState, data: RunData, started: float) -> Forecast:
    """Take some steps, an evaluation's and a checkpoint's part, and say what the run will take; every rank calls it.

    Args:
        job: of the run, with no folder to write to.
        state: of the run; its weights are not those of the run afterwards.
        data: of the run.
        started: value of `time.monotonic()` when the command began.

    Raises:
        UserMistake: the folder of the run cannot be written.
        NonFinite: the steps diverge.
    """
    runtime, first = job.runtime, state.step
    start_s = time.monotonic() - started
    needed, free = job.checkpoints.space(state)
    pace = _pace(job, state)
    evaluation_s = _health_s(job, state, data) + _knn_s(job, state, data)
    # Last: the optimizer has its state by now, which a checkpoint holds.
    save_s = _save_s(job, state) if runtime.is_main else 0.0
    on_gpu = runtime.device.type == "cuda"
    return Forecast(
        run_dir=job.config.run.run_dir,
        images=len(data.population),
        global_batch=job.config.recipe.global_batch,
        steps_per_epoch=job.steps_per_epoch,
        first_step=first,
        last_step=job.last_step,
        pace=pace,
        start_s=start_s,
        evaluations=Repeated(_evaluations(job, first), runtime.gather_objects(evaluation_s)[0]),
        checkpoints=Repeated(_checkpoints(job, first), runtime.gather_objects(save_s)[0]),
        host_bytes=runtime.gather_objects(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        device_bytes=runtime.gather_objects(torch.cuda.max_memory_reserved()) if on_gpu else [],
        device_total=min(runtime.gather_objects(torch.cuda.get_device_properties(runtime.device).total_memory))
        if on_gpu
        else 0,
        checkpoint_bytes=state_bytes(state),
        disk_needed=max(needed, 0),
        disk_free=free,
    )


def _evaluations(job: Job, first: int) -> int:
    """How often the run evaluates: before its first step, every `--knn-every` epochs, and at its end."""
    every = job.config.run.knn_every * job.steps_per_epoch
    between = (job.last_step - 1) // every - first // every if every else 0
    return between + 1 + (first == 0)


def _checkpoints(job: Job, first: int) -> int:
    """How many checkpoints the run writes; those of a better k-NN than before are not foreseen."""
    every = job.config.run.checkpoint_every
    return (job.last_step - 1) // every - first // every + 1


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def _taken(job: Job, state: TrainState) -> Iterator[None]:
    """Takes one step after the other without end; behind the last one it begins again."""
    first = state.step
    while True:
        # A run of a few steps has fewer than it takes to measure them.
        state.step = first if state.step >= job.last_step else state.step
        epoch, position = divmod(state.step, job.steps_per_epoch)
        for step, inputs in job.stream.epoch(epoch, position, state.step):
            state.step = step + 1
            take_step(job, state, step, inputs)
            yield
            if state.step >= job.last_step:
                break


def _seconds(job: Job, steps: Iterator[None], count: int) -> float:
    """Seconds of the next `count` steps, all work of the device included."""
    begun = time.perf_counter()
    for _ in range(count):
        next(steps)
    if job.runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _pace(job: Job, state: TrainState) -> Pace:
    state.method.train()
    steps = _taken(job, state)
    warm_up = _seconds(job, steps, WARM_UP)
    job.stream.stages(warm_up)  # its waits do not count
    begun = time.perf_counter()
    windows: list[tuple[int, float]] = []
    count = 1
    while True:
        windows.append((count, _seconds(job, steps, count)))
        # Rank 0 decides: ranks that took different numbers of steps would wait for each other.
        if job.runtime.gather_objects(_is_steady(windows))[0]:
            break
        # A run waits for its device once in `--log-every` steps; here as seldom, or every second where steps are slow.
        step_s = job.runtime.gather_objects(windows[-1][1] / count)[0]
        count = max(1, min(job.config.run.log_every, round(1.0 / step_s)))
    wait_share = job.stream.stages(time.perf_counter() - begun)["data_wait_share"]
    later = windows[len(windows) // 2 :]
    step_s = sum(seconds for _, seconds in later) / sum(count for count, _ in later)
    measured = sum(count for count, _ in windows)
    return Pace(step_s, measured, wait_share, max(warm_up - WARM_UP * step_s, 0.0))


def _is_steady(windows: list[tuple[int, float]]) -> bool:
    """Whether the second half of the windows is as fast as the first, or time is up."""
    # What the loader had prepared before the first step makes the first ones faster than it can go on.
    total = sum(seconds for _, seconds in windows)
    half = len(windows) // 2
    if total > MOST_S or half == 0:
        return total > MOST_S
    before, after = (sum(s for _, s in part) / sum(n for n, _ in part) for part in (windows[:half], windows[half:]))
    return total > LEAST_S and abs(after / before - 1) < _STEADY


# ---------------------------------------------------------------------------------------------------------------------
# What interrupts the steps


def _pass_s(job: Job, pipeline: Pipeline, encode: Callable[[Batch], None]) -> float:
    """Seconds of `encode` over a whole pipeline, estimated from the batches of the first seconds."""
    pipeline.set_epoch(0)
    begun, seen = time.perf_counter(), 0
    source = iter(pipeline)
    for batch in source:
        encode(batch)
        seen += 1
        if time.perf_counter() - begun > _SAMPLE_S:
            break
    if job.runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) * len(pipeline) / max(seen, 1)


@torch.no_grad()
def _health_s(job: Job, state: TrainState, data: RunData) -> float:
    method, runtime = state.method, job.runtime

    def encode(batch: Batch) -> None:
        for name in VIEWS:
            with runtime.autocast():
                method.features(batch.views[name])

    if not runtime.is_main:
        return 0.0  # rank 0 alone measures them, and the others wait for it
    with evaluation_mode(method.encoder):
        return _pass_s(job, data.health, encode)


@torch.no_grad()
def _knn_s(job: Job, state: TrainState, data: RunData) -> float:
    """Seconds of one k-NN over all labelled images: their features, and the search among them."""
    if data.bank is None or data.queries is None:
        return 0.0
    runtime, encoder, width = job.runtime, state.method.encoder, 0

    def encode(batch: Batch) -> None:
        nonlocal width
        (pixels,) = batch.views.values()
        with runtime.autocast():
            width = pool(encoder(normalise(pixels.to(runtime.device)))).shape[1]

    with evaluation_mode(encoder):
        features_s = sum(_pass_s(job, pipeline, encode) for pipeline in (data.bank, data.queries))
    return features_s + _search_s(job, width, data.bank.num_samples, data.queries.num_samples)


def _search_s(job: Job, width: int, bank: int, queries: int) -> float:
    """Seconds to look for the neighbours of all queries, from a search of a few among a part of the bank."""
    rows, asked = min(bank, _BANK_ROWS), min(queries, _QUERY_ROWS)
    device = job.runtime.device
    table = normalised_rows(torch.rand(rows, width, device=device))
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    begun = time.perf_counter()
    knn_predict(table, labels, table[:asked], [min(KNN_NEIGHBOURS, rows)])
    return (time.perf_counter() - begun) * bank / rows * queries / asked / job.runtime.world_size


def _save_s(job: Job, state: TrainState) -> float:
    """Seconds to write a checkpoint and the backbone on the disk of the run; the files are removed again."""
    run_dir = Path(job.config.run.run_dir)
    # A file in the way counts as well, and is refused below.
    folder = nearest_existing(run_dir)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".regatta-dry-run-") as place:
            begun = time.perf_counter()
            name = checkpoint_name(state.step)
            write_checkpoint(Path(place), name, to_files(state, [state.rank_part()], job.checkpoints.identity))
            recipe, method = job.config.recipe, job.config.run.method
            save_backbone(state.method.encoder, Path(place) / BACKBONE_FILE, arch=recipe.arch, method=method)
            return time.perf_counter() - begun
    except OSError as reason:
        raise UserMistake(
            f"--run-dir {run_dir}: {reason.strerror or reason}; choose a folder that can be written"
        ) from None
