"""The rows of a benchmark: median and percentiles of each figure, one table on the screen, one CSV line a figure.

Each CSV line says where its figure comes from: date, commit, device, processor, cores and library versions.
"""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import platform
import re
import shutil
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from train.versions import cpu_name, usable_cores

ROOT = Path(__file__).resolve().parents[2]
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
        # Percentiles, not mean and deviation: one pause of the machine would move both of those.
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
    """The rows of one benchmark run, printed as a table and appended to a CSV.

    Attributes:
        benchmark: name of the benchmark, and of the CSV.
        device: that this process measured on.
        rows: what was measured.
        origin: columns of where and with what it was measured, when that was another process: see `recorded_origin`.
    """

    benchmark: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rows: list[Row] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)

    def add(
        self, contender: str, metric: str, unit: str, values: Sequence[float] | Summary, setting: str = ""
    ) -> Summary:
        """Record the figures of one contender; returns their summary."""
        summary = values if isinstance(values, Summary) else Summary.of(values)
        self.rows.append(Row(contender, metric, unit, summary, setting))
        return summary

    def table(self) -> str:
        """Every row, aligned, in the width of the terminal; what the settings have in common stands once above."""
        width = shutil.get_terminal_size().columns
        parts = [row.setting.split("; ") if row.setting else [] for row in self.rows]
        shared = [part for part in parts[0] if all(part in other for other in parts)] if parts else []
        lines = textwrap.wrap("; ".join(shared), width)
        body = [
            (
                "; ".join([row.contender, *(part for part in own if part not in shared)]),
                row.metric,
                _figure(row.value.median),
                _figure(row.value.p20),
                _figure(row.value.p80),
                str(row.value.n),
                row.unit,
            )
            for row, own in zip(self.rows, parts, strict=True)
        ]
        header = ("contender", "metric", "median", "p20", "p80", "n", "unit")
        return "\n".join([*lines, format_table(header, body, width)])

    def _provenance(self) -> dict[str, str]:
        """The columns that say where and with what the figures of this run were measured."""
        return {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "commit": commit(),
            "benchmark": self.benchmark,
            "device": device_name(self.device),
            "cpu": cpu_name(),
            "cores": str(usable_cores()),
            "torch": torch.__version__,
            "libraries": library_versions(),
            **self.origin,
        }

    def append_csv(self, path: Path | None = None) -> Path:
        """Append the rows to `path` (default `tools/results/<benchmark>.csv`), with date, commit, machine, versions."""
        path = RESULTS / f"{self.benchmark}.csv" if path is None else path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Runs append to one file, so only the first writes the header.
        fresh = not path.exists() or path.stat().st_size == 0
        common = self._provenance()
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
            # Before the table, so that the conclusion is the last line of the output.
            print(f"{len(self.rows)} rows appended to {self.append_csv(path)}")
        print(self.table())
        print(conclusion, flush=True)


def format_table(header: Sequence[str], body: Sequence[Sequence[str]], width: int) -> str:
    """Columns padded to their widest entry, the header underlined.

    Args:
        header: names of the columns.
        body: entries of each row.
        width: characters of a line; the first column is broken into lines so that the rest fits beside it.
    """
    widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]
    # A name needs some room even where the other columns leave none.
    widths[0] = max(24, min(widths[0], width - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = [_aligned(header, widths), "-" * (sum(widths) + 2 * len(widths[1:]))]
    for first, *rest in body:
        broken = textwrap.wrap(first, widths[0], subsequent_indent="  ") or [""]
        lines += [_aligned([broken[0], *rest], widths), *broken[1:]]
    return "\n".join(lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _figure(value: float) -> str:
    """Four significant digits, all digits of large figures, an exponent only for tiny ones."""
    if abs(value) >= 1e4:
        return f"{value:.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3e}"


@functools.cache
def commit() -> str:
    """Short hash of the checkout's commit, with "+" where tracked files differ from it; "unknown" outside git."""
    try:
        run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
        short = run(["git", "rev-parse", "--short=10", "HEAD"]).stdout.strip()
        # The rows themselves are left out: a second benchmark would otherwise always look like changed code.
        changed = run(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!tools/results"]).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return short + ("+" if changed.strip() else "")


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


def recorded_origin(versions: Mapping[str, str], machine: str) -> dict[str, str]:
    """The columns of where and with what a figure was measured, from what its process recorded.

    Args:
        versions: as `train.versions.versions` gives them.
        machine: as `train.versions.machine` gives it: the GPU, or the processor with the cores that it might use. Of
            a GPU's host nothing is recorded.
    """
    processor = re.fullmatch(r"(?P<cpu>.*), (?P<cores>\d+) cores", machine)
    host = processor.groupdict() if processor else {"cpu": "", "cores": ""}
    others = {name: version for name, version in versions.items() if name not in ("commit", "torch")}
    return {
        "commit": versions.get("commit", "unknown"),
        "device": "cpu" if processor else machine,
        **host,
        "torch": versions.get("torch", ""),
        "libraries": " ".join(f"{name}={version}" for name, version in others.items()),
    }
