"""What every loader promises, asked of each: order, ranks, resume, bad records, early break, pixels."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import decoder as decoder_module
from pipeline import loaders
from pipeline.decoder import pil_views
from pipeline.epoch import substitute
from pipeline.images import decode_rgb
from pipeline.interface import Batch, Pipeline, PipelineConfig, ViewSpec
from pipeline.loaders import PIPELINES, build_pipeline, choose_loader
from pipeline.native_build import NativeUnavailable
from pipeline.refusal import TooManyBad
from pipeline.sampling import hold_out
from pipeline.shard_store import open_shards
from pipeline.stores import FileStore
from tests.small_stores import damage_bytes, damage_file, damage_packed, pack
from tools import make_webdataset

VIEWS = (ViewSpec("view1", 48), ViewSpec("view2", 64, scale=(0.08, 1.0), draw_id=1))
WHOLE = (ViewSpec("image", 40, kind="whole"), ViewSpec("middle", 32, kind="center", interpolation="bicubic"))
BATCH = 8
PHOTOS = 30

has_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
has_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed")


@dataclass(frozen=True)
class Case:
    loader: str
    packed: bool = False
    shards: bool = False
    exact: bool = True  # the same bits as the native decoder, not only the same picture


CASES = [
    pytest.param(Case("folder", packed=False), id="folder"),
    pytest.param(Case("folder", packed=True), id="folder-packed"),
    pytest.param(Case("reference", packed=False, exact=False), id="reference"),
    pytest.param(Case("ffcv", packed=True), id="ffcv", marks=[pytest.mark.ffcv, has_ffcv]),
    pytest.param(Case("dali", packed=True, exact=False), id="dali-packed", marks=[pytest.mark.dali, has_dali]),
    pytest.param(Case("dali", packed=False, exact=False), id="dali-folder", marks=[pytest.mark.dali, has_dali]),
    pytest.param(Case("dali", shards=True, exact=False), id="dali-shards", marks=[pytest.mark.dali, has_dali]),
    pytest.param(Case("webdataset", shards=True), id="webdataset"),
]


@pytest.fixture(scope="module")
def folder(photos: Callable[[int], Path]) -> Path:
    return photos(PHOTOS // 10)


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(folder, tmp_path_factory.mktemp("packed") / "photos.beton")


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shards") / "photos"
    # About seven photos a shard: six shards, so that four ranks have one each.
    assert make_webdataset.main([str(folder), str(target), "--shard-size-mib", "0.04", "--workers", "1"]) == 0
    return target


@pytest.fixture
def build(folder: Path, packed: Path, shards: Path) -> Iterator[Callable[..., Pipeline]]:
    built: list[Pipeline] = []

    def make(case: Case, data: Path | None = None, **changes: object) -> Pipeline:
        source = data or (packed if case.packed else shards if case.shards else folder)
        config = PipelineConfig(str(source), VIEWS, BATCH, seed=5, workers=2)
        pipeline = build_pipeline(case.loader, replace(config, **changes))  # type: ignore[arg-type]
        built.append(pipeline)
        return pipeline

    yield make
    for pipeline in built:
        pipeline.close()
        pipeline.close()  # twice is allowed


def collect(pipeline: Pipeline) -> list[Batch]:
    return list(pipeline)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.index, b.index)
        and torch.equal(a.label, b.label)
        and all(torch.equal(a.views[name], b.views[name]) for name in a.views)
        for a, b in zip(first, second, strict=True)
    )


def difference(
    views: dict[str, torch.Tensor], row: int, specs: tuple[ViewSpec, ...], expected: list[np.ndarray]
) -> float:
    """Mean absolute difference in grey levels over all views of one row."""
    gaps = [
        np.abs(views[spec.name][row].permute(1, 2, 0).numpy().astype(int) - pixels).mean()
        for spec, pixels in zip(specs, expected, strict=True)
    ]
    return float(np.mean(gaps))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", ["global", "sharded", "sequential"])
def test_order_labels_and_pixels(case: Case, order: str, build: Callable[..., Pipeline], folder: Path) -> None:
    specs = WHOLE if order == "sequential" else VIEWS
    pipeline = build(case, order=order, block_size=5, shard_window=2, views=specs, drop_last=order != "sequential")
    pipeline.set_epoch(2)
    batches = collect(pipeline)
    store = FileStore(str(folder))
    plan = pipeline.plan  # type: ignore[attr-defined]
    assert pipeline.num_samples == PHOTOS and len(batches) == len(pipeline) == plan.steps
    expected = plan.order(2)[: sum(len(batch.index) for batch in batches)]
    assert np.array_equal(torch.cat([batch.index for batch in batches]).numpy(), expected)
    assert sorted(plan.order(2)) == list(range(PHOTOS))
    gaps = []
    for batch in batches:
        assert np.array_equal(batch.label.numpy(), store.labels[batch.index.numpy()])
        assert batch.sizes is not None
        assert batch.sizes.tolist() == [list(decode_rgb(store.read(each)).shape[:2]) for each in batch.index.tolist()]
        for spec in specs:
            view = batch.views[spec.name]
            assert view.dtype == torch.uint8 and view.shape == (len(batch.index), 3, spec.size, spec.size)
            assert view.is_contiguous(memory_format=torch.channels_last)
        for row, index in enumerate(batch.index.tolist()):
            reference = pil_views(decode_rgb(store.read(index)), specs, 5, 2, index)
            gaps.append(difference(batch.views, row, specs, reference))
    # Small views of small photos: chroma planes are enlarged more than at 224 px, where the mean is 0.26.
    assert np.mean(gaps) < (1.5 if case.loader == "dali" else 0.6) and max(gaps) < 3


@pytest.mark.parametrize("case", CASES)
def test_ranks_share_one_sequence(case: Case, build: Callable[..., Pipeline]) -> None:
    whole = collect(build(case, drop_last=False))
    for world_size in (2, 4):
        ranks = [collect(build(case, drop_last=False, rank=r, world_size=world_size)) for r in range(world_size)]
        assert all(len(rank) == len(whole) for rank in ranks)
        for step, batch in enumerate(whole):
            assert torch.equal(torch.cat([rank[step].index for rank in ranks]), batch.index)
            for name in batch.views:
                joined = torch.cat([rank[step].views[name] for rank in ranks])
                assert torch.equal(joined, batch.views[name])


@pytest.mark.parametrize("case", CASES)
def test_resume_in_mid_epoch(case: Case, build: Callable[..., Pipeline]) -> None:
    pipeline = build(case)
    pipeline.set_epoch(3)
    whole = collect(pipeline)
    pipeline.set_epoch(3, first_step=1)
    assert same(collect(pipeline), whole[1:])
    fresh = build(case)
    fresh.set_epoch(3, first_step=2)
    assert same(collect(fresh), whole[2:])
    fresh.set_epoch(4)
    assert not same(collect(fresh), whole)


@pytest.mark.parametrize("case", CASES)
def test_workers_do_not_matter(case: Case, build: Callable[..., Pipeline]) -> None:
    assert same(collect(build(case, workers=1)), collect(build(case, workers=3)))


@pytest.mark.parametrize("case", CASES)
def test_bad_record_is_named_and_its_place_filled(
    case: Case, build: Callable[..., Pipeline], folder: Path, packed: Path, shards: Path, tmp_path: Path
) -> None:
    broken = 11
    if case.packed:
        data = tmp_path / packed.name
        for path in packed.parent.iterdir():
            shutil.copy(path, tmp_path)
        damage_packed(data, broken)
    elif case.shards:
        data = tmp_path / "shards"
        shutil.copytree(shards, data)
        index = open_shards(str(data), "global", 1, 1).index
        damage_bytes(data / index.names[index.shard_of()[broken]], int(index.offsets[broken]), int(index.sizes[broken]))
    else:
        data = tmp_path / "photos"
        shutil.copytree(folder, data)
        damage_file(FileStore(str(data)).files[broken])
    population, _ = hold_out(PHOTOS, 5, 4)
    if broken not in population:
        population = np.sort(np.append(population, broken))
    pipeline = build(case, data, population=population, drop_last=False)
    good = FileStore(str(folder))
    for epoch in (0, 1):
        pipeline.set_epoch(epoch)
        batches = collect(pipeline)
        assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == population.tolist()
        instead = substitute(5, epoch, broken, 0, population)
        assert instead != broken, "choose another record, or this shows nothing"
        reference = pil_views(decode_rgb(good.read(instead)), VIEWS, 5, epoch, broken)
        batch = next(batch for batch in batches if broken in batch.index)
        row = batch.index.tolist().index(broken)
        assert difference(batch.views, row, VIEWS, reference) < 3
        assert batch.label[row] == good.labels[broken]
    bad = pipeline.stats().bad_records
    assert list(bad) == [broken] and bad[broken]


@pytest.mark.parametrize("case", CASES)
def test_abandoned_epochs_leave_nothing_behind(case: Case, build: Callable[..., Pipeline]) -> None:
    pipeline = build(case)
    first = collect(pipeline)
    threads = threading.active_count()
    for _ in range(5):
        for batch in pipeline:
            assert torch.equal(batch.index, first[0].index)
            break
    del batch
    assert same(collect(pipeline), first)
    assert threading.active_count() <= threads
    kept = iter(pipeline)
    next(kept)
    assert same(collect(pipeline), first)  # while an older iteration was left open
    pipeline.close()


@pytest.mark.parametrize("case", CASES)
def test_batches_belong_to_the_receiver(case: Case, build: Callable[..., Pipeline]) -> None:
    pipeline = build(case, global_batch=4)
    pipeline.set_epoch(0)
    kept, copies = [], []
    for epoch in (0, 1, 2):
        pipeline.set_epoch(epoch)
        for batch in pipeline:
            kept.append(batch)
            copies.append({name: view.clone() for name, view in batch.views.items()})
    assert len(kept) > 12
    for batch, copy in zip(kept, copies, strict=True):
        assert all(torch.equal(batch.views[name], copy[name]) for name in copy)


@pytest.mark.parametrize("case", CASES)
def test_loaders_agree_to_the_bit(case: Case, build: Callable[..., Pipeline]) -> None:
    if not case.exact:
        pytest.skip("decodes with other software; its pixels are compared with the reference elsewhere")
    assert same(collect(build(case)), collect(build(Case("folder", packed=False))))


def test_buffers_are_used_again(build: Callable[..., Pipeline]) -> None:
    pipeline = build(Case("folder", packed=True))
    addresses = set()
    for epoch in range(6):
        pipeline.set_epoch(epoch)
        for batch in pipeline:
            addresses.add(batch.views["view1"].data_ptr())
    assert len(addresses) <= 8


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("folder", packed=True), id="folder-packed"),
        pytest.param(Case("ffcv", packed=True), id="ffcv", marks=[pytest.mark.ffcv, has_ffcv]),
    ],
)
def test_memory_stays_flat(case: Case, build: Callable[..., Pipeline]) -> None:
    large = tuple(replace(spec, size=512) for spec in VIEWS)  # a lost set of buffers is 4 MiB
    pipeline = build(case, global_batch=3, views=large)
    used = []
    for epoch in range(13):
        pipeline.set_epoch(epoch)
        for step, _ in enumerate(pipeline):
            if epoch % 2 and step == 3:
                break
        used.append(resident_mib())
    assert used[-1] - used[2] < 12, used


@pytest.mark.ffcv
@has_ffcv
def test_ffcv_leaves_torch_threads_alone(build: Callable[..., Pipeline]) -> None:
    threads = torch.get_num_threads()
    collect(build(Case("ffcv", packed=True)))
    assert torch.get_num_threads() == threads


def test_packed_file_without_manifest(folder: Path, tmp_path: Path, build: Callable[..., Pipeline]) -> None:
    bare = pack(folder, tmp_path / "bare.beton", with_manifest=False)
    case = Case("folder", packed=True)
    assert same(collect(build(case, bare)), collect(build(case)))


def test_without_a_compiler_pil_does_the_same_work(
    monkeypatch: pytest.MonkeyPatch, build: Callable[..., Pipeline]
) -> None:
    reference = collect(build(Case("reference", packed=False)))
    monkeypatch.setattr(decoder_module, "native_library", lambda instead=None: None)
    assert same(collect(build(Case("folder", packed=True))), reference)


def test_synthetic_order_resume_and_ranks(build: Callable[..., Pipeline]) -> None:
    case = Case("synthetic", packed=False)
    pipeline = build(case, Path("100"))
    whole = collect(pipeline)
    assert len(whole) == 12 and pipeline.num_samples == 100
    pipeline.set_epoch(0, first_step=5)
    assert same(collect(pipeline), whole[5:])
    halves = [collect(build(case, Path("100"), rank=rank, world_size=2)) for rank in (0, 1)]
    for name in whole[0].views:
        joined = torch.cat([halves[0][0].views[name], halves[1][0].views[name]])
        # Other batch sizes may take other sums within grid_sample.
        assert (joined.int() - whole[0].views[name].int()).abs().max() <= 1
    means = torch.cat([batch.views["view1"] for batch in whole]).float().mean((2, 3))
    assert means.std(0).min() > 5  # the images differ


def _no_compiler(name: str) -> None:
    raise NativeUnavailable("no C++ compiler was found")


def test_auto_chooses_by_the_data(folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_loader(str(folder))[0] == "folder"
    assert choose_loader("train-{000000..000009}.tar")[0] == "webdataset"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_loader(str(packed))[0] == "ffcv"
    with monkeypatch.context() as patch:
        patch.setattr(loaders, "load", _no_compiler)
        loader, reason = choose_loader(str(packed))
        assert loader == "folder" and "native decoder" in reason
        with pytest.raises(ValueError, match="no C.. compiler.*--loader folder"):
            build_pipeline("ffcv", PipelineConfig(str(packed), VIEWS, BATCH))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_loader(str(packed))[0] == "folder"
    with pytest.raises(ValueError, match="pip install 'regatta\\[ffcv\\]'"):
        build_pipeline("ffcv", PipelineConfig(str(packed), VIEWS, BATCH))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"views": ()}, "no views"),
        ({"order": "random"}, "unknown order"),
        ({"global_batch": 64}, "fewer than one global batch"),
        ({"global_batch": 9, "world_size": 2}, "does not divide"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"population": np.array([0, 99])}, "population"),
        ({"data": "/nonexistent"}, "does not exist"),
    ],
)
def test_mistakes_are_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    config = replace(PipelineConfig(str(folder), VIEWS, BATCH), **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        build_pipeline("folder", config)
    assert "folder" in PIPELINES


def test_all_records_bad_is_an_error_not_a_hang(folder: Path, tmp_path: Path, build: Callable[..., Pipeline]) -> None:
    data = tmp_path / "photos"
    shutil.copytree(folder, data)
    for path in FileStore(str(data)).files:
        path.write_bytes(b"no image")
    with pytest.raises(TooManyBad, match="nor can 64 others that were drawn for its place"):
        collect(build(Case("folder", packed=False), data))


@pytest.mark.ffcv
def test_ffcv_leaves_torch_its_threads():
    """FFCV's import sets torch to one thread, which would halve training on the CPU without a word."""
    pytest.importorskip("ffcv")
    script = (
        "import torch; torch.set_num_threads(2); from pipeline import loaders; loaders._ffcv_pipeline(); "
        "print(torch.get_num_threads())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    checkout = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=checkout, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"]
