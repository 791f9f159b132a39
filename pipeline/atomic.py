"""Files and folders that appear under their final name whole, on the disk, and readable as the umask says.

This is the one atomic writer of the project. It stands in this library because packers, loaders, training and tools all
write files, and a library may not import the applications.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(final: Path, durable: bool = True) -> Iterator[Path]:
    """A path to write a file or make a folder at; it takes the place of `final` when the block ends without an error.

    A kill at any moment leaves at `final` what was there before or what is new, never a part. Where a folder replaces a
    folder, there is nothing at `final` between two renames, for an instant. A block that raises, or
    that leaves nothing at the path, changes nothing at `final`. Of several nested blocks the outermost gets its name
    last.

    Args:
        final: the file or folder to replace; its parent must exist.
        durable: also wait until the bytes are on the disk. Caches, which can be made again, need not.

    Yields:
        A path beside `final` with the same ending, at which nothing exists yet.

    Raises:
        OSError: when it cannot be written or renamed.
    """
    # The thread's number is part of the name because several threads of one process may fetch the same file.
    own = f".{final.stem}.{os.getpid()}-{threading.get_ident()}.tmp{final.suffix}"
    temporary = final.with_name(own)
    try:
        yield temporary
        if not temporary.exists():
            return
        _open_to_others(temporary)
        if durable:
            _sync_tree(temporary)
        _put_in_place(temporary, final)
        if durable:
            sync(final.parent)  # without it a power cut can undo the rename
    finally:
        remove(temporary)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that readers see the old or the new content, never a part.

    Raises:
        OSError: when it cannot be written; the old content is then still there.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it; nothing happens where there is none or it cannot be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # a disk that has become read-only keeps its leftovers; the error that brought us here says more


def remove_leftovers(final: Path) -> None:
    """Remove what killed processes left behind while they wrote `final`; only its one writer may call this."""
    for leftover in final.parent.glob(f".{final.stem}.*.tmp{final.suffix}"):
        # After a kill between two renames it is all that is left of the old folder.
        if not leftover.name.endswith(f".old.tmp{final.suffix}") or final.exists():
            remove(leftover)


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files_and_folders(path: Path) -> Iterator[Path]:
    """Everything below a folder, and the path itself last."""
    if path.is_dir():
        yield from sorted(path.rglob("*"), reverse=True)
    yield path


def _sync_tree(path: Path) -> None:
    for each in _files_and_folders(path):
        sync(each)


def _default_mode(folder: Path) -> int:
    """Permission bits of a new file in this folder: 0666 less the umask, or what the folder's default list grants."""
    # Reading the umask would mean setting it for a moment, for all threads; a file shows it without harm.
    probe = folder / f".{os.getpid()}-{threading.get_ident()}.mode"
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        remove(probe)


def _open_to_others(path: Path) -> None:
    """Give files at least the permissions of a new file: safetensors and `tempfile` make theirs for the owner alone."""
    wanted = _default_mode(path.parent)
    for each in _files_and_folders(path):
        mode = stat.S_IMODE(each.stat().st_mode)
        if each.is_file() and mode & wanted != wanted:
            each.chmod(mode | wanted)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename; a folder that was there goes away only after the new one has its name."""
    if not (temporary.is_dir() and final.is_dir()):
        os.replace(temporary, final)
        return
    old = final.with_name(f".{final.stem}.{os.getpid()}-{threading.get_ident()}.old.tmp{final.suffix}")
    os.rename(final, old)
    try:
        os.rename(temporary, final)
    except OSError:
        os.rename(old, final)  # a new folder that cannot get its name must not cost the one that had it
        raise
    shutil.rmtree(old)
