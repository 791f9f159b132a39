"""What can be wrong with a machine, each with its remedy: the doctor's checks without a target."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from train.record.diagnosis import Finding

ROOT = Path(__file__).resolve().parents[2]
_SETUP = "run 'bash tools/setup.sh --retry'"


def check_environment() -> Iterator[Finding]:
    """Python, torch, GPU, optional packages, compiler, native library and cores, one finding or more for each."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _torch,
        check_gpu,
        _optional,
        _compiler,
        _native,
        _cores,
        _set_up,
    )
    for check in checks:
        yield from check()


def _python() -> Iterator[Finding]:
    yield Finding("ok", f"Python {platform.python_version()} at {sys.executable}")


def _torch() -> Iterator[Finding]:
    try:
        import torch
        import torchvision.ops

        # An import may work where the compiled operators do not: versions that do not fit show only at a call.
        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    except (ImportError, RuntimeError, OSError) as reason:
        line = str(reason).strip().splitlines()[0]
        yield Finding(
            "fault", f"torch or torchvision does not work: {line}", "remove .venv and run 'bash tools/setup.sh'"
        )
        return
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    text = f"torch {torch.__version__} with torchvision {torchvision.__version__}"
    if version < (2, 10):
        yield Finding("fault", text, f"torch 2.10 or newer is needed; {_SETUP}")
    else:
        yield Finding("ok", text)


def check_gpu() -> Iterator[Finding]:
    """Each card against this build of PyTorch; a card that PyTorch cannot use; that there is none."""
    try:
        import torch
    except ImportError:
        return
    from train.cards import card_problem

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            problem = card_problem(properties.name, (properties.major, properties.minor))
            if problem:
                # Its last part is what to install.
                text, _, remedy = problem.partition("; ")
                yield Finding("fault", f"GPU {number}: {text}", remedy)
                continue
            half = "bf16" if properties.major >= 8 else "fp16"
            memory_gib = properties.total_memory / 2**30
            yield Finding("ok", f"GPU {number}: {properties.name}, {memory_gib:.0f} GiB; --precision auto is {half}")
    # The driver sees a GPU that PyTorch does not: training would run on the CPU without a word.
    elif shutil.which("nvidia-smi") and _succeeds(["nvidia-smi", "-L"]):
        built = torch.version.cuda
        cause = f"torch is built for CUDA {built}, newer than the driver" if built else "torch is built without CUDA"
        yield Finding("fault", f"there is a GPU that torch cannot use: {cause}", "install a matching torch or driver")
    else:
        yield Finding("ok", "no GPU: everything runs on the CPU, at a small part of a GPU's speed")


def _succeeds(command: list[str], text: str | None = None) -> bool:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


_OPTIONAL = (
    ("ffcv", "ffcv.loader", "--loader ffcv"),
    ("nvidia-dali-cuda130", "nvidia.dali", "--loader dali"),
    ("webdataset", "webdataset", "comparison with stock webdataset"),
    ("scikit-learn", "sklearn", "evaluation against a reference"),
    ("timm", "timm", "--format timm"),
    ("onnx", "onnx", "--format onnx"),
)


def _optional() -> Iterator[Finding]:
    for name, module, purpose in _OPTIONAL:
        try:
            importlib.import_module(module)
            yield Finding("ok", f"{name} {importlib.metadata.version(name)}")
        except (ImportError, OSError, importlib.metadata.PackageNotFoundError) as reason:
            line = str(reason).strip().splitlines()[0]
            yield Finding("note", f"{name} is missing, which {purpose} needs ({line})", _SETUP)


def _compiler() -> Iterator[Finding]:
    compiler = shutil.which("g++")
    if compiler is None:
        yield Finding("note", "no g++: FFCV and our decoder cannot be compiled", f"apt-get install g++, then {_SETUP}")
        return
    includes = "#include <cstdio>\n#include <jpeglib.h>\n"
    # A syntax check finds the headers without writing a file.
    if _succeeds([compiler, "-x", "c++", "-fsyntax-only", "-"], includes):
        yield Finding("ok", f"{compiler} with libjpeg's headers")
    else:
        remedy = f"apt-get install libjpeg-dev, then {_SETUP}"
        yield Finding("note", "libjpeg's headers are missing: our decoder cannot be compiled", remedy)


def _native() -> Iterator[Finding]:
    from pipeline import native_build

    for source in sorted(native_build.SOURCES.glob("*.cpp")):
        try:
            native_build.load(source.stem)
        except native_build.NativeUnavailable as reason:
            yield Finding("note", f"native {source.stem} does not work: {reason}", _SETUP)
        else:
            yield Finding("ok", f"native {source.stem} loads")


def _cores() -> Iterator[Finding]:
    # A container or a scheduler may allow fewer cores than there are.
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    flags = _cpu_flags()
    lanes = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "neither AVX2 nor AVX-512"
    limit = f" of {present}" if usable < present else ""
    yield Finding("ok", f"{usable} cores{limit} may be used, {lanes}")
    free_gib = shutil.disk_usage(ROOT).free / 2**30
    if free_gib < 2:
        yield Finding("note", f"{free_gib:.1f} GiB are free on the disk", "make room before packing or training")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def _set_up() -> Iterator[Finding]:
    stamp = ROOT / ".venv" / "regatta-setup"
    if stamp.is_file():
        for line in stamp.read_text(encoding="utf-8").splitlines()[1:]:
            yield Finding("note", f"set-up left out {line}")
