"""What systems leave in folders is no data, for every reader of folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.clutter import has_clutter, is_clutter
from pipeline.listing import list_images

CLUTTER = (
    "._photo.jpg .DS_Store .ipynb_checkpoints .@__thumb @eaDir @Recycle #recycle $RECYCLE.BIN __MACOSX lost+found "
    "Thumbs.db desktop.ini ~$photo.jpg photo.jpg~ #photo.jpg# SYNOPHOTO_THUMB_XL.jpg FOUND.000"
).split()
DATA = [
    "photo.jpg",
    "#hash",
    "@home",
    "$5 bill.jpg",
    "a~b.png",
    "_private.jpg",
    "recycling",
    "FOUND",
    "found.0001",
    "C#",
    "#1 best",
]


@pytest.mark.parametrize("name", CLUTTER)
def test_clutter_is_told_by_its_name(name: str) -> None:
    assert is_clutter(name) and has_clutter(["good", name, "x.jpg"])


@pytest.mark.parametrize("name", DATA)
def test_people_s_own_names_are_data(name: str) -> None:
    assert not is_clutter(name)


def test_thumbnails_and_deleted_photos_become_neither_images_nor_classes(tmp_path: Path) -> None:
    kept = ["cat/1.jpg", "dog/2.jpg"]
    left = ["cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/3.jpg", "$RECYCLE.BIN/S-1/4.jpg", "cat/._1.jpg"]
    for name in (*kept, *left):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    listing = list_images(tmp_path)
    assert listing.names == kept and listing.classes == ("cat", "dog")


def test_a_folder_that_the_user_names_is_data(tmp_path: Path) -> None:
    (tmp_path / "#recycle").mkdir()
    (tmp_path / "#recycle" / "3.jpg").write_bytes(b"x")
    assert list_images(tmp_path / "#recycle").names == ["3.jpg"]
