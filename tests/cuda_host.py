"""Compiles a CUDA source for the host under `cuda_shim.h`, as a launcher that takes CPU tensors' addresses."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

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
