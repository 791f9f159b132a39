"""One packed or parquet file behind an address, copied to this machine once and used from there.

Shards are streamed, because each is read whole. The images of one file are read in any order, so the file is fetched
whole before the first is read. The copy stays in a cache: later runs, and the other processes of a run, ask the server
only whether it still has the same version. What a stopped download has fetched is kept, and the next one goes on there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
import urllib.parse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from . import fetch
from .atomic import remove, write_atomically
from .beton import FORMAT_VERSION, HEADER, BetonReader
from .endings import PACKED, TABLE
from .fetch import Remote, ask, fetch_rest, public_url, shown
from .manifest import manifest_of, manifest_path, read_manifest
from .parquet import MAGIC as PARQUET_MAGIC
from .parquet import ParquetImages
from .parts import part_of, whole_path
from .refusal import SourceBusy, SourceClosed
from .shards import expand_braces

CACHE = "REGATTA_CACHE"
"""Environment variable with the folder of the copies; without it, `regatta` in the user's cache folder."""

_POLL_S = 0.25
_TOLD_EVERY_S = 10.0
_settled: dict[str, str] = {}  # address -> its copy: a process works on one version from its start to its end


def is_single_file(data: str) -> bool:
    """Whether the text is the address of a packed or parquet file, or several of them separated by commas."""
    return all("://" in part and _name(part).endswith((PACKED, TABLE)) for part in _split(data))


def is_streamed(data: str) -> bool:
    """Whether the text is an address from which data arrive while they are used."""
    return "://" in data and not is_single_file(data)


def local_copies(data: str) -> list[str]:
    """Paths of the copies of what `is_single_file` says yes to; fetches those that are missing or outdated.

    Args:
        data: addresses separated by commas; a range as `{01..16}` stands for several.

    Raises:
        SourceClosed: a file does not exist or may not be read.
        SourceBusy: it did not arrive in time, or a signal asked to stop.
        ValueError: it is no packed file, or has arrived damaged.
        OSError: the disk has no room for it, or the server cannot be reached and there is no copy.
    """
    return [_settle(address) for address in _addresses(data)]


def count_behind(data: str) -> int:
    """Images behind what `is_single_file` says yes to: a packed file says it in its first bytes, others are fetched.

    Raises:
        SourceClosed, SourceBusy, ValueError, OSError: as `local_copies`.
    """
    return sum(_count(address) for address in _addresses(data))


def _addresses(data: str) -> list[str]:
    return [address for part in _split(data) for address in expand_braces(part)]


def _split(data: str) -> list[str]:
    """The parts between commas; a comma within a signature separates nothing."""
    return re.split(r",(?=[a-z0-9]+://)", data)


def _count(address: str) -> int:
    if address not in _settled and _name(address).endswith(PACKED):
        return int(_header(address, ask(public_url(address), HEADER.itemsize))["num_samples"])
    path = _settle(address)
    return len(BetonReader(path)) if path.endswith(PACKED) else len(ParquetImages([Path(path)]))


def _name(address: str) -> str:
    """The file's name, without a signature behind it."""
    return urllib.parse.unquote(address.partition("?")[0].rpartition("/")[2])


def _beside(address: str, name: str) -> str:
    """The address of another file in the same folder; a signature goes with it."""
    path, mark, query = address.partition("?")
    return f"{path.rpartition('/')[0]}/{urllib.parse.quote(name)}{mark}{query}"


def _header(address: str, remote: Remote) -> np.void:
    header = np.zeros(1, dtype=HEADER)
    if len(remote.head) >= HEADER.itemsize:
        header = np.frombuffer(remote.head[: HEADER.itemsize], dtype=HEADER)
    if int(header[0]["version"]) != FORMAT_VERSION:
        raise _another_kind(address, remote, "packed")
    found: np.void = header[0]
    return found


def _another_kind(address: str, remote: Remote, wanted: str) -> ValueError:
    return ValueError(
        f"{shown(address)} is not a {wanted} file: its first bytes are {remote.head[:12]!r}; check the address, and "
        "whether a browser gets the file itself there"
    )


def _check_kind(url: str, copy: Path, remote: Remote) -> None:
    """Refuse what only has the name of a data file: a page that asks for a login is also served under this name."""
    if copy.name.endswith(PACKED):
        _header(url, remote)
    elif not remote.head.startswith(PARQUET_MAGIC):
        raise _another_kind(url, remote, "parquet")


def _folder(address: str) -> Path:
    """Where the copies of one folder of a server lie; those of parts lie side by side, as their manifests need it."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    base = Path(os.environ.get(CACHE) or os.path.join(cache, "regatta"))
    # Without the query: signatures are new every day.
    digest = hashlib.sha256(address.partition("?")[0].rpartition("/")[0].encode()).hexdigest()
    folder = base / "copies" / digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _settle(address: str) -> str:
    if address not in _settled:
        copy = _folder(address) / _name(address)
        with _alone(copy, address):
            _bring_up_to_date(public_url(address), copy)
        _settled[address] = str(copy)
    return _settled[address]


@contextlib.contextmanager
def _alone(copy: Path, address: str) -> Iterator[None]:
    """One process at a time works on a copy: of the ranks of a machine one fetches, and the others wait for it."""
    with open(copy.with_name(f".{copy.name}.lock"), "w") as lock:
        # Asked again and again instead of waited for, so that a signal's request to stop is seen.
        while not _locked(lock.fileno()):
            _refuse_if_stopping(address)
            time.sleep(_POLL_S)
        yield


def _locked(descriptor: int) -> bool:
    # Of the open file, where `claim` locks for the process: threads of one process must keep each other out as well.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as reason:
        # Some file servers know no locks. A claim does without one; here two processes would write into one file.
        raise OSError(
            f"the disk of the cache refuses locks ({reason.strerror}), which keep processes from writing one copy at "
            f"once; name a folder on another disk in the environment variable {CACHE}"
        ) from None
    return True


def _refuse_if_stopping(address: str) -> None:
    if fetch.is_stopping():
        raise SourceBusy(f"stopped while {shown(address)} was fetched; the same command goes on with what has arrived")


# ---------------------------------------------------------------------------------------------------------------------
# One file


def _bring_up_to_date(url: str, copy: Path) -> None:
    """Fetch a file unless its copy is of the version that the server has."""
    kept = _recorded(_origin(copy)) if copy.exists() else None
    try:
        remote = ask(url, HEADER.itemsize)
    except (OSError, SourceClosed) as reason:
        # A signature that has run out, or no network on the nodes of a cluster: the copy is whole, and was checked.
        if kept is None or isinstance(reason, SourceBusy):
            raise
        print(f"{reason}; takes the copy of it in {copy.parent}", file=sys.stderr)
        return
    version = [remote.size, remote.version]
    if kept == version:
        return
    _check_kind(url, copy, remote)  # before a download of hours
    _fetch(url, copy, remote)
    if copy.name.endswith(PACKED):
        _fetch_manifests(url, copy)
        _check(url, copy)
    # Last: what has no record of its origin is fetched again.
    write_atomically(_origin(copy), json.dumps(version).encode())


def _origin(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.origin.json")


def _recorded(path: Path) -> list[object] | None:
    """The version in a file; None where there is none or the file is damaged."""
    try:
        version = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return version if isinstance(version, list) else None


def _fetch(url: str, copy: Path, remote: Remote) -> None:
    partial = copy.with_name(f".{copy.name}.partial")
    begun = copy.with_name(f".{copy.name}.begun.json")
    version = [remote.size, remote.version]
    # Where the server names no version, nothing says that the beginning belongs to what it has now.
    if not remote.version or _recorded(begun) != version:
        remove(partial)
        write_atomically(begun, json.dumps(version).encode())
    with open(partial, "ab") as file:
        _check_room(url, copy, remote.size - file.tell())
        if file.tell() != remote.size:
            # The server has answered: what fails from now on may pass.
            told = cast(BinaryIO, _Told(file, url, remote.size))
            fetch_rest(url, told, remote.size if remote.size >= 0 else None, persistent=True)
    remove(_origin(copy))
    os.replace(partial, copy)
    remove(begun)


def _check_room(url: str, copy: Path, missing: int) -> None:
    free = shutil.disk_usage(copy.parent).free
    if missing > free:
        raise OSError(
            f"{shown(url)} lacks {missing / 1e9:.3g} GB of its copy in {copy.parent}, where {free / 1e9:.3g} GB are "
            f"free; name another folder in the environment variable {CACHE}, or make shards, which are streamed"
        )


def _fetch_manifests(url: str, copy: Path) -> None:
    """Fetch what the packer wrote beside a packed file: its manifest, and for a part that of the whole."""
    manifest = manifest_path(copy)
    if _fetch_beside(url, manifest) and part_of(read_manifest(manifest).details) is not None:
        _fetch_beside(url, manifest_path(whole_path(copy)))


def _fetch_beside(url: str, path: Path) -> bool:
    remove(path)
    try:
        fetch.fetch(_beside(url, path.name), path)
    except SourceClosed:
        return False  # a file that FFCV's own writer made, or one that was uploaded alone
    return True


def _check(url: str, copy: Path) -> None:
    """Read the copy once to its end.

    Raises:
        ValueError: a record is not the one that was packed; the copy is removed, so that it is fetched anew.
    """
    try:
        reader = BetonReader(copy)
        manifest = manifest_of(reader)
        if manifest is None:
            return
        for index, expected in enumerate(manifest.checksums.tolist()):
            if zlib.crc32(reader.record(index).tobytes()) != expected:
                raise ValueError(f"record {index} is not the one that was packed")
    except ValueError as reason:
        remove(copy)
        raise ValueError(
            f"the copy of {shown(url)} is damaged ({reason}) and was removed; the same command fetches it again, and "
            "if that is damaged as well, upload the file and its manifest anew"
        ) from None


class _Told:
    """A file that says every few seconds how much of it has arrived, and ends the download when a signal asks to stop.

    It has the methods of a binary file that a download uses.
    """

    def __init__(self, file: BinaryIO, url: str, size: int):
        self._file, self._url, self._size = file, url, size
        self.seek, self.tell, self.truncate = file.seek, file.tell, file.truncate
        self._told = time.monotonic()
        there = f", of which {_amount(file.tell())} are there" if file.tell() else ""
        print(f"fetches {shown(url)} ({_amount(size)}{there}) into the cache", file=sys.stderr, flush=True)

    def write(self, data: bytes) -> int:
        """Write, and tell now and then."""
        _refuse_if_stopping(self._url)
        count = self._file.write(data)
        if time.monotonic() - self._told > _TOLD_EVERY_S:
            self._told = time.monotonic()
            print(f"{_amount(self.tell())} of {_amount(self._size)}", file=sys.stderr, flush=True)
        return count


def _amount(count: int) -> str:
    return "size unknown" if count < 0 else f"{count / 1e6:,.1f} MB"
