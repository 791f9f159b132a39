"""Damage photos in every way that files get damaged, and see that no reader crashes, hangs or takes memory for it.

`python -m tests.faults.images --files 100000 [--report FILE.txt]` is the long form; the short one runs in CI. Each file
is read by the general decoder, by the packer and by the compiled threads, which must agree on what is refused. Then
all are packed by the packer's command, and the packed file is read back. Pieces of `PIECE` files run on all cores; disk
and memory are those of one piece for each core, however many files there are. A thousand files take about 9 seconds of
one core (AMD EPYC, AVX2), so 100,000 about a quarter of an hour of one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.images import decode_rgb
from pipeline.interface import PipelineConfig, ViewSpec
from pipeline.loaders import build_pipeline
from pipeline.records import make_record
from pipeline.refusal import ImageRefused
from tests.faults.reports import publish
from tools import make_ffcv_dataset

SLOWEST_S = 20.0
MOST_GROWTH_KIB = 1_500_000
"""What the peak of memory may grow over all files: one image at the limit of pixels is not among them."""
DIFFERS = "DIFFERS"
"""Begins the outcome of a file that the loader of a folder takes otherwise than decoder and packer, which agree."""
_BATCH = 16
PIECE = 1001
"""Files of one piece: each kind with each mutation seven times."""


def seeds() -> dict[str, bytes]:
    """Whole small files of the kinds that people have."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels).resize((96, 72), Image.Resampling.BICUBIC)
    kinds: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "jpeg": (picture, "JPEG", {}),
        "progressive": (picture, "JPEG", {"progressive": True}),
        "restarts": (picture, "JPEG", {"restart_marker_blocks": 3}),
        "gray": (picture.convert("L"), "JPEG", {}),
        "cmyk": (picture.convert("CMYK"), "JPEG", {}),
        "444": (picture, "JPEG", {"subsampling": 0, "quality": 98}),
        "png": (picture, "PNG", {}),
        "palette": (picture.quantize(16), "PNG", {}),
        "webp": (picture, "WEBP", {}),
        "gif": (picture.quantize(16), "GIF", {}),
        "bmp": (picture, "BMP", {}),
        "tiff": (picture, "TIFF", {"compression": "tiff_lzw"}),
        "avif": (picture, "AVIF", {}),
    }
    found = {}
    for name, (image, form, settings) in kinds.items():
        coded = io.BytesIO()
        image.save(coded, form, **settings)
        found[name] = coded.getvalue()
    return found


def _flip(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 20])):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _cut_at_marker(data: bytes, draw: random.Random) -> bytes:
    marks = [at for at in range(len(data) - 1) if data[at] == 0xFF and data[at + 1] not in (0, 0xFF)]
    return data[: draw.choice(marks) + draw.randrange(3)] if marks else data[: draw.randrange(len(data))]


def _zero(data: bytes, draw: random.Random) -> bytes:
    at, length = draw.randrange(len(data)), draw.randrange(1, 400)
    return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]


def _twelve_bits(data: bytes, draw: random.Random) -> bytes:
    at = data.find(b"\xff\xc0")
    return data if at < 0 else data[: at + 4] + b"\x0c" + data[at + 5 :]


def _huge_size(data: bytes, draw: random.Random) -> bytes:
    """The header claims a picture that no memory holds."""
    if data[:4] == b"\x89PNG":
        header = struct.pack(">II", draw.choice([1 << 31, 60_000, 100_000]), 60_000) + data[24:29]
        return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        at = data.find(marker)
        if at >= 0:
            return data[: at + 5] + draw.choice([b"\xff\xff\xff\xff", b"\xff\xff\x00\x10"]) + data[at + 9 :]
    return data + bytes(1 << 16)


def _more_scans(data: bytes, draw: random.Random) -> bytes:
    """One scan repeated thousands of times: little to store, long to decode."""
    at = data.find(b"\xff\xda")
    return data if at < 0 else data[:-2] + data[at:-2] * draw.choice([50, 500]) + data[-2:]


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": _flip,
    "cut": lambda data, draw: data[: draw.randrange(len(data))],
    "cut at marker": _cut_at_marker,
    "zero": _zero,
    "empty": lambda data, draw: b"",
    "append": lambda data, draw: data + draw.randbytes(draw.randrange(1, 3000)),
    "splice": lambda data, draw: (
        data[: len(data) // 2] + draw.randbytes(draw.randrange(1, 300)) + data[len(data) // 2 :]
    ),
    "12 bits": _twelve_bits,
    "huge": _huge_size,
    "scans": _more_scans,
    "noise": lambda data, draw: data[:4] + draw.randbytes(len(data)),
}


def files(count: int, seed: int = 0) -> Iterator[tuple[str, str, bytes]]:
    """(kind, mutation, bytes) of `count` files, all pairs in turn."""
    draw, whole = random.Random(seed), seeds()
    pairs = [(kind, name) for name in MUTATIONS for kind in whole]
    for number in range(count):
        kind, name = pairs[number % len(pairs)]
        yield kind, name, MUTATIONS[name](whole[kind], draw)


def verdict(data: bytes) -> tuple[str, str]:
    """What the general decoder and the packer say: "read" or "refused", and the reason of a refusal.

    Raises:
        AssertionError: they differ, or a refusal has no reason of one line.
    """
    said, reason = [], ""
    for reader in (lambda: decode_rgb(data), lambda: make_record(data, 64, 90, 1 << 24)):
        try:
            reader()
            said.append("read")
        except ImageRefused as refusal:
            reason = str(refusal)
            assert reason and "\n" not in reason
            said.append("refused")
    assert said[0] == said[1], f"the decoder says {said[0]}, the packer {said[1]}"
    return said[0], reason


def loaded(folder: Path, contents: list[bytes]) -> set[int]:
    """Numbers of the files that the compiled loader refuses, read beside as many whole ones under wrong endings."""
    good = seeds()["jpeg"]
    for number, data in enumerate(contents):
        # A wrong ending must not matter: content decides.
        (folder / f"{number:03d}.png").write_bytes(data)
        (folder / f"{number + len(contents):03d}.jpg").write_bytes(good)
    # The whole image: of a crop the loader decodes the rows that it needs, and damage below them harms nobody.
    config = PipelineConfig(str(folder), (ViewSpec("v", 16, kind="whole"),), 8, order="sequential", drop_last=False)
    pipeline = build_pipeline("folder", config, quiet=True)
    try:
        for _ in pipeline:
            pass
        bad = set(pipeline.stats().bad_records)
    finally:
        pipeline.close()
    for file in folder.iterdir():
        file.unlink()
    return bad


def packed(folder: Path, contents: list[bytes]) -> int:
    """How many of the files the packer's command takes; every one of them is read back from the packed file.

    Raises:
        AssertionError: the command fails, or an image that was packed cannot be read.
    """
    photos, target = folder / "photos", folder / "photos.beton"
    photos.mkdir()
    # A whole one among them: a packer that is given no image at all refuses the folder.
    for number, data in enumerate([*contents, seeds()["jpeg"]]):
        (photos / f"{number:05d}.jpg").write_bytes(data)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = make_ffcv_dataset.main(
            [str(photos), str(target), "--max-bad", "1", "--max-resolution", "64", "--workers", "1"]
        )
    assert code == 0, said.getvalue()
    config = PipelineConfig(str(target), (ViewSpec("v", 16),), 64, order="sequential", drop_last=False, workers=1)
    pipeline = build_pipeline("folder", config, quiet=True)
    try:
        count = sum(len(batch.index) for batch in pipeline)
        assert not pipeline.stats().bad_records, pipeline.stats().bad_records
    finally:
        pipeline.close()
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return count - 1


def attack(count: int, seed: int = 0) -> Counter[tuple[str, str]]:
    """Outcomes of `count` damaged files, by (mutation, outcome).

    Raises:
        AssertionError: decoder and packer disagree, one file takes too long, or memory grows beyond the bound.
    """
    tally: Counter[tuple[str, str]] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    waiting: list[tuple[str, str, bytes, str, str]] = []
    contents: list[bytes] = []
    readable = 0
    with tempfile.TemporaryDirectory() as name:
        for number, (kind, mutation, data) in enumerate(files(count, seed), 1):
            started = time.monotonic()
            outcome, reason = verdict(data)
            assert time.monotonic() - started < SLOWEST_S, f"{kind} {mutation} takes too long"
            contents.append(data)
            readable += outcome == "read"
            waiting.append((kind, mutation, data, outcome, reason))
            if len(waiting) == _BATCH or number == count:
                bad = loaded(Path(name), [each[2] for each in waiting])
                for place, (kind, mutation, _, outcome, reason) in enumerate(waiting):
                    differs = (place in bad) != (outcome == "refused")
                    # Told with the reason and counted: the long form shall find every kind, not stop at the first.
                    said = f"{DIFFERS}, {kind}, {outcome} by the decoder ({reason})" if differs else outcome
                    tally[mutation, said] += 1
                waiting = []
        taken = packed(Path(name), contents)
        assert taken == readable, f"the packer's command takes {taken} files, the decoder reads {readable}"
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert growth < MOST_GROWTH_KIB, f"memory grew by {growth} KiB"
    return tally


def attack_on_all_cores(count: int, seed: int, jobs: int, say: Callable[[str], None]) -> Counter[tuple[str, str]]:
    """`attack` in pieces of `PIECE` files, each with a seed of its own, in as many processes.

    Raises:
        AssertionError: of the first piece that fails, with its seed.
    """
    sizes = [PIECE] * (count // PIECE) + ([count % PIECE] if count % PIECE else [])
    tally: Counter[tuple[str, str]] = Counter()
    started = time.monotonic()
    # A new process now and then, which costs the import of PyTorch: what pieces leak must not add up for ever.
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=8) as pool:
        pieces = [(size, seed + number) for number, size in enumerate(sizes)]
        for number, found in enumerate(pool.imap_unordered(_piece, pieces), 1):
            tally += found
            say(
                f"{tally.total()} of {count} files, {time.monotonic() - started:.0f} s, piece {number} of {len(pieces)}"
            )
    return tally


def _piece(size_and_seed: tuple[int, int]) -> Counter[tuple[str, str]]:
    try:
        return attack(*size_and_seed)
    except AssertionError as fault:
        raise AssertionError(f"--files {size_and_seed[0]} --seed {size_and_seed[1]}: {fault}") from None


def main(argv: list[str]) -> int:
    """The long form; prints a table and writes it where `--report` says."""
    parser = argparse.ArgumentParser(description="Read damaged photos by every reader.")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; 1 a core by default")
    parser.add_argument("--report", type=Path, help="text file to write")
    arguments = parser.parse_args(argv)
    tally = attack_on_all_cores(
        arguments.files, arguments.seed, arguments.jobs, lambda line: print(line, file=sys.stderr, flush=True)
    )
    lines = [f"python -m tests.faults.images --files {arguments.files} --seed {arguments.seed}"]
    lines += [f"{mutation}  {outcome}  {count}" for (mutation, outcome), count in sorted(tally.items())]
    differing = sum(count for (_, outcome), count in tally.items() if outcome.startswith(DIFFERS))
    lines.append(
        f"{tally.total()} files, decoder and packer agree on each, packed and read back, no crash, no hang; the loader "
        f"of a folder takes {differing} otherwise"
    )
    publish(lines, arguments.report)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
