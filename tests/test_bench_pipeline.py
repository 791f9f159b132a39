"""The pipeline benchmark's own settings at a tiny size: part of the file in memory, one lever at a time."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import augment_native, decoder, simd
from tests.small_stores import pack
from tools import bench_pipeline

pytestmark = pytest.mark.skipif(
    augment_native.library() is None or decoder.native_library() is None, reason="no C++ compiler"
)


@pytest.fixture(scope="module")
def packed(photos: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(photos(4), tmp_path_factory.mktemp("packed") / "photos.beton")


def replace_contenders(monkeypatch, names):
    measure = bench_pipeline.measure_bounded
    monkeypatch.setattr(bench_pipeline, "measure_bounded", lambda *given: measure(*given, contenders=names))
    return names


def test_bench_of_a_file_larger_than_memory(packed, tmp_path, capsys, monkeypatch):
    flags = "--memory-share 0.5 --batch 8 --size 32 --rounds 1 --device cpu --workers 1 --output".split()
    few = replace_contenders(monkeypatch, ("sharded", "global"))
    assert bench_pipeline.main(["--data", str(packed), *flags, str(tmp_path / "rows.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len(rows) == 3 * len(few) and {row["metric"] for row in rows} == {
        "throughput",
        "read in an epoch",
        "most in the page cache",
    }
    assert capsys.readouterr().out.splitlines()[-1].startswith("bottleneck: --order sharded reads ")


def test_bench_of_many_views_from_one_decode(packed, tmp_path, capsys):
    flags = "--multi-crop --batch 8 --rounds 1 --device cpu --workers 1 --output".split()
    assert bench_pipeline.main(["--data", str(packed), *flags, str(tmp_path / "rows.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    # The loaders' pixels were compared with PIL's for all eight views before anything was timed.
    assert {"ours without FFCV, crops only", "our decoder alone"} <= {row["contender"] for row in rows}
    assert all("two views of 224 px and six of 96 px" in row["setting"] for row in rows)
    with pytest.raises(ValueError, match="a measurement of its own"):
        bench_pipeline.main(["--data", str(packed), "--multi-crop", "--levers"])


def test_bench_of_single_levers(packed, tmp_path, capsys):
    flags = "--levers --batch 8 --size 32 --rounds 1 --device cpu --workers 1 --output".split()
    assert bench_pipeline.main(["--data", str(packed), *flags, str(tmp_path / "rows.csv")]) == 0
    contenders = [row["contender"] for row in csv.DictReader((tmp_path / "rows.csv").open())]
    assert len(contenders) == len(set(contenders)) > 10 and "decoder: decoding to the last row" in contenders
    assert capsys.readouterr().out.splitlines()[-1].startswith("bottleneck: time relative to everything on: decoding")


def test_a_run_says_which_vector_instructions_it_used(packed, tmp_path):
    flags = "--simd plain --contenders folder own-loop v2-full --batch 2 --slow-images 2 --size 32 --rounds 1".split()
    flags += "--device cpu --workers 1 --output".split()
    before = simd.level()
    assert bench_pipeline.main(["--data", str(packed), *flags, str(tmp_path / "rows.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert {"folder", "own-loop", "v2-full"} <= {
        name for name, label in bench_pipeline.EXPLAINED.items() if label in {row["contender"] for row in rows}
    }
    assert all("vector instructions plain" in row["setting"] for row in rows)
    assert simd.level() == before
