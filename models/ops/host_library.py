"""C++ with operators for PyTorch, compiled at set-up or in the background of the first run that wants it.

A run never waits for the compiler, which takes half a minute: until the library is there, and where it cannot be built,
Python does the same work. `tools/setup.sh` builds it on a machine with a GPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from .nvrtc import cache_folder

FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-shared")
# Linked by name: they are loaded with PyTorch already, but not for everyone to see.
LIBRARIES = ("-ltorch_cpu", "-lc10")

_logger = logging.getLogger(__name__)


class HostLibraryUnavailable(RuntimeError):
    """A library could not be built or loaded; the message says why and what to do."""


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, or g++, or clang++, or None."""
    return next(
        (path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None
    )


def _command(cxx: str, source: Path) -> list[str]:
    torch_folder = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [cxx, *FLAGS, abi, f"-I{torch_folder / 'include'}", str(source), f"-L{torch_folder / 'lib'}", *LIBRARIES]


def _target(source: Path, cxx: str | None) -> Path:
    """Where the library lies: its name is a hash of all that it is made from."""
    # A library that was built before is used on a machine without a compiler, too.
    command = _command(Path(cxx or "g++").name, source)
    # PyTorch's headers are those of its version; a home folder may be shared by machines of different age.
    made_from = [*command, torch.__version__, platform.machine(), *platform.libc_ver()]
    digest = hashlib.sha256(" ".join(made_from).encode())
    for path in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(path.name.encode() + path.read_bytes())
    return cache_folder() / f"{source.stem}-{digest.hexdigest()[:32]}.so"


def build(source: Path) -> Path:
    """The shared library of a source, compiled where it is not there yet.

    Raises:
        HostLibraryUnavailable: there is no compiler, it failed, or the cache cannot be written.
    """
    cxx = compiler()
    target = _target(source, cxx)
    if target.exists():
        return target
    if cxx is None:
        raise HostLibraryUnavailable("no C++ compiler was found; install one (Debian: apt install g++)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f"{source.stem}.lock") as alone:
            if not target.exists():  # another rank may have built it while we waited
                if alone:
                    _remove_leftovers(source, target.parent)
                _compile(_command(cxx, source), target)
    except OSError as error:
        raise HostLibraryUnavailable(f"{target.parent} cannot be written ({error}); set XDG_CACHE_HOME") from None
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock file, so that ranks that start together do not all compile; false where there are no locks."""
    with path.open("w") as file:
        alone = False
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        yield alone


def _remove_leftovers(source: Path, folder: Path) -> None:
    """Remove what compilers have left whose process ended before them, as that of a short run does."""
    for left in folder.glob(f".{source.stem}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _compile(command: list[str], target: Path) -> None:
    """The file appears under its name when it is whole, so that a killed compiler leaves nothing there."""
    with tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent) as folder:
        partial = Path(folder) / target.name
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.splitlines()
            first = next((line for line in lines if "error" in line), done.stderr.strip()[:200])
            raise HostLibraryUnavailable(f"{Path(command[0]).name} could not build it: {first}")
        os.replace(partial, target)


class HostLibrary:
    """The library of one source. Asking for it starts the compiler in the background and never waits.

    Args:
        source: the `.cpp` file.
        slower: what a run does without it, for the log.
    """

    def __init__(self, source: Path, slower: str) -> None:
        self._source, self._slower = source, slower
        self._lock = threading.Lock()
        self._builder: threading.Thread | None = None
        self._built: Path | None = None
        self._failure = ""
        self._loaded: Path | None = None

    def is_built(self) -> bool:
        """Whether the library is there already, so that a process which starts now has it from its first step on."""
        return _target(self._source, compiler()).exists()

    def loaded(self) -> Path | None:
        """The library, its operators registered; None while it is compiled and where it cannot be."""
        if self._loaded is None and not self._failure:
            self._advance()
        return self._loaded

    def wait(self) -> Path | None:
        """As `loaded`, but waits for the compiler: for benchmarks and tests, which measure the finished state."""
        self.loaded()
        if self._builder is not None:
            self._builder.join()
        return self.loaded()

    def why_not(self) -> str:
        """Why there is no library; empty where it is there or still compiled."""
        return self._failure

    def _advance(self) -> None:
        # Two threads (a forward and a backward pass) may ask at once.
        with self._lock:
            if self._builder is None:
                # A daemon: a run that ends does not wait for the compiler either.
                self._builder = threading.Thread(target=self._build, name="host library", daemon=True)
                self._builder.start()
            # In the thread that asks, so that no operator appears in the middle of another one's look-up.
            if self._built is not None and self._loaded is None and not self._failure:
                self._load(self._built)

    def _build(self) -> None:
        try:
            self._built = build(self._source)
        except HostLibraryUnavailable as error:
            self._fail(error)

    def _load(self, path: Path) -> None:
        try:
            torch.ops.load_library(str(path))
            self._loaded = path
        except OSError as error:  # for example a cache shared with a machine that has another C library
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = str(error)
        _logger.warning("%s: %s; until then: %s", self._source.name, error, self._slower)


@functools.cache
def batch_norm_library() -> HostLibrary:
    """The host side of batch norm's kernels."""
    source = Path(__file__).with_name("batch_norm_act.cpp")
    return HostLibrary(source, "batch norm's kernels are launched from Python, which costs the host more")


def main() -> None:
    """Build the library and wait for it, as set-up does."""
    library = batch_norm_library()
    if library.wait() is None:
        sys.exit(f"host library: {library.why_not()}")
    print(library.loaded())
