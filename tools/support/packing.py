"""What both packers share: making records on all cores, counting what became of them, and flags."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from pipeline.listing import describe_passed_over
from pipeline.manifest import Manifest, data_hash, pack_sources
from pipeline.refusal import ImageRefused

from .source import Source

if TYPE_CHECKING:
    from pipeline.records import Record

SHUFFLE_SEED = 0
MAX_BAD = 0.001
_FEW_BAD = 5
_FULL_RECIPE = 10_000  # images from which a published recipe, of batch 1024, has steps enough an epoch
_SMALL_BATCH = 64  # of the recipe for few images
_CHUNK = 16


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
        passed_over: what the source holds beside images: kind and number.
    """

    sources: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    kept: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    passed_over: Mapping[str, int] = field(default_factory=dict)

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

    def manifest(
        self,
        fingerprint: str,
        classes: tuple[str, ...],
        settings: dict[str, Any],
        more: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """The manifest of what was packed, with further entries where there are some."""
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
                "passed_over": dict(sorted(self.passed_over.items())),
                "settings": settings,
                **(more or {}),
            },
        )

    def rejected_lines(self) -> str:
        """The text of the list of refused files: one JSON object a line."""
        return "".join(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in self.rejected)

    def passed_over_words(self) -> str:
        """What a packer's last line says of files that are no images; empty where there were none."""
        return f"passed over {describe_passed_over(self.passed_over)}; " if self.passed_over else ""

    def too_many(self, total: int, max_bad: float | None) -> str | None:
        """One line about the refused images where they are more than is allowed, otherwise None.

        Args:
            total: images of the source.
            max_bad: share that is allowed; None is the default, see `_allowed`.
        """
        bad = len(self.rejected)
        if bad <= (_allowed(total) if max_bad is None else max_bad * total):
            return None
        name, reason = self.rejected[0]
        limit = f"--max-bad {MAX_BAD if max_bad is None else max_bad}"
        # Rounded up, so that the number that is named works when it is typed.
        enough = math.ceil(bad / total * 1000) / 1000
        return (
            f"{bad} of {total} images are bad ({bad / total:.2%}), more than {limit} allows; the first is {name} "
            f"({reason}); mend them, or give --max-bad {enough:g}, for which nothing is decoded again"
        )


def _allowed(total: int) -> float:
    """Bad images that pass by default: in a small folder one in a hundred and up to five, which are named anyway."""
    return max(MAX_BAD * total, min(_FEW_BAD, math.ceil(total / 100)))


def next_command(data: Path | str, images: int) -> str:
    """The last line of a packer: how to train on what it made."""
    small = "" if images >= _FULL_RECIPE else " --recipe regioncl-m-small"
    if images < _SMALL_BATCH:
        # Its batch-norm groups of 16 must divide the batch.
        small += f" --global-batch {max(images // 16 * 16, 16)}"
    return f"next: python train/main.py --method regioncl-m{small} --data {shlex.quote(str(data))}"


def make_records(
    source: Source, max_side_px: int, quality: int, max_bytes: int, workers: int
) -> Iterator[tuple[int, Record | str]]:
    """(index, record or the reason why there is none) of every image, in order, made by `workers` threads.

    Threads, not processes: reading, hashing, checking, decoding and coding all run without Python's lock, and records
    need not be copied between processes.
    """
    # Here and not above: the checker of JPEG files is compiled when it is imported, 1.6 s that `--help` need not cost.
    from pipeline.records import make_record

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
    add(
        "source",
        metavar="SOURCE",
        help="folder, text file with one path or address a line, shards name-{000000..000009}.tar, parquet file, or "
        "several of them by commas or a pattern",
    )
    add("--classes", metavar="FILE", help="pack only these classes: a text file with one class folder name a line")
    add("--max-resolution", type=int, default=400, metavar="PX", help="longest side; larger images are reduced to it")
    add("--jpeg-quality", type=int, default=90, metavar="1..100", help="of images that have to be coded anew")
    add("--workers", type=int, default=0, metavar="N", help="threads; 0 is one for each core (of a Ray task: 1)")
    add(
        "--max-bad",
        type=float,
        default=argparse.SUPPRESS,
        metavar="SHARE",
        help=f"share of bad images above which to give up (default: {MAX_BAD}; of a small source up to 0.01 and "
        f"{_FEW_BAD} images)",
    )
    add("--shuffle", action="store_true", help="store in a random order (always the same), for reading in sequence")
    add("--overwrite", action="store_true", help="replace what is there")
    add(
        "--part",
        default="",
        metavar="I/N",
        help="pack only the I-th of N parts, which together are one data set; slurm takes I and N from an array job",
    )
    add("--engine", default="threads", choices=["threads", "ray"], help="this machine, or a Ray cluster in parts")
    add("--parts", type=int, default=0, metavar="N", help="with --engine ray: how many; 0 is one for 20,000 images")
    add(
        "--ray-address",
        default="",
        metavar="HOST:PORT",
        help="a running cluster; otherwise RAY_ADDRESS, one that runs here, or one started here",
    )


def check_packing_flags(options: argparse.Namespace) -> None:
    """Refuse impossible values and resolve `--workers 0`.

    Raises:
        ValueError: a value is out of range.
    """
    for name, low, high in (("max_resolution", 1, 65500), ("jpeg_quality", 1, 100), ("workers", 0, 1024)):
        value = getattr(options, name)
        if not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value} is out of range; choose {low} to {high}")
    options.max_bad = getattr(options, "max_bad", None)
    if options.max_bad is not None and not 0 <= options.max_bad <= 1:
        raise ValueError(f"--max-bad {options.max_bad} is out of range; it is a share, choose 0 to 1")
    if options.engine == "ray" and options.part:
        raise ValueError("--engine ray packs all parts; leave out --part")
    if options.engine != "ray" and (options.parts or options.ray_address):
        raise ValueError("--parts and --ray-address belong to --engine ray; for one part of several give --part I/N")
    if options.parts < 0:
        raise ValueError(f"--parts {options.parts} is out of range; choose 1 or more")
    # A task of Ray shares its machine with others.
    options.workers = options.workers or (1 if options.engine == "ray" else len(os.sched_getaffinity(0)))
