"""What can be wrong with a packed file, each with its remedy: the doctor's checks of a `.beton` file."""

from __future__ import annotations

import collections
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.beton import BetonReader
from pipeline.images import decode_rgb
from pipeline.manifest import manifest_of, manifest_path
from train.record.diagnosis import Finding

_LISTED = 5  # damaged records that are named


def check_packed(path: Path, decode: int) -> Iterator[Finding]:
    """A packed file: its table, the checksum of every record, and a decode of `decode` records spread over it.

    Args:
        path: the `.beton` file.
        decode: how many records to decode to their last pixel; all of them when larger than the file.

    Raises:
        ValueError: the file cannot be opened as a packed file, or its manifest belongs to another.
        FileNotFoundError: there is no such file.
    """
    reader = BetonReader(path)
    yield Finding("ok", _describe(reader))
    manifest = manifest_of(reader)
    sources: list[str] = []
    if manifest is None:
        yield Finding(
            "note",
            f"{manifest_path(path).name} is missing: damage that still decodes cannot be noticed",
            "copy it from where the file was packed, or pack again with tools/make_ffcv_dataset.py",
        )
    else:
        sources = manifest.sources
        changed = [
            index for index, same in enumerate(_parallel(_matches(reader, manifest.checksums), len(reader))) if not same
        ]
        yield _records("fit their checksums", "have other bytes than were packed", changed, len(reader), sources)
    # Spread over the file, since damage to a disk or a copy is local.
    chosen = np.unique(np.linspace(0, len(reader) - 1, min(decode, len(reader))).astype(np.int64))
    failed = [
        int(i) for i, good in zip(chosen, _parallel(_decodes(reader, chosen), len(chosen)), strict=True) if not good
    ]
    yield _records("decode to their last pixel", "do not decode", failed, len(chosen), sources)


def _describe(reader: BetonReader) -> str:
    labels = collections.Counter(reader.labels[reader.labels >= 0].tolist())
    classes = f"{len(labels)} classes" if labels else "no labels"
    sides = f"{int(reader.widths.max())} x {int(reader.heights.max())} px at most"
    mean_kib = float(reader.sizes.mean()) / 1024
    return f"{reader.path.name}: {len(reader):,} images, {classes}, {sides}, {mean_kib:.1f} KiB each"


def _parallel(check: Callable[[int], bool], count: int) -> list[bool]:
    # CRC-32 and decoding both leave Python's lock.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(check, range(count), chunksize=64))


def _matches(reader: BetonReader, checksums: np.ndarray) -> Callable[[int], bool]:
    return lambda index: zlib.crc32(reader.record(index).tobytes()) == int(checksums[index])


def _decodes(reader: BetonReader, chosen: np.ndarray) -> Callable[[int], bool]:
    def decodes(position: int) -> bool:
        index = int(chosen[position])
        try:
            pixels: Any = decode_rgb(reader.record(index).tobytes())
        except ValueError:
            return False
        return pixels.shape[:2] == (int(reader.heights[index]), int(reader.widths[index]))

    return decodes


def _records(good: str, bad: str, failed: list[int], count: int, sources: list[str]) -> Finding:
    if not failed:
        return Finding("ok", f"{count:,} records {good}")
    named = ", ".join(
        f"{index} ({sources[index]})" if index < len(sources) else str(index) for index in failed[:_LISTED]
    )
    more = f" and {len(failed) - _LISTED} more" if len(failed) > _LISTED else ""
    return Finding(
        "fault", f"{len(failed):,} of {count:,} records {bad}: {named}{more}", "copy the file again, or pack again"
    )
