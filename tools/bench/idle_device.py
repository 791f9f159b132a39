"""A process in which PyTorch believes in a GPU: its own CUDA code runs, kernels are counted and do nothing.

`run_on_idle_device` builds `idle_device.c` and starts a Python script with it in place of the CUDA runtime, cuBLAS,
cuDNN and the driver. Tensors in that process are CUDA tensors without values, and a step costs the host what it costs
on a GPU, but for the time inside those libraries.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
CALLERS = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so")
STAND_INS = re.compile(r"(cuda|cublas|cudnn)[A-Z]\w*")
REAL = re.compile(r"\w*(ErrorName|ErrorString|StatusString|GetVersion)")
"""Functions that need no GPU and whose answers PyTorch reads."""

DRIVER = (
    *("cuInit", "cuCtxSetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuCtxSynchronize"),
    *("cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease_v2", "cuModuleUnload"),
    *("cuFuncGetAttribute", "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuGetErrorString", "cuLaunchKernelEx"),
    *("cuLaunchCooperativeKernel", "cuLinkAddData_v2", "cuLinkComplete", "cuLinkCreate_v2", "cuLinkDestroy"),
    *("cuModuleLoadDataEx", "cuModuleLoad", "cuOccupancyMaxActiveBlocksPerMultiprocessor", "cuTensorMapEncodeTiled"),
    *("cuStreamGetCtx", "cuCtxFromGreenCtx", "cuMemGetAllocationGranularity", "cuStreamWriteValue32_v2"),
    "cuStreamWriteValue32",
)
"""Functions of the driver that PyTorch looks up by name when it starts."""

_VARIABLE = "REGATTA_IDLE_DEVICE"


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"{name} is not installed; a process without a GPU but with CUDA code needs it")
    return Path(spec.origin).parent


def _called_symbols() -> set[str]:
    """Names of the CUDA functions that PyTorch's libraries import."""
    libraries = [str(_package("torch") / "lib" / name) for name in CALLERS]
    listed = subprocess.run(["nm", "-D", "--undefined-only", *libraries], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines() if line.startswith(" ")}
    return {name for name in symbols if STAND_INS.fullmatch(name) and not REAL.fullmatch(name)}


def build(folder: Path) -> Path:
    """Compile the library into a folder and return its path.

    Raises:
        ValueError: PyTorch has no CUDA code, or compiler and headers are missing.
    """
    include = _package("triton") / "backends" / "nvidia" / "include"
    library = folder / "libidle.so"
    defined = set(re.findall(r"\b(\w+)\(", SOURCE.read_text()))
    names = sorted((_called_symbols() | set(DRIVER)) - defined)
    (folder / "nothing.h").write_text("".join(f"NOTHING({name})\n" for name in names))
    # By this name PyTorch and cuda.bindings look for the driver; the loader gives them what it has loaded already.
    name = "-Wl,-soname,libcuda.so.1"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-w", name, f"-I{include}", f"-I{folder}", str(SOURCE), "-o"]
    try:
        subprocess.run([*command, str(library)], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise ValueError(f"{SOURCE.name} does not compile: {str(reason)[:400]}") from None
    return library


def is_idle_device() -> bool:
    """Whether this process was started by `run_on_idle_device`."""
    return _VARIABLE in os.environ


def run_on_idle_device(arguments: Sequence[str]) -> int:
    """Run `python ARGUMENTS` with the idle device and return its exit code.

    Raises:
        ValueError: the library cannot be built here.
    """
    with tempfile.TemporaryDirectory() as folder:
        preloaded = {"LD_PRELOAD": str(build(Path(folder))), _VARIABLE: "1"}
        return subprocess.run([sys.executable, *arguments], env={**os.environ, **preloaded}).returncode


def launches() -> int:
    """Kernels, copies, products and convolutions that this process has launched so far."""
    count = ctypes.CDLL(None).idle_launches
    count.restype = ctypes.c_ulong
    return int(count())
