"""Packing in parts: the epochs of one packed file, every image once, and no part missing, foreign or twice."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import beton
from pipeline.beton import BetonReader
from pipeline.interface import PipelineConfig, ViewSpec
from pipeline.loaders import build_pipeline
from pipeline.manifest import manifest_path, read_manifest
from pipeline.shards import INDEX_NAME, parse_index
from pipeline.stores import JoinedStore, open_store
from tools import make_ffcv_dataset, make_webdataset
from tools.support.cli import call
from tools.support.parts import Part, read_part
from train.eval import splits

PACKERS = [make_ffcv_dataset, make_webdataset]
IMAGES = 23


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Packed files of megabytes, of which these tests write many, with pages as small as the format allows."""
    monkeypatch.setattr(beton, "DEFAULT_PAGE_SIZE", beton.MIN_PAGE_SIZE)


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    coded = io.BytesIO()
    Image.fromarray(pixels).resize((40 + seed % 3, 32)).save(coded, "JPEG")
    return coded.getvalue()


@pytest.fixture
def photos(tmp_path) -> Path:
    """23 photos of three classes: the last parts of three lack the first class. Two files are no images."""
    root = tmp_path / "photos"
    for number in range(IMAGES):
        path = root / ("ant", "bee", "cat")[min(number // 6, 2)] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number) if number not in (4, 20) else b"no image")
    (root / "notes.txt").write_text("x")
    return root


def pack(packer, source: Path, dest: Path, *more: object) -> int:
    return call(packer.main, [str(each) for each in (source, dest, "--max-bad", "0.2", *more)])


def dest_of(packer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / ("p.beton" if packer is make_ffcv_dataset else "p")


def in_parts(packer, source: Path, folder: Path, of: int, *more: object) -> str:
    """Pack in parts, the last one first; gives what `--data` names."""
    dest = dest_of(packer, folder)
    assert [pack(packer, source, dest, "--part", f"{n}/{of}", *more) for n in range(of, 0, -1)] == [0] * of
    return str(folder / "p-*.beton") if packer is make_ffcv_dataset else str(dest)


def epochs(data: str, order: str = "global") -> tuple[list, object]:
    """(samples, labels and pixels of two epochs with random crops, the pipeline)."""
    views = (ViewSpec("a", 24), ViewSpec("b", 16, draw_id=1))
    config = PipelineConfig(data, views, 4, seed=3, order=order, block_size=4, shard_window=2, augment="mocov2")
    pipeline = build_pipeline("auto", config, quiet=True)
    seen = []
    for epoch in range(2):
        pipeline.set_epoch(epoch)
        for batch in pipeline:
            pixels = hashlib.sha256(b"".join(view.numpy().tobytes() for view in batch.views.values())).hexdigest()
            seen.append((batch.index.tolist(), batch.label.tolist(), pixels))
    pipeline.close()
    return seen, pipeline


@pytest.mark.parametrize("of", [1, 3, 7])
@pytest.mark.parametrize("packer", PACKERS)
def test_parts_give_the_epochs_of_one_file(packer, of, photos, tmp_path):
    one = dest_of(packer, tmp_path / "one")
    assert pack(packer, photos, one) == 0
    data = in_parts(packer, photos, tmp_path / "parts", of)
    expected, whole = epochs(str(one))
    seen, pipeline = epochs(data)
    assert seen == expected and len(seen) == 2 * (IMAGES // 4)
    assert pipeline.data_hash == whole.data_hash and pipeline.classes == whole.classes == ("ant", "bee", "cat")
    assert pipeline.labels.tolist() == whole.labels.tolist() and splits.class_names(data) == ["ant", "bee", "cat"]
    # One manifest over the parts, with each image that could be used once, and all that were refused.
    about = read_manifest(
        manifest_path(tmp_path / "parts/p.beton") if of and packer is PACKERS[0] else Path(data, INDEX_NAME)
    )
    alone = read_manifest(manifest_path(one) if packer is PACKERS[0] else one / INDEX_NAME)
    assert about.sources == alone.sources and len(set(about.sources)) == IMAGES - 2
    assert (about.checksums == alone.checksums).all() and about.details["passed_over"] == {".txt": 1}
    assert [row["number"] for row in about.details["parts"]] == list(range(1, of + 1))
    refused = [json.loads(line)["file"] for line in (tmp_path / "parts/p.rejected.jsonl").read_text().splitlines()]
    assert refused == ["ant/04.jpg", "cat/20.jpg"]
    assert splits.source_names(data) == (alone.sources if packer is make_ffcv_dataset else None)


def test_the_sharded_order_of_packed_parts_is_that_of_the_file_too(photos, tmp_path):
    assert pack(make_ffcv_dataset, photos, tmp_path / "one.beton", "--shuffle") == 0
    data = in_parts(make_ffcv_dataset, photos, tmp_path / "parts", 4, "--shuffle")
    assert epochs(data, "sharded")[0] == epochs(str(tmp_path / "one.beton"), "sharded")[0]


def test_shards_in_parts_name_no_record_twice_and_can_be_chosen(photos, tmp_path):
    import tarfile

    data = Path(in_parts(make_webdataset, photos, tmp_path / "parts", 3, "--shard-size-mib", "0.008"))
    names = []
    for path in sorted(data.glob("*.tar")):
        with tarfile.open(path) as archive:
            names += [member.name for member in archive if member.name.endswith(".jpg")]
    assert len(names) == len(set(names)) == IMAGES - 2
    index = parse_index((data / INDEX_NAME).read_text(), "index")
    assert list(index.names) == sorted(path.name for path in data.glob("*.tar")) and len(index.names) > 3
    chosen, _ = epochs(f"{data}/shard-2-of-3-{{000000..000001}}.tar")
    assert chosen


def test_a_lost_part_is_packed_again_alone(photos, tmp_path, capsys):
    for packer in PACKERS:
        data = in_parts(packer, photos, tmp_path / packer.__name__, 3)
        folder = dest_of(packer, tmp_path / packer.__name__)
        expected = epochs(data)[0]
        lost = folder.parent / "p-2-of-3.beton" if packer is make_ffcv_dataset else folder / "shard-2-of-3-000000.tar"
        times = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*-of-3*")}
        before = lost.read_bytes()
        lost.unlink()
        capsys.readouterr()
        assert pack(packer, photos, folder, "--part", "1/3") == 0
        assert "part 2 is missing" in capsys.readouterr().out, "part 1 is there, so only the lack is said"
        assert pack(packer, photos, folder, "--part", "2/3") == 0
        assert lost.read_bytes() == before and epochs(data)[0] == expected
        others = [path for path in times if "-2-of-3" not in path.name]
        assert others and all(path.stat().st_mtime_ns == times[path] for path in others)
        assert not [path for path in folder.parent.rglob("*") if path.name[0] == "."]


def test_parts_that_do_not_make_a_data_set_are_refused(photos, tmp_path):
    data = in_parts(make_ffcv_dataset, photos, tmp_path / "a", 3)
    first, second, third = (tmp_path / f"a/p-{n}-of-3.beton" for n in (1, 2, 3))
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    for path in other.rglob("*.jpg"):
        path.write_bytes(jpeg(100 + int(path.stem)))
    in_parts(make_ffcv_dataset, other, tmp_path / "b", 3)
    again = tmp_path / "b" / "p-2-of-3.beton"
    for text, words in [
        (f"{first},{third}", "part 2 is missing; give all of them as --data"),
        (str(first), "part 2 and 1 more is missing"),
        (f"{first},{second},{second},{third}", "both part 2 of 3 of one data set"),
        (f"{first},{again},{third}", "part 2 is missing .parts of another data set"),
    ]:
        with pytest.raises(ValueError, match=words) as refusal:
            open_store(text)
        assert "\n" not in str(refusal.value)
    # Two whole data sets may still be trained on together, each in its own order.
    both = open_store(f"{data},{tmp_path}/b/p-*.beton")
    assert isinstance(both, JoinedStore) and len(both.labels) == 2 * IMAGES - 2
    manifest_path(tmp_path / "a/p.beton").unlink()
    with pytest.raises(ValueError, match="is missing; pack the parts that lack, or repeat the command of one"):
        open_store(data)
    assert pack(make_ffcv_dataset, photos, tmp_path / "a/p.beton", "--part", "3/3") == 0
    assert isinstance(open_store(data), JoinedStore)
    # A file in the place of another part of the same data set.
    shutil.copy(again, second)
    shutil.copy(manifest_path(again), manifest_path(second))
    with pytest.raises(ValueError, match="part 2 is missing"):
        open_store(data)


@pytest.mark.parametrize("packer", PACKERS)
def test_a_dest_with_other_parts_is_refused(packer, photos, tmp_path, capsys):
    dest = dest_of(packer, tmp_path / "d")
    assert pack(packer, photos, dest, "--part", "1/3") == 0
    for more, words in [
        (("--part", "2/3", "--jpeg-quality", "80"), "other images or settings"),
        (("--part", "2/4"), "of 3"),
        (("--part", "24/24"), "only 23 images"),
        (("--part", "0/3"), "numbered from 1 to 3"),
        (("--part", "two"), "is not I/N"),
        (("--part", "slurm"), "no task of an array"),
    ]:
        capsys.readouterr()
        assert pack(packer, photos, dest, *more) == 2
        said = capsys.readouterr().err.strip()
        assert words in said and "\n" not in said
    (photos / "ant" / "00.jpg").write_bytes(jpeg(77))
    assert pack(packer, photos, dest, "--part", "2/3") == 2, "the folder has changed since part 1"
    assert [pack(packer, photos, dest, "--part", f"{n}/3", "--overwrite") for n in (1, 2, 3)] == [0, 0, 0]
    assert "all 3 parts are packed: 21 images" in capsys.readouterr().out


@pytest.mark.parametrize("packer", PACKERS)
def test_too_many_bad_images_are_counted_over_all_parts(packer, photos, tmp_path, capsys, monkeypatch):
    dest = dest_of(packer, tmp_path / "d")
    arguments = [str(photos), str(dest), "--part"]
    assert call(packer.main, [*arguments, "1/2"]) == 0
    assert call(packer.main, [*arguments, "2/2"]) == 3
    said = capsys.readouterr().err
    assert "2 of 23 images are bad" in said and "--max-bad 0.087, for which nothing is decoded again" in said
    assert len((tmp_path / "d/p.rejected.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="is missing|does not exist"):
        epochs(str(tmp_path / "d/p-*.beton") if packer is make_ffcv_dataset else str(dest))
    monkeypatch.setattr(packer, "make_records", lambda *_: pytest.fail("an image is decoded again"))
    assert call(packer.main, [*arguments, "1/2", "--max-bad", "0.087"]) == 0
    assert "all 2 parts are packed" in capsys.readouterr().out


@pytest.mark.parametrize("packer", PACKERS)
def test_a_part_without_a_usable_image_has_no_file(packer, photos, tmp_path):
    (photos / "ant" / "03.jpg").write_bytes(b"")
    data = in_parts(packer, photos, tmp_path, 12)
    assert pack(packer, photos, dest_of(packer, tmp_path / "one")) == 0
    assert epochs(data)[0] == epochs(str(dest_of(packer, tmp_path / "one")))[0]
    if packer is make_ffcv_dataset:
        assert not (tmp_path / "p-03-of-12.beton").exists()
        assert BetonReader(tmp_path / "p-04-of-12.beton").num_samples == 2


def test_places_in_an_array_job():
    def task(identity: int, count: int, low: int, high: int, step: int = 1) -> Part:
        values = {"ID": identity, "COUNT": count, "MIN": low, "MAX": high, "STEP": step}
        return read_part("slurm", {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()})

    assert [task(n, 4, 0, 3) for n in range(4)] == [task(n, 4, 1, 4) for n in (1, 2, 3, 4)]
    assert task(5, 3, 1, 9, 4) == Part(2, 3)
    for values in ((2, 3, 1, 5), (4, 1, 4, 4)):
        with pytest.raises(ValueError, match="do not tell the parts"):
            task(*values)
    for total, of in ((10, 3), (7, 7), (1000, 7)):
        stretches = [Part(n, of).stretch(total) for n in range(1, of + 1)]
        assert [index for each in stretches for index in each] == list(range(total))
        assert all(len(each) for each in stretches)
