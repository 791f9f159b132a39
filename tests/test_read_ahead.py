"""The sharded order of a packed file: read in long stretches, about once an epoch, before it is used."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import read_ahead
from pipeline.beton import BetonReader, BetonWriter
from pipeline.epoch import EpochPlan
from pipeline.interface import PipelineConfig, ViewSpec
from pipeline.loaders import build_pipeline
from pipeline.read_ahead import MAX_GAP, WindowReader, extents
from pipeline.sampling import sharded_order, sharded_windows
from tests.small_stores import pack
from tools.bench.page_limit import PAGE, PageLimit

has_ffcv = [
    pytest.mark.ffcv,
    pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed"),
]
VIEWS = (ViewSpec("view1", 32),)


def packed_numbers(path: Path, images: int, size: int) -> Path:
    """A packed file whose records are no images: what is read of it is all that is asked."""
    with path.open("wb") as file:
        writer = BetonWriter(file, images)
        for number in range(images):
            writer.append(bytes([number % 251]) * size, 8, 8)
        writer.finish()
    return path


def test_extents_cover_and_join():
    offsets = np.array([900_000, 0, 100, 500_000])
    sizes = np.array([10, 100, 50, 10])
    assert extents(offsets, sizes, max_gap=1000).tolist() == [[0, 150], [500_000, 500_010], [900_000, 900_010]]
    assert extents(offsets, sizes, max_gap=400_000).tolist() == [[0, 150], [500_000, 900_010]]
    assert extents(offsets[:0], sizes[:0]).shape == (0, 2)
    # A long record that reaches past the next ones.
    assert extents(np.array([0, 10, 3000]), np.array([2500, 5, 5]), max_gap=100).tolist() == [[0, 2500], [3000, 3005]]


def test_windows_are_those_of_the_order():
    population = np.flatnonzero(np.arange(1000) % 7 != 0)
    blocks = np.array([90] * 10 + [100])
    order, windows = (f(population, 3, 5, blocks, 4) for f in (sharded_order, sharded_windows))
    assert len(order) == len(windows) and (np.diff(windows) >= 0).all()
    block_of = np.repeat(np.arange(11), blocks)[order]
    for window in range(3):
        assert len(np.unique(block_of[windows == window])) == (4, 4, 3)[window]
    assert not set(block_of[windows == 0]) & set(block_of[windows == 1])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_page_is_read_about_once_on_any_number_of_ranks(world_size, tmp_path, monkeypatch):
    """Ranks of a machine share the page cache, so what counts is the union of what they read of a window."""
    data = packed_numbers(tmp_path / "numbers.beton", images=1200, size=20_000)
    reader = BetonReader(data)
    reads: list[tuple[int, int]] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: reads.append((at, len(into[0]))) or preadv(fd, into, at))
    by_window: dict[int, set[int]] = {}
    for rank in range(world_size):
        config = PipelineConfig(
            str(data),
            VIEWS,
            64,
            rank=rank,
            world_size=world_size,
            order="sharded",
            block_size=50,
            shard_window=3,
            drop_last=False,
        )
        plan = EpochPlan(config, 1200)
        batches, windows = plan.batches(1), plan.windows(1)
        ahead = WindowReader([(0, data)], reader.offsets, reader.sizes, batches, windows)
        for step, (batch, window) in enumerate(zip(batches, windows, strict=True)):
            ahead.wait(step)
            held = set().union(*(range(at // PAGE, -(-(at + size) // PAGE)) for at, size in reads))
            for sample in batch:
                start, end = int(reader.offsets[sample]), int(reader.offsets[sample] + reader.sizes[sample])
                assert held.issuperset(range(start // PAGE, -(-end // PAGE))), "used before it was read"
            assert ahead._read <= int(window[-1]) + 2, "more than one window ahead"
        ahead.stop()
        sizes = np.array([size for _, size in reads])
        assert (sizes**2).sum() / sizes.sum() > 500_000, "the read that a byte comes with is long"
        for stretches, number in zip(ahead._extents, ahead._windows.tolist(), strict=True):
            pages = by_window.setdefault(number, set())
            for start, end in stretches.tolist():
                pages.update(range(start // PAGE, -(-end // PAGE)))
        reads.clear()
    pages_read = sum(len(pages) for pages in by_window.values())
    assert 1.0 <= pages_read * PAGE / int(reader.sizes.sum()) < 1.1


def test_sparse_records_are_read_alone():
    offsets = np.arange(50) * (MAX_GAP + 30_000)
    assert len(extents(offsets, np.full(50, 20_000))) == 50


@pytest.fixture(scope="module")
def packed(photos: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(photos(4), tmp_path_factory.mktemp("packed") / "photos.beton")


@pytest.mark.parametrize("loader", ["folder", pytest.param("ffcv", marks=has_ffcv)])
def test_loaders_read_windows_before_use_and_end_with_the_epoch(loader, packed, monkeypatch):
    reads = []
    monkeypatch.setattr(WindowReader, "_read_stretch", lambda self, fd, start, end, piece: reads.append((start, end)))
    config = PipelineConfig(str(packed), VIEWS, 8, order="sharded", block_size=5, shard_window=2, workers=1)
    pipeline = build_pipeline(loader, config)
    wanted = EpochPlan(config, pipeline.num_samples)
    for epoch, first in ((0, 0), (1, 2)):
        reads.clear()
        pipeline.set_epoch(epoch, first)
        seen = [batch.index.tolist() for batch in pipeline]
        assert seen == [index.tolist() for index in wanted.batches(epoch, first)]
        covered = sum(end - start for start, end in reads)
        assert covered >= sum(int(pipeline.store.reader.sizes[index].sum()) for index in seen)  # type: ignore[attr-defined]
    pipeline.set_epoch(2)
    next(iter(pipeline))  # abandoned
    pipeline.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "regatta-read-ahead"]


@pytest.mark.parametrize("loader", ["folder", pytest.param("ffcv", marks=has_ffcv)])
def test_the_global_order_of_a_large_file_is_read_a_record_at_a_time(loader, packed, monkeypatch):
    reads = []
    monkeypatch.setattr(WindowReader, "_read_stretch", lambda self, fd, start, end, piece: reads.append((start, end)))
    monkeypatch.setattr(read_ahead, "RECORD_GAP", 0)
    pipeline = build_pipeline(loader, PipelineConfig(str(packed), VIEWS, 8, workers=1))
    list(pipeline)
    assert not reads, "a file that fits into memory is left to the system"
    monkeypatch.setattr(read_ahead, "memory_bytes", lambda: packed.stat().st_size)
    pipeline.set_epoch(1, 1)
    samples = np.concatenate([batch.index for batch in pipeline])
    reader = pipeline.store.reader  # type: ignore[attr-defined]
    covered = np.concatenate([np.arange(start, end) for start, end in reads])
    wanted = np.concatenate([np.arange(reader.offsets[i], reader.offsets[i] + reader.sizes[i]) for i in samples])
    assert np.array_equal(np.sort(covered), np.sort(wanted)), "just the records of the epoch's rest, each once"
    batches = pipeline.plan.batches(1)  # type: ignore[attr-defined]
    ahead = read_ahead.window_reader(pipeline.plan, pipeline.store, 1, batches)  # type: ignore[attr-defined]
    assert ahead is not None and len(ahead._windows) == -(-len(batches) // read_ahead.STEPS_A_WINDOW) > 2
    ahead.stop()
    pipeline.close()


def test_memory_is_the_machines_or_less():
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < read_ahead.memory_bytes() <= physical


@pytest.mark.parametrize(
    ("line", "limited"), [("0::/job/step", "job/memory.max"), ("5:cpu,memory:/job", "memory/job/memory.limit_in_bytes")]
)
def test_memory_is_that_of_the_control_group(line, limited, tmp_path, monkeypatch):
    own, limit = tmp_path / "own", tmp_path / limited
    own.write_text(f"7:cpuset:/\n{line}\n")
    limit.parent.mkdir(parents=True)
    limit.write_text("12345678\n")
    monkeypatch.setattr(read_ahead, "OWN_GROUPS", own)
    monkeypatch.setattr(read_ahead, "GROUPS", tmp_path)
    assert read_ahead.memory_bytes() == 12345678
    limit.write_text("max\n")
    assert read_ahead.memory_bytes() > 12345678


def test_a_file_that_cannot_be_read_is_an_error_and_no_hang(packed, monkeypatch):
    def fail(*arguments):
        raise OSError("disk")

    monkeypatch.setattr(read_ahead.os, "preadv", fail)
    config = PipelineConfig(str(packed), VIEWS, 8, order="sharded", block_size=5, shard_window=2, workers=1)
    pipeline = build_pipeline("folder", config)
    with pytest.raises(OSError, match="disk"):
        list(pipeline)
    pipeline.close()


def test_page_limit_drops_what_came_first(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(400 * PAGE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    with PageLimit(path, 100 * PAGE) as limit:
        if limit.resident().any():
            pytest.skip("this file system keeps its pages")
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        read_ahead.advise_random(mapped)
        for page in range(400):
            mapped[page * PAGE]
            if page % 50 == 49:
                for _ in range(500):
                    if limit.resident().sum() <= 100:
                        break
                    threading.Event().wait(0.01)
        assert 0 < limit.resident().sum() <= 100 and not limit.resident()[:250].any()
