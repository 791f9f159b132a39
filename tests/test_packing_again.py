"""A refused packing run is repeated without decoding; small folders pack by default; what comes next is named."""

import io
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tools import make_ffcv_dataset, make_webdataset
from tools.support import packing
from tools.support.cli import call
from train.main import main as train

PACKERS = [make_ffcv_dataset, make_webdataset]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Forty photos of two classes, two of which are bad, and three other files."""
    folder = tmp_path / "my photos"
    for number in range(40):
        path = folder / f"c{number % 2}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((50, 40)).save(path)
    (folder / "c0" / "00.jpg").write_bytes(b"")
    (folder / "c1" / "01.jpg").write_bytes((folder / "c1" / "03.jpg").read_bytes()[:300])
    for name in ("a.mp4", "b.mp4", "notes.txt"):
        (folder / name).write_bytes(b"x")
    return folder


def dest_of(packer, folder: Path) -> Path:
    return folder / ("p.beton" if packer is make_ffcv_dataset else "p")


def content(dest: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(dest.rglob("*"))) if dest.is_dir() else dest.read_bytes()


def no_decoding(monkeypatch) -> None:
    def fail(*_):
        raise AssertionError("an image is decoded again")

    for module in (*PACKERS, packing):
        monkeypatch.setattr(module, "make_records", fail)


@pytest.mark.parametrize("packer", PACKERS)
def test_another_limit_decodes_nothing_again(packer, photos, tmp_path, monkeypatch, capsys):
    fresh, dest = dest_of(packer, tmp_path / "fresh"), dest_of(packer, tmp_path)
    assert call(packer.main, [str(photos), str(fresh), "--max-bad", "0.1"]) == 0
    assert call(packer.main, [str(photos), str(dest)]) == 3
    line = capsys.readouterr().err
    assert "2 of 40" in line and "--max-bad 0.05, for which nothing is decoded again" in line and not dest.exists()
    no_decoding(monkeypatch)
    # Refused again, then allowed by the value that was named; no --overwrite for one's own left-overs.
    assert call(packer.main, [str(photos), str(dest), "--max-bad", "0.03"]) == 3
    assert call(packer.main, [str(photos), str(dest), "--max-bad", "0.05"]) == 0
    assert content(dest) == content(fresh)
    assert (tmp_path / "p.rejected.jsonl").read_text() == (tmp_path / "fresh" / "p.rejected.jsonl").read_text()
    assert not list(tmp_path.glob("*.refused")) and not [path for path in tmp_path.iterdir() if path.name[0] == "."]


@pytest.mark.parametrize("change", ["file", "quality", "damage", "label"])
def test_a_change_packs_anew(photos, tmp_path, change):
    dest = tmp_path / "p.beton"
    assert call(make_ffcv_dataset.main, [str(photos), str(dest)]) == 3
    kept = tmp_path / "p.beton.refused" / "about.json"
    if change == "file":
        (photos / "c0" / "00.jpg").write_bytes((photos / "c0" / "02.jpg").read_bytes())
    elif change == "damage":
        kept.write_text(kept.read_text()[:100])
    elif change == "label":
        (photos / "c0" / "02.jpg").rename(photos / "c1" / "02.jpg")
    more = ["--jpeg-quality", "80"] if change == "quality" else []
    assert call(make_ffcv_dataset.main, [str(photos), str(dest), "--max-bad", "0.1", *more]) == 0
    details = json.loads((tmp_path / "p.manifest.json").read_text())
    assert details["rejected"] == (1 if change == "file" else 2)
    assert details["passed_over"] == {".mp4": 2, ".txt": 1} and not kept.exists()


@pytest.mark.parametrize(("total", "bad"), [(60, 1), (300, 3), (527, 3), (600, 5), (100_000, 100)])
def test_few_bad_files_pass_by_default(total, bad):
    tally = packing.Tally(rejected=[("x", "empty file")] * bad)
    assert tally.too_many(total, None) is None
    tally.rejected *= 7
    problem = tally.too_many(total, None)
    assert problem is not None and "--max-bad 0.001 allows" in problem
    named = float(problem.partition("or give --max-bad ")[2].partition(",")[0])
    assert tally.too_many(total, named) is None, "the value that is named works"


@pytest.mark.parametrize("packer", PACKERS)
def test_the_last_line_is_the_next_command_and_works(packer, photos, tmp_path, capsys, monkeypatch):
    dest = dest_of(packer, tmp_path / "with blank's")
    dest.parent.mkdir()
    assert call(packer.main, [str(photos), str(dest), "--max-bad", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "passed over 2 .mp4, 1 .txt; " in out
    command = shlex.split(out.strip().splitlines()[-1].removeprefix("next: "))
    assert command[:2] == ["python", "train/main.py"] and command[-1] == str(dest)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.pretrain.rehearse", lambda *_: SimpleNamespace(text=lambda: ""))  # no step is needed
    assert train([*command[2:], "--dry-run"]) == 0


def test_too_few_images_name_the_small_recipe(tmp_path, capsys):
    for number in range(70):
        coded = io.BytesIO()
        Image.new("RGB", (32, 32), (number, 0, 0)).save(coded, "PNG")
        (tmp_path / f"{number}.png").write_bytes(coded.getvalue())
    # Without --recipe the run would take the small one by itself.
    arguments = [
        "--method",
        "regioncl-m",
        "--recipe",
        "regioncl-m",
        "--data",
        str(tmp_path),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert train(arguments) == 2
    assert "choose --recipe regioncl-m-small" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "0.png").rename(tmp_path / "0.txt")
    for number in range(1, 9):
        (tmp_path / f"{number}.png").unlink()
    assert train(arguments) == 2
    assert "lower it or add images" in capsys.readouterr().err.splitlines()[-1]
