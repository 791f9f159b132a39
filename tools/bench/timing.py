"""How a benchmark takes its figures: flags, device, contenders in turn, peak memory, and whether results agree.

A benchmark checks that its contenders agree, warms each of them up, then runs them in turn, so that a machine that
slows down meanwhile slows all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tools.support.cli import positive
from train.cards import refuse_without_code


def time_interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | None = None,
    rounds: int = 20,
    warmup: int = 3,
    inner: int = 0,
    max_seconds: float | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one figure a round, the contenders taking turns within a round.

    Args:
        contenders: name -> a call without arguments that does the work once.
        device: where the work runs; a CUDA device is timed with events, anything else by the wall clock.
        rounds: figures wanted of each contender.
        warmup: calls of each contender before the first figure.
        inner: calls timed together; the figure is their mean. 0 is five on a CUDA device, where the host runs ahead of
            the device as in training, and one elsewhere.
        max_seconds: stop after the round in which this much time has gone by, but never before three rounds.

    Returns:
        name -> seconds per call, in the order measured.
    """
    for call in contenders.values():
        # First calls compile, choose algorithms and touch memory for the first time.
        for _ in range(warmup):
            call()
    on_cuda = device is not None and device.type == "cuda"
    clock, inner = _cuda_seconds if on_cuda else _wall_seconds, inner or (5 if on_cuda else 1)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for done in range(rounds):
        # Checked between rounds, so that every contender has equally many figures.
        if max_seconds is not None and done >= 3 and time.perf_counter() - started > max_seconds:
            break
        for name, call in contenders.items():
            seconds[name].append(clock(call, inner) / inner)
    return seconds


def _wall_seconds(call: Callable[[], object], inner: int) -> float:
    started = time.perf_counter()
    for _ in range(inner):
        call()
    return time.perf_counter() - started


def _cuda_seconds(call: Callable[[], object], inner: int) -> float:
    """Device time between two events: launch gaps count, work queued earlier does not."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(inner):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def check_twice_eager(name: str, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> float:
    """Ratio of our error to eager's, both against a float64 result; more than twice eager's is refused.

    Args:
        name: what is compared, for the message.
        ours: result under test.
        eager: result of plain PyTorch in the same dtype.
        exact: float64 result of the definition.

    Returns:
        max |ours - exact| / max |eager - exact|, 0 where ours is exact.

    Raises:
        RuntimeError: the error exceeds twice eager's and one unit in the last place of the largest value.
    """
    # Compared on the CPU in float64, where the comparison itself rounds nothing away.
    reference = exact.detach().double().cpu()
    ours_error, eager_error = (float((x.detach().double().cpu() - reference).abs().max()) for x in (ours, eager))
    # Where eager happens to be exact, twice its error would allow nothing.
    spacing = torch.finfo(ours.dtype).eps * float(reference.abs().max())
    # Written so that NaN is refused as well.
    if not ours_error <= max(2 * eager_error, spacing):
        raise RuntimeError(f"{name}: error {ours_error:.3g} is more than twice eager's {eager_error:.3g}")
    return ours_error / eager_error if eager_error else 0.0


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that every benchmark has."""
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to measure")
    parser.add_argument("--rounds", type=positive, default=20, help="figures of each contender")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="time limit of each group of contenders")
    parser.add_argument("--output", type=Path, default=None, help="CSV to append to; tools/results/<benchmark>.csv")
    parser.add_argument("--no-csv", action="store_true", help="print the table and keep no rows")


def choose_device(name: str) -> torch.device:
    """The device of a `--device` flag.

    Raises:
        ValueError: CUDA was asked for and there is none, or this PyTorch has no code for the card.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or check the driver")
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    refuse_without_code(device)
    return device


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Most memory, in MiB, that `call` holds beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    # The CPU allocator keeps no peak, so it is added up from single allocations and releases in order of time.
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20
