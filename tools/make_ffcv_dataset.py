"""Pack images into one `.beton` file, which FFCV and our own loaders read at any position.

Writes DEST.beton, DEST.manifest.json (data hash, checksums, classes) and DEST.rejected.jsonl (bad files and why). The
bytes depend on the images and the settings only, not on the number of workers. Nothing appears under the final names
before it is whole.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.beton import BetonReader, BetonWriter, page_size_for
from pipeline.manifest import manifest_path, rejected_path
from tools.support.cli import TOO_MANY_BAD, make_parser, parse, run_main
from tools.support.packing import (
    SHUFFLE_SEED,
    Source,
    Tally,
    add_packing_flags,
    check_packing_flags,
    make_records,
    open_source,
    sync_folder,
    with_progress,
    write_text,
)


def main(argv: Sequence[str]) -> int:
    """Pack SOURCE into DEST; returns the exit code.

    Raises:
        ValueError: the user's mistake, in one line.
    """
    started = time.perf_counter()
    parser = make_parser("Pack images into one .beton file, with checksums and a list of bad files beside it.")
    add_packing_flags(parser)
    parser.add_argument("dest", metavar="DEST.beton", help="file to write")
    options = parse(parser, argv)
    check_packing_flags(options)
    dest = Path(options.dest)
    finals = _final_paths(dest, options.overwrite)
    source = open_source(options.source)
    if options.shuffle:
        source = source.shuffled(SHUFFLE_SEED)
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = [path.with_name(f".{path.name}.partial-{os.getpid()}") for path in finals]
    try:
        tally = _write(source, partial[0], options.max_resolution, options.jpeg_quality, options.workers)
        problem = tally.too_many(len(source), options.max_bad)
        if problem is None and not tally.sources:
            raise ValueError(f"not one image of {options.source} can be used; the first: {tally.rejected[0]}")
        write_text(partial[2], tally.rejected_lines())
        if problem is not None:
            # The list of bad files is whole and is what the user needs now; of the packed file nothing stays.
            os.replace(partial[2], finals[2])
            print(f"{problem}; all are listed in {finals[2]}", file=sys.stderr)
            return TOO_MANY_BAD
        settings = {
            "max_resolution": options.max_resolution,
            "jpeg_quality": options.jpeg_quality,
            "shuffle": options.shuffle,
        }
        manifest = tally.manifest(BetonReader(partial[0]).fingerprint(), source.classes, settings)
        write_text(partial[1], manifest.to_json())
        # The packed file comes last: where it is, the other two are.
        for temporary, final in reversed(list(zip(partial, finals, strict=True))):
            os.replace(temporary, final)
        sync_folder(dest.parent)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    _report(tally, source, dest, manifest.data_hash, time.perf_counter() - started)
    return 0


def _final_paths(dest: Path, overwrite: bool) -> list[Path]:
    if dest.suffix != ".beton":
        raise ValueError(f"DEST is {dest}, but packed files end in .beton; write {dest}.beton")
    finals = [dest, manifest_path(dest), rejected_path(dest)]
    for path in finals:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; choose another DEST")
        if path.exists() and not overwrite:
            raise ValueError(f"{path} is there already; add --overwrite to replace it or choose another DEST")
    return finals


def _write(source: Source, path: Path, max_side_px: int, quality: int, workers: int) -> Tally:
    tally = Tally()
    page_size = page_size_for(max_side_px)
    with open(path, "xb") as file:
        writer = BetonWriter(file, len(source), page_size)
        records = make_records(source, max_side_px, quality, page_size, workers)
        for index, made in with_progress(records, len(source)):
            name, label = source.names[index], int(source.labels[index])
            if isinstance(made, str):
                tally.rejected.append((name, made))
            else:
                writer.append(made.data, made.width, made.height, label)
                tally.add(name, label, made)
        writer.finish()
        file.flush()
        os.fsync(file.fileno())
    return tally


def _report(tally: Tally, source: Source, dest: Path, data_hash: str, seconds: float) -> None:
    count, bad = len(tally.sources), len(tally.rejected)
    classes = f"{len(source.classes)} classes" if source.classes else "no classes"
    print(
        f"{dest}: {count} images, {classes}, {dest.stat().st_size / 2**20:.1f} MiB, {tally.kept} stored as they were, "
        f"{count - tally.kept} coded anew, {bad} refused{f' (see {rejected_path(dest)})' if bad else ''}; "
        f"data hash {data_hash[:12]}; {seconds:.1f} s, {len(source) / seconds:.0f} images/s"
    )


if __name__ == "__main__":
    run_main(main)
