"""Our C++ sources: compiled at set-up or first use, loaded through ctypes.

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
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "native"
# No contraction into fused multiply-adds: crops must have the bits that numpy computes.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared", "-pthread")
LIBRARIES = {"views": ("-ljpeg",)}
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


def _key(name: str, command: list[str]) -> str:
    digest = hashlib.sha256(" ".join([*command, platform.machine(), *platform.libc_ver()]).encode())
    for path in sorted([*SOURCES.glob("*.h"), SOURCES / f"{name}.cpp"]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that ranks that start together do not all compile; without locks they may."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(name: str, extra_flags: tuple[str, ...] = ()) -> Path:
    """The shared library of `native/<name>.cpp`, built where it is not there yet.

    Args:
        name: stem of the source file.
        extra_flags: further compiler flags, for sanitizers.

    Raises:
        NativeUnavailable: there is no compiler, or it failed; the message names the remedy.
    """
    cxx = compiler()
    command = [cxx or "g++", *FLAGS, *extra_flags, str(SOURCES / f"{name}.cpp")]
    file_name = f"{name}-{_key(name, [Path(command[0]).name, *FLAGS, *extra_flags])}.so"
    folders = list(_cache_folders())
    for folder in folders:
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
        if target.exists():
            return target
        # Built under another name and renamed, so that a killed compiler leaves nothing under the final one.
        partial = folder / f".{file_name}.{os.getpid()}"
        done = subprocess.run([*command, "-o", str(partial), *LIBRARIES.get(name, ())], capture_output=True, text=True)
        if done.returncode:
            partial.unlink(missing_ok=True)
            first_error = next(
                (line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200]
            )
            raise NativeUnavailable(f"{Path(cxx).name} could not build {name}.cpp ({first_error}); {_REMEDY}")
        os.replace(partial, target)
    return target


@functools.cache
def _load(name: str) -> ctypes.CDLL | NativeUnavailable:
    try:
        return ctypes.CDLL(str(build(name)))
    except NativeUnavailable as error:
        return error
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
