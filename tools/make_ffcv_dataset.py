"""Pack images into one `.beton` file, which FFCV and our own loaders read at any position.

Writes DEST.beton, DEST.manifest.json (data hash, checksums, classes) and DEST.rejected.jsonl (bad files and why). The
bytes depend on the images and the settings only, not on the number of workers. Nothing appears under the final names
before it is whole. With `--part I/N` it writes DEST-I-of-N.beton and its two companions, and when all N parts are there
DEST.manifest.json over them; `--data 'DEST-*-of-N.beton'` then gives the epochs of the one file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.atomic import remove, replacing
from pipeline.beton import BetonReader, BetonWriter, page_size_for
from pipeline.claim import claimed
from pipeline.endings import PACKED
from pipeline.manifest import manifest_path, rejected_path
from tools.support.class_list import open_chosen
from tools.support.cli import make_parser, parse, run_main
from tools.support.kept import forget, identity, keep, take_up
from tools.support.packed_parts import PackedParts
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
from tools.support.source import Source
from train.errors import EXIT_BAD_IMAGES
from train.flags import OneLineParser


def main(argv: Sequence[str]) -> int:
    """Pack SOURCE into DEST; returns the exit code.

    Raises:
        ValueError: the user's mistake, in one line.
    """
    options = parse(_parser(), argv)
    check_packing_flags(options)
    if Path(options.dest).suffix != PACKED:
        raise ValueError(f"DEST is {options.dest}, but packed files end in {PACKED}; write {options.dest}{PACKED}")
    if options.part or options.engine == "ray":
        return pack_in_parts(PARTS, options)
    return _pack_whole(Path(options.dest), options)


def _parser() -> OneLineParser:
    parser = make_parser("Pack images into one .beton file, with checksums and a list of bad files beside it.")
    add_packing_flags(parser)
    parser.add_argument("dest", metavar="DEST.beton", help="file to write")
    return parser


def _opened(options: argparse.Namespace) -> tuple[Source, dict[str, Any]]:
    """The images in the order in which they are packed, and the settings that the manifest records."""
    source, chosen = open_chosen(options.source, options.classes)
    if options.shuffle:
        source = source.shuffled(SHUFFLE_SEED)
    Path(options.dest).parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "max_resolution": options.max_resolution,
        "jpeg_quality": options.jpeg_quality,
        "shuffle": options.shuffle,
        **chosen,
    }
    return source, settings


def _pack_whole(dest: Path, options: argparse.Namespace) -> int:
    """Pack everything into one file; returns the exit code."""
    started = time.perf_counter()
    finals = _final_paths(dest, options.overwrite)
    source, settings = _opened(options)
    key = identity(source, settings)
    # The packed file gets its name last: where it is, the other two are.
    with (
        _claimed(dest, finals),
        replacing(finals[0]) as packed,
        replacing(finals[1]) as about,
        replacing(finals[2]) as refused,
    ):
        # Asked again: whoever had the claim before may have packed it meanwhile.
        _final_paths(dest, options.overwrite)
        kept = take_up(dest, key, packed)
        tally = kept[0] if kept else _write(source, packed, options)
        problem = tally.too_many(len(source), options.max_bad)
        if problem is None and not tally.sources:
            raise ValueError(f"not one image of {options.source} can be used; the first: {tally.rejected[0]}")
        refused.write_text(tally.rejected_lines(), encoding="utf-8")
        if problem is not None:
            # The list of bad files is whole and is what the user needs now; what is packed waits for another limit.
            keep(dest, key, packed, tally, {})
            print(f"{problem}; all are listed in {finals[2]}", file=sys.stderr)
            return EXIT_BAD_IMAGES
        manifest = tally.manifest(BetonReader(packed).fingerprint(), source.classes, settings)
        about.write_text(manifest.to_json(), encoding="utf-8")
    forget(dest)
    _report(tally, source, dest, manifest.data_hash, time.perf_counter() - started)
    print(next_command(dest, len(tally.sources)))
    return 0


def _claimed(path: Path, finals: Sequence[Path]) -> AbstractContextManager[None]:
    return claimed(path.with_name(f".{path.name}.lock"), f"DEST {path}", finals)


def _part_writer(files: PackedParts, options: argparse.Namespace, settings: dict[str, Any]) -> Write:
    """What packs some images as a part; a part without a usable image has no packed file."""

    def write(source: Source, number: int, _: int, more: dict[str, Any]) -> None:
        started = time.perf_counter()
        path = files.path(number)
        finals = [path, manifest_path(path), rejected_path(path)]
        with _claimed(path, finals):
            # The manifest gets its name last: a part is there when it is.
            remove(finals[1])
            with replacing(finals[1]) as about, replacing(finals[0]) as packed, replacing(finals[2]) as refused:
                tally = _write(source, packed, options)
                refused.write_text(tally.rejected_lines(), encoding="utf-8")
                fingerprint = BetonReader(packed).fingerprint() if tally.sources else ""
                if not tally.sources:
                    remove(packed)
                    remove(path)
                manifest = tally.manifest(fingerprint, source.classes, settings, {**more, **digests_entry(tally)})
                about.write_text(manifest.to_json(), encoding="utf-8")
        if tally.sources:
            _report(tally, source, path, manifest.data_hash, time.perf_counter() - started)

    return write


def _final_paths(dest: Path, overwrite: bool) -> list[Path]:
    finals = [dest, manifest_path(dest), rejected_path(dest)]
    for path in finals:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; choose another DEST")
        # The list that a refused run left belongs to no file and may go.
        alone = path == finals[2] and not dest.exists()
        if path.exists() and not overwrite and not alone:
            raise ValueError(f"{path} is there already; add --overwrite to replace it or choose another DEST")
    return finals


def _write(source: Source, path: Path, options: argparse.Namespace) -> Tally:
    tally = Tally(passed_over=source.passed_over)
    page_size = page_size_for(options.max_resolution)
    with open(path, "xb") as file:
        writer = BetonWriter(file, len(source), page_size)
        records = make_records(source, options.max_resolution, options.jpeg_quality, page_size, options.workers)
        for index, made in with_progress(records, len(source)):
            name, label = source.names[index], int(source.labels[index])
            if isinstance(made, str):
                tally.rejected.append((name, made))
            else:
                writer.append(made.data, made.width, made.height, label)
                tally.add(name, label, made)
        writer.finish()
    return tally


def _report(tally: Tally, source: Source, dest: Path, data_hash: str, seconds: float) -> None:
    count, bad = len(tally.sources), len(tally.rejected)
    classes = f"{len(source.classes)} classes" if source.classes else "no classes"
    print(
        f"{dest}: {count} images, {classes}, {dest.stat().st_size / 2**20:.1f} MiB, {tally.kept} stored as they were, "
        f"{count - tally.kept} coded anew, {bad} refused{f' (see {rejected_path(dest)})' if bad else ''}; "
        f"{tally.passed_over_words()}data hash {data_hash[:12]}; {seconds:.1f} s, {len(source) / seconds:.0f} images/s"
    )


PARTS = PartPacker("make_ffcv_dataset", _opened, PackedParts, _part_writer)


if __name__ == "__main__":
    run_main(main)
