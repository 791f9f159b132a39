"""Compile CUDA C++ at first use with NVRTC, keep the result, and launch it on PyTorch's current stream.

Every CUDA build of torch brings NVRTC along, so no toolkit is needed. NVRTC is called through ctypes, so that any major
version will do; the driver through `cuda.bindings`, which torch brings too. Compiling needs no GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch


class Launcher(Protocol):
    """Runs a kernel that takes one structure by value."""

    def __call__(
        self, kernel: str, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: ctypes.Structure
    ) -> None:
        """Launch `kernel` and return at once."""


def nvrtc_candidates(major: int | None = None) -> Iterator[str]:
    """Where NVRTC may be: the wheels under `nvidia`, then the loader's own search; newest major first unless given."""
    majors = [major] if major else [13, 12]
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for wanted in majors:
        for folder in folders:
            yield from (str(path) for path in sorted(folder.glob(f"*/lib/libnvrtc.so.{wanted}")))
        yield f"libnvrtc.so.{wanted}"


def torch_cuda_major() -> int | None:
    """Major CUDA version torch was built with; None for a CPU build."""
    return int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None


class Nvrtc:
    """One NVRTC library."""

    def __init__(self, path: str) -> None:
        """Load the library at `path`.

        Raises:
            OSError: it is not there or cannot be loaded.
        """
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")) if os.sep in path else []:
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # found by name from now on, whatever the search path
        self.path = path
        self._library = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"{function}: {self._library.nvrtcGetErrorString(status).decode()}")

    def _text(self, function: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(function, program, buffer)
        return buffer.raw

    def compile(self, source: str, name: str, capability: tuple[int, int], options: Sequence[str] = ()) -> bytes:
        """Machine code (a cubin) of `source` for one compute capability.

        Raises:
            RuntimeError: the compiler refuses the source or the capability; the message ends with its log.
        """
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            flags = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17", *options]
            encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
            try:
                self._call("nvrtcCompileProgram", program, len(flags), encoded)
            except RuntimeError as error:
                log = self._text("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace")
                raise RuntimeError(f"{name} for sm_{capability[0]}{capability[1]}: {error}\n{log}") from None
            return self._text("nvrtcGetCUBIN", program)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))


@functools.cache
def find_nvrtc(major: int | None = None) -> Nvrtc:
    """The first NVRTC that loads: of the given major version, else of torch's, else any.

    Raises:
        RuntimeError: there is none.
    """
    tried = list(nvrtc_candidates(major or torch_cuda_major()))
    for path in tried:
        try:
            return Nvrtc(path)
        except OSError:
            continue
    raise RuntimeError(f"NVRTC not found ({', '.join(tried)}); pip install nvidia-cuda-nvrtc")


def cache_folder() -> Path:
    """Where compiled kernels are kept between runs: `$XDG_CACHE_HOME/regatta/kernels`, `~/.cache` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regatta" / "kernels"


def read_source(path: Path) -> str:
    """A source with the headers beside it (`#include "name.h"`) put in place of their includes."""
    lines = path.read_text().splitlines(keepends=True)
    names = [line.split('"')[1] if line.startswith('#include "') else "" for line in lines]
    return "".join(path.with_name(n).read_text() if n else line for n, line in zip(names, lines, strict=True))


def cached_cubin(nvrtc: Nvrtc, source: Path, capability: tuple[int, int], options: Sequence[str]) -> bytes:
    """Machine code from the cache, or compiled and put there; keyed by source, options, capability and compiler."""
    text = read_source(source)
    key = hashlib.sha256(repr((text, tuple(options), capability, nvrtc.version)).encode()).hexdigest()
    path = cache_folder() / f"{source.stem}-{key[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        cubin = nvrtc.compile(text, source.name, capability, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)  # another process may do the same; either result is whole
    except OSError:
        pass  # an unwritable home costs a compilation in each run, nothing else
    return cubin


class CudaModule:
    """Kernels of one compiled source on one device; calling it launches one of them."""

    def __init__(self, source: Path, options: Sequence[str], device: torch.device) -> None:
        """Compile (or fetch) and load; the device's context is made current first.

        Raises:
            RuntimeError: no NVRTC, no driver bindings, a source that does not compile, or a stream that is capturing a
                CUDA graph: a module must be loaded before.
        """
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise RuntimeError(f"cuda.bindings is missing ({error}); pip install cuda-bindings") from None
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{source.name} must be loaded before a CUDA graph is captured: run one step first")
        cubin = cached_cubin(find_nvrtc(), source, torch.cuda.get_device_capability(device), options)
        self._driver = driver
        self._device = device
        self._functions: dict[str, object] = {}
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # the context exists from here on
            self._module = self._checked(driver.cuModuleLoadData(cubin))

    def _checked(self, result: tuple) -> object:
        status, *values = result
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"CUDA driver: {status!r}")
        return values[0] if values else None

    def preload(self, kernels: Sequence[str]) -> None:
        """Resolve the kernels now, so that a later capture finds them loaded."""
        for kernel in kernels:
            self._function(kernel)

    def _function(self, kernel: str) -> object:
        if kernel not in self._functions:
            self._functions[kernel] = self._checked(self._driver.cuModuleGetFunction(self._module, kernel.encode()))
        return self._functions[kernel]

    def __call__(
        self, kernel: str, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: ctypes.Structure
    ) -> None:
        """Launch on the current stream of the module's device. The arguments are copied by the driver in the call."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            self._checked(
                self._driver.cuLaunchKernel(
                    self._function(kernel), *grid, *block, 0, stream, ctypes.addressof(pointers), 0
                )
            )
