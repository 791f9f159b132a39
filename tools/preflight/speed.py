"""How fast the loader and the steps are on this machine, when the run would end, and which of the two is the limit."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from pipeline.endings import is_packed, is_tar
from pipeline.interface import Pipeline, PipelineConfig
from pipeline.loaders import build_pipeline
from train.build import build_state, last_step
from train.config import Config
from train.inputs import batch_per_device, finished_views, images_per_forward
from train.memory import training_remedy
from train.memory_estimate import is_lack_of_memory
from train.micro_batch import micro_batches, with_micro_batch
from train.proving.setting import method_and_inputs, setting_of
from train.record.diagnosis import Finding
from train.runtime import Runtime

from .examination import Examination

LOADER_S = 4.0
STEP_S = 4.0
UPDATE_S = 1.0
_BATCH = 64
_CPU_IMAGES = 4
_BUSY = 0.6
_LAUNCHING = 0.85
"""Share of a step's time from which on the device waits for the host to launch the next kernel."""


def loader(examination: Examination) -> Iterator[Finding]:
    """Images a second that the loader delivers, with all threads that the run gives it."""
    if not examination.trained_on:
        return
    pipeline = _training_pipeline(examination)
    with contextlib.closing(pipeline):
        examination.loader_rate, examination.loader_busy = loader_rate(pipeline)
    yield Finding(
        "ok",
        f"loader: {examination.loader_rate:,.0f} images/s, with {examination.loader_busy:.0%} of the cores busy, on "
        "files as warm as they are now",
    )


def _training_pipeline(examination: Examination) -> Pipeline:
    config = examination.config
    settings = PipelineConfig(
        data=config.run.data,
        views=(),
        global_batch=min(_BATCH, examination.trained_on),
        seed=config.run.seed,
        workers=config.run.workers,
        device=examination.runtime.device,
        order=config.run.order,
    )
    return build_pipeline(config.run.loader, finished_views(settings, config, examination.runtime), quiet=True)


def loader_rate(pipeline: Pipeline) -> tuple[float, float]:
    """(images a second, share of the usable cores kept busy) over a few seconds."""
    epochs = _batches(pipeline)
    next(epochs)  # threads start, compiled code is loaded
    images, started, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < LOADER_S:
        images += next(epochs)
    seconds = time.perf_counter() - started
    return images / seconds, (time.process_time() - used) / seconds / len(os.sched_getaffinity(0))


def _batches(pipeline: Pipeline) -> Iterator[int]:
    """Sizes of batches without end, epoch after epoch."""
    for epoch in range(1 << 30):
        pipeline.set_epoch(epoch)
        for batch in pipeline:
            yield batch.index.numel()


def step(examination: Examination) -> Iterator[Finding]:
    """Images a second of steps on noise that is there already."""
    if examination.method is None:
        return
    config, runtime = examination.config, examination.runtime
    # The weights of the method that was built for the checks before would take memory beside those of the steps.
    examination.method = None
    gpu = runtime.device.type == "cuda"
    count = examination.world_size if gpu else 1  # processes on a CPU share what one of them has alone
    measured = on_gpu(config, count) if gpu else on_cpu(config)
    try:
        local = batch_per_device(config, count)
        rate, examination.host_share = step_rate(measured, replace(runtime, world_size=count), local)
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        yield Finding("fault", "a step ran out of memory", f"give {training_remedy(measured, runtime)}")
        return
    examination.step_rate = rate * count
    at = images_per_forward(measured, count)
    yield Finding(
        "ok",
        f"steps: {rate:,.3g} images/s a process, measured at {at} images of {measured.recipe.image_size} px"
        + (f", {examination.host_share:.0%} of the time launching" if gpu else ""),
    )


def on_cpu(config: Config) -> Config:
    """The run with a step of a few images, which takes a CPU about as long for each image as the whole step."""
    recipe = replace(config.recipe, global_batch=_CPU_IMAGES, bn=replace(config.recipe.bn, group_size=0, mode="plain"))
    small = {name: _CPU_IMAGES for name in ("t_bn_group_size",) if getattr(config.model, name, 0)}
    model = replace(config.model, **small)
    return with_micro_batch(replace(config, recipe=recipe, model=model), 0)


def on_gpu(config: Config, world_size: int) -> Config:
    """The run as one process has it; with `--micro-batch auto` a step of at most 256 images."""
    if config.run.micro_batch != "auto":
        return config
    whole = with_micro_batch(config, 0)
    sizes = micro_batches(whole, world_size, min(256, batch_per_device(whole, world_size)))
    return with_micro_batch(whole, next(sizes, 0))


def step_rate(config: Config, runtime: Runtime, local: int) -> tuple[float, float]:
    """(images a second of one process, share of the time that the host takes to launch) of steps on noise.

    Args:
        config: whose micro-batch is measured.
        runtime: this process, among as many as the run has.
        local: images of a whole step on this device; the optimizer's part is spread over them.
    """
    setting = setting_of(config, runtime)
    method, inputs = method_and_inputs(setting)
    optimizer = build_state(setting.config, setting.runtime, method).optimizer

    def passes() -> None:
        with setting.runtime.autocast():
            loss = method(inputs).loss
        loss.backward()

    seconds, host = _timed(passes, runtime.device, STEP_S)
    update, _ = _timed(optimizer.step, runtime.device, UPDATE_S)
    images = len(inputs.view1)
    rate = local / (local / images * seconds + update)
    return rate, host / seconds if runtime.device.type == "cuda" else 0.0


def _timed(take: Callable[[], None], device: torch.device, limit_s: float) -> tuple[float, float]:
    """Seconds of one call, and of its launching alone; the first call is left out unless it takes all the time.

    Args:
        take: what is called, over and over.
        device: whose work is waited for after each call.
        limit_s: for the first call, and again for all the others.
    """
    started = time.perf_counter()
    _call(take, device)
    first = time.perf_counter() - started
    if first > limit_s:
        return first, first
    launched = count = 0.0
    started = time.perf_counter()
    while time.perf_counter() - started < limit_s:
        launched += _call(take, device)
        count += 1
    return (time.perf_counter() - started) / count, launched / count


def _call(take: Callable[[], None], device: torch.device) -> float:
    """Seconds until the call has returned; then its work on the device is waited for."""
    started = time.perf_counter()
    take()
    launched = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return launched


def finish(examination: Examination) -> Iterator[Finding]:
    """When the run would be done, and which of the four limits of the README it meets."""
    loading, stepping = examination.loader_rate, examination.step_rate
    if not loading or not stepping:
        return
    config = examination.config
    on_cpu = examination.runtime.device.type == "cpu"
    # On a CPU both take their time from the same cores, one after the other; a GPU works beside the loader.
    rate = 1 / (1 / loading + 1 / stepping) if on_cpu else min(loading, stepping)
    steps = last_step(config, examination.trained_on // config.recipe.global_batch)
    seconds = steps * config.recipe.global_batch / rate
    yield Finding("ok", f"finish: {steps:,} steps at about {rate:,.3g} images/s take {duration(seconds)}")
    yield limit(examination)


def limit(examination: Examination) -> Finding:
    """Which of loader, disk, model and host is the limit, and the flag to change."""
    loading, stepping = examination.loader_rate, examination.step_rate
    if loading < stepping:
        text = f"limit: the loader gives {loading:,.0f} images/s, the steps could take {stepping:,.0f}"
        if examination.loader_busy >= _BUSY:
            return Finding("note", f"{text}; decoding is the limit", _faster_decoding(examination))
        return Finding(
            "note", f"{text}; the disk is the limit", "move the data to a local disk, or give --order sharded"
        )
    text = f"limit: the steps take {stepping:,.3g} images/s, the loader could give {loading:,.0f}"
    if examination.host_share >= _LAUNCHING:
        return Finding("note", f"{text}; the host is the limit", "give --compile, or a larger batch per device")
    return Finding("ok", f"{text}; the model is the limit", _faster_model(examination))


def _faster_decoding(examination: Examination) -> str:
    data = examination.config.run.data
    if not (is_packed(data) or is_tar(data) or "://" in data):
        return f"pack once: python tools/make_ffcv_dataset.py {data} photos.beton, then --data photos.beton"
    return "pack with a smaller --max-resolution, or decode on the GPU with --loader dali"


def _faster_model(examination: Examination) -> str:
    if examination.runtime.device.type == "cpu":
        return "a GPU; on a CPU a smaller --image-size or --arch resnet18"
    if examination.runtime.dtype is torch.float32:
        return "--precision auto"
    region = getattr(examination.config.model, "region", None)
    return "a larger --global-batch" if region is None else "a larger --global-batch, --region.shared-forward"


def duration(seconds: float) -> str:
    """A time as people say it: its two largest units."""
    minutes, _ = divmod(round(seconds), 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
