"""What every benchmark shares: interleaved timing, correctness first, one table, one CSV row for every figure.

A benchmark checks that its contenders agree, warms each of them up, then runs them in turn, so that a machine that
slows down meanwhile slows all of them. Figures are medians with the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tools.cli import positive

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools" / "results"
COLUMNS = (
    "date",
    "commit",
    "benchmark",
    "contender",
    "setting",
    "metric",
    "unit",
    "median",
    "p20",
    "p80",
    "n",
    "device",
    "cpu",
    "cores",
    "torch",
    "libraries",
)
LIBRARIES = ("torchvision", "numpy", "numba", "ffcv", "nvidia-dali-cuda130", "webdataset", "kornia", "pillow", "triton")


@dataclass(frozen=True)
class Summary:
    """Median and 20th and 80th percentile of n figures."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise at least one figure."""
        p20, median, p80 = np.percentile(np.asarray(values, dtype=np.float64), [20, 50, 80])
        return cls(float(median), float(p20), float(p80), len(values))


@dataclass(frozen=True)
class Row:
    """One measured figure: contender and setting say what ran, metric and unit what the figure is."""

    contender: str
    metric: str
    unit: str
    value: Summary
    setting: str = ""


@dataclass
class Report:
    """The rows of one benchmark run, printed as a table and appended to a CSV."""

    benchmark: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rows: list[Row] = field(default_factory=list)

    def add(
        self, contender: str, metric: str, unit: str, values: Sequence[float] | Summary, setting: str = ""
    ) -> Summary:
        """Record the figures of one contender; returns their summary."""
        summary = values if isinstance(values, Summary) else Summary.of(values)
        self.rows.append(Row(contender, metric, unit, summary, setting))
        return summary

    def table(self) -> str:
        """Every row, aligned."""
        header = ("contender", "setting", "metric", "median", "p20", "p80", "n", "unit")
        body = [
            (
                row.contender,
                row.setting,
                row.metric,
                _figure(row.value.median),
                _figure(row.value.p20),
                _figure(row.value.p80),
                str(row.value.n),
                row.unit,
            )
            for row in self.rows
        ]
        return format_table(header, body)

    def append_csv(self, path: Path | None = None) -> Path:
        """Append the rows to `path` (default `tools/results/<benchmark>.csv`), with date, commit, machine, versions."""
        path = RESULTS / f"{self.benchmark}.csv" if path is None else path
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists() or path.stat().st_size == 0
        common = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "commit": commit(),
            "benchmark": self.benchmark,
            "device": device_name(self.device),
            "cpu": cpu_name(),
            "cores": str(usable_cores()),
            "torch": torch.__version__,
            "libraries": library_versions(),
        }
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
            if fresh:
                writer.writeheader()
            for row in self.rows:
                value = row.value
                writer.writerow(
                    common
                    | {
                        "contender": row.contender,
                        "setting": row.setting,
                        "metric": row.metric,
                        "unit": row.unit,
                        "median": _figure(value.median),
                        "p20": _figure(value.p20),
                        "p80": _figure(value.p80),
                        "n": value.n,
                    }
                )
        return path

    def finish(self, conclusion: str, path: Path | None = None, write: bool = True) -> None:
        """Append the rows to the CSV (unless `write` is off), then print the table and the conclusion last.

        Args:
            conclusion: one line: what limits, by how much, which flag changes it.
            path: the CSV; `tools/results/<benchmark>.csv` by default.
            write: whether rows are kept.
        """
        if write:
            print(f"{len(self.rows)} rows appended to {self.append_csv(path)}")
        print(self.table())
        print(conclusion, flush=True)


def format_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest entry, the header underlined."""
    widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *body]]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def _figure(value: float) -> str:
    """Four significant digits, all digits of large figures, an exponent only for tiny ones."""
    if abs(value) >= 1e4:
        return f"{value:.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3e}"


def time_interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | None = None,
    rounds: int = 20,
    warmup: int = 3,
    inner: int = 1,
    max_seconds: float | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one figure a round, the contenders taking turns within a round.

    Args:
        contenders: name -> a call without arguments that does the work once.
        device: where the work runs; a CUDA device is timed with events, anything else by the wall clock.
        rounds: figures wanted of each contender.
        warmup: calls of each contender before the first figure.
        inner: calls timed together; the figure is their mean. For work too short to be timed alone.
        max_seconds: stop after the round in which this much time has gone by, but never before three rounds.

    Returns:
        name -> seconds per call, in the order measured.
    """
    for call in contenders.values():
        for _ in range(warmup):
            call()
    clock = _cuda_seconds if device is not None and device.type == "cuda" else _wall_seconds
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for done in range(rounds):
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
    reference = exact.detach().double().cpu()
    ours_error, eager_error = (float((x.detach().double().cpu() - reference).abs().max()) for x in (ours, eager))
    spacing = torch.finfo(ours.dtype).eps * float(reference.abs().max())
    if not ours_error <= max(2 * eager_error, spacing):
        raise RuntimeError(f"{name}: error {ours_error:.3g} is more than twice eager's {eager_error:.3g}")
    return ours_error / eager_error if eager_error else 0.0


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def commit() -> str:
    """Short hash of the checkout's commit, with "+" where tracked files differ from it; "unknown" outside git."""
    try:
        run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
        short = run(["git", "rev-parse", "--short=10", "HEAD"]).stdout.strip()
        changed = run(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!tools/results"]).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return short + ("+" if changed.strip() else "")


@functools.cache
def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Name of the accelerator, "cpu" where there is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def library_versions() -> str:
    """`name=version` of the libraries a figure may depend on, those installed, and the Python version."""
    found = [f"python={platform.python_version()}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name}={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return " ".join(found)


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
        ValueError: CUDA was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or check the driver")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


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
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20
