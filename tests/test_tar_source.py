"""Tar files as people have them: every member is packed, counted as passed over, or refused by name."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.beton import BetonReader
from pipeline.loaders import choose_loader
from pipeline.manifest import manifest_path, read_manifest
from pipeline.refusal import ImageRefused
from pipeline.stores import FileStore
from tools import make_ffcv_dataset
from tools.support.cli import call
from tools.support.open_source import open_source


def jpeg(seed: int, size: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    coded = io.BytesIO()
    Image.fromarray(pixels).resize((size, size)).save(coded, "JPEG")
    return coded.getvalue()


def tar_bytes(members: list, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar file of (name, bytes), (name, "hard", target) and (name, "soft", target)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, what, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type = tarfile.LNKTYPE if what == "hard" else tarfile.SYMTYPE
                info.linkname = target[0]
                archive.addfile(info)
            else:
                info.size = len(what)
                archive.addfile(info, io.BytesIO(what))
    return out.getvalue()


def labelled(count: int, name: str = "{:03d}") -> list:
    return [
        member
        for number in range(count)
        for member in ((name.format(number) + ".jpg", jpeg(number)), (name.format(number) + ".cls", b"%d" % number))
    ]


def content(path: Path) -> list:
    """(name, label, bytes or the reason of the refusal) of everything that is counted."""
    source = open_source(str(path))
    rows = []
    for number, name in enumerate(source.names):
        try:
            what: object = source.read(number)
        except ImageRefused as refusal:
            what = str(refusal)
        rows.append((name, int(source.labels[number]), what))
    return rows


@pytest.mark.parametrize(
    "name", ["frame.000.{:03d}", "v1.2/x.{:d}", "{:03d}", "2024-01-01 10.30.{:02d}", "./deep/er.d/{:d}", "a..{:d}."]
)
def test_dots_in_names(tmp_path, name):
    (tmp_path / "a.tar").write_bytes(tar_bytes(labelled(4, name)))
    assert [(label, data) for _, label, data in content(tmp_path / "a.tar")] == [(n, jpeg(n)) for n in range(4)]


def test_several_images_of_one_class_file(tmp_path):
    members = [
        ("7.jpg", jpeg(0)),
        ("7.depth.png", jpeg(1)),
        ("7.cls", b"3"),
        ("7.left.jpg", jpeg(2)),
        ("8.jpg", jpeg(3)),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes([*members, ("7.left.cls", b"5")]))
    assert [label for _, label, _ in content(tmp_path / "a.tar")] == [3, 3, 5, -1]


def offset_of(data: bytes, name: str) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmember(name).offset


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["001.jpg", "002.jpg", "003.jpg", "003.cls"])
def test_a_damaged_header_costs_one_member_and_is_named(tmp_path, form, name):
    data = bytearray(tar_bytes(labelled(4), form))
    at = offset_of(bytes(data), name)
    data[at + 124] ^= 0x41  # in the size, so that the checksum does not fit
    (tmp_path / "a.tar").write_bytes(data)
    rows = content(tmp_path / "a.tar")
    lost = [row for row in rows if isinstance(row[2], str)]
    assert lost == [(f"{tmp_path}/a.tar, byte {at}", -1, lost[0][2])] and "damaged tar header" in lost[0][2]
    found = {row[0]: row[1] for row in rows if not isinstance(row[2], str)}
    wanted = {f"{number:03d}.jpg": number for number in range(4) if f"{number:03d}.jpg" != name}
    assert found == wanted | ({"003.jpg": -1} if name == "003.cls" else {})


def test_a_packer_counts_what_a_damaged_header_hides(tmp_path, capsys):
    data = bytearray(tar_bytes([(f"cat/{n}.jpg" if n % 2 else f"dog/{n}.jpg", jpeg(n)) for n in range(8)]))
    data[offset_of(bytes(data), "cat/3.jpg") + 5] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    arguments = [str(tmp_path / "a.tar"), str(tmp_path / "a.beton"), "--max-bad"]
    assert call(make_ffcv_dataset.main, [*arguments, "0.1"]) == 3
    assert "1 of 8" in capsys.readouterr().err
    assert call(make_ffcv_dataset.main, [*arguments, "0.2", "--overwrite"]) == 0
    manifest = read_manifest(manifest_path(tmp_path / "a.beton"))
    assert manifest.classes == ("cat", "dog") and manifest.num_samples == 7
    assert "byte" in json.loads((tmp_path / "a.rejected.jsonl").read_text())["file"]


@pytest.mark.parametrize("where", ["between", "data", "header", "padding", "end mark"])
def test_cut_files_are_refused(tmp_path, where):
    data = tar_bytes(labelled(5))
    at = offset_of(data, "003.jpg")
    cut = {
        "between": at,
        "data": at + 700,
        "header": at + 100,
        "padding": at - 10,
        "end mark": offset_of(data, "004.cls") + 1024,
    }
    (tmp_path / "a.tar").write_bytes(data[: cut[where]])
    with pytest.raises(ValueError, match="is cut|truncated"):
        open_source(str(tmp_path / "a.tar"))
    if where in ("between", "end mark"):
        # The remedy that the message names.
        (tmp_path / "a.tar").write_bytes(data[: cut[where]] + bytes(1024))
        assert len(content(tmp_path / "a.tar")) == (3 if where == "between" else 5)


def test_joined_archives_are_read_to_the_end(tmp_path):
    first, second = tar_bytes(labelled(3, "a/{:d}")), tar_bytes(labelled(3, "b/{:d}"), tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(first + second + bytes(3 << 20) + second)
    rows = content(tmp_path / "a.tar")
    assert [name for name, _, _ in rows] == [f"{c}/{n}.jpg" for c in "abb" for n in range(3)]
    assert [label for _, label, _ in rows] == [0, 1, 2] * 3
    (tmp_path / "a.tar").write_bytes(first + b"rubbish behind the end")
    rows = content(tmp_path / "a.tar")
    assert len(rows) == 4 and "damaged" in rows[3][2]


def test_links_lead_to_their_images(tmp_path):
    members = [
        ("./dog/late.jpg", "soft", "../cat/0.jpg"),
        ("./cat/0.jpg", jpeg(0)),
        ("./dog/hard.jpg", "hard", "./cat/0.jpg"),
        ("./dog/chain.jpg", "soft", "hard.jpg"),
        ("./dog/out.jpg", "soft", "/etc/passwd"),
        ("./dog/up.jpg", "soft", "../../up.jpg"),
        ("./dog/round.jpg", "soft", "round.jpg"),
        ("./dog/gone.jpg", "hard", "cat/gone.jpg"),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    rows = {name: (label, data) for name, label, data in content(tmp_path / "a.tar")}
    assert len(rows) == len(members)
    for name, label in {"dog/late.jpg": 1, "cat/0.jpg": 0, "dog/hard.jpg": 1, "dog/chain.jpg": 1}.items():
        assert rows[name] == (label, jpeg(0))
    for name in ("out", "up", "round", "gone"):
        assert "a link to" in rows[f"dog/{name}.jpg"][1] and "no image of this tar file" in rows[f"dog/{name}.jpg"][1]


def test_a_name_that_is_there_twice(tmp_path):
    twice = [("a.jpg", jpeg(0)), ("a.cls", b"4"), ("a.jpg", jpeg(1)), ("a.cls", b"7")]
    (tmp_path / "a.tar").write_bytes(tar_bytes(twice))
    assert content(tmp_path / "a.tar") == [("a.jpg", 4, jpeg(0)), ("a.jpg", 7, jpeg(1))]
    (tmp_path / "a.tar").write_bytes(tar_bytes([*twice[:3], ("a.cls", b"4")]))
    assert [label for _, label, _ in content(tmp_path / "a.tar")] == [4, 4]
    # Three labels for two images: whose is whose is not guessed.
    (tmp_path / "a.tar").write_bytes(tar_bytes([*twice, ("a.cls", b"9"), ("b.jpg", jpeg(2)), ("b.cls", b"1")]))
    rows = content(tmp_path / "a.tar")
    assert [type(row[2]) for row in rows] == [str, str, bytes] and rows[2][1] == 1
    # Folders instead of class files.
    (tmp_path / "a.tar").write_bytes(tar_bytes([("x/a.jpg", jpeg(0)), ("y/a.jpg", jpeg(1)), ("x/a.jpg", jpeg(2))]))
    assert [label for _, label, _ in content(tmp_path / "a.tar")] == [0, 1, 0]


def test_what_systems_add_is_passed_over_and_counted(tmp_path):
    members = [
        ("./._0.jpg", b"fork"),
        ("0.jpg", jpeg(0)),
        ("__MACOSX/0.jpg", b"fork"),
        ("@eaDir/0.jpg", jpeg(1, 8)),
        (".DS_Store", b"x"),
        ("0.json", b"{}"),
        ("clip.mp4", b"x"),
        ("README", b"x"),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    source = open_source(str(tmp_path / "a.tar"))
    assert source.names == ["0.jpg"]
    assert source.passed_over == {"system files": 4, ".json": 1, ".mp4": 1, "without ending": 1}


def test_hostile_headers_cost_neither_memory_nor_time(tmp_path):
    data = bytearray(tar_bytes([("x" * 150 + "/0.jpg", jpeg(0)), ("1.jpg", jpeg(1))], tarfile.PAX_FORMAT))
    assert data[156:157] == b"x"  # the extended header; it claims 8 GiB
    data[124:136] = b"77777777777\0"
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    rows = content(tmp_path / "a.tar")
    assert rows[-1] == ("1.jpg", -1, jpeg(1)) and "damaged" in rows[0][2]


def test_a_tar_of_class_tars(tmp_path):
    inner = {
        wnid: tar_bytes([(f"{wnid}_{n}.JPEG", jpeg(n + place * 10)) for n in range(3)])
        for place, wnid in enumerate(("n01440764", "n01443537"))
    }
    (tmp_path / "train.tar").write_bytes(tar_bytes([(f"{name}.tar", data) for name, data in inner.items()]))
    rows = content(tmp_path / "train.tar")
    assert [(name, label) for name, label, _ in rows] == [
        (f"{wnid}/{wnid}_{n}.JPEG", place) for place, wnid in enumerate(inner) for n in range(3)
    ]
    assert [data for _, _, data in rows] == [jpeg(n + place * 10) for place in range(2) for n in range(3)]
    cut = tar_bytes([("n1.tar", inner["n01440764"][:1500])])
    (tmp_path / "cut.tar").write_bytes(cut)
    with pytest.raises(ValueError, match="n1.tar in .*cut.tar is (truncated|cut)"):
        open_source(str(tmp_path / "cut.tar"))


def test_wildcards_name_tar_files(tmp_path):
    for number in (2, 0, 1):
        (tmp_path / f"s-{number}.tar").write_bytes(tar_bytes([(f"c/{number}.jpg", jpeg(number))]))
    (tmp_path / "._s-0.tar").write_bytes(b"fork")
    assert [name for name, _, _ in content(tmp_path / "s-*.tar")] == ["c/0.jpg", "c/1.jpg", "c/2.jpg"]
    with pytest.raises(ValueError, match="no file fits"):
        open_source(str(tmp_path / "t-*.tar"))


def test_a_stray_tar_makes_no_shards_of_a_folder(tmp_path):
    for name in ("n1", "n2"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "0.jpg").write_bytes(jpeg(0))
        (tmp_path / "photos" / f"{name}.tar").write_bytes(tar_bytes([(f"{name}_0.jpg", jpeg(0))]))
    assert choose_loader(str(tmp_path / "photos"))[0] == "folder"
    store = FileStore(str(tmp_path / "photos"))
    assert store.classes == ("n1", "n2") and len(store.files) == 2
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(tar_bytes([("0.jpg", jpeg(0))]))
    with pytest.raises(ValueError, match="tar files without an index"):
        FileStore(str(tmp_path / "tars"))
    assert call(make_ffcv_dataset.main, [str(tmp_path / "photos"), str(tmp_path / "a.beton")]) == 0
    assert BetonReader(tmp_path / "a.beton").labels.tolist() == [0, 1]
    assert read_manifest(manifest_path(tmp_path / "a.beton")).details["passed_over"] == {".tar": 2}


@pytest.mark.parametrize(
    "name", ["n1/inner.tar", "all.zip", "n1.tar.gz", "table.parquet", "photos.beton", "list.txt", "index.json"]
)
def test_what_else_lies_beside_the_classes_makes_no_other_data_of_a_folder(tmp_path, name):
    for folder in ("n1", "n2"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        (tmp_path / "photos" / folder / "0.jpg").write_bytes(jpeg(0))
    (tmp_path / "photos" / name).write_bytes(b"whatever it holds")
    assert choose_loader(str(tmp_path / "photos"))[0] == "folder"
    store = FileStore(str(tmp_path / "photos"))
    assert store.classes == ("n1", "n2") and store.labels.tolist() == [0, 1]


CLASS_NAMES = ["tench", "great white shark", "#misc", "Café", "#1 dog"]


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (["tench", "great white shark"], ["great white shark", "tench"]),
        (["tench Tinca tinca", "# a remark"], ["tench"]),
        (["#misc", "# a remark", "tench"], ["#misc", "tench"]),
        (["Cafe\u0301"], ["Café"]),
        (["#1 dog", "great white shark # the big one"], None),
        (["great white shark"], ["great white shark"]),
    ],
)
def test_lists_of_classes_with_blanks_accents_and_signs(tmp_path, capsys, lines, kept):
    (tmp_path / "a.tar").write_bytes(tar_bytes([(f"{name}/0.jpg", jpeg(n)) for n, name in enumerate(CLASS_NAMES)]))
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    arguments = [str(tmp_path / "a.tar"), str(tmp_path / "a.beton"), "--classes", str(tmp_path / "list.txt")]
    code = call(make_ffcv_dataset.main, arguments)
    if kept is None:
        assert code == 2 and "no images of class great" in capsys.readouterr().err
    else:
        assert code == 0 and list(read_manifest(manifest_path(tmp_path / "a.beton")).classes) == kept
