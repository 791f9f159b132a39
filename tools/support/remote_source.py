"""Images behind addresses: named by lists, or found in a folder of an object store."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipeline.clutter import has_clutter
from pipeline.fetch import fetch, member_url, public_url
from pipeline.listing import IMAGE_SUFFIXES, common_folder_removed, label_by_folder
from pipeline.refusal import ImageRefused, SourceClosed
from pipeline.remote import listed, needs_fsspec

from .source import FilePart, Place, Source, refuse_huge


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file behind an address."""

    url: str

    def read(self) -> bytes:
        """The bytes; see `Place`.

        Raises:
            ImageRefused: it is not there or may not be read.
            SourceBusy: its server did not send it in time.
        """
        try:
            return refuse_huge(_fetched(self.url, persistent=True))
        except SourceClosed as error:
            raise ImageRefused(str(error)) from error


def _fetched(url: str, persistent: bool = False) -> bytes:
    with tempfile.TemporaryDirectory(prefix="regatta-fetch-") as folder:
        copy = Path(folder, "file")
        fetch(url, copy, persistent=persistent)
        return copy.read_bytes()


def open_remote(address: str) -> Source:
    """The images of a list with an address, or of a folder that fsspec can list.

    Raises:
        ValueError: the address cannot be read, or there are no images.
        OSError: its host cannot be reached.
    """
    url = public_url(address)
    if needs_fsspec(url) and not url.endswith((".txt", ".lst", ".list")):
        return _open_folder(url)
    lines = _fetched(url).decode("utf-8-sig", "surrogateescape").split("\n")
    names = [line.removesuffix("\r") for line in lines if line.strip()]
    # As for a list on this machine, names are relative to the list's own folder.
    base = url.partition("?")[0].rpartition("/")[0]
    places = [RemoteFile(public_url(name) if "://" in name else member_url(base, name)) for name in names]
    return named_source(names, places, address)


def _open_folder(url: str) -> Source:
    passed_over: Counter[str] = Counter()
    names = []
    for name in listed(url):
        suffix = os.path.splitext(name)[1].lower()
        if has_clutter(name.split("/")):
            passed_over["system files"] += 1
        elif suffix in IMAGE_SUFFIXES:
            names.append(name)
        else:
            passed_over[suffix or "without ending"] += 1
    names.sort(key=os.fsencode)
    if not names:
        raise ValueError(f"{url} holds no image files; check the address")
    labels, classes = label_by_folder(names)
    return Source(names, labels, classes, [RemoteFile(member_url(url, name)) for name in names], passed_over)


def open_mixed_list(path: Path) -> Source | None:
    """The images of a list on this machine that names addresses; None for a list that names none, or no list."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        # Enough to see what kind of list it is, without reading an archive of gigabytes.
        if b"://" not in file.read(1 << 16):
            return None
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    names = [line.removesuffix("\r") for line in lines if line.strip()]
    places: list[Place] = [
        RemoteFile(public_url(name)) if "://" in name else FilePart(str(path.parent / name)) for name in names
    ]
    return named_source(names, places, str(path))


def named_source(names: list[str], places: list[Place] | list[RemoteFile], where: str) -> Source:
    """A source of listed images; folders decide the classes where every image lies in one.

    Raises:
        ValueError: the list is empty.
    """
    if not names:
        raise ValueError(f"{where} names no images; write one address or path a line")
    labels, classes = label_by_folder(common_folder_removed([name.partition("?")[0] for name in names]))
    return Source(names, labels, classes, places)
