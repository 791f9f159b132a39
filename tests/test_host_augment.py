"""Views that a loader delivers augmented: the pixels of `augment.apply`, buffers used again, bad records too."""

from __future__ import annotations

import importlib.util
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import augment, augment_native, decoder
from pipeline.augmenter import BATCHES, NOBODY, THREADS, BatchAugmenter, augmented_by
from pipeline.epoch import EpochPipeline
from pipeline.interface import Pipeline, PipelineConfig
from pipeline.loaders import build_pipeline
from pipeline.manifest import manifest_path
from tests.small_stores import damage_packed, pack
from tools import make_webdataset

pytestmark = pytest.mark.skipif(
    augment_native.library() is None or decoder.native_library() is None, reason="no C++ compiler"
)
has_ffcv = [
    pytest.mark.ffcv,
    pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed"),
]
LOADERS = [
    pytest.param("folder", id="folder"),
    pytest.param("ffcv", id="ffcv", marks=has_ffcv),
    pytest.param("webdataset", id="webdataset"),
    pytest.param("reference", id="reference"),
]
VIEWS = tuple(
    replace(spec, size=size) for spec, size in zip(augment.view_specs("byol-mocov3", 48), (48, 61), strict=True)
)
BATCH = 8


@pytest.fixture(scope="module")
def packed(photos: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(photos(3), tmp_path_factory.mktemp("packed") / "photos.beton")


@pytest.fixture(scope="module")
def shards(photos: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shards") / "photos"
    assert make_webdataset.main([str(photos(3)), str(target), "--shard-size-mib", "0.04", "--workers", "1"]) == 0
    return target


@pytest.fixture
def opened() -> Iterator[Callable[..., Pipeline]]:
    pipelines: list[Pipeline] = []

    def build(loader: str, data: Path, **options) -> Pipeline:
        config = PipelineConfig(str(data), VIEWS, BATCH, seed=3, workers=2, **options)
        pipelines.append(build_pipeline(loader, config))
        return pipelines[-1]

    yield build
    for pipeline in pipelines:
        pipeline.close()


def expected(crops: Pipeline, epoch: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Crops of an epoch, augmented batch by batch as training without a fused decoder does."""
    crops.set_epoch(epoch)
    batches = []
    for batch in crops:
        params = [augment.draw("byol-mocov3", 3, epoch, batch.index.numpy(), number) for number in range(2)]
        views = zip(batch.views.values(), params, strict=True)
        batches.append([augment.apply(view, each, dtype) for view, each in views])
    return batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loader", LOADERS)
def test_delivered_views_are_those_of_apply(loader, dtype, packed, shards, opened):
    if loader == "ffcv" and dtype != torch.bfloat16:
        pytest.skip("FFCV compiles for seconds each time; its dtypes differ in nothing but the buffers")
    data = shards if loader == "webdataset" else packed
    made = opened(loader, data, augment="byol-mocov3", dtype=dtype, drop_last=False)
    assert isinstance(made, EpochPipeline) and made.augmented_by == (BATCHES if loader == "reference" else THREADS)
    for epoch in (0, 2):
        made.set_epoch(epoch)
        batches = [(batch.index.numel(), list(batch.views.values())) for batch in made]
        wanted = expected(opened(loader, data, drop_last=False), epoch, dtype)
        assert [count for count, _ in batches] == [8, 8, 8, 6]
        for (_, views), right in zip(batches, wanted, strict=True):
            for view, other in zip(views, right, strict=True):
                assert view.dtype == dtype and view.is_contiguous(memory_format=torch.channels_last)
                assert torch.equal(view, other)


@pytest.mark.parametrize("loader", ["folder", pytest.param("ffcv", marks=has_ffcv)])
def test_bad_records_are_replaced_and_augmented_alike(loader, packed, opened, tmp_path):
    broken = tmp_path / "broken.beton"
    shutil.copy(packed, broken)
    shutil.copy(manifest_path(packed), manifest_path(broken))
    for index in (4, 11):
        damage_packed(broken, index)
    made = opened(loader, broken, augment="byol-mocov3")
    for epoch in (0, 1):
        made.set_epoch(epoch)
        views = [list(batch.views.values()) for batch in made]
        for left, right in zip(views, expected(opened(loader, broken), epoch, torch.float32), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert set(made.stats().bad_records) == {4, 11}


def test_float64_and_other_dtypes_fall_back_to_the_batch(packed, opened):
    made = opened("folder", packed, augment="byol-mocov3", dtype=torch.float64)
    batch = next(iter(made))
    assert batch.views["view1"].dtype == torch.float64


def test_who_augments_is_decided_by_config_and_decoder():
    cpu = PipelineConfig("", VIEWS, BATCH, augment="mocov2")
    assert augmented_by(cpu, compiled_threads=True) == THREADS
    assert augmented_by(replace(cpu, implementation="native"), compiled_threads=True) == THREADS
    assert augmented_by(replace(cpu, augment=""), compiled_threads=True) == NOBODY
    assert augmented_by(cpu, compiled_threads=False) == BATCHES
    assert augmented_by(replace(cpu, implementation="reference"), compiled_threads=True) == BATCHES
    assert augmented_by(replace(cpu, dtype=torch.float64), compiled_threads=True) == BATCHES
    assert augmented_by(replace(cpu, device=torch.device("cuda")), compiled_threads=True) == BATCHES
    with pytest.raises(ValueError, match="'kernel' is for a CUDA device"):
        augmented_by(replace(cpu, implementation="kernel"), compiled_threads=True)


@pytest.mark.parametrize("loader", [*LOADERS, pytest.param("synthetic", id="synthetic")])
def test_every_loader_and_every_place_gives_the_views_of_the_definition(loader, packed, shards, opened):
    """Threads, batches and a consumer that augments crops itself: equal pixels, whichever the one decision chose."""
    data = {"webdataset": shards, "synthetic": "24"}.get(loader, packed)
    for implementation in ("auto", "reference"):
        config = PipelineConfig("", VIEWS, BATCH, seed=3, augment="byol-mocov3", implementation=implementation)
        finish, crops = BatchAugmenter(config), opened(loader, data)
        made = opened(loader, data, augment="byol-mocov3", implementation=implementation)
        threads = implementation == "auto" and loader not in ("reference", "synthetic")
        assert isinstance(made, EpochPipeline) and made.augmented_by == (THREADS if threads else BATCHES)
        for pipeline in (crops, made):
            pipeline.set_epoch(1)
        steps = 0
        for plain, finished in zip(crops, made, strict=True):
            wanted = finish(plain, 1)
            assert plain.views["view1"].dtype == torch.uint8 and finished.views.keys() == wanted.views.keys()
            for number, name in enumerate(wanted.views):
                params = augment.draw("byol-mocov3", 3, 1, plain.index.numpy(), number)
                definition = augment.apply(plain.views[name], params, implementation=implementation)
                assert torch.equal(finished.views[name], wanted.views[name])
                assert torch.equal(finished.views[name], definition)
            steps += 1
        assert steps == 3


def test_a_profile_without_enough_views_is_refused(packed, opened):
    with pytest.raises(ValueError, match="linear has 1 views, but 2 were asked for"):
        opened("folder", packed, augment="linear")


@pytest.mark.parametrize("loader", ["folder", pytest.param("ffcv", marks=has_ffcv)])
def test_steady_running_allocates_nothing(loader, packed, tmp_path):
    """Page faults after the first epoch: a fresh view buffer of 18 MiB would bring 4,600 a batch."""
    views = augment.view_specs("mocov2", 224)
    population = np.arange(30)
    config = PipelineConfig(str(packed), views, 15, workers=2, population=population, augment="mocov2")
    pipeline = build_pipeline(loader, config)
    addresses = set()

    def run(epochs: range) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for epoch in epochs:
            pipeline.set_epoch(epoch)
            for batch in pipeline:
                addresses.update(view.data_ptr() for view in batch.views.values())
                del batch
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    run(range(4))
    held = len(addresses)
    faults = run(range(4, 12))
    pages_of_a_batch = 2 * 15 * 224 * 224 * 3 * 4 // resource.getpagesize()
    pipeline.close()
    assert len(addresses) == held, "a buffer that was not there before"
    assert faults < pages_of_a_batch / 2, f"{faults} pages were new in 16 batches"
