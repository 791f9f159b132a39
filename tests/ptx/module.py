"""A launcher that runs NVRTC's PTX on the CPU, every access checked, in place of a CUDA module.

It sees what the machine code for a GPU is made from, so also the branches that only a GPU compiles, fused multiply-adds
and unsigned indices, which a host build of the source does not. It leaves unproven what ptxas makes of the PTX, the
hardware, the order of memory within a warp, and index arithmetic beyond the small shapes that it is run on. `exp2` is
the host's.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from models.ops.nvrtc import find_nvrtc, read_source

from .translate import Translator

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-w", "-fwrapv", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"]
COUNTS = (
    "load requests",
    "load sectors",
    "store requests",
    "store sectors",
    "global bytes",
    "shared requests",
    "shared passes",
    "thread instructions",
)
_extents: dict[int, int] = {}


@contextmanager
def watched_tensors() -> Iterator[None]:
    """Remember how many bytes belong to each address that a tensor gives away: an argument is an address alone.

    Meanwhile a new tensor holds NaN until it is written. What lay there before may be the very result that a faulty
    kernel leaves out.
    """
    plain = torch.Tensor.data_ptr
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # It fills what `torch.empty` gives, among other things.
    torch.use_deterministic_algorithms(True, warn_only=True)

    def data_ptr(tensor: torch.Tensor) -> int:
        address = plain(tensor)
        if address:
            _extents[address] = tensor.numel() * tensor.element_size()
        return address

    torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.data_ptr = plain  # type: ignore[method-assign]
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        _extents.clear()


class DoesNotCompile(Exception):
    """NVRTC refuses the source; the message is its log. Never taken for a result that a test compares."""


def make_ptx(source: str, name: str, capability: tuple[int, int], options: Sequence[str]) -> str:
    """What NVRTC makes of a source before it makes machine code of it.

    Raises:
        DoesNotCompile: NVRTC refuses it.
    """
    nvrtc, program = find_nvrtc(), ctypes.c_void_p()
    nvrtc._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    flags = [f"--gpu-architecture=compute_{capability[0]}{capability[1]}", "--std=c++17", *options]
    encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    try:
        nvrtc._call("nvrtcCompileProgram", program, len(flags), encoded)
    except RuntimeError:
        raise DoesNotCompile(nvrtc._text("nvrtcGetProgramLog", program).decode(errors="replace")) from None
    return nvrtc._text("nvrtcGetPTX", program).rstrip(b"\0").decode()


def need_tools() -> str:
    """The C++ compiler; skips the test where it or NVRTC is absent."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    try:
        find_nvrtc()
    except RuntimeError as error:
        pytest.skip(str(error))
    return compiler


@cache
def build_folder() -> Path:
    """Where the built libraries of this process lie; gone with it."""
    folder = tempfile.TemporaryDirectory(prefix="ptx-")
    build_folder.keep = folder  # type: ignore[attr-defined]
    return Path(folder.name)


@cache
def build(source: str, name: str, capability: tuple[int, int], options: tuple[str, ...]) -> Path:
    """The library that runs a source's kernels, built once in a process."""
    compiler = need_tools()
    key = hashlib.sha256(repr((source, capability, options)).encode()).hexdigest()[:16]
    code, library = build_folder() / f"{key}.cpp", build_folder() / f"{key}.so"
    code.write_text(Translator().module(make_ptx(source, name, capability, options)))
    subprocess.run([compiler, *FLAGS, f"-I{HERE}", str(code), "-o", str(library)], check=True)
    return library


class CheckFailed(AssertionError):
    """A kernel did what a GPU need not forgive; the message lists the first reports."""


class PtxModule:
    """Kernels of one source; a call runs one, twice where `both_orders`: results must not depend on the order.

    Args:
        source: the text, headers included, or the path of the file.
        options: compiler flags.
        capability: which architecture's PTX.
        shared_bytes: kernel -> dynamic shared memory of a block.
        both_orders: run threads and blocks forwards and backwards and compare what they leave.
    """

    def __init__(
        self,
        source: str | Path,
        options: Sequence[str] = (),
        *,
        capability: tuple[int, int] = (8, 0),
        shared_bytes: Mapping[str, int] | None = None,
        both_orders: bool = True,
    ) -> None:
        text = read_source(source) if isinstance(source, Path) else source
        self.library = ctypes.CDLL(str(build(text, "kernels.cu", capability, tuple(options))))
        self.library.reports.restype = ctypes.c_char_p
        self.library.run_kernel.restype = ctypes.c_long
        self.shared_bytes, self.both_orders = shared_bytes or {}, both_orders
        self.launched: list[str] = []
        self.blocks = 0
        self.counts: dict[str, dict[str, int]] = {}

    def __call__(
        self, kernel: str, grid: Sequence[int], block: Sequence[int] | int, arguments: ctypes.Structure
    ) -> None:
        """Run a kernel.

        Raises:
            CheckFailed: a check reported something, or the two orders left different bytes.
        """
        # Launchers of two and of three dimensions are both served.
        grid = (*grid, *(1,) * (3 - len(grid)))
        block = (block, 1, 1) if isinstance(block, int) else block
        self.launched.append(kernel)
        tensors = self._register(arguments)
        before = contents(tensors)
        self._run(kernel, grid, block, arguments, reverse=False)
        if not self.both_orders:
            return
        forwards = contents(tensors)
        for (address, size), old in zip(tensors, before, strict=True):
            ctypes.memmove(address, old, size)
        self._run(kernel, grid, block, arguments, reverse=True)
        if contents(tensors) != forwards:
            raise CheckFailed(f"order: {kernel}: the order of threads and blocks changes the result")

    def _register(self, arguments: ctypes.Structure) -> list[tuple[int, int]]:
        """Tell the runtime the tensors of the launch: (address, bytes) of each."""
        tensors = tensors_of(arguments)
        self.library.clear_tensors()
        for address, size in tensors:
            self.library.add_tensor(ctypes.c_uint64(address), ctypes.c_uint64(size))
        return tensors

    def _run(
        self, kernel: str, grid: Sequence[int], block: Sequence[int], arguments: ctypes.Structure, reverse: bool
    ) -> None:
        triple, shared = ctypes.c_uint32 * 3, self.shared_bytes.get(kernel, 0)
        size = ctypes.c_uint64(ctypes.sizeof(arguments))
        found = self.library.run_kernel(
            kernel.encode(), bytes(arguments), size, triple(*grid), triple(*block), shared, int(reverse)
        )
        self.blocks += grid[0] * grid[1] * grid[2]
        if found < 0:
            raise CheckFailed(f"launch: no kernel {kernel} that takes {ctypes.sizeof(arguments)} bytes")
        if found:
            raise CheckFailed(f"{found} reports: {self.library.reports().decode()}")

    @contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """Counts of what the launches within the block ask of memory, by the names in `COUNTS`."""
        counted: dict[str, int] = {}
        self.library.start_counting(1)
        try:
            yield counted
        finally:
            values = (ctypes.c_long * len(COUNTS))()
            self.library.read_counts(values)
            self.library.start_counting(0)
            counted.update(zip(COUNTS, values, strict=True))


def tensors_of(arguments: ctypes.Structure) -> list[tuple[int, int]]:
    """(Address, bytes) of each tensor whose address the arguments hold, by the last tensor that gave that address."""
    fields = [name for name, kind, *_ in arguments._fields_ if kind is ctypes.c_void_p]
    addresses = {getattr(arguments, name) for name in fields} - {None, 0}
    return [(address, _extents[address]) for address in sorted(addresses)]


def contents(tensors: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each tensor now."""
    return [ctypes.string_at(address, size) for address, size in tensors]


def capabilities() -> list[tuple[int, int]]:
    """The architectures of the slow runs: Turing, Ampere, Hopper; `REGATTA_PTX` names others, as in "8.0,10.0"."""
    named = os.environ.get("REGATTA_PTX", "7.5,8.0,9.0").split(",")
    return [(int(each.partition(".")[0]), int(each.partition(".")[2])) for each in named]
