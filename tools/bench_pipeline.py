"""Source images per second from a packed file to two views: our loaders, stock FFCV, and a DataLoader with PIL.

    python tools/bench_pipeline.py --photos FOLDER      # packs them at 400 px and repeats them to a long epoch
    python tools/bench_pipeline.py --data FILE.beton
    python tools/bench_pipeline.py --photos FOLDER --memory-share 0.25   # as if a quarter of it fitted into memory
    python tools/bench_pipeline.py --photos FOLDER --levers              # what each device of the loader is worth

The contenders take turns. Every one of them decodes each image anew, so repeated photos are no easier than others.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from pipeline import augment
from pipeline.beton import BetonReader, BetonWriter
from pipeline.decoder import JOB, MAX_PIXELS, native_library, pil_views, view_array
from pipeline.images import decode_rgb
from pipeline.interface import Pipeline, PipelineConfig
from pipeline.loaders import build_pipeline
from pipeline.manifest import manifest_path
from pipeline.records import make_record
from pipeline.stores import PackedStore, list_images
from tools import cli
from tools.benchmarking import Report, Summary, add_common_flags, choose_device, usable_cores
from tools.packing import Tally
from tools.pipeline_bounded import bounded_conclusion, measure_bounded
from tools.pipeline_contenders import crops_transform, dataloader_epoch, moco_v2_transform, stock_ffcv_epoch
from tools.pipeline_levers import measure_levers

CONTENDERS = (
    "stock-ffcv", "pil-crops", "pil-full", "ffcv", "folder", "dali", "ffcv-augment", "ffcv-augment-bf16",
)  # fmt: skip
LARGEST_RECORD = 1 << 26
EXPLAINED = {
    "stock-ffcv": "stock FFCV, one decode per view",
    "pil-crops": "DataLoader, PIL, crops only",
    "pil-full": "DataLoader, PIL, whole MoCo v2 augmentation",
    "ffcv": "ours through FFCV's Loader, crops only",
    "folder": "ours without FFCV, crops only",
    "dali": "DALI in our order, crops only",
    "ffcv-augment": "ours through FFCV's Loader, whole MoCo v2 augmentation on the CPU",
    "ffcv-augment-bf16": "ours through FFCV's Loader, whole MoCo v2 augmentation on the CPU, bfloat16",
}
METRIC = "throughput"


def pack_repeated(photos: Path, target: Path, side_px: int, quality: int, images: int) -> None:
    """Pack a folder's photos so that the longest side is at most `side_px`, again and again up to `images` records."""
    files, _ = list_images(photos)
    records = [make_record(path.read_bytes(), side_px, quality, LARGEST_RECORD) for path in files]
    tally = Tally()
    with target.open("wb") as file:
        writer = BetonWriter(file, images)
        for number in range(images):
            record = records[number % len(records)]
            writer.append(record.data, record.width, record.height)
            tally.add(files[number % len(files)].name, -1, record)
        writer.finish()
    # With checksums a loader need not decode a record to its end to know that it is whole.
    manifest_path(target).write_text(tally.manifest(BetonReader(target).fingerprint(), (), {}).to_json())


def check(data: Path, config: PipelineConfig, loaders: Sequence[str]) -> None:
    """Compare the first batches of our loaders with the reference, so that only right pixels are timed.

    Raises:
        RuntimeError: a loader's views differ from PIL's by more than resampling explains.
    """
    store = PackedStore(str(data))
    for name in loaders:
        pipeline = build_pipeline(name, replace(config, global_batch=16))
        batch = next(iter(pipeline))
        pixels = [decode_rgb(store.read(index)) for index in batch.index.tolist()]
        gaps = []
        for row, index in enumerate(batch.index.tolist()):
            expected = pil_views(pixels[row], config.views, config.seed, 0, index)
            for spec, view in zip(config.views, expected, strict=True):
                gaps.append(np.abs(batch.views[spec.name][row].permute(1, 2, 0).cpu().numpy().astype(int) - view))
        mean = float(np.mean(gaps))
        if mean > (1.5 if name == "dali" else 0.5):
            raise RuntimeError(f"{name}: its views differ from PIL's by {mean:.2f} grey levels on average")
        pipeline.close()


def pipeline_epoch(pipeline: Pipeline, device: torch.device) -> Callable[[], int]:
    """One epoch of a pipeline, a new one each call; returns how many images were delivered."""
    epoch = 0

    def run() -> int:
        nonlocal epoch
        epoch += 1
        pipeline.set_epoch(epoch)
        count = 0
        for batch in pipeline:
            count += len(batch.index)
            del batch  # its buffers are free for the next
        if device.type == "cuda":
            torch.cuda.synchronize()
        return count

    return run


def decoder_us(data: Path, config: PipelineConfig, images: int = 512) -> tuple[float, float]:
    """Microseconds per image of the decoder alone, by wall clock: on one thread, and on all of them."""
    library = native_library()
    if library is None:
        return float("nan"), float("nan")
    store, specs = PackedStore(str(data)), view_array(config.views)
    count = min(images, len(store.labels))
    outs = [np.zeros((count, spec.size, spec.size, 3), dtype=np.uint8) for spec in config.views]
    pointers = np.array([out.ctypes.data for out in outs], dtype=np.uint64)
    jobs, index = np.zeros(count, dtype=JOB), np.arange(count)
    jobs["index"], jobs["slot"] = index, index
    store.fill(jobs, index)
    found = []
    for threads in (1, config.workers):
        pool = library.rg_pool_open(threads)
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            library.rg_decode(
                pool, jobs.ctypes.data, count, specs.ctypes.data, len(outs), pointers.ctypes.data, 0, 0, MAX_PIXELS
            )
            seconds.append(time.perf_counter() - started)
        library.rg_pool_close(pool)
        found.append(float(np.median(seconds[1:])) / count * 1e6)
    return found[0], found[1]


def conclusion(rates: dict[str, Summary], alone_us: float, workers: int) -> str:
    """The bottleneck line: what limits, by how much, which flag changes it."""
    ours = rates.get("ffcv") or rates.get("folder")
    if ours is None:
        return "bottleneck: not known, none of our loaders was measured (--contenders ffcv folder)"
    ratios = [
        f"{ours.median / rates[other].median:.2f} times {EXPLAINED[other]}"
        for other in ("stock-ffcv", "pil-crops", "pil-full")
        if other in rates
    ]
    if "ffcv-augment" in rates and "pil-full" in rates:
        ratio = rates["ffcv-augment"].median / rates["pil-full"].median
        ratios.append(f"{ratio:.2f} times the same DataLoader with the augmentation on the CPU too")
    overhead = 1e6 / ours.median / alone_us - 1
    limit = (
        f"bottleneck: JPEG decoding and resizing on {workers} threads ({alone_us:.0f} us an image, "
        f"{1e6 / alone_us:.0f} images/s); the loader adds {overhead:.1%}; "
        "more cores raise it (--workers), smaller packed photos too"
    )
    return "; ".join([limit, *ratios])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = cli.make_parser("Measure images per second from a packed file to two views.")
    parser.add_argument("--data", type=Path, default=None, help="a packed file")
    parser.add_argument("--photos", type=Path, default=None, help="a folder of photos to pack and repeat instead")
    parser.add_argument("--max-resolution", type=int, default=400, help="longest side when packing --photos, in pixels")
    parser.add_argument("--jpeg-quality", type=int, default=90, help="quality when packing --photos")
    parser.add_argument("--images", type=int, default=8400, help="images of an epoch when packing --photos")
    parser.add_argument("--slow-images", type=int, default=1024, help="images of an epoch of the PIL contenders")
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    parser.add_argument("--batch", type=int, default=256, help="images of a batch")
    parser.add_argument("--workers", type=int, default=0, help="threads or processes that decode; 0: one a core")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, help="what to measure")
    parser.add_argument("--memory-share", type=float, default=0.0, metavar="SHARE",
                        help="instead, as if only this share of the file fitted into memory; 0: all of it")  # fmt: skip
    parser.add_argument("--levers", action="store_true", help="instead, change one device of our loader at a time")
    add_common_flags(parser)
    parser.set_defaults(rounds=5, max_seconds=600.0)
    return cli.parse(parser, argv)


def make_contenders(
    options, data: Path, config: PipelineConfig, opened: list[Pipeline]
) -> dict[str, Callable[[], int]]:  # type: ignore[no-untyped-def]
    """Name -> one epoch, for the contenders that are installed; says which are not."""
    slow, workers = max(options.slow_images, options.batch), config.workers

    def ours(loader: str, **settings: object) -> Callable[[], int]:
        opened.append(build_pipeline(loader, replace(config, **settings)))  # type: ignore[arg-type]
        return pipeline_epoch(opened[-1], config.device)

    makers: dict[str, Callable[[], Callable[[], int]]] = {
        "stock-ffcv": lambda: stock_ffcv_epoch(data, options.size, options.batch, workers),
        "pil-crops": lambda: dataloader_epoch(data, crops_transform(options.size), options.batch, workers, slow),
        "pil-full": lambda: dataloader_epoch(data, moco_v2_transform(options.size), options.batch, workers, slow),
        "ffcv": lambda: ours("ffcv"),
        "folder": lambda: ours("folder"),
        "dali": lambda: ours("dali"),
        "ffcv-augment": lambda: ours("ffcv", augment="mocov2"),
        "ffcv-augment-bf16": lambda: ours("ffcv", augment="mocov2", dtype=torch.bfloat16),
    }
    made = {}
    for name in options.contenders:
        try:
            made[name] = makers[name]()
        except (ImportError, ValueError) as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
    return made


def main(argv: Sequence[str]) -> int:
    """Measure what the flags ask for."""
    options = parse(argv)
    if (options.data is None) == (options.photos is None):
        raise ValueError("give either --data FILE.beton or --photos FOLDER")
    if options.levers and options.memory_share:
        raise ValueError("--levers and --memory-share are two measurements; give one of them")
    if not 0 <= options.memory_share < 1:
        raise ValueError(f"--memory-share {options.memory_share} is not a share of the file; choose 0.25, say")
    device = choose_device(options.device)
    workers = options.workers or usable_cores()
    report = Report("bench_pipeline", device)
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder) / "photos.beton"
        if options.photos is not None:
            pack_repeated(options.photos, data, options.max_resolution, options.jpeg_quality, options.images)
        reader = BetonReader(data)
        source = "a packed file" if options.photos is None else (
            f"{len(list_images(options.photos)[0])} photos packed at {options.max_resolution} px, quality "
            f"{options.jpeg_quality}, repeated"
        )  # fmt: skip
        setting = (
            f"{source}; {len(reader)} images of {reader.sizes.mean() / 1024:.0f} KiB and "
            f"{(reader.widths.astype(float) * reader.heights).mean() / 1e6:.3f} Mpx; two views of {options.size} px; "
            f"batch {options.batch}; {workers} workers; warm cache"
        )
        views = tuple(replace(spec, size=options.size) for spec in augment.view_specs("mocov2", options.size))
        config = PipelineConfig(str(data), views, options.batch, workers=workers, device=device)
        if options.levers:
            check(data, config, ["folder"])
            line = measure_levers(report, data, config, options.rounds, options.max_seconds, setting)
            report.finish(line, options.output, write=not options.no_csv)
            return 0
        if options.memory_share:
            data = data.resolve()
            check(data, config, ["folder"])
            found = measure_bounded(
                report, data, config, len(reader), options.memory_share, options.rounds,
                setting.removesuffix("; warm cache"),
            )  # fmt: skip
            report.finish(bounded_conclusion(found), options.output, write=not options.no_csv)
            return 0
        opened: list[Pipeline] = []
        contenders = make_contenders(options, data, config, opened)
        check(data, config, [name for name in ("ffcv", "folder", "dali") if name in contenders])
        images_per_s: dict[str, list[float]] = {name: [] for name in contenders}
        started = time.perf_counter()
        for turn in range(options.rounds + 1):  # the first turn warms up
            for name, epoch in contenders.items():
                begun = time.perf_counter()
                count = epoch()
                if turn:
                    images_per_s[name].append(count / (time.perf_counter() - begun))
            if turn >= 3 and time.perf_counter() - started > options.max_seconds:
                break
        one, alone = decoder_us(data, config)
        rates = {}
        for name, figures in images_per_s.items():
            slow = f"; epochs of {options.slow_images} images" if name.startswith("pil") else ""
            rates[name] = report.add(EXPLAINED[name], METRIC, "images/s", figures, setting + slow)
        report.add("our decoder alone", "time on one thread", "us/image", [one], setting)
        for pipeline in opened:
            pipeline.close()
    report.finish(conclusion(rates, alone, workers), options.output, write=not options.no_csv)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
