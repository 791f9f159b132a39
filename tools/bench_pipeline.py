"""Source images per second from a packed file to their views: our loaders, stock FFCV, and PyTorch's DataLoader.

    python tools/bench_pipeline.py --photos FOLDER      # packs them at 400 px and repeats them to a long epoch
    python tools/bench_pipeline.py --data FILE.beton
    python tools/bench_pipeline.py --photos FOLDER --memory-share 0.25   # as if a quarter of it fitted into memory
    python tools/bench_pipeline.py --photos FOLDER --levers              # what each device of the loader is worth
    python tools/bench_pipeline.py --photos FOLDER --multi-crop          # two views of 224 px and six of 96 px
    python tools/bench_pipeline.py --photos FOLDER --simd avx2           # as on a processor without AVX-512

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
from pipeline.decoder import native_library, pil_views
from pipeline.epoch import EpochPlan
from pipeline.images import decode_rgb
from pipeline.interface import Pipeline, PipelineConfig
from pipeline.layouts import JOB, view_array
from pipeline.listing import list_images
from pipeline.loaders import build_pipeline
from pipeline.manifest import manifest_path
from pipeline.records import make_record
from pipeline.refusal import MAX_PIXELS
from pipeline.simd import LEVELS, at_most, level
from pipeline.stores import PackedStore
from tools.bench.pipeline_bounded import bounded_conclusion, measure_bounded
from tools.bench.pipeline_contenders import (
    MULTI_CROP,
    crops_transform,
    dataloader_epoch,
    moco_v2_transform,
    moco_v2_transform_v2,
    stock_ffcv_epoch,
)
from tools.bench.pipeline_levers import measure_levers
from tools.bench.rows import Report, Summary
from tools.bench.timing import add_common_flags, choose_device
from tools.support import cli
from tools.support.packing import Tally
from tools.wheel.loader import Loader
from train.versions import usable_cores

CONTENDERS = (
    "stock-ffcv",
    "pil-crops",
    "pil-full",
    "v2-full",
    "ffcv",
    "folder",
    "dali",
    "ffcv-augment",
    "ffcv-augment-bf16",
    "own-loop",
)
FOR_ANY_VIEWS = ("stock-ffcv", "ffcv", "folder")
"""The contenders that cut other views than the two of MoCo v2."""
LARGEST_RECORD = 1 << 26
RING = 4  # batches of buffers that the decoder alone writes in turn, like our loaders
EXPLAINED = {
    "stock-ffcv": "stock FFCV, one decode per view",
    "pil-crops": "DataLoader, PIL, crops only",
    "pil-full": "DataLoader, PIL, whole MoCo v2 augmentation",
    "v2-full": "DataLoader, torchvision v2, whole MoCo v2 augmentation",
    "ffcv": "ours through FFCV's Loader, crops only",
    "folder": "ours without FFCV, crops only",
    "dali": "DALI in our order, crops only",
    "ffcv-augment": "ours through FFCV's Loader, whole MoCo v2 augmentation on the CPU",
    "ffcv-augment-bf16": "ours through FFCV's Loader, whole MoCo v2 augmentation on the CPU, bfloat16",
    "own-loop": "regatta.Loader in a loop of one's own, whole MoCo v2 augmentation",
}
SLOW = ("pil-crops", "pil-full", "v2-full")
"""The contenders with shorter epochs, since they would take most of the time."""
METRIC = "throughput"


def pack_repeated(photos: Path, target: Path, side_px: int, quality: int, images: int) -> None:
    """Pack a folder's photos so that the longest side is at most `side_px`, again and again up to `images` records."""
    files = list_images(photos).files
    # Coded once; only the finished record is repeated.
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
        # A small batch: this looks at pixels, and PIL is slow.
        pipeline = build_pipeline(name, replace(config, global_batch=16))
        batch = next(iter(pipeline))
        pixels = [decode_rgb(store.read(index)) for index in batch.index.tolist()]
        gaps = []
        for row, index in enumerate(batch.index.tolist()):
            expected = pil_views(pixels[row], config.views, config.seed, 0, index)
            for spec, view in zip(config.views, expected, strict=True):
                gaps.append(np.abs(batch.views[spec.name][row].permute(1, 2, 0).cpu().numpy().astype(int) - view))
        # Views of several sizes do not stack.
        mean = float(np.concatenate([gap.ravel() for gap in gaps]).mean())
        # DALI has its own decoder and resampling, so its pixels differ a little more.
        if mean > (1.5 if name == "dali" else 0.5):
            raise RuntimeError(f"{name}: its views differ from PIL's by {mean:.2f} grey levels on average")
        pipeline.close()


def pipeline_epoch(pipeline: Pipeline, device: torch.device) -> Callable[[], int]:
    """One epoch of a pipeline, a new one each call; returns how many images were delivered."""
    epoch = 0

    def run() -> int:
        nonlocal epoch
        # Another epoch at each call, so that no order and no crop is repeated.
        epoch += 1
        pipeline.set_epoch(epoch)
        count = 0
        for batch in pipeline:
            count += len(batch.index)
            del batch  # its buffers are free for the next
        if device.type == "cuda":
            # The copies to the device belong to delivering.
            torch.cuda.synchronize()
        return count

    return run


def own_loop_epoch(data: Path, config: PipelineConfig, size: int) -> Callable[[], int]:
    """One epoch of `regatta.Loader` as a user's own loop sees it; returns how many images were delivered."""
    loader = Loader(
        data,
        size=size,
        augment="mocov2",
        batch_size=config.global_batch,
        device=config.device,
        workers=config.workers,
    )
    return lambda: sum(len(batch.index) for batch in loader)


class DecoderAlone:
    """Decoding and resizing of whole epochs and nothing else: one call of the native decoder for all their images.

    It does the very work of a loader's epochs (the same images in the same order, the same crops, as many buffers
    written in turn), so what a loader takes longer is its own overhead.
    """

    def __init__(self, data: Path, config: PipelineConfig, threads: int):
        library = native_library(instead=None)
        assert library is not None
        self._library, self._pool = library, library.rg_pool_open(threads)
        self._store, self._config = PackedStore(str(data)), config
        self._plan = EpochPlan(config, len(self._store.labels))
        self._specs, self._rows = view_array(config.views), RING * config.global_batch
        # As many buffers as a loader writes in turn: one that stays in the cache would flatter the decoder.
        self._outs = [np.zeros((self._rows, spec.size, spec.size, 3), dtype=np.uint8) for spec in config.views]
        self._epoch = 0

    def jobs(self, epoch: int, images: int | None = None) -> np.ndarray:
        """Decoding jobs of an epoch, or of its first images only."""
        index = np.concatenate(self._plan.batches(epoch))[:images]
        jobs = np.zeros(len(index), dtype=JOB)
        jobs["index"], jobs["slot"] = index, np.arange(len(index)) % self._rows
        self._store.fill(jobs, index)
        return jobs

    def seconds(self, jobs: np.ndarray, epoch: int) -> float:
        """How long the jobs take."""
        pointers = np.array([out.ctypes.data for out in self._outs], dtype=np.uint64)
        started = time.perf_counter()
        self._library.rg_decode(
            self._pool,
            jobs.ctypes.data,
            len(jobs),
            self._specs.ctypes.data,
            len(self._outs),
            pointers.ctypes.data,
            self._config.seed,
            epoch,
            MAX_PIXELS,
        )
        return time.perf_counter() - started

    def __call__(self) -> float:
        """Images per second of the next epoch."""
        self._epoch += 1
        jobs = self.jobs(self._epoch)
        return len(jobs) / self.seconds(jobs, self._epoch)

    def close(self) -> None:
        """Stop the threads."""
        self._library.rg_pool_close(self._pool)


def one_thread_us(data: Path, config: PipelineConfig, images: int = 512) -> float:
    """Microseconds that one thread takes to decode and resize an image."""
    alone = DecoderAlone(data, config, threads=1)
    jobs = alone.jobs(0, images)
    # Without the first call, which touches code and memory for the first time.
    found = float(np.median([alone.seconds(jobs, 0) for _ in range(4)][1:])) / len(jobs) * 1e6
    alone.close()
    return found


def conclusion(rates: dict[str, Summary], alone: Summary | None, workers: int) -> str:
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
    if "own-loop" in rates and "v2-full" in rates:
        ratio = rates["own-loop"].median / rates["v2-full"].median
        ratios.append(f"a loop on regatta.Loader {ratio:.2f} times {EXPLAINED['v2-full']}")
    if alone is None:
        return "; ".join(["bottleneck: not known without the native decoder (tools/setup.sh builds it)", *ratios])
    added = " and ".join(
        f"{alone.median / rates[name].median - 1:.1%} ({EXPLAINED[name]})"
        for name in ("ffcv", "folder")
        if name in rates
    )
    limit = (
        f"bottleneck: JPEG decoding and resizing on {workers} threads ({alone.median:.0f} images/s); "
        f"the loader adds {added}; more cores raise it (--workers), smaller packed photos too"
    )
    return "; ".join([limit, *ratios])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = cli.make_parser("Measure images per second from a packed file to two views.")
    parser.add_argument("--data", type=Path, default=None, help="a packed file")
    parser.add_argument("--photos", type=Path, default=None, help="a folder of photos to pack and repeat instead")
    parser.add_argument("--max-resolution", type=int, default=400, help="longest side when packing --photos, in pixels")
    parser.add_argument("--jpeg-quality", type=int, default=90, help="quality when packing --photos")
    parser.add_argument("--images", type=cli.positive, default=8400, help="images of an epoch when packing --photos")
    parser.add_argument(
        "--slow-images", type=cli.positive, default=1024, help="images of an epoch of the PIL contenders"
    )
    parser.add_argument("--size", type=cli.positive, default=224, help="side of a view in pixels")
    parser.add_argument("--batch", type=cli.positive, default=256, help="images of a batch")
    parser.add_argument("--workers", type=int, default=0, help="threads or processes that decode; 0: one a core")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, help="what to measure")
    parser.add_argument(
        "--memory-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="instead, as if only this share of the file fitted into memory; 0: all of it",
    )
    parser.add_argument(
        "--multi-crop", action="store_true", help="instead, SwAV's two views of 224 px and six of 96 px"
    )
    parser.add_argument(
        "--simd",
        choices=("auto", *LEVELS),
        default="auto",
        help="vector instructions of our compiled code; auto: the most that the processor has",
    )
    parser.add_argument("--levers", action="store_true", help="instead, change one device of our loader at a time")
    add_common_flags(parser)
    parser.set_defaults(rounds=5, max_seconds=600.0)
    return cli.parse(parser, argv)


def make_contenders(
    options, data: Path, config: PipelineConfig, opened: list[Pipeline]
) -> dict[str, Callable[[], int]]:  # type: ignore[no-untyped-def]
    """Name -> one epoch, for the contenders that are installed; says which are not."""
    # At least one batch.
    slow, workers = max(options.slow_images, options.batch), config.workers

    def ours(loader: str, **settings: object) -> Callable[[], int]:
        opened.append(build_pipeline(loader, replace(config, **settings)))  # type: ignore[arg-type]
        return pipeline_epoch(opened[-1], config.device)

    makers: dict[str, Callable[[], Callable[[], int]]] = {
        "stock-ffcv": lambda: stock_ffcv_epoch(data, config.views, options.batch, workers),
        "pil-crops": lambda: dataloader_epoch(data, crops_transform(options.size), options.batch, workers, slow),
        "pil-full": lambda: dataloader_epoch(data, moco_v2_transform(options.size), options.batch, workers, slow),
        "v2-full": lambda: dataloader_epoch(
            data, moco_v2_transform_v2(options.size), options.batch, workers, slow, tensors=True
        ),
        "ffcv": lambda: ours("ffcv"),
        "folder": lambda: ours("folder"),
        "dali": lambda: ours("dali"),
        "ffcv-augment": lambda: ours("ffcv", augment="mocov2"),
        "ffcv-augment-bf16": lambda: ours("ffcv", augment="mocov2", dtype=torch.bfloat16),
        "own-loop": lambda: own_loop_epoch(data, config, options.size),
    }
    made = {}
    for name in options.contenders:
        try:
            made[name] = makers[name]()
        except (ImportError, ValueError) as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
    return made


def measure(report: Report, options: argparse.Namespace, data: Path, config: PipelineConfig, setting: str) -> str:
    """Rows of the contenders, which take turns with the decoder alone; returns the conclusion."""
    opened: list[Pipeline] = []
    contenders = make_contenders(options, data, config, opened)
    check(data, config, [name for name in ("ffcv", "folder", "dali") if name in contenders])
    decoder = DecoderAlone(data, config, config.workers) if native_library() else None
    images_per_s: dict[str, list[float]] = {name: [] for name in contenders}
    decoder_rates: list[float] = []
    started = time.perf_counter()
    for turn in range(options.rounds + 1):  # the first turn warms up
        for name, epoch in contenders.items():
            begun = time.perf_counter()
            count = epoch()
            if turn:
                images_per_s[name].append(count / (time.perf_counter() - begun))
        if decoder:
            decoder_rates.append(decoder())
        # Three figures at least: fewer have no percentiles to speak of.
        if turn >= 3 and time.perf_counter() - started > options.max_seconds:
            break
    rates = {}
    for name, figures in images_per_s.items():
        slow = f"; epochs of {options.slow_images} images" if name in SLOW else ""
        rates[name] = report.add(EXPLAINED[name], METRIC, "images/s", figures, setting + slow)
    alone = None
    if decoder:
        alone = report.add("our decoder alone", METRIC, "images/s", decoder_rates[1:], setting)
        report.add("our decoder alone", "time on one thread", "us/image", [one_thread_us(data, config)], setting)
        decoder.close()
    for pipeline in opened:
        pipeline.close()
    return conclusion(rates, alone, config.workers)


def describe(options: argparse.Namespace, data: Path, workers: int) -> str:
    """The setting of a run's rows, in parts that semicolons divide."""
    reader = BetonReader(data)
    if options.photos is None:
        source = "a packed file"
    else:
        photos = len(list_images(options.photos).files)
        source = f"{photos} photos packed at {options.max_resolution} px, quality {options.jpeg_quality}, repeated"
    pixels = (reader.widths.astype(float) * reader.heights).mean() / 1e6
    parts = (
        source,
        f"{len(reader)} images of {reader.sizes.mean() / 1024:.0f} KiB and {pixels:.3f} Mpx",
        "two views of 224 px and six of 96 px" if options.multi_crop else f"two views of {options.size} px",
        f"batch {options.batch}",
        f"{workers} workers",
        f"vector instructions {level()}",
        "warm cache",
    )
    return "; ".join(parts)


def refuse_impossible(options: argparse.Namespace) -> None:
    """Refuse flags that do not go together.

    Raises:
        ValueError: one line with the remedy.
    """
    if (options.data is None) == (options.photos is None):
        raise ValueError("give either --data FILE.beton or --photos FOLDER")
    if options.levers and options.memory_share:
        raise ValueError("--levers and --memory-share are two measurements; give one of them")
    if options.multi_crop and (options.levers or options.memory_share):
        raise ValueError("--multi-crop is a measurement of its own; leave out --levers and --memory-share")
    if not 0 <= options.memory_share < 1:
        raise ValueError(f"--memory-share {options.memory_share} is not a share of the file; choose 0.25, say")


def measure_asked(report: Report, options: argparse.Namespace, data: Path) -> None:
    """The measurement that the flags name, with its rows."""
    workers = options.workers or usable_cores()
    setting = describe(options, data, workers)
    views = MULTI_CROP if options.multi_crop else augment.view_specs("mocov2", options.size)
    config = PipelineConfig(str(data), views, options.batch, workers=workers, device=report.device)
    if options.levers:
        check(data, config, ["folder"])
        line = measure_levers(report, data, config, options.rounds, options.max_seconds, setting)
    elif options.memory_share:
        check(data, config, ["folder"])
        count, cold = len(BetonReader(data)), setting.removesuffix("; warm cache")
        share = options.memory_share
        line = bounded_conclusion(measure_bounded(report, data.resolve(), config, count, share, options.rounds, cold))
    else:
        line = measure(report, options, data, config, setting)
    report.finish(line, options.output, write=not options.no_csv)


def main(argv: Sequence[str]) -> int:
    """Measure what the flags ask for."""
    options = parse(argv)
    refuse_impossible(options)
    if options.multi_crop:
        options.contenders = [name for name in options.contenders if name in FOR_ANY_VIEWS]
    report = Report("bench_pipeline", choose_device(options.device))
    with tempfile.TemporaryDirectory() as folder, at_most(level() if options.simd == "auto" else options.simd):
        data = options.data or Path(folder) / "photos.beton"
        if options.photos is not None:
            pack_repeated(options.photos, data, options.max_resolution, options.jpeg_quality, options.images)
        measure_asked(report, options, data)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
