"""Small stores of real photos for tests: packed here record by record, so that no packer is needed."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.beton import BetonReader, BetonWriter
from pipeline.manifest import Manifest, data_hash, manifest_path, pack_sources
from pipeline.stores import FileStore


def pack(source: Path, target: Path, with_manifest: bool = True) -> Path:
    """Pack the JPEG files of a folder, in the order of the folder store, as they are."""
    store = FileStore(str(source))
    records = [store.read(index) for index in range(len(store.labels))]
    with target.open("wb") as file:
        writer = BetonWriter(file, len(records))
        for path, record, label in zip(store.files, records, store.labels.tolist(), strict=True):
            with Image.open(path) as image:
                writer.append(record, *image.size, label)
        writer.finish()
    if with_manifest:
        reader = BetonReader(target)
        digests = b"".join(hashlib.sha256(record).digest() for record in records)
        manifest = Manifest(
            data_hash=data_hash(digests, store.labels),
            fingerprint=reader.fingerprint(),
            checksums=np.array([zlib.crc32(record) for record in records], dtype=np.uint32),
            classes=store.classes,
            source_names=pack_sources([str(index) for index in range(len(records))]),
        )
        manifest_path(target).write_text(manifest.to_json())
    return target


def damage_bytes(path: Path, start: int, size: int, at: float = 0.6, length: int = 40) -> None:
    """Overwrite bytes in the middle of a record that begins at byte `start` of a file."""
    with path.open("r+b") as file:
        file.seek(start + int(size * at))
        file.write(bytes((7 * byte + 1) % 255 for byte in range(length)))


def damage_packed(path: Path, index: int) -> None:
    """Overwrite bytes in the middle of one record of a packed file."""
    reader = BetonReader(path)
    damage_bytes(path, int(reader.offsets[index]), int(reader.sizes[index]))


def damage_file(path: Path) -> None:
    """Cut the second half of a file off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
