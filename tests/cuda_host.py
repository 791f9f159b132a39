"""Compiles CUDA sources: for the host, as a launcher that takes CPU tensors' addresses, and for GPUs."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.ops.nvrtc import Nvrtc, find_nvrtc, nvrtc_candidates, read_source

SHIM = Path(__file__).with_name("cuda_shim.h")
ENTRY = """
#include "{shim}"
#include "{source}"
extern "C" void shim_launch(void *kernel, const Arguments *arguments, const int *grid, const int *block) {{
    ShimLaunch<Arguments>::run((void (*)(Arguments))kernel, *arguments, grid, block);
}}
"""


class HostModule:
    """The kernels of one source, run by a loop over their threads; an error that UBSan sees ends the process."""

    def __init__(self, source: Path, options: tuple[str, ...], folder: Path):
        compiler = shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        name = "_".join(option.removeprefix("-D").replace("=", "") for option in options)
        entry, library = folder / f"{name}.cpp", folder / f"{name}.so"
        entry.write_text(ENTRY.format(shim=SHIM, source=source))
        flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
        sanitize = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
        subprocess.run([compiler, *flags, *sanitize, *options, str(entry), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        self.launched: list[str] = []

    def __call__(self, kernel, grid, block, arguments):
        self.launched.append(kernel)
        address = ctypes.cast(getattr(self._library, kernel), ctypes.c_void_p)
        triple = ctypes.c_int * 3
        self._library.shim_launch(address, ctypes.byref(arguments), triple(*grid), triple(*block))


def nvrtc_or_skip() -> Nvrtc:
    """The compiler, where it is installed."""
    try:
        return find_nvrtc()
    except RuntimeError as error:
        pytest.skip(str(error))


def compiles_for(source: Path, kernels: tuple[str, ...], capability: tuple[int, int], options: list[str]) -> None:
    """Assert that a source compiles for a compute capability, with all its kernels in the result."""
    cubin = nvrtc_or_skip().compile(read_source(source), source.name, capability, options)
    assert cubin[:4] == b"\x7fELF" and all(kernel.encode() in cubin for kernel in kernels)


def compiles_for_volta(source: Path, options: list[str]) -> None:
    """Assert that CUDA 12's compiler, the last that knows sm_70, takes a source."""
    path = next((path for path in nvrtc_candidates(12) if os.sep in path), None)
    if path is None:
        pytest.skip("CUDA 12's NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12")
    # Another process, so that two versions of the compiler never meet in one.
    code = (
        "import sys; from pathlib import Path; from models.ops.nvrtc import Nvrtc, read_source\n"
        "source = Path(sys.argv[2])\n"
        "print(len(Nvrtc(sys.argv[1]).compile(read_source(source), source.name, (7, 0), sys.argv[3:])))\n"
    )
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", code, path, str(source), *options]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 1000
