"""The packer: what it stores, that stock FFCV reads it, and every way it says no."""

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.beton import MIN_PAGE_SIZE, BetonReader, BetonWriter, page_size_for
from pipeline.jpeg import check_jpeg
from pipeline.listing import list_images
from pipeline.manifest import manifest_of, manifest_path, read_manifest
from pipeline.records import fit, make_record
from pipeline.refusal import ImageRefused
from pipeline.shards import INDEX_NAME
from tools import make_ffcv_dataset, make_webdataset
from tools.support import packing
from tools.support.class_list import read_class_list
from tools.support.cli import call, make_parser, parse

ROOT = Path(__file__).resolve().parents[1]


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise: codes like a photo."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (9 + 4 * c) + seed) + np.cos(y / (7 + 5 * c)) for c in range(3)]
    pixels = 127 + 50 * np.stack(waves, axis=-1) + rng.normal(0, 6, (height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, mode: str = "RGB", **settings) -> bytes:
    coded = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(coded, "JPEG", **settings)
    return coded.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of three images, one of them gray, one a PNG, one to be reduced."""
    source = tmp_path / "source"
    for name in ("cat/a.jpg", "cat/deep/b.JPG", "cat/c.png", "dog/a.jpeg", "dog/gray.jpg", "dog/large.jpg"):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = len(name)
        if name.endswith("png"):
            Image.fromarray(picture(60, 40, seed)).save(path)
        elif "large" in name:
            path.write_bytes(jpeg(picture(900, 600, seed)))
        else:
            path.write_bytes(jpeg(picture(80 + seed, 64, seed), mode="L" if "gray" in name else "RGB"))
    return source


def pack(*arguments: object) -> int:
    return call(make_ffcv_dataset.main, [str(argument) for argument in arguments])


def test_fitting_jpegs_are_stored_byte_for_byte(photos, tmp_path):
    source, dest = photos(3), tmp_path / "photos.beton"
    assert pack(source, dest) == 0
    reader = BetonReader(dest)
    listing = list_images(source)
    assert reader.num_samples == len(listing.files) == 30
    for number, file in enumerate(listing.files):
        assert reader.record(number).tobytes() == file.read_bytes()
        with Image.open(file) as image:
            assert image.size == (reader.widths[number], reader.heights[number])
    manifest = manifest_of(reader)
    assert manifest.classes == listing.classes == tuple(sorted(path.name for path in source.iterdir()))
    assert reader.labels.tolist() == [number // 3 for number in range(30)]
    assert manifest.sources == listing.names
    assert manifest.details["stored_as_they_were"] == 30


def test_larger_images_are_reduced_with_antialiasing(unpack, tmp_path):
    source, dest = unpack("photos-mixed-size"), tmp_path / "mixed.beton"
    keep = sorted(source.iterdir())[::6]
    for file in set(source.iterdir()) - set(keep):
        file.unlink()
    assert pack(source, dest, "--max-resolution", 150, "--jpeg-quality", 95) == 0
    reader, reduced = BetonReader(dest), 0
    for number, file in enumerate(list_images(source).files):
        with Image.open(file) as image:
            full = image.convert("RGB")
        size = (int(reader.widths[number]), int(reader.heights[number]))
        if max(full.size) <= 150:
            continue
        reduced += 1
        assert max(size) == 150 and abs(size[0] / size[1] - full.size[0] / full.size[1]) < 0.02 * size[0] / size[1]
        want = np.asarray(full.resize(size, Image.Resampling.BICUBIC), dtype=float)
        with Image.open(io.BytesIO(reader.record(number).tobytes())) as image:
            got = np.asarray(image.convert("RGB"), dtype=float)
        # Chroma at half resolution and quantisation; without antialiasing the difference is several times that.
        assert np.abs(got - want).mean() < 5
    assert reduced >= 15


def test_bytes_do_not_depend_on_workers(folder, tmp_path):
    for workers in (1, 3):
        assert pack(folder, tmp_path / f"{workers}.beton", "--workers", workers) == 0
    for ending in ("beton", "manifest.json", "rejected.jsonl"):
        assert (tmp_path / f"1.{ending}").read_bytes() == (tmp_path / f"3.{ending}").read_bytes()


@pytest.mark.ffcv
def test_stock_ffcv_opens_it(folder, tmp_path):
    pytest.importorskip("ffcv")
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption

    dest = tmp_path / "a.beton"
    assert pack(folder, dest) == 0
    reader = BetonReader(dest)
    loader = Loader(
        str(dest),
        batch_size=4,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=False,  # page by page, so the layout in pages is tried too
        drop_last=False,
        pipelines={"image": [CenterCropRGBImageDecoder((32, 32), ratio=1)], "label": [IntDecoder()]},
    )
    batches = [(image.copy(), label.copy()) for image, label in loader]
    got = np.concatenate([image for image, _ in batches])
    labels = np.concatenate([label for _, label in batches])[:, 0]
    assert labels.tolist() == reader.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for number in range(6):
        with Image.open(io.BytesIO(reader.record(number).tobytes())) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side))
            want = np.asarray(square.resize((32, 32), Image.Resampling.BOX), dtype=float)
        assert np.abs(got[number] - want).mean() < 4


@pytest.mark.ffcv
def test_reads_what_ffcv_wrote(tmp_path):
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    images = [(picture(40 + i, 30, i), i * 7 - 1) for i in range(5)]
    for mode in ("jpg", "raw"):
        path = tmp_path / f"{mode}.beton"
        fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
        DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(images)
    reader = BetonReader(tmp_path / "jpg.beton")
    assert reader.labels.tolist() == [label for _, label in images] and manifest_of(reader) is None
    for number, (pixels, _) in enumerate(images):
        with Image.open(io.BytesIO(reader.record(number).tobytes())) as image:
            assert np.abs(np.asarray(image, dtype=float) - pixels).mean() < 8
    with pytest.raises(ValueError, match="raw pixels"):
        BetonReader(tmp_path / "raw.beton")


def test_pages_hold_whole_records(tmp_path):
    path = tmp_path / "pages.beton"
    records = [bytes([number]) * size for number, size in enumerate((900_000, 900_000, 900_000, 5, MIN_PAGE_SIZE, 1))]
    with open(path, "wb") as file:
        writer = BetonWriter(file, capacity=9, page_size=MIN_PAGE_SIZE)
        for number, record in enumerate(records):
            writer.append(record, 10 + number, 20, number)
        with pytest.raises(ValueError, match="does not fit a page"):
            writer.append(bytes(MIN_PAGE_SIZE + 1), 1, 1)
        writer.finish()
    reader = BetonReader(path)
    assert [reader.record(number).tobytes() for number in range(6)] == records
    assert (reader.pages - reader.pages[0]).tolist() == [0, 0, 1, 1, 2, 3]
    assert ((reader.offsets + reader.sizes - 1) // MIN_PAGE_SIZE == reader.pages).all()
    assert page_size_for(400) < page_size_for(4000) and page_size_for(65500) < 1 << 32


def test_broken_betons_are_refused_in_one_line(folder, tmp_path):
    dest = tmp_path / "a.beton"
    assert pack(folder, dest) == 0
    good = dest.read_bytes()
    table = int(np.frombuffer(good[16:24], dtype="<u8")[0])
    foreign = random.Random(0).randbytes(5000)
    unfinished = good[:16] + bytes(8) + good[24:]
    moved = good[: 24 + 2 * 1041 + 5] + b"\xff" * 8 + good[24 + 2 * 1041 + 13 :]
    cuts = [good[:0], good[:10], good[:1000], good[: len(good) // 2], good[:table], good[:-1], good[:-24]]
    for broken in [*cuts, foreign, unfinished, moved, good + b"x"]:
        path = tmp_path / "broken.beton"
        path.write_bytes(broken)
        with pytest.raises(ValueError) as caught:
            BetonReader(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="folder"):
        BetonReader(tmp_path)


def test_manifest_tells_damage_and_belongs_to_its_file(folder, tmp_path):
    import hashlib
    import zlib

    dest, other = tmp_path / "a.beton", tmp_path / "other.beton"
    assert pack(folder, dest) == 0 and pack(folder / "cat", other) == 0
    reader = BetonReader(dest)
    manifest = manifest_of(reader)
    digest = hashlib.sha256()
    for number in range(reader.num_samples):
        record = reader.record(number).tobytes()
        assert zlib.crc32(record) == manifest.checksums[number]
        digest.update(int(reader.labels[number]).to_bytes(8, "little", signed=True) + hashlib.sha256(record).digest())
    assert manifest.data_hash == digest.hexdigest()
    shutil.copy(manifest_path(other), manifest_path(dest))
    with pytest.raises(ValueError, match="does not belong"):
        manifest_of(BetonReader(dest))
    for text in ("", "{}", "[1]", '{"format": "regatta-manifest", "version": 1, "images": 2, "crc32": ""}'):
        manifest_path(dest).write_text(text)
        with pytest.raises(ValueError, match="not a manifest"):
            read_manifest(manifest_path(dest))


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_folder_list_and_shards_give_the_same_data(folder, tmp_path):
    listing = list_images(folder)
    listed = tmp_path / "my list.txt"
    listed.write_text("\n".join(f"source/{name}" for name in listing.names) + "\n\n")
    members = [(f"wrapped/{name}", file.read_bytes()) for name, file in zip(listing.names, listing.files, strict=True)]
    make_tar(tmp_path / "part-08.tar", [*members[:2], ("wrapped/cat/README.txt", b"not an image")])
    make_tar(tmp_path / "part-09.tar", [])
    make_tar(tmp_path / "part-10.tar", members[2:])
    hashes = set()
    for number, source in enumerate((folder, listed, tmp_path / "part-{08..10}.tar")):
        dest = tmp_path / f"{number}.beton"
        assert pack(source, dest) == 0
        manifest = read_manifest(manifest_path(dest))
        assert manifest.classes == ("cat", "dog")
        hashes.add(manifest.data_hash)
    assert len(hashes) == 1


def test_shards_with_class_files(tmp_path):
    data = [jpeg(picture(30, 30, seed)) for seed in range(3)]
    members = [("000.jpg", data[0]), ("000.cls", b"4"), ("001.cls", b"2\n"), ("001.jpg", data[1]), ("002.jpg", data[2])]
    make_tar(tmp_path / "a.tar", members)
    assert pack(tmp_path / "a.tar", tmp_path / "a.beton") == 0
    assert BetonReader(tmp_path / "a.beton").labels.tolist() == [4, 2, -1]


def test_lists_keep_order_and_repetitions_and_name_what_is_missing(folder, tmp_path):
    listed = tmp_path / "list.txt"
    os.mkfifo(tmp_path / "pipe.jpg")
    lines = ["dog/a.jpeg\n", "missing.jpg\n", "cat/a.jpg\r\n", "../pipe.jpg\n", "dog/a.jpeg\n"]
    listed.write_bytes("".join(f"source/{line}" for line in lines).encode())
    dest = tmp_path / "a.beton"
    assert pack(listed, dest, "--max-bad", 0.4) == 0
    manifest = read_manifest(manifest_path(dest))
    assert manifest.sources == ["source/dog/a.jpeg", "source/cat/a.jpg", "source/dog/a.jpeg"]
    assert manifest.details["repeated"] == 1
    entries = [json.loads(line) for line in (tmp_path / "a.rejected.jsonl").open()]
    assert [entry["file"] for entry in entries] == ["source/missing.jpg", "source/../pipe.jpg"]
    assert "No such file" in entries[0]["reason"] and "regular" in entries[1]["reason"]


def test_folders_with_loops_links_and_other_files(folder, tmp_path):
    (folder / "cat/loop").symlink_to(folder, target_is_directory=True)
    (folder / "cat/self").symlink_to(folder / "cat", target_is_directory=True)
    (folder / "dog/nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    (folder / "dog/linked.jpg").symlink_to(folder / "cat/a.jpg")
    (folder / "empty").mkdir()
    (folder / "cat/._a.jpg").write_bytes(b"a resource fork")
    (folder / "cat/labels.csv").write_text("a,b")
    os.mkfifo(folder / "cat/pipe.jpg")
    dest = tmp_path / "a.beton"
    assert pack(folder, dest, "--max-bad", 0.5) == 0
    manifest = read_manifest(manifest_path(dest))
    assert manifest.num_samples == 7 and manifest.classes == ("cat", "dog")
    assert manifest.sources.count("dog/linked.jpg") == 1 and manifest.details["repeated"] == 1
    assert [json.loads(line)["file"] for line in (tmp_path / "a.rejected.jsonl").open()] == ["dog/nowhere.jpg"]
    (folder / "loose.jpg").write_bytes(jpeg(picture(20, 20)))
    assert set(list_images(folder).labels.tolist()) == {-1}


def test_more_bad_images_than_allowed(folder, tmp_path, capsys):
    (folder / "cat/bad.jpg").write_bytes((folder / "cat/a.jpg").read_bytes()[:-200])
    dest = tmp_path / "out" / "a.beton"
    assert pack(folder, dest, "--max-bad", 0.1) == 3
    line = capsys.readouterr().err.strip()
    assert "1 of 7" in line and "cat/bad.jpg" in line and "\n" not in line
    # The list of what to repair stays, and what is packed, for a run with another limit.
    assert sorted(path.name for path in dest.parent.iterdir()) == ["a.beton.refused", "a.rejected.jsonl"]
    assert json.loads((dest.parent / "a.rejected.jsonl").read_text())["file"] == "cat/bad.jpg"
    assert pack(folder, dest, "--max-bad", 0.2, "--overwrite") == 0
    assert BetonReader(dest).num_samples == 6


def test_mistakes_are_one_line_and_code_2(folder, tmp_path, capsys):
    dest = tmp_path / "a.beton"
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "cut.tar").write_bytes(b"not a tar file at all" * 100)
    (tmp_path / "there.beton").write_bytes(b"x")
    junk = tmp_path / "junk"
    junk.mkdir()
    (junk / "a.jpg").write_bytes(b"nothing")
    for arguments, words in [
        ((folder, dest, "--max-resolutoin", 3), "--max-resolution"),
        ((folder,), "DEST"),
        ((folder, dest, "--workers", "many"), "many"),
        ((folder, dest, "--workers", -1), "--workers -1"),
        ((folder, dest, "--jpeg-quality", 101), "1 to 100"),
        ((folder, dest, "--max-bad", 1.5), "0 to 1"),
        ((empty, dest), "holds no image files"),
        ((tmp_path / "nothing", dest), "does not exist"),
        ((tmp_path / "s-{0..2}.tar", dest), "s-0.tar does not exist"),
        ((tmp_path / "cut.tar", dest), "cut.tar"),
        ((folder, tmp_path / "there.beton"), "--overwrite"),
        ((folder, tmp_path / "a.bin"), "end in .beton"),
        ((junk, dest, "--max-bad", 1), "can be used"),
        ((folder, Path("/proc/no/a.beton")), "/proc/no"),
    ]:
        assert pack(*arguments) == 2, arguments
        line = capsys.readouterr().err.strip()
        assert words in line and "\n" not in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.tar", "empty", "junk", "source", "there.beton"]


def test_interruption_leaves_nothing_and_spares_what_was_there(folder, tmp_path, monkeypatch, capsys):
    dest = tmp_path / "out" / "a.beton"
    assert pack(folder, dest) == 0
    before = {path.name: path.read_bytes() for path in dest.parent.iterdir()}
    whole = packing.make_records

    def interrupted(*arguments):
        for number, made in enumerate(whole(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield made

    monkeypatch.setattr(make_ffcv_dataset, "make_records", interrupted)
    assert pack(folder, dest, "--overwrite") == 130
    assert {path.name: path.read_bytes() for path in dest.parent.iterdir()} == before
    assert pack(folder, tmp_path / "new.beton") == 130
    assert not list(tmp_path.glob("*new*")) and not list(tmp_path.glob(".*new*"))


def test_killed_and_run_from_elsewhere(folder, tmp_path):
    script, dest = ROOT / "tools/make_ffcv_dataset.py", tmp_path / "out" / "a.beton"
    shown = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    text = " ".join(shown.stdout.split())
    assert shown.returncode == 0 and "default: 400" in text and "default: 0.001" in text
    listed = tmp_path / "list.txt"
    listed.write_text("source/cat/c.png\n" * 200_000)  # about a minute of work
    running = subprocess.Popen([sys.executable, script, listed, dest], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (dest.parent.is_dir() and list(dest.parent.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {path.name[0] for path in dest.parent.iterdir()} == {"."}
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 130
    assert running.stderr.read().strip().splitlines()[-1].startswith("stopped before it was done")
    assert not list(dest.parent.iterdir())


def test_shuffle_is_the_same_every_time(photos, tmp_path):
    source = photos(4)
    for name in ("a", "b"):
        assert pack(source, tmp_path / f"{name}.beton", "--shuffle") == 0
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()
    reader = BetonReader(tmp_path / "a.beton")
    manifest = manifest_of(reader)
    assert sorted(manifest.sources) == list_images(source).names != manifest.sources
    for number, name in enumerate(manifest.sources):
        assert manifest.classes[reader.labels[number]] == name.split("/")[0]


@pytest.mark.parametrize("packer", [make_ffcv_dataset, make_webdataset])
def test_only_the_listed_classes_are_packed(packer, photos, tmp_path):
    source = photos(4)
    every = list_images(source)
    chosen = [every.classes[7], every.classes[2]]
    text = f"# two of them\r\n\r\n{chosen[0]} more words\n  {chosen[1]}\n"
    (tmp_path / "two.txt").write_bytes(text.encode())
    dest = tmp_path / ("a.beton" if packer is make_ffcv_dataset else "shards")
    assert call(packer.main, [str(source), str(dest), "--classes", str(tmp_path / "two.txt"), "--shuffle"]) == 0
    place = manifest_path(dest) if packer is make_ffcv_dataset else dest / INDEX_NAME
    about = json.loads(place.read_text())
    # Labels follow the order of the names, whatever the order of the list.
    assert about["classes"] == sorted(chosen)
    listed = {"file": "two.txt", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    assert about["settings"]["classes"] == listed
    if packer is make_ffcv_dataset:
        manifest = read_manifest(place)
        assert sorted(manifest.sources) == [name for name in every.names if name.split("/")[0] in chosen]
        for name, label in zip(manifest.sources, BetonReader(dest).labels.tolist(), strict=True):
            assert manifest.classes[label] == name.split("/")[0]


def test_listed_classes_of_shards_with_class_numbers(tmp_path):
    members = []
    for number, label in enumerate([0, 3, 1, -1, 3]):
        members += [(f"{number}.jpg", jpeg(picture(40, 30, number))), (f"{number}.cls", str(label).encode())]
    make_tar(tmp_path / "s.tar", members)
    (tmp_path / "list.txt").write_text("3\n1\n")
    assert pack(tmp_path / "s.tar", tmp_path / "a.beton", "--classes", tmp_path / "list.txt") == 0
    reader = BetonReader(tmp_path / "a.beton")
    assert manifest_of(reader).sources == ["1.jpg", "2.jpg", "4.jpg"]
    assert reader.labels.tolist() == [1, 0, 1] and manifest_of(reader).classes == ("1", "3")
    (tmp_path / "list.txt").write_text("2\n")  # below the highest number, but no image has it
    assert pack(tmp_path / "s.tar", tmp_path / "b.beton", "--classes", tmp_path / "list.txt") == 2


def test_class_lists_that_do_not_fit_are_one_line(folder, tmp_path, capsys):
    lists = {"bird": "cat\nbird\n", "birds": "bird\ncow\ncat\n", "empty": "# nothing\n\n"}
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    for name, words in [
        ("bird", "no images of class bird, which bird names"),
        ("birds", "class bird and 1 more"),
        ("empty", "names no class"),
        ("absent", "cannot be read"),
    ]:
        assert pack(folder, tmp_path / "a.beton", "--classes", tmp_path / name) == 2
        line = capsys.readouterr().err.strip()
        assert words in line and "\n" not in line
    assert not list(tmp_path.glob("a.*"))


def test_the_list_of_imagenet_100_has_100_wordnet_ids():
    names = read_class_list(ROOT / "tools" / "support" / "imagenet100.txt").names
    assert len(names) == 100 and all(re.fullmatch(r"n\d{8}", name) for name in names)


VARIANTS = [
    {"mode": mode, "progressive": progressive, "optimize": optimize, **extra}
    for mode, extras in {
        "RGB": [{"subsampling": s} for s in ("4:4:4", "4:2:2", "4:2:0")] + [{"restart_marker_blocks": 3}],
        "L": [{}, {"restart_marker_rows": 1}],
        "CMYK": [{}],
    }.items()
    for extra in extras
    for progressive in (False, True)
    for optimize in (False, True)
]


def test_whole_jpegs_of_every_kind_pass_and_cut_ones_do_not():
    rng = random.Random(1)
    for number, variant in enumerate(VARIANTS):
        variant = dict(variant)
        width, height, mode = rng.randint(1, 70), rng.randint(1, 70), variant.pop("mode")
        data = jpeg(picture(width, height, number), mode, quality=rng.choice([5, 75, 95, 100]), **variant)
        info = check_jpeg(data + b"behind the end")
        assert (info.width, info.height, info.end, info.clean) == (width, height, len(data), True)
        assert info.progressive == variant["progressive"]
        assert info.color == {"RGB": "ycc", "L": "gray", "CMYK": "cmyk"}[mode]
        for cut in {2, len(data) // 3, len(data) // 2, len(data) - 30, len(data) - 2, len(data) - 1}:
            with pytest.raises(ImageRefused):
                check_jpeg(data[:cut])
            with pytest.raises(ImageRefused):  # a mended end marker does not bring the image back
                check_jpeg(data[: min(cut, len(data) - 20)] + b"\xff\xd9")


def test_check_is_stricter_than_the_decoder():
    """What passes decodes; most of what PIL decodes in spite of damage does not pass."""
    rng = random.Random(2)
    source = [jpeg(picture(120, 90, seed), quality=90, progressive=seed % 2 == 1) for seed in range(6)]
    silent = caught = passed = 0
    for _ in range(250):
        data = bytearray(rng.choice(source))
        for _ in range(rng.choice([1, 20])):
            data[rng.randrange(300 if rng.random() < 0.2 else 650, len(data) - 2) if len(data) > 700 else 20] = (
                rng.randrange(256)
            )
        try:
            with Image.open(io.BytesIO(bytes(data))) as image:
                image.load()
            decodes = True
        except Exception:
            decodes = False
        try:
            clean = check_jpeg(bytes(data)).clean
        except ImageRefused:
            silent += decodes
            caught += decodes
            continue
        passed += 1
        silent += decodes
        assert decodes or not clean
    assert caught > 0.5 * silent and passed > 10


def test_what_is_kept_and_what_is_coded_anew():
    pixels = picture(100, 60)
    plain = jpeg(pixels)
    page = page_size_for(400)
    exif = Image.Exif()
    exif[0x0112] = 6
    kept = make_record(plain + b"a film", 400, 90, page)
    assert kept.kept and kept.data == plain
    assert make_record(jpeg(pixels, progressive=True), 400, 90, page).kept
    assert make_record(jpeg(pixels, "L"), 400, 90, page).kept
    assert make_record(plain, 100, 90, page).kept and not make_record(plain, 99, 90, page).kept
    turned = make_record(jpeg(pixels, exif=exif.tobytes()), 400, 90, page)
    assert not turned.kept and (turned.width, turned.height) == (60, 100)
    for other in (jpeg(pixels, "CMYK"), jpeg(pixels, keep_rgb=True), plain[:20] + b"junk" + plain[20:]):
        record = make_record(other, 400, 90, page)
        info = check_jpeg(record.data)
        assert not record.kept and info.color == "ycc" and info.clean
        with Image.open(io.BytesIO(record.data)) as image:
            assert np.abs(np.asarray(image, dtype=float) - pixels).mean() < 8
    # A record that is large only for what else it holds loses that.
    stuffed = plain[:2] + (b"\xff\xfe\xff\xff" + bytes(65533)) * 40 + plain[2:]
    assert not make_record(stuffed, 400, 90, MIN_PAGE_SIZE).kept
    assert fit(Image.new("RGB", (1, 2000)), 400).size == (1, 400)


def test_parser_names_the_nearest_flag():
    parser = make_parser("test")
    parser.add_argument("--max-resolution", type=int, default=1)
    parser.add_argument("--shift", type=float, default=0.0)
    assert parse(parser, ["--shift", "-1.5"]).shift == -1.5
    for argv, near in ((["--max-res", "2"], "--max-resolution"), (["--resolution=2"], "--max-res")):
        with pytest.raises(ValueError, match=f"nearest valid flag is .*{near}"):
            parse(parser, argv)
    with pytest.raises(ValueError, match="unknown flag -z; --help lists all flags"):
        parse(parser, ["-z"])
