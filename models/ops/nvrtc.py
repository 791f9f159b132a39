"""Compile CUDA C++ at first use with NVRTC, and keep the result on disk.

Every CUDA build of torch brings NVRTC along, so no toolkit is needed. NVRTC is called through ctypes, so that any major
version will do. Compiling needs no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch


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

    @functools.cached_property
    def architectures(self) -> list[int]:
        """Architectures that this compiler knows, ascending: 80 for compute capability 8.0, 120 for 12.0."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return sorted(numbers)

    def flags(self, capability: tuple[int, int], options: Sequence[str]) -> list[str]:
        """All flags of a compilation: machine code of the GPU's own architecture where the compiler knows it.

        A GPU newer than the compiler gets PTX of the newest architecture known, which its driver compiles when it loads
        it. One that is older than all known gets its own number, and so the compiler's refusal.
        """
        wanted = 10 * capability[0] + capability[1]
        known = [number for number in self.architectures if number <= wanted]
        target = f"compute_{known[-1]}" if known and known[-1] < wanted else f"sm_{wanted}"
        return [f"--gpu-architecture={target}", "--std=c++17", *options]

    def compile(self, source: str, name: str, capability: tuple[int, int], options: Sequence[str] = ()) -> bytes:
        """What the driver loads for `source` on one compute capability: a cubin, or PTX for an unknown newer GPU.

        Raises:
            RuntimeError: the compiler refuses the source or the capability; the message ends with its log.
        """
        flags = self.flags(capability, options)
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
            try:
                self._call("nvrtcCompileProgram", program, len(flags), encoded)
            except RuntimeError as error:
                log = self._text("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace")
                raise RuntimeError(f"{name} for sm_{capability[0]}{capability[1]}: {error}\n{log}") from None
            return self._text("nvrtcGetPTX" if "=compute_" in flags[0] else "nvrtcGetCUBIN", program)
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


def cached_binary(
    nvrtc: Nvrtc, source: Path, capability: tuple[int, int], options: Sequence[str], fresh: bool = False
) -> bytes:
    """What `Nvrtc.compile` gives, from the cache, or compiled and put there.

    Args:
        nvrtc: the compiler; its version is a part of the key.
        source: file; its text with its headers is a part of the key.
        capability: compute capability of the GPU.
        options: compiler flags; with the fixed ones they are a part of the key.
        fresh: compile even if the cache has it, and replace what is there: it proved to be damaged.
    """
    text = read_source(source)
    key = hashlib.sha256(repr((text, nvrtc.flags(capability, options), nvrtc.version)).encode()).hexdigest()
    path = cache_folder() / f"{source.stem}-{key[:32]}.cubin"
    if not fresh:
        with contextlib.suppress(OSError):
            return path.read_bytes()
    binary = nvrtc.compile(text, source.name, capability, options)
    with contextlib.suppress(OSError):  # an unwritable home costs a compilation in each run, nothing else
        _replace(path, binary)
    return binary


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: another process may write or read the same one now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)  # a full disk must not fill up further with halves of files
        raise
