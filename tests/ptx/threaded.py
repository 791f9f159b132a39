"""The kernels' own sources under the sanitizers, with a thread for each CUDA thread.

A case is recorded on the shim of the ordinary tests: each launch with the bytes of its tensors before and after. Then a
program of the same source repeats the launches; its results must have the same bits. It sees races within a block, by
another method than the PTX run, and access outside a tensor or a static array. It sees no race between blocks, which
run one after another, and nothing that only the GPU's compiler makes.

A CUDA thread is a thread of the operating system (`threads.h`) or a fiber that ThreadSanitizer takes for a thread
(`fibers.h`). Fibers never run at the same time: what they show of races rests on ThreadSanitizer's clocks alone. They
cost about a fiftieth, so they serve hundreds of shapes; `test_threads.py` holds both forms to the same planted faults.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from models.ops.nvrtc import read_source
from pipeline.kernels import fused_augment
from tests.cuda_host import HostModule

from .cases import Case
from .module import HERE, build_folder, contents, tensors_of, watched_tensors

SANITIZERS = {"threads": ["-fsanitize=thread"], "addresses": ["-fsanitize=address,undefined", "-fno-sanitize-recover"]}
ORDERS = {"threads": ((),), "fibers": ((), ("backwards",))}
"""Form of a CUDA thread -> the arguments of each run of the program: fibers run in both orders."""
Plant = Callable[[str], str]
FLAGS = ["-std=c++17", "-O1", "-g", "-w", "-ffp-contract=off", "-pthread"]


def threaded_source(text: str) -> str:
    """A source as the program includes it: the augmentation in its GPU form, its one instruction by hand."""
    text = re.sub(r'asm\("cvt\.rn\.f16\.f32 .*', "result = shim_float_to_half(value);", text)
    text = text.replace("extern __shared__ float name[]", "float* name = dynamic_shared")
    return "#define ON_GPU\n" + text.replace("#define ON_GPU", "") if "ON_GPU" in text else text


class Recorder:
    """A launcher that keeps what each launch was given and what it left.

    Attributes:
        launches: each launch as `launches.h` reads it.
        threads: how many CUDA threads the launches have, as a measure of what it costs to repeat them.
    """

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher
        self.launches: list[bytes] = []
        self.threads = 0

    def __call__(self, kernel: str, grid: Any, block: Any, arguments: ctypes.Structure) -> None:
        tensors = tensors_of(arguments)
        given, before = bytes(arguments), contents(tensors)
        self.launcher(kernel, grid, block, arguments)
        record = packed(kernel.encode()) + struct.pack("<6q", *grid, *block) + packed(given)
        record += struct.pack("<q", len(tensors))
        for (address, _), old, new in zip(tensors, before, contents(tensors), strict=True):
            fields = [place for place in range(0, len(given) - 7, 8) if given[place : place + 8] == as_bytes(address)]
            record += struct.pack(f"<q{len(fields)}q", len(fields), *fields) + packed(old) + packed(new)
        self.launches.append(record)
        self.threads += math.prod(grid) * math.prod(block)


def packed(data: bytes) -> bytes:
    """Bytes behind their length."""
    return struct.pack("<q", len(data)) + data


def as_bytes(address: int) -> bytes:
    """An address as it stands in memory."""
    return struct.pack("<Q", address)


def host_augment(folder: Path) -> Any:
    """The augmentation's host form as a launcher."""
    library = folder / "augment.so"
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-w"]
    subprocess.run([*command, "-x", "c++", str(fused_augment.SOURCE), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    return lambda name, grid, block, arguments: getattr(loaded, f"host_{name}")(ctypes.byref(arguments), *grid[:2])


Variant = tuple[Path, tuple[str, ...]]
"""Source and compiler options."""


@cache
def shim(source: Path, options: tuple[str, ...]) -> Any:
    """The launcher of the ordinary tests for one variant, built once in a process."""
    # A folder for each source: two of them have options, and so files, of the same name.
    own = build_folder() / source.stem
    own.mkdir(exist_ok=True)
    return host_augment(own) if source == fused_augment.SOURCE else HostModule(source, options, own)


def record(case: Case) -> dict[Variant, Recorder]:
    """Run a case on the shim: what it launches of each variant."""
    if shutil.which("g++") is None:
        pytest.skip("no g++, whose sanitizers are used")
    variants: dict[Variant, Recorder] = {}

    def make(source: Path, options: tuple[str, ...], shared: Mapping[str, int]) -> Recorder:
        return variants.setdefault((source, options), Recorder(shim(source, options)))

    with watched_tensors():
        case(make)
    return variants


def build_program(text: str, options: tuple[str, ...], sanitizer: str, form: str, folder: Path) -> Path:
    """The program that repeats launches of one source."""
    names = re.findall(r"__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(const Arguments", text)
    find = "".join(f'if (!strcmp(name, "{name}")) return (void*)&{name};\n' for name in names)
    code, program = folder / f"{form}-{sanitizer}.cpp", folder / f"{form}-{sanitizer}"
    code.write_text(
        f'#include "{HERE / form}.h"\n{threaded_source(text)}\n'
        f"static void* find_kernel(const char* name) {{\n{find}abort();\n}}\n"
        "int main(int count, char** given) {\n"
        "    return replay(given[1], count > 2, find_kernel, run_launch<Arguments>) ? 4 : 0;\n}\n"
    )
    subprocess.run(
        ["g++", *FLAGS, *SANITIZERS[sanitizer], *options, str(code), "-o", str(program)], check=True, timeout=300
    )
    return program


def complaints(case: Case, sanitizer: str, form: str, folder: Path, plant: Plant | None = None) -> str:
    """What a sanitizer says of a case, "" for nothing; `plant` changes the source's text first."""
    recorded = record(case)
    return "".join(
        repeated(variant, recorder.launches, sanitizer, form, folder, plant) for variant, recorder in recorded.items()
    )


def repeated(
    variant: Variant,
    launches: Sequence[bytes],
    sanitizer: str,
    form: str,
    folder: Path,
    plant: Plant | None = None,
    seconds: float = 550,
) -> str:
    """What a sanitizer says of launches of one variant; "" for nothing.

    Args:
        variant: source and options.
        launches: as a `Recorder` keeps them.
        sanitizer: a key of `SANITIZERS`.
        form: what a CUDA thread is, a key of `ORDERS`.
        folder: where the program is built.
        plant: changes the source's text first.
        seconds: how long one run of the program may take.
    """
    source, options = variant
    text = read_source(source)
    program = build_program(plant(text) if plant else text, options, sanitizer, form, folder)
    file = folder / "launches"
    file.write_bytes(struct.pack("<q", len(launches)) + b"".join(launches))
    return "".join(said_by(program, [str(file), *order], seconds) for order in ORDERS[form])


def said_by(program: Path, arguments: Sequence[str], seconds: float) -> str:
    """What a program of `build_program` says; "" for nothing."""
    environment = {"TSAN_OPTIONS": "exitcode=5 report_signal_unsafe=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    # Without a fixed layout of the address space: some kernels' randomisation is beyond what TSan can map.
    command = ["setarch", "-R"] if shutil.which("setarch") else []
    run = subprocess.run(
        [*command, str(program), *arguments], env=environment, capture_output=True, text=True, timeout=seconds
    )
    if run.returncode == 4:
        return f"value: tensors differ from the recording\n{run.stderr[:2000]}"
    return f"exit {run.returncode}: {run.stderr[:2000]}\n" if run.returncode else ""
