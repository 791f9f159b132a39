"""Registers that a thread of each kernel takes in machine code, and how many blocks they leave room for.

    python -m tests.ptx.registers CONTENDER                   appends rows to tools/results/kernel_counts.csv
    python -m tests.ptx.registers CONTENDER --at COMMIT       of the sources of a commit
    python -m tests.ptx.registers CONTENDER --on 7.0          for other compute capabilities than 8.0 and 9.0

NVRTC makes the machine code, `cuobjdump` reads it; Triton brings one along. No GPU is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.ops.batch_norm_act_kernels import SOURCE, THREADS
from models.ops.nvrtc import find_nvrtc, read_source
from tools.bench.rows import Report

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("-DFEATURE=BFloat16", "-DVECTOR=8")
JOINS = ("batch_norm_join_statistics", "batch_norm_join_sums")
"""Kernels whose blocks have other than `THREADS` threads."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: registers and stack bytes of a thread. A stack holds what registers were too few for."""

    registers: int
    stack: int

    def blocks(self, threads: int = THREADS) -> int:
        """Blocks that run on a multiprocessor at a time as far as registers go.

        A multiprocessor of compute capability 7.0 to 12.0 is four parts with 16,384 registers; a warp takes those of
        one part, in units of 256 (CUDA C++ Programming Guide, technical specifications).
        """
        of_a_warp = -(-32 * self.registers // 256) * 256
        return 4 * (16384 // of_a_warp) // (threads // 32)


def cuobjdump() -> str | None:
    """The program that reads machine code: on the path, or Triton's; None where neither is there."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(each) for each in (spec.submodule_search_locations or [])] if spec else []
    bundled = [str(folder / "backends" / "nvidia" / "bin" / "cuobjdump") for folder in folders]
    return next((found for name in ("cuobjdump", *bundled) if (found := shutil.which(name))), None)


def resources(source: Path, capability: tuple[int, int], options: Sequence[str] = OPTIONS) -> dict[str, Resources]:
    """Kernel -> what it takes on one compute capability.

    Raises:
        RuntimeError: there is no NVRTC or no `cuobjdump`, or they refuse the source.
    """
    reader = cuobjdump()
    if reader is None:
        raise RuntimeError("cuobjdump not found; it comes with Triton and with the CUDA toolkit")
    # CUDA 13 knows no Volta.
    nvrtc = find_nvrtc(12 if capability < (7, 5) else None)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(nvrtc.compile(read_source(source), source.name, capability, options))
        file.flush()
        run = subprocess.run([reader, "--dump-resource-usage", file.name], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{reader}: {run.stderr}")
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", run.stdout)
    return {name: Resources(int(registers), int(stack)) for name, registers, stack in found}


@contextmanager
def sources_at(commit: str | None) -> Iterator[Path]:
    """The path of batch norm's source as it is now, or as it was at a commit."""
    if commit is None:
        yield SOURCE
        return
    folder = SOURCE.parent.relative_to(ROOT)
    with tempfile.TemporaryDirectory() as root:
        packed = Path(root) / "sources.tar"
        command = ["git", "archive", f"--output={packed}", commit, str(folder)]
        subprocess.run(command, cwd=ROOT, check=True)
        with tarfile.open(packed) as archive:
            archive.extractall(root, filter="data")
        yield Path(root) / folder / SOURCE.name


def add_rows(report: Report, source: Path, contender: str, capability: tuple[int, int]) -> None:
    """Add what each kernel takes on one compute capability."""
    setting = f"{' '.join(OPTIONS)}, sm_{capability[0]}{capability[1]}"
    for kernel, taken in sorted(resources(source, capability).items()):
        values = {"registers a thread": taken.registers, "stack bytes a thread": taken.stack}
        if kernel not in JOINS:
            values["blocks a multiprocessor by registers"] = taken.blocks()
        for metric, value in values.items():
            report.add(f"{kernel}: {contender}", metric, "count", [float(value)], setting)


def main() -> None:
    """The command of the head of this file."""
    parser = argparse.ArgumentParser(description="registers of batch norm's kernels")
    parser.add_argument("contender", help="what the rows say of the sources, such as before and after")
    parser.add_argument("--at", metavar="COMMIT", help="take the sources of a commit")
    parser.add_argument("--on", default="8.0,9.0", help="compute capabilities; 7.0 alone: it needs CUDA 12's compiler")
    given = parser.parse_args()
    capabilities = [(int(each.partition(".")[0]), int(each.partition(".")[2])) for each in given.on.split(",")]
    # Two versions of the compiler must not meet in one process.
    if len({each < (7, 5) for each in capabilities}) > 1:
        parser.error("capabilities below 7.5 need a run of their own")
    report = Report("kernel_counts")
    with sources_at(given.at) as source:
        for capability in capabilities:
            add_rows(report, source, given.contender, capability)
    print(report.append_csv())


if __name__ == "__main__":
    main()
