"""The manifest beside a packed store: what is in it, and a checksum of each record, so that damage shows at run time.

`DEST.manifest.json` belongs to `DEST.beton`, `manifest.json` to a folder of shards. It is plain JSON; the two columns
that grow with the number of images are packed into strings (little-endian CRC-32 words in base64; source names joined
by zero bytes, deflated, in base64), so that the manifest of a million images loads in well under a second.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .beton import BetonReader
from .endings import PACKED

_FORMAT = "regatta-manifest"
_VERSION = 1


def data_hash(record_digests: bytes, labels: np.ndarray) -> str:
    """SHA-256 (hex) of a data set: equal for equal records and labels in the same order, whatever store holds them.

    Args:
        record_digests: SHA-256 of each record's bytes, 32 bytes each, one after the other.
        labels: (N,) int64, -1 where there is none.
    """
    rows = np.zeros(len(labels), dtype=[("label", "<i8"), ("digest", "V32")])
    rows["label"] = labels
    rows["digest"] = np.frombuffer(record_digests, dtype="V32")
    return hashlib.sha256(rows.tobytes()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What a packer says about its store.

    Attributes:
        data_hash: see `data_hash`.
        fingerprint: what tells the store this manifest belongs to from another, see `BetonReader.fingerprint`.
        checksums: (N,) uint32, CRC-32 of each record's bytes.
        classes: class folder names in label order; empty without labels.
        source_names: the packed names of the source files, see `sources`.
        details: counts and settings of the packer, for people.
    """

    data_hash: str
    fingerprint: str
    checksums: np.ndarray
    classes: tuple[str, ...]
    source_names: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Records in the store."""
        return len(self.checksums)

    @cached_property
    def sources(self) -> list[str]:
        """The source file of each record, relative to the packed source; decoded on first use."""
        joined = zlib.decompress(base64.b64decode(self.source_names))
        return joined.decode("utf-8", "surrogateescape").split("\0") if self.num_samples else []

    def to_json(self) -> str:
        """The text of the manifest file."""
        fields = {
            "format": _FORMAT,
            "version": _VERSION,
            "images": self.num_samples,
            "data_hash": self.data_hash,
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            **self.details,
            "crc32": base64.b64encode(self.checksums.astype("<u4").tobytes()).decode("ascii"),
            "sources": self.source_names,
        }
        return json.dumps(fields, indent=1, ensure_ascii=True) + "\n"


def pack_sources(names: list[str]) -> str:
    """Source names as one string for `Manifest.source_names`; names may hold anything but zero characters."""
    joined = "\0".join(names).encode("utf-8", "surrogateescape")
    return base64.b64encode(zlib.compress(joined, 6)).decode("ascii")


def manifest_path(beton: str | Path) -> Path:
    """Where the manifest of a packed file lies: `DEST.manifest.json` for `DEST.beton`."""
    return _beside(Path(beton), ".manifest.json")


def rejected_path(beton: str | Path) -> Path:
    """Where the list of refused source files lies: `DEST.rejected.jsonl` for `DEST.beton`."""
    return _beside(Path(beton), ".rejected.jsonl")


def _beside(beton: Path, ending: str) -> Path:
    return beton.with_name(beton.name.removesuffix(PACKED) + ending)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest in a file.

    Raises:
        ValueError: the file is not a manifest or is damaged.
        FileNotFoundError: there is no such file.
    """
    return parse_manifest(Path(path).read_text(encoding="utf-8", errors="replace"), str(path))


def parse_manifest(text: str, where: str) -> Manifest:
    """The manifest in a JSON text.

    Raises:
        ValueError: it is not a manifest or is damaged; `where` is named.
    """
    try:
        fields = json.loads(text)
        if fields.pop("format") != _FORMAT or fields.pop("version") != _VERSION:
            raise KeyError("format")
        checksums = np.frombuffer(base64.b64decode(fields.pop("crc32")), dtype="<u4")
        if len(checksums) != fields.pop("images"):
            raise KeyError("images")
        return Manifest(
            data_hash=fields.pop("data_hash"),
            fingerprint=fields.pop("fingerprint"),
            checksums=checksums,
            classes=tuple(fields.pop("classes")),
            source_names=fields.pop("sources"),
            details=fields,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where} is not a manifest of this packer or is damaged; pack the images again") from error


def manifest_of(reader: BetonReader) -> Manifest | None:
    """The manifest beside a packed file, or None where there is none (a file that FFCV's own writer made).

    Raises:
        ValueError: there is one, but it belongs to another file, so its checksums would call good records bad.
    """
    path = manifest_path(reader.path)
    if not path.exists():
        return None
    manifest = read_manifest(path)
    if manifest.fingerprint != reader.fingerprint():
        raise ValueError(
            f"{path} does not belong to {reader.path}: one of them was replaced; copy both again or pack again"
        )
    return manifest
