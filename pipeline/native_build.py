"""Our C++ sources: compiled at set-up or first use, loaded through ctypes.

A library is `native/<name>.cpp` and, where there is one, `native/per_target/<name>.cpp`, which is compiled once for
each instruction set. All of these are compiled side by side and then linked.

A library is named after a hash of its sources and of the command that built it, so that a changed source is built anew
and several ranks can start at once: whoever comes second waits and finds the file there.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .atomic import replacing

SOURCES = Path(__file__).resolve().parent / "native"
FLAGS = ("-std=c++17", "-O3", "-fvisibility=hidden", "-fPIC", "-pthread")
TARGETS = ("plain", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("plain",)
"""Instruction sets, as `native/targets.h` names them."""


@dataclass(frozen=True)
class Options:
    """What one library needs beside `FLAGS`: flags for its compiler and for its linker."""

    compile: tuple[str, ...] = ()
    link: tuple[str, ...] = ()


_MATHS = ("no-math-errno", "no-trapping-math", "no-signed-zeros", "finite-math-only", "fp-contract=fast")
LIBRARIES = {
    # No contraction into fused multiply-adds: crops must have the bits that numpy computes.
    "views": Options(("-ffp-contract=off",), ("-ljpeg",)),
    # Pixels are finite, and nothing has to agree with another program bit for bit: native/augment_lanes.h.
    "augment": Options(tuple(f"-f{freedom}" for freedom in _MATHS)),
}
_REMEDY = "install a C++ compiler and libjpeg-turbo's headers (Debian: apt install g++ libjpeg62-turbo-dev)"
_told: set[str] = set()


class NativeUnavailable(RuntimeError):
    """A library could not be built; the message says why and what to do."""


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, or g++, or clang++, or None."""
    return next(
        (path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None
    )


def _cache_folders() -> Iterator[Path]:
    """Where built libraries may lie, best first: beside the sources, the user's cache, a private temporary folder."""
    # Beside the sources it is found by every user of a checkout; an installed package may be read-only.
    yield SOURCES / "build"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    yield Path(cache) / "regatta"
    yield Path(tempfile.gettempdir()) / f"regatta-{os.getuid()}"


def _usable(folder: Path) -> bool:
    """Whether the folder can be written and belongs to us, so that nobody else can have put a library there."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.access(folder, os.W_OK | os.X_OK) and folder.stat().st_uid in (os.getuid(), 0)
    except OSError:
        return False


def _units(name: str) -> list[tuple[Path, tuple[str, ...]]]:
    """What a library is compiled from: each source with the flags that say for which target."""
    units: list[tuple[Path, tuple[str, ...]]] = [(SOURCES / f"{name}.cpp", ())]
    if (kernels := SOURCES / "per_target" / f"{name}.cpp").exists():
        units += [(kernels, (f"-DREGATTA_TARGET_{target.upper()}",)) for target in TARGETS]
    return units


def _key(name: str, command: list[str]) -> str:
    # The C library's version counts: a home folder may be shared by machines of different age.
    digest = hashlib.sha256(" ".join([*command, platform.machine(), *platform.libc_ver()]).encode())
    for path in sorted({*SOURCES.glob("*.h"), *(source for source, _ in _units(name))}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = done.stderr.splitlines()
        first = next((line for line in errors if "error" in line), done.stderr.strip()[:200])
        raise NativeUnavailable(f"{Path(command[0]).name} could not build {name}.cpp ({first}); {_REMEDY}")


def _compile(name: str, command: list[str], target: Path) -> None:
    """Compile a library's units, as many at a time as there are cores, and link them.

    The file appears under its name when it is whole, so that a killed compiler leaves nothing there.
    """
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as folder:
        units = _units(name)
        objects = [f"{folder}/{number}.o" for number in range(len(units))]
        jobs = [
            [*command, *flags, "-c", str(source), "-o", made]
            for (source, flags), made in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            list(threads.map(functools.partial(_run, name), jobs))
        with replacing(target, durable=False) as partial:
            _run(name, [*command, "-shared", *objects, "-o", str(partial), *LIBRARIES.get(name, Options()).link])


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that ranks that start together do not all compile; without locks they may."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(name: str, extra_flags: tuple[str, ...] = ()) -> Path:
    """The shared library `name`, built where it is not there yet.

    Args:
        name: stem of the source file.
        extra_flags: further compiler flags, for sanitizers.

    Raises:
        NativeUnavailable: there is no compiler, or it failed; the message names the remedy.
    """
    cxx = compiler()
    flags = [*FLAGS, *LIBRARIES.get(name, Options()).compile, *extra_flags]
    file_name = f"{name}-{_key(name, [Path(cxx or 'g++').name, *flags])}.so"
    folders = list(_cache_folders())
    for folder in folders:
        # A library in a folder that somebody else owns could be anybody's code.
        if (folder / file_name).exists() and folder.stat().st_uid in (os.getuid(), 0):
            return folder / file_name
    if cxx is None:
        raise NativeUnavailable(f"no C++ compiler was found; {_REMEDY}")
    writable = [folder for folder in folders if _usable(folder)]
    if not writable:
        raise NativeUnavailable(f"none of {', '.join(map(str, folders))} can be written; set XDG_CACHE_HOME")
    folder = writable[0]
    target = folder / file_name
    with _locked(folder / f"{name}.lock"):
        # Another rank may have built it while we waited for the lock.
        if target.exists():
            return target
        _compile(name, [cxx, *flags], target)
    return target


@functools.cache
def _load(name: str) -> ctypes.CDLL | NativeUnavailable:
    try:
        return ctypes.CDLL(str(build(name)))
    except NativeUnavailable as error:
        return error
    # For example a cache shared with a machine that has another C library.
    except OSError as error:
        return NativeUnavailable(f"the built library {name} cannot be loaded ({error}); {_REMEDY}")


def load(name: str) -> ctypes.CDLL:
    """The library of `native/<name>.cpp`; its functions are called without Python's lock.

    Raises:
        NativeUnavailable: it cannot be built or loaded; the message names the remedy.
    """
    library = _load(name)
    if isinstance(library, NativeUnavailable):
        raise library
    return library


def try_load(name: str, instead: str) -> ctypes.CDLL | None:
    """The library, or None after saying once on standard error why, and what is done instead."""
    library = _load(name)
    if not isinstance(library, NativeUnavailable):
        return library
    # Every loader of a run asks; the user is told once.
    if name not in _told:
        _told.add(name)
        print(f"native {name}: {library}; until then: {instead}", file=sys.stderr)
    return None


if __name__ == "__main__":
    for source in sorted(SOURCES.glob("*.cpp")):
        try:
            print(build(source.stem))
        except NativeUnavailable as error:
            sys.exit(f"native {source.stem}: {error}")
