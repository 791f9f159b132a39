"""Pack images into tar shards that webdataset and our own loader stream, with an index of the samples of each shard.

Writes DEST_DIR with shard-000000.tar, ... and index.json, and DEST_DIR.rejected.jsonl (bad files and why). Images are
treated exactly as by make_ffcv_dataset.py. Nothing appears under the final name before it is whole. With `--part I/N`
it writes the shards of one part into DEST_DIR, and index.json when all N parts are there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.atomic import remove, replacing
from pipeline.beton import page_size_for
from pipeline.claim import claimed
from pipeline.shards import INDEX_NAME, ShardWriter, fingerprint, write_index
from tools.support.class_list import open_chosen
from tools.support.cli import make_parser, parse, run_main
from tools.support.kept import forget, identity, keep, take_up
from tools.support.packing import (
    SHUFFLE_SEED,
    Tally,
    add_packing_flags,
    check_packing_flags,
    make_records,
    next_command,
    with_progress,
)
from tools.support.part_commands import PartPacker, pack_in_parts
from tools.support.parts import Write, digests_entry
from tools.support.shard_parts import ShardParts
from tools.support.source import Source
from train.errors import EXIT_BAD_IMAGES
from train.flags import OneLineParser


def main(argv: Sequence[str]) -> int:
    """Pack SOURCE into shards; returns the exit code.

    Raises:
        ValueError: the user's mistake, in one line.
    """
    options = parse(_parser(), argv)
    check_packing_flags(options)
    if not 0 < options.shard_size_mib <= 1 << 20:
        raise ValueError(f"--shard-size-mib {options.shard_size_mib} is out of range; choose a number above 0")
    if options.part or options.engine == "ray":
        return pack_in_parts(PARTS, options)
    return _pack_whole(Path(os.path.abspath(options.dest)), options)


def _parser() -> OneLineParser:
    parser = make_parser("Pack images into tar shards with an index, for streaming.")
    add_packing_flags(parser)
    parser.add_argument("dest", metavar="DEST_DIR", help="folder to make")
    parser.add_argument("--shard-size-mib", type=float, default=256, metavar="MIB", help="largest size of a shard")
    return parser


def _opened(options: argparse.Namespace) -> tuple[Source, dict[str, Any]]:
    """The images in the order in which they are packed, and the settings that the index records."""
    source, chosen = open_chosen(options.source, options.classes)
    if options.shuffle:
        source = source.shuffled(SHUFFLE_SEED)
    Path(os.path.abspath(options.dest)).parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "max_resolution": options.max_resolution,
        "jpeg_quality": options.jpeg_quality,
        "shuffle": options.shuffle,
        "shard_size_mib": options.shard_size_mib,
        **chosen,
    }
    return source, settings


def _pack_whole(dest: Path, options: argparse.Namespace) -> int:
    """Pack everything in one process; returns the exit code."""
    started = time.perf_counter()
    rejected = dest.with_name(f"{dest.name}.rejected.jsonl")
    _check_dest(dest, rejected, options.overwrite)
    source, settings = _opened(options)
    key = identity(source, settings)
    lock, finals = dest.with_name(f".{dest.name}.lock"), (rejected, dest)
    with claimed(lock, f"DEST_DIR {dest}", finals), replacing(rejected) as partial_list, replacing(dest) as partial:
        # Asked again: whoever had the claim before may have packed it meanwhile.
        _check_dest(dest, rejected, options.overwrite)
        tally, shards = take_up(dest, key, partial) or _write(source, partial, options)
        problem = tally.too_many(len(source), options.max_bad)
        if problem is None and not tally.sources:
            raise ValueError(f"not one image of {options.source} can be used; the first: {tally.rejected[0]}")
        partial_list.write_text(tally.rejected_lines(), encoding="utf-8")
        if problem is not None:
            keep(dest, key, partial, tally, shards)  # what is at DEST stays
            print(f"{problem}; all are listed in {rejected}", file=sys.stderr)
            return EXIT_BAD_IMAGES
        manifest = tally.manifest(fingerprint(shards), source.classes, settings)
        write_index(partial, manifest, shards)
    forget(dest)
    seconds = time.perf_counter() - started
    print(
        f"{dest}: {len(tally.sources)} images in {len(shards['shards'])} shards, {tally.kept} stored as they were, "
        f"{len(tally.rejected)} refused; {tally.passed_over_words()}"
        f"data hash {manifest.data_hash[:12]}; {seconds:.1f} s"
    )
    if len(source.classes) > 1 and not options.shuffle:
        print("the shards hold class after class; for training from streams pack with --shuffle, which mixes them")
    print(next_command(dest, len(tally.sources)))
    return 0


def _part_writer(files: ShardParts, options: argparse.Namespace, settings: dict[str, Any]) -> Write:
    """What packs some images as a part, first into a hidden folder beside the finished shards."""

    def write(source: Source, number: int, first: int, more: dict[str, Any]) -> None:
        started = time.perf_counter()
        files.dest.mkdir(exist_ok=True)
        made = files.dest / f".{files.prefix(number)}.tmp"
        with claimed(files.dest / f".{files.prefix(number)}.lock", f"part {files.path(number)}"):
            # A part has one writer, so what lies here is of a killed one.
            remove(made)
            try:
                tally, shards = _write(source, made, options, files.prefix(number), first)
                manifest = tally.manifest(
                    fingerprint(shards), source.classes, settings, {**more, **digests_entry(tally), **shards}
                )
                files.put(made, number, manifest, tally.rejected_lines())
            finally:
                remove(made)
        print(
            f"{files.path(number)}: {len(tally.sources)} images in {len(shards['shards'])} shards, "
            f"{len(tally.rejected)} refused; {time.perf_counter() - started:.1f} s"
        )

    return write


def _check_dest(dest: Path, rejected: Path, overwrite: bool) -> None:
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"{dest} is a file; choose another DEST_DIR")
    if dest.is_dir() and any(dest.iterdir()):
        if not overwrite:
            raise ValueError(f"{dest} is not empty; add --overwrite to replace it or choose another DEST_DIR")
        # --overwrite removes the whole folder, so it must be one that this command made.
        if not (dest / INDEX_NAME).exists():
            raise ValueError(f"{dest} holds other things than shards and is not overwritten; choose another DEST_DIR")
    # The list that a refused run left belongs to no shards and may go.
    if rejected.exists() and not overwrite and dest.exists():
        raise ValueError(f"{rejected} is there already; add --overwrite to replace it or choose another DEST_DIR")


def _write(
    source: Source, folder: Path, options: argparse.Namespace, prefix: str = "shard", first: int = 0
) -> tuple[Tally, dict[str, Any]]:
    folder.mkdir()
    tally = Tally(passed_over=source.passed_over)
    writer = ShardWriter(folder, int(options.shard_size_mib * 2**20), prefix, first)
    # The same limit on a record as in a packed file, so that both hold the same records.
    limit = page_size_for(options.max_resolution)
    records = make_records(source, options.max_resolution, options.jpeg_quality, limit, options.workers)
    try:
        for index, made in with_progress(records, len(source)):
            name, label = source.names[index], int(source.labels[index])
            if isinstance(made, str):
                tally.rejected.append((name, made))
            else:
                writer.append(made.data, label)
                tally.add(name, label, made)
        return tally, writer.finish()
    finally:
        # After a failure a shard is still open.
        writer.abandon()


PARTS = PartPacker("make_webdataset", _opened, ShardParts, _part_writer)


if __name__ == "__main__":
    run_main(main)
