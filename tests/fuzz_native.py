"""Feeds damaged JPEGs to the native decoder; run by test_native.py inside a process with the sanitizers loaded.

Usage: fuzz_native.py LIBRARY SECONDS SEED FILE [FILE ...]; prints how many images it tried, how many decoded, and how
many of those our own decoder did. The sanitizers abort the process where the decoder does what it must not. Status and
pixels must be what libjpeg alone makes of the file.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import numpy as np

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.decoder import declare
from pipeline.interface import ViewSpec
from pipeline.layouts import BASELINE, JOB, LIBJPEG_ONLY, OK, WHOLE_IMAGE, view_array


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """One of the ways in which files go bad, or headers are made to lie."""
    bytes_ = bytearray(data)
    kind = random.integers(6)
    if kind == 0:
        return bytes(bytes_[: random.integers(1, len(bytes_))])
    for _ in range(random.integers(1, 12)):
        at = int(random.integers(len(bytes_) if kind < 3 else min(len(bytes_), 700)))
        if kind == 4:
            bytes_[at : at + 1] = random.bytes(int(random.integers(0, 4)))
        elif kind == 5:  # sizes and sampling factors in the frame header
            frame = max(bytes_.find(b"\xff\xc0"), bytes_.find(b"\xff\xc2"))
            bytes_[frame + int(random.integers(2, 18))] = int(random.integers(256))
        else:
            bytes_[at] = int(random.integers(256))
    return bytes(bytes_)


def main() -> None:
    library, seconds, seed, *paths = sys.argv[1:]
    native = declare(ctypes.CDLL(library))
    random = np.random.default_rng(int(seed))
    corpus = [Path(path).read_bytes() for path in paths]
    views = (
        ViewSpec("a", 37),
        ViewSpec("b", 224, interpolation="bicubic", draw_id=1),
        ViewSpec("c", 32, kind="whole"),
    )
    specs, pool = view_array(views), native.rg_pool_open(2)
    sets = [[np.zeros((8, spec.size, spec.size, 3), dtype=np.uint8) for spec in views] for _ in range(2)]
    tried = decoded = ours = 0
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        native.rg_force_level(int(random.integers(3)))
        records = [mutate(corpus[random.integers(len(corpus))], random) for _ in range(8)]
        # Exactly as large as the record, so that reading one byte too many is seen.
        arrays = [np.frombuffer(record, dtype=np.uint8).copy() for record in records]
        jobs = np.zeros(8, dtype=JOB)
        jobs["data"], jobs["size"] = [a.ctypes.data for a in arrays], [len(a) for a in arrays]
        jobs["slot"], jobs["index"] = np.arange(8), random.integers(1 << 31, size=8)
        jobs["flags"] = random.choice([0, WHOLE_IMAGE, 4, 4 | WHOLE_IMAGE], size=8)
        general = jobs.copy()
        general["flags"] |= LIBJPEG_ONLY
        for each, outs in zip((jobs, general), sets, strict=True):
            pointers = np.array([out.ctypes.data for out in outs], dtype=np.uint64)
            native.rg_decode(
                pool, each.ctypes.data, 8, specs.ctypes.data, len(views), pointers.ctypes.data, tried, 0, 4_000_000
            )
        assert ((jobs["status"] >= 0) & (jobs["status"] <= 5)).all()
        for at in range(8):
            same = all(jobs[at][field] == general[at][field] for field in ("status", "width", "height"))
            if same and jobs[at]["status"] == OK:
                same = all(np.array_equal(found[at], expected[at]) for found, expected in zip(*sets, strict=True))
            assert same, f"not as libjpeg: {jobs[at]} {general[at]} {records[at].hex()}"
        tried += 8
        decoded += int((jobs["status"] == OK).sum())
        ours += int(((jobs["status"] == OK) & (jobs["decoder"] == BASELINE)).sum())
    native.rg_pool_close(pool)
    print(tried, decoded, ours)


if __name__ == "__main__":
    main()
