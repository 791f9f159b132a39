"""Shards as `tools/make_webdataset.py` writes them: tar files that stock webdataset reads, and an index.

`index.json` is a manifest (see `manifest.py`) with, for every record, its place: shards are listed with their samples
and bytes, and the columns `offsets`, `sizes` and `labels` are little-endian integers in base64. So any record can be
reached without reading a tar header, and every rank knows the length of the epoch.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .manifest import Manifest, parse_manifest

INDEX_NAME = "index.json"
_BLOCK = 512


@dataclass(frozen=True)
class ShardIndex:
    """What is in a set of shards, in storage order.

    Attributes:
        names: file name of each shard.
        samples: (S,) int64, samples of each shard.
        shard_bytes: (S,) int64, size of each shard file.
        offsets: (N,) int64, where each record begins in its shard.
        sizes: (N,) int64, bytes of each record.
        labels: (N,) int64, -1 where there is none.
        checksums: (N,) uint32, CRC-32 of each record.
        classes: class names by label.
        data_hash: see `manifest.data_hash`.
    """

    names: tuple[str, ...]
    samples: np.ndarray
    shard_bytes: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    checksums: np.ndarray
    classes: tuple[str, ...]
    data_hash: str

    def shard_of(self) -> np.ndarray:
        """(N,) int64, the shard of each record."""
        return np.repeat(np.arange(len(self.names)), self.samples)

    def only(self, names: list[str]) -> ShardIndex:
        """The index of some of the shards, in the order of the index.

        Raises:
            ValueError: a name is not in the index.
        """
        missing = [name for name in names if name not in self.names]
        if missing:
            raise ValueError(
                f"shard {missing[0]} is not in the index ({self.names[0]} to {self.names[-1]}); "
                "name shards that are in it"
            )
        kept = np.array([name in set(names) for name in self.names])
        if kept.all():
            return self
        # Records follow their shard.
        rows = np.repeat(kept, self.samples)
        chosen = tuple(name for name, keep in zip(self.names, kept, strict=True) if keep)
        # Some of the shards are other data than all of them.
        identity = hashlib.sha256("\0".join((self.data_hash, *chosen)).encode()).hexdigest()
        columns = {name: getattr(self, name)[rows] for name in ("offsets", "sizes", "labels", "checksums")}
        return replace(
            self,
            names=chosen,
            samples=self.samples[kept],
            shard_bytes=self.shard_bytes[kept],
            data_hash=identity,
            **columns,
        )


def parse_index(text: str, where: str) -> ShardIndex:
    """The index in a JSON text.

    Raises:
        ValueError: it is not an index or is damaged; `where` is named.
    """
    manifest = parse_manifest(text, where)
    details = manifest.details
    try:
        shards = details["shards"]
        index = ShardIndex(
            names=tuple(str(shard["name"]) for shard in shards),
            samples=np.array([shard["samples"] for shard in shards], dtype=np.int64),
            shard_bytes=np.array([shard["bytes"] for shard in shards], dtype=np.int64),
            offsets=column(details["offsets"]),
            sizes=column(details["sizes"]),
            labels=column(details["labels"]),
            checksums=manifest.checksums,
            classes=manifest.classes,
            data_hash=manifest.data_hash,
        )
        # Places are checked here once, so that no later read can leave its shard.
        ends = np.repeat(index.shard_bytes, index.samples)
        columns = (index.offsets, index.sizes, index.labels, index.checksums)
        if not len(ends) or any(len(column) != len(ends) for column in columns):
            raise ValueError("lengths")
        if (index.offsets < 0).any() or (index.sizes <= 0).any() or (index.offsets + index.sizes > ends).any():
            raise ValueError("places")
        # A name from a stranger's index must not lead out of the folder.
        if any("/" in name or name in ("", "..") for name in index.names):
            raise ValueError("names")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is not an index of shards or is damaged; make the shards again") from error
    return index


def column(text: str) -> np.ndarray:
    """(N,) int64: a column of an index."""
    return np.frombuffer(base64.b64decode(text), dtype="<i8")


def _packed(values: list[int] | np.ndarray) -> str:
    return base64.b64encode(np.array(values, dtype="<i8").tobytes()).decode("ascii")


def join_columns(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the index of several sets of shards holds beyond a manifest, from what the index of each holds."""
    columns = {
        name: _packed(np.concatenate([column(part[name]) for part in parts])) for name in ("offsets", "sizes", "labels")
    }
    return {"shards": [shard for part in parts for shard in part["shards"]], **columns}


class ShardWriter:
    """Writes records into tar files of about a given size; the bytes depend on the records only.

    Args:
        folder: where the shards go.
        shard_bytes: a shard is closed before the record that would make it larger; each holds at least one.
        prefix: how the shards' names begin.
        first: number of the first record; in a set of shards no two records should have one.
    """

    def __init__(self, folder: Path, shard_bytes: int, prefix: str = "shard", first: int = 0):
        self._folder, self._limit, self._prefix, self._first = folder, shard_bytes, prefix, first
        self._file: BinaryIO | None = None
        self._shards: list[dict[str, Any]] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._labels: list[int] = []

    def append(self, record: bytes, label: int) -> None:
        """Add one JPEG record as `<number>.jpg` and, where it has a label, `<number>.cls`."""
        key = f"{self._first + len(self._sizes):09d}"
        members = [_member(f"{key}.jpg", record)]
        if label >= 0:
            members.append(_member(f"{key}.cls", str(label).encode("ascii")))
        # With the two empty blocks that end a tar file.
        grown = sum(map(len, members)) + 2 * _BLOCK
        if self._file is None or self._file.tell() + grown > self._limit:
            self._close()
            name = f"{self._prefix}-{len(self._shards):06d}.tar"
            self._file = open(self._folder / name, "xb")
            self._shards.append({"name": name, "samples": 0, "bytes": 0})
        # The record follows its tar header.
        self._offsets.append(self._file.tell() + _BLOCK)
        self._sizes.append(len(record))
        self._labels.append(label)
        self._shards[-1]["samples"] += 1
        for member in members:
            self._file.write(member)

    def _close(self) -> None:
        if self._file is not None:
            self._file.write(bytes(2 * _BLOCK))  # a tar file ends with two empty blocks
            self._shards[-1]["bytes"] = self._file.tell()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(self) -> dict[str, Any]:
        """Close the last shard; returns what the index holds beyond a manifest."""
        self._close()
        columns = {"offsets": self._offsets, "sizes": self._sizes, "labels": self._labels}
        return {"shards": self._shards, **{name: _packed(values) for name, values in columns.items()}}

    def abandon(self) -> None:
        """Release the open file; what was written is for the caller to remove."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _member(name: str, data: bytes) -> bytes:
    """A tar member with a fixed date and owner: header, data, padding."""
    # Its defaults have date 0 and owner 0: the same records give the same bytes.
    info = tarfile.TarInfo(name)
    info.size = len(data)
    out = io.BytesIO()
    out.write(info.tobuf(tarfile.USTAR_FORMAT))
    out.write(data)
    out.write(bytes(-len(data) % _BLOCK))
    return out.getvalue()


def write_index(folder: Path, manifest: Manifest, shards: dict[str, Any]) -> None:
    """Write `index.json` and make it last."""
    whole = replace(manifest, details={**manifest.details, **shards})
    with open(folder / INDEX_NAME, "x", encoding="utf-8") as file:
        file.write(whole.to_json())
        file.flush()
        os.fsync(file.fileno())


def fingerprint(shards: dict[str, Any]) -> str:
    """What tells one set of shards from another: SHA-256 (hex) of their sizes and places."""
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode("utf-8")).hexdigest()


def expand_braces(pattern: str) -> list[str]:
    """`a-{00..02}.tar` to its names; numbers keep the width of the first. Several ranges multiply.

    Raises:
        ValueError: a range is empty.
    """
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    choices = []
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        if int(last) < int(first):
            raise ValueError(f"the range {{{first}..{last}}} in {pattern} is empty; write the smaller number first")
        choices.append([f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)])
    literal = parts[0::3]
    return [
        literal[0] + "".join(text + after for text, after in zip(chosen, literal[1:], strict=True))
        for chosen in product(*choices)
    ]
