"""Stores with random access: a packed file read without FFCV, and plain files."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from .beton import BetonReader
from .classes import joined
from .clutter import is_clutter
from .copies import count_behind, is_single_file, local_copies
from .endings import is_packed, is_table, is_tar
from .layouts import CHECK_CRC, REFUSE_ROTATED, WHOLE_IMAGE
from .listing import image_names, list_images
from .manifest import manifest_of
from .parquet import ParquetImages
from .parts import Whole, arranged, divided_into
from .shard_store import open_shards
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
    """Plain image files of any format; nothing vouches for them, so every one is decoded to its end.

    Attributes:
        passed_over: what the folder holds beside images: kind and number.
    """

    def __init__(self, path: str):
        source = Path(path)
        if not source.exists():
            raise ValueError(f"{source} does not exist; give a folder of photos or a list with one path a line")
        listing = list_images(source)
        if any("://" in name for name in listing.names):
            raise ValueError(
                f"{source} names addresses, which a packer fetches: tools/make_ffcv_dataset.py {source} DEST"
            )
        self.files, self.labels, self.classes = listing.files, listing.labels, listing.classes
        self.passed_over = listing.passed_over
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


class TableStore:
    """The images of a parquet file; nothing vouches for them, so every one is decoded to its end."""

    def __init__(self, path: str):
        file = Path(path)
        self.images = ParquetImages([file])
        self.labels, self.classes = self.images.labels, self.images.classes
        # As for plain files, name and size stand for the content.
        described = f"{file.name}\0{file.stat().st_size}"
        self.data_hash = hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()

    def fill(self, jobs: np.ndarray, index: np.ndarray) -> object:
        """Addresses of the cells' bytes, which the result keeps."""
        held = [np.frombuffer(self.images.read(each) or b"\0", dtype=np.uint8) for each in index.tolist()]
        jobs["data"], jobs["size"] = [data.ctypes.data for data in held], [len(data) for data in held]
        jobs["flags"] = WHOLE_IMAGE | REFUSE_ROTATED
        return held

    def read(self, index: int) -> bytes:
        """The bytes of one image; raises OSError."""
        return self.images.read(index)

    def intact(self, index: int, data: bytes) -> bool:
        """Nothing is known about them."""
        return True

    def name(self, index: int) -> str:
        """The image's name in its table."""
        return self.images.names[index]


class JoinedStore:
    """Several stores as one, one behind the other; classes meet by name.

    Args:
        stores: the stores, in order.
        names: what to call each in a message.
        data_hash: of the joined content; empty is the hash of the stores' own.

    Attributes:
        stores: the stores, in order.
        starts: (S + 1,) int64, number of each store's first record, and the number of all.
    """

    def __init__(self, stores: Sequence[Store], names: Sequence[str], data_hash: str = ""):
        self.stores = stores
        parts = [(store.labels, store.classes, name) for store, name in zip(stores, names, strict=True)]
        self.labels, self.classes = joined(parts)
        self.starts = np.cumsum([0, *(len(store.labels) for store in stores)])
        own = hashlib.sha256("\0".join(store.data_hash for store in stores).encode()).hexdigest()
        self.data_hash = data_hash or own

    def _place(self, index: int) -> tuple[Store, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.stores[part], index - int(self.starts[part])

    def fill(self, jobs: np.ndarray, index: np.ndarray) -> object:
        """What each store writes into the jobs of its records."""
        parts = np.searchsorted(self.starts, index, side="right") - 1
        kept = []
        for part in np.unique(parts).tolist():
            rows = np.flatnonzero(parts == part)
            own = jobs[rows]
            kept.append(self.stores[part].fill(own, index[rows] - self.starts[part]))
            jobs[rows] = own
        return kept

    def read(self, index: int) -> bytes:
        """The bytes of one record; raises OSError."""
        store, own = self._place(index)
        return store.read(own)

    def intact(self, index: int, data: bytes) -> bool:
        """Whether the bytes are those that were packed; true where nothing is known."""
        store, own = self._place(index)
        return store.intact(own, data)

    def name(self, index: int) -> str:
        """What its store calls it."""
        store, own = self._place(index)
        return store.name(own)


def data_parts(data: str) -> list[str]:
    """The folders and files that `--data` names: several are separated by commas, or fit a pattern with `*`, `?`, `[`.

    A path that exists is one part, whatever signs are in its name. Shard patterns and addresses of shards are one part
    as well: an index says which shards there are. For the address of a packed or parquet file stands the path of its
    copy on this machine, which is fetched first.

    Raises:
        ValueError: no file fits a pattern, or one of several parts does not exist.
        SourceClosed, SourceBusy, OSError: a file behind an address, as `copies.local_copies` says.
    """
    if is_single_file(data):
        return local_copies(data)
    if "://" in data or is_tar(data) or os.path.exists(data):
        return [data]
    if "," in data:
        parts = [part for text in data.split(",") if text for part in data_parts(text)]
        missing = next((part for part in parts if not os.path.exists(part)), None)
        if missing is not None:
            raise ValueError(f"{missing} of {data} does not exist; several folders or files are separated by commas")
        return parts
    if not glob.has_magic(data):
        return [data]
    # In the order of the names as bytes, which does not depend on the locale.
    found = sorted(glob.glob(data, recursive=True), key=os.fsencode)
    found = [path for path in found if not is_clutter(os.path.basename(path))]
    if not found:
        raise ValueError(
            f"no file matches {data}; quote a pattern so that the shell leaves it alone. Shards are named as "
            "shards/photos-{000000..000009}.tar"
        )
    return found


def count_images(data: str, enough: int) -> int:
    """Images that `--data` names, as cheaply as they can be counted.

    Returns:
        Their number; `enough` where there are as many or more, where they are shards behind an address, or where they
        cannot be opened, which whoever opens them tells.
    """
    try:
        if is_single_file(data):
            return min(enough, count_behind(data))
        if "://" in data:
            return enough
        parts = [data] if is_shard_pattern(data) else data_parts(data)
        return min(enough, sum(_count_part(part, enough) for part in parts))
    except (ValueError, OSError):
        return enough


def _count_part(part: str, enough: int) -> int:
    if is_shard_pattern(part):
        return len(open_shards(part, "sequential", 1, 1).labels)
    if os.path.isdir(part):
        # Not the whole walk: a folder of millions takes minutes.
        return sum(1 for _ in itertools.islice(image_names(Path(part)), enough))
    if is_packed(part) or is_table(part):
        return len(_open_one(part).labels)
    # The lines of a list alone: its store asks the disk for every file.
    return len(list_images(Path(part)).names)


def is_shard_pattern(data: str) -> bool:
    """Whether the text names tar shards: a pattern, a tar file, an address, or a folder with a shard index.

    Tar files alone make no shards of a folder: archives that were unpacked are often left beside the photos.
    """
    if is_single_file(data):
        return False
    path = Path(data)
    if is_tar(data) or "://" in data:
        return True
    return ((path / INDEX_NAME).is_file() or divided_into(path) > 0) and any(path.glob("*.tar"))


def open_store(data: str) -> PackedStore | FileStore | TableStore | JoinedStore:
    """The store that `--data` names: `.beton` or parquet files, folders or lists of images, or several of them.

    Parts of one packed data set are read as the one file that they stand for.

    Raises:
        ValueError: something cannot be used, or a part is missing.
    """
    parts = data_parts(data)
    sharded = next((part for part in parts if is_shard_pattern(part)), None)
    if len(parts) > 1 and sharded is not None:
        raise ValueError(
            f"{sharded} is a set of shards, which cannot be read together with others; make one set of them with "
            "tools/make_webdataset.py"
        )
    wholes = arranged(parts)
    stores = [_open_whole(whole) for whole in wholes]
    return stores[0] if len(stores) == 1 else JoinedStore(stores, [whole.paths[0] for whole in wholes])


def _open_whole(whole: Whole) -> PackedStore | FileStore | TableStore | JoinedStore:
    stores = [_open_one(path) for path in whole.paths]
    if whole.manifest is None or len(stores) == 1:
        return stores[0]
    # The hash of the whole, not one of hashes: a run may go on with the parts of the file that it began with.
    return JoinedStore(stores, whole.paths, whole.manifest.data_hash)


def _open_one(path: str) -> PackedStore | FileStore | TableStore:
    if is_packed(path):
        return PackedStore(path)
    return TableStore(path) if is_table(path) else FileStore(path)
