"""Stores with random access: a packed file read without FFCV, and plain files."""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np

from .beton import BetonReader
from .layouts import CHECK_CRC, REFUSE_ROTATED, WHOLE_IMAGE
from .listing import list_images
from .manifest import manifest_of
from .shards import INDEX_NAME


class Store(Protocol):
    """Records by number."""

    labels: np.ndarray
    """(N,) int64, -1 where there is none."""

    classes: tuple[str, ...]
    """Class names by label; empty where the store keeps numbers only."""

    data_hash: str
    """SHA-256 (hex), equal for equal content."""

    def fill(self, jobs: np.ndarray, index: np.ndarray) -> object:
        """Write where the records `index` are into the decoder's jobs; the result must outlive the call."""

    def read(self, index: int) -> bytes:
        """The bytes of one record; raises OSError."""

    def intact(self, index: int, data: bytes) -> bool:
        """Whether the bytes are those that were packed; true where nothing is known."""

    def name(self, index: int) -> str:
        """What to call a record in a message."""


class PackedStore:
    """The JPEG records of a `.beton` file, with the packer's checksums where its manifest is there."""

    def __init__(self, path: str):
        self.reader = BetonReader(path)
        self.labels = self.reader.labels
        # Files packed by FFCV itself have no manifest and therefore no checksums.
        manifest = manifest_of(self.reader)
        self.checksums = None if manifest is None else manifest.checksums
        self.classes = () if manifest is None else manifest.classes
        self.data_hash = self.reader.fingerprint() if manifest is None else manifest.data_hash
        self._base = self.reader.data.ctypes.data

    def fill(self, jobs: np.ndarray, index: np.ndarray) -> object:
        """Addresses within the memory map, which lives as long as the store."""
        # Addresses in the mapping: a record is read from the page cache, never copied.
        jobs["data"] = self._base + self.reader.offsets[index]
        jobs["size"] = self.reader.sizes[index]
        if self.checksums is None:
            # Nothing else would notice damage below the crops.
            jobs["flags"] = WHOLE_IMAGE
        else:
            jobs["flags"] = CHECK_CRC
            jobs["crc"] = self.checksums[index]
        return self.reader

    def read(self, index: int) -> bytes:
        """The bytes of one record."""
        return self.reader.record(index).tobytes()

    def intact(self, index: int, data: bytes) -> bool:
        """Whether the bytes fit the packer's checksum."""
        return self.checksums is None or zlib.crc32(data) == int(self.checksums[index])

    def name(self, index: int) -> str:
        """Number and file."""
        return f"record {index} of {self.reader.path.name}"


class FileStore:
    """Plain image files of any format; nothing vouches for them, so every one is decoded to its end."""

    def __init__(self, path: str):
        source = Path(path)
        if not source.exists():
            raise ValueError(f"{source} does not exist; give a folder of photos or a list with one path a line")
        listing = list_images(source)
        self.files, self.labels, self.classes = listing.files, listing.labels, listing.classes
        # Encoded once; C++ wants bytes that end in a zero.
        self._encoded = [os.fsencode(file) + b"\0" for file in self.files]
        # Hashing every byte of a large folder would take minutes: names and sizes stand for the content.
        digest = hashlib.sha256()
        root = source if source.is_dir() else source.parent
        for file in self.files:
            size = file.stat().st_size if file.exists() else -1
            digest.update(f"{os.path.relpath(file, root)}\0{size}\0".encode("utf-8", "surrogateescape"))
        self.data_hash = digest.hexdigest()

    def fill(self, jobs: np.ndarray, index: np.ndarray) -> object:
        """The paths; the decoder's threads read the files."""
        # numpy's view of a bytes object gives the address that the C side needs.
        paths = [np.frombuffer(self._encoded[each], dtype=np.uint8) for each in index.tolist()]
        jobs["path"] = [path.ctypes.data for path in paths]
        # Nobody has checked these files, and a camera's photo may need turning, which the general path does.
        jobs["flags"] = WHOLE_IMAGE | REFUSE_ROTATED
        return paths

    def read(self, index: int) -> bytes:
        """The bytes of one file; raises OSError."""
        return self.files[index].read_bytes()

    def intact(self, index: int, data: bytes) -> bool:
        """Nothing is known about plain files."""
        return True

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.files[index])


def is_shard_pattern(data: str) -> bool:
    """Whether the text names tar shards: a pattern, a tar file, an address, or a folder with a shard index.

    Tar files alone make no shards of a folder: archives that were unpacked are often left beside the photos.
    """
    path = Path(data)
    return data.endswith(".tar") or "://" in data or ((path / INDEX_NAME).is_file() and any(path.glob("*.tar")))


def open_store(path: str) -> PackedStore | FileStore:
    """The store at a path: a `.beton` file, or else a folder or list of images."""
    return PackedStore(path) if path.endswith(".beton") else FileStore(path)
