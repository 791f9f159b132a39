"""Data as people have them: several folders, patterns, parquet tables, HEIC, lists of addresses, object stores."""

import http.server
import io
import json
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.beton import BetonReader
from pipeline.classes import joined
from pipeline.images import decode_rgb
from pipeline.interface import PipelineConfig, ViewSpec
from pipeline.loaders import build_pipeline, choose_loader
from pipeline.manifest import manifest_path, read_manifest
from pipeline.stores import data_parts
from tools import make_ffcv_dataset, make_webdataset
from tools.support.cli import call
from tools.support.open_source import open_source
from train.eval import splits


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    coded = io.BytesIO()
    Image.fromarray(pixels).resize((40, 32)).save(coded, "JPEG")
    return coded.getvalue()


def folder(root: Path, classes: str, seed: int = 0) -> Path:
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(3):
            (root / name / f"{number}.jpg").write_bytes(jpeg(seed + 10 * place + number))
    return root


def pack(source: object, dest: Path, *more: object) -> int:
    return call(make_ffcv_dataset.main, [str(each) for each in (source, dest, *more)])


def seen(data: str, loader: str = "auto") -> tuple[list[int], list[bytes], object]:
    """(labels, pixels of each image in storage order, the pipeline)."""
    views = (ViewSpec("v", 16, kind="center"),)
    config = PipelineConfig(data, views, 4, order="sequential", drop_last=False)
    pipeline = build_pipeline(loader, config, quiet=True)
    labels, pixels = [], []
    for batch in pipeline:
        labels += batch.label.tolist()
        pixels += [view.numpy().tobytes() for view in batch.views["v"]]
    pipeline.close()
    return labels, pixels, pipeline


def test_several_folders_are_one_data_set_by_class_name(tmp_path):
    first, second = folder(tmp_path / "a", "xz"), folder(tmp_path / "b c", "yz", 100)
    assert pack(second, tmp_path / "b.beton") == 0
    apart = [seen(str(each))[1] for each in (first, second)]
    for text in (f"{first},{second}", f"{first},{tmp_path}/b.beton", f"{first},{tmp_path}/b?c"):
        labels, pixels, pipeline = seen(text)
        assert pipeline.classes == ("x", "y", "z") and splits.class_names(text) == ["x", "y", "z"]
        assert labels == [0] * 3 + [2] * 3 + [1] * 3 + [2] * 3 and pixels == [*apart[0], *apart[1]]
    assert len(splits.source_names(f"{first},{second}")) == 12
    assert seen(f"{first},{second}")[2].data_hash != seen(f"{second},{first}")[2].data_hash
    assert pack(f"{first},{second}", tmp_path / "both.beton") == 0
    manifest = read_manifest(manifest_path(tmp_path / "both.beton"))
    assert manifest.classes == ("x", "y", "z") and manifest.sources[0] == f"{first}/x/0.jpg"
    assert BetonReader(tmp_path / "both.beton").labels.tolist() == [0] * 3 + [2] * 3 + [1] * 3 + [2] * 3


def test_patterns_and_what_is_wrong_with_them(tmp_path, capsys):
    for name in ("2023", "2024", "._2025"):
        folder(tmp_path / name, "xy")
    assert data_parts(f"{tmp_path}/20*") == [f"{tmp_path}/2023", f"{tmp_path}/2024"]
    assert choose_loader(f"{tmp_path}/20*") == ("folder", "the data is 2 folders or files")
    assert data_parts(f"{tmp_path}/2023") == [f"{tmp_path}/2023"]
    for text, words in [
        (f"{tmp_path}/19*", "no file matches"),
        (f"{tmp_path}/2023,{tmp_path}/none", "none of"),
        (f"{tmp_path}/2023,", ""),
    ]:
        code = pack(text, tmp_path / "o.beton")
        assert (code == 0) == (not words) and words in capsys.readouterr().err
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "index.json").write_text("{}")
    (tmp_path / "s" / "0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="set of shards, which cannot be read together"):
        seen(f"{tmp_path}/s,{tmp_path}/2023")


def test_numbers_and_names_do_not_mix():
    numbers, none = np.array([0, 4]), np.array([-1])
    assert joined([(numbers, (), "a"), (numbers, (), "b")])[0].tolist() == [0, 4, 0, 4]
    assert joined([(numbers, ("0", "1", "2", "3", "4"), "a"), (none, (), "b")])[0].tolist() == [0, 4, -1]
    labels, classes = joined([(np.array([1]), ("0", "1"), "a"), (np.array([10]), tuple(map(str, range(11))), "b")])
    assert labels.tolist() == [1, 10] and classes[10] == "10", "numbers of class files stay numbers"
    with pytest.raises(ValueError, match="b has class numbers only and a has names"):
        joined([(np.array([0]), ("cat",), "a"), (numbers, (), "b")])


def table(
    path: Path, seeds: list[int], labels: list | None, form: str = "struct", names: list[str] | None = None
) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = [jpeg(seed) for seed in seeds]
    if form == "struct":
        cells = [{"bytes": data, "path": f"{seed}.jpg"} for data, seed in zip(cells, seeds, strict=True)]
    columns = {"image": cells} | ({} if labels is None else {"label": labels})
    made = arrow.table(columns)
    if names is not None:
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(about)})
    parquet.write_table(made, path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", ["struct", "binary", "names", "words", "no labels", "two files"])
def test_parquet_tables(tmp_path, kind):
    seeds, labels = [1, 2, 3, 4, 5], [2, 0, 1, 0, 2]
    names = {"names": ["ant", "bee", "cat"]}.get(kind)
    given: list | None = labels
    if kind == "words":
        given = [["ant", "bee", "cat"][label] for label in labels]
    elif kind == "no labels":
        given = None
    data = table(tmp_path / "t-0.parquet", seeds, given, "binary" if kind == "binary" else "struct", names)
    text, wanted = str(data), [-1] * 5 if given is None else labels
    if kind == "two files":
        table(tmp_path / "t-1.parquet", [6, 7], [1, 1])
        text, wanted, seeds = f"{tmp_path}/t-*.parquet", [*labels, 1, 1], [*seeds, 6, 7]
    found, pixels, pipeline = seen(text)
    assert found == wanted
    assert pipeline.classes == (("ant", "bee", "cat") if kind in ("names", "words") else ())
    for loader in ("folder", "reference"):
        assert seen(text, loader)[0] == wanted
    assert pack(text, tmp_path / "p.beton") == 0
    reader = BetonReader(tmp_path / "p.beton")
    assert [reader.record(n).tobytes() for n in range(len(seeds))] == [jpeg(seed) for seed in seeds]
    assert reader.labels.tolist() == wanted
    assert seen(str(tmp_path / "p.beton"), "folder")[1] == pixels


def test_parquet_tables_that_cannot_be_used(tmp_path, capsys, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = table(tmp_path / "t.parquet", [1, 2, 3], None)
    (tmp_path / "cut.parquet").write_bytes(data.read_bytes()[:-50])
    parquet.write_table(arrow.table({"text": ["a"]}), tmp_path / "none.parquet")
    whole = bytearray(data.read_bytes())
    whole[60:400] = bytes(340)
    (tmp_path / "damaged.parquet").write_bytes(whole)
    for name, words in [("cut", "cannot be read as a parquet"), ("none", "no column of images among text")]:
        assert pack(tmp_path / f"{name}.parquet", tmp_path / "o.beton") == 2
        assert words in capsys.readouterr().err
    assert pack(tmp_path / "damaged.parquet", tmp_path / "o.beton") == 3
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x.parquet").write_bytes(data.read_bytes())
    assert pack(tmp_path / "f", tmp_path / "o.beton") == 2 and "'FOLDER/*.parquet'" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    assert pack(data, tmp_path / "o.beton") == 2
    assert "pip install pyarrow" in capsys.readouterr().err


def test_heic_and_avif_where_pillow_has_them(tmp_path):
    picture = Image.fromarray(np.linspace(0, 255, 60 * 80 * 3).reshape(60, 80, 3).astype(np.uint8))
    avif = io.BytesIO()
    picture.save(avif, "AVIF", quality=95)
    assert np.abs(decode_rgb(avif.getvalue()).astype(int) - np.asarray(picture)).mean() < 6
    heif = pytest.importorskip("pillow_heif")
    coded = io.BytesIO()
    heif.from_pillow(picture).save(coded, quality=95)
    (tmp_path / "f" / "c").mkdir(parents=True)
    (tmp_path / "f" / "c" / "IMG_1.HEIC").write_bytes(coded.getvalue())
    assert np.abs(decode_rgb(coded.getvalue()).astype(int) - np.asarray(picture)).mean() < 6
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    heif.from_pillow(picture).save(turned, quality=95, exif=exif.tobytes())
    upright = np.asarray(picture.transpose(Image.Transpose.ROTATE_270))
    shown = decode_rgb(turned.getvalue())
    assert shown.shape == upright.shape and np.abs(shown.astype(int) - upright).mean() < 6
    assert pack(tmp_path / "f", tmp_path / "o.beton") == 0
    with pytest.raises(ValueError, match="HEIF cannot be decoded|not an image"):
        decode_rgb(coded.getvalue()[:300])


@pytest.fixture
def address(tmp_path):
    """A server over a folder with class folders x and y."""
    folder(tmp_path / "www" / "photos", "xy")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "www")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/photos"
    server.shutdown()
    server.server_close()


def test_lists_of_addresses(tmp_path, address, capsys):
    names = [f"{c}/{n}.jpg" for c in "xy" for n in range(3)]
    (tmp_path / "www" / "photos" / "list.txt").write_text("\n".join(names))
    (tmp_path / "own.txt").write_text("\n".join(f"{address}/{name}" for name in names))
    assert pack(tmp_path / "www" / "photos", tmp_path / "local.beton") == 0
    wanted = read_manifest(manifest_path(tmp_path / "local.beton"))
    for number, source in enumerate((f"{address}/list.txt", tmp_path / "own.txt")):
        assert pack(source, tmp_path / f"{number}.beton") == 0
        got = read_manifest(manifest_path(tmp_path / f"{number}.beton"))
        assert got.data_hash == wanted.data_hash and got.classes == ("x", "y")
    (tmp_path / "own.txt").write_text(f"{address}/x/0.jpg\n{address}/x/gone.jpg\nwww/photos/y/1.jpg\n")
    assert pack(tmp_path / "own.txt", tmp_path / "two.beton") == 0
    refused = json.loads((tmp_path / "two.rejected.jsonl").read_text())
    assert refused["file"].endswith("gone.jpg") and "404" in refused["reason"]
    with pytest.raises(ValueError, match="make_ffcv_dataset.py"):
        seen(str(tmp_path / "own.txt"))


def test_a_folder_of_an_object_store(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    local = folder(tmp_path / "f", "xy")
    for file in local.rglob("*.jpg"):
        store.pipe(f"/photos-bucket/set/{file.relative_to(local).as_posix()}", file.read_bytes())
    store.pipe("/photos-bucket/set/x/._0.jpg", b"fork")
    store.pipe("/photos-bucket/set/notes.txt.bak", b"n")
    assert pack("memory://photos-bucket/set", tmp_path / "r.beton") == 0 and pack(local, tmp_path / "l.beton") == 0
    remote, here = (read_manifest(manifest_path(tmp_path / f"{name}.beton")) for name in "rl")
    assert remote.data_hash == here.data_hash and remote.sources == here.sources
    assert remote.details["passed_over"] == {"system files": 1, ".bak": 1}
    assert open_source(f"memory://photos-bucket/set,{local}".partition(",")[0]).classes == ("x", "y")
    assert pack("memory://photos-bucket/nothing", tmp_path / "n.beton") == 2


@pytest.mark.parametrize("ending", ["beton", "parquet", "tar"])
def test_a_folder_is_a_folder_whatever_its_name_ends_in(tmp_path, ending):
    plain, named = folder(tmp_path / "plain", "xy"), folder(tmp_path / f"photos.{ending}", "xy")
    assert choose_loader(str(named)) == ("folder", "the data is a folder")
    assert seen(str(named))[:2] == seen(str(plain))[:2]
    assert splits.class_names(str(named)) == ["x", "y"] and len(splits.source_names(str(named))) == 6
    assert pack(named, tmp_path / "packed.beton") == 0
    assert BetonReader(tmp_path / "packed.beton").labels.tolist() == [0] * 3 + [1] * 3


def test_a_folder_of_shards_may_have_the_ending_of_one(tmp_path):
    shards = tmp_path / "shards.tar"
    assert call(make_webdataset.main, [str(folder(tmp_path / "photos", "xy")), str(shards)]) == 0
    assert choose_loader(str(shards))[0] == "webdataset" and seen(str(shards))[0] == [0] * 3 + [1] * 3
