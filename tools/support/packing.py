"""What both packers share: where images come from, making records on all cores, and what is said about them."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import stat
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.listing import IMAGE_SUFFIXES, common_folder_removed, label_by_folder, list_images
from pipeline.manifest import Manifest, data_hash, pack_sources
from pipeline.records import Record, make_record
from pipeline.refusal import ImageRefused
from pipeline.shards import expand_braces

MAX_FILE_BYTES = 1 << 29
SHUFFLE_SEED = 0
_CHUNK = 16


@dataclass(frozen=True)
class Source:
    """Images to pack, in order.

    Attributes:
        names: what to call them.
        labels: (N,) int64, -1 where there are no classes.
        classes: class names by label.
        places: (file, offset, bytes) of each; offset and bytes -1 for a whole file.
    """

    names: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    places: list[tuple[str, int, int]]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The bytes of one image file.

        Raises:
            ImageRefused: it cannot be read or is absurdly large.
        """
        path, offset, size = self.places[index]
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ImageRefused("not a regular file")  # reading a pipe would wait for ever
            with open(path, "rb") as file:
                if offset >= 0:
                    file.seek(offset)
                data = file.read(MAX_FILE_BYTES + 1 if size < 0 else min(size, MAX_FILE_BYTES + 1))
        except OSError as error:
            raise ImageRefused(f"the file cannot be read: {error.strerror}") from error
        if len(data) > MAX_FILE_BYTES:
            raise ImageRefused(f"more than {MAX_FILE_BYTES >> 20} MiB of file")
        return data

    def shuffled(self, seed: int) -> Source:
        """A source with these images in a random order, which depends only on the seed and the number of images."""
        # Philox by name: NumPy may change what its default generator draws.
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(self)).tolist()
        return Source([self.names[i] for i in order], self.labels[order], self.classes, [self.places[i] for i in order])


def open_source(text: str) -> Source:
    """The images that SOURCE names: a folder, a text file with one path a line, a tar file or a shard pattern.

    Raises:
        ValueError: it does not exist, holds no images, or a shard is damaged.
    """
    path = Path(text)
    if text.endswith(".tar") and not path.is_dir():
        return _open_shards([Path(name) for name in expand_braces(text)])
    if not path.exists():
        raise ValueError(f"{text} does not exist; give a folder of images, a list of paths or a shard pattern")
    listing = list_images(path)
    return Source(listing.names, listing.labels, listing.classes, [(str(file), -1, -1) for file in listing.files])


def _open_shards(shards: list[Path]) -> Source:
    names, places, given = [], [], []
    for shard in shards:
        members = _tar_members(shard)
        labels = {_key(name): place for name, place in members.items() if name.endswith(".cls")}
        with open(shard, "rb") as file:
            for name, (offset, size) in members.items():
                if os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
                    continue
                names.append(name)
                places.append((str(shard), offset, size))
                given.append(_read_label(file, shard, name, labels.get(_key(name))))
    if not names:
        raise ValueError(f"{shards[0]} and {len(shards) - 1} more hold no image files; give shards with images")
    # Class files decide where there are any; otherwise the folders inside the shards do.
    if any(label is not None for label in given):
        numbers = np.array([-1 if label is None else label for label in given], dtype=np.int64)
        classes = tuple(str(number) for number in range(int(numbers.max()) + 1))
        return Source(names, numbers, classes, places)
    numbers, classes = label_by_folder(common_folder_removed(names))
    return Source(names, numbers, classes, places)


def _key(name: str) -> str:
    """What the members of one sample share: the path up to the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.split('.', 1)[0]}"


def _read_label(file: Any, shard: Path, name: str, place: tuple[int, int] | None) -> int | None:
    if place is None:
        return None
    file.seek(place[0])
    # A class number is short; a damaged header must not make this read a gigabyte.
    text = file.read(min(place[1], 64)).decode("ascii", "replace").strip()
    if not re.fullmatch(r"-?\d{1,9}", text) or int(text) < -1:
        raise ValueError(f"the label of {name} in {shard} is {text!r}, not a class number; repair the shard")
    return int(text)


def _tar_members(shard: Path) -> dict[str, tuple[int, int]]:
    """Name -> (offset of the data, bytes) of the regular files, in order."""
    if not shard.exists():
        raise ValueError(f"shard {shard} does not exist; check the pattern")
    try:
        with tarfile.open(shard, "r:") as archive:
            members = {m.name: (m.offset_data, m.size) for m in archive if m.isreg()}
    except tarfile.TarError as error:
        raise ValueError(f"shard {shard} is not an uncompressed tar file or is damaged ({error}); copy it again") from (
            error
        )
    end = max((offset + size for offset, size in members.values()), default=0)
    if end > shard.stat().st_size:
        raise ValueError(f"shard {shard} is truncated; copy it again")
    return members


@dataclass
class Tally:
    """What became of the images of a source.

    Attributes:
        sources: names of the packed ones, in order.
        labels: their labels.
        checksums: CRC-32 of each record.
        digests: SHA-256 of each record, one after the other.
        kept: how many were stored as they were.
        rejected: (name, reason) of the others.
    """

    sources: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    kept: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, label: int, record: Record) -> None:
        """Count a packed image."""
        self.sources.append(name)
        self.labels.append(label)
        self.checksums.append(record.crc32)
        self.digests += record.digest
        self.kept += record.kept

    @property
    def repeated(self) -> int:
        """Packed images whose record is equal to an earlier one."""
        digests = np.frombuffer(bytes(self.digests), dtype="V32")
        return len(digests) - len(set(digests.tolist()))

    def manifest(self, fingerprint: str, classes: tuple[str, ...], settings: dict[str, Any]) -> Manifest:
        """The manifest of what was packed."""
        return Manifest(
            data_hash=data_hash(bytes(self.digests), np.array(self.labels, dtype=np.int64)),
            fingerprint=fingerprint,
            checksums=np.array(self.checksums, dtype=np.uint32),
            classes=classes,
            source_names=pack_sources(self.sources),
            details={
                "stored_as_they_were": self.kept,
                "coded_anew": len(self.sources) - self.kept,
                "repeated": self.repeated,
                "rejected": len(self.rejected),
                "settings": settings,
            },
        )

    def rejected_lines(self) -> str:
        """The text of the list of refused files: one JSON object a line."""
        return "".join(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in self.rejected)

    def too_many(self, total: int, max_bad: float) -> str | None:
        """One line about the refused images where they are more than the share allowed, otherwise None."""
        bad = len(self.rejected)
        if bad <= max_bad * total:
            return None
        name, reason = self.rejected[0]
        return (
            f"{bad} of {total} images are bad ({bad / total:.2%}), more than --max-bad {max_bad} allows; the first is "
            f"{name} ({reason})"
        )


def make_records(
    source: Source, max_side_px: int, quality: int, max_bytes: int, workers: int
) -> Iterator[tuple[int, Record | str]]:
    """(index, record or the reason why there is none) of every image, in order, made by `workers` threads.

    Threads, not processes: reading, hashing, checking, decoding and coding all run without Python's lock, and records
    need not be copied between processes.
    """

    def one(index: int) -> Record | str:
        try:
            return make_record(source.read(index), max_side_px, quality, max_bytes)
        except ImageRefused as refusal:
            return str(refusal)
        # One picture that is too large must not end hours of packing.
        except MemoryError:
            return "not enough memory to decode it"

    def several(indices: range) -> list[Record | str]:
        return [one(index) for index in indices]

    chunks = (range(first, min(first + _CHUNK, len(source))) for first in range(0, len(source), _CHUNK))
    running: deque[tuple[range, Future[list[Record | str]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            # Only so many chunks ahead, so that memory does not depend on the number of images.
            for chunk in itertools.islice(chunks, 4 * workers - len(running)):
                running.append((chunk, pool.submit(several, chunk)))
            if not running:
                return
            indices, future = running.popleft()
            yield from zip(indices, future.result(), strict=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def with_progress(records: Iterator[tuple[int, Record | str]], total: int) -> Iterator[tuple[int, Record | str]]:
    """Pass the records through, with a progress bar where standard error is a terminal."""
    return iter(tqdm(records, total=total, unit=" images", disable=None, smoothing=0.05))


def add_packing_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that both packers have."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder, text file with one path a line, or shards name-{000000..000009}.tar")
    add("--classes", metavar="FILE", help="pack only these classes: a text file with one class folder name a line")
    add("--max-resolution", type=int, default=400, metavar="PX", help="longest side; larger images are reduced to it")
    add("--jpeg-quality", type=int, default=90, metavar="1..100", help="of images that have to be coded anew")
    add("--workers", type=int, default=0, metavar="N", help="threads; 0 is one for each core")
    add("--max-bad", type=float, default=0.001, metavar="SHARE", help="share of bad images above which to give up")
    add("--shuffle", action="store_true", help="store in a random order (always the same), for reading in sequence")
    add("--overwrite", action="store_true", help="replace what is there")


def check_packing_flags(options: argparse.Namespace) -> None:
    """Refuse impossible values and resolve `--workers 0`.

    Raises:
        ValueError: a value is out of range.
    """
    for name, low, high in (("max_resolution", 1, 65500), ("jpeg_quality", 1, 100), ("workers", 0, 1024)):
        value = getattr(options, name)
        if not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value} is out of range; choose {low} to {high}")
    if not 0 <= options.max_bad <= 1:
        raise ValueError(f"--max-bad {options.max_bad} is out of range; it is a share, choose 0 to 1")
    options.workers = options.workers or len(os.sched_getaffinity(0))
