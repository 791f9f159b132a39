"""What a killed writer leaves behind goes away with the next one."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pipeline.atomic import remove_leftovers
from tools import make_ffcv_dataset, make_webdataset


def test_a_folder_that_was_being_replaced_is_kept_as_long_as_it_is_the_only_one(tmp_path: Path) -> None:
    old = tmp_path / ".shards.host-3-1.old.tmp"
    old.mkdir()
    remove_leftovers(tmp_path / "shards")
    assert old.exists()
    (tmp_path / "shards").mkdir()
    remove_leftovers(tmp_path / "shards")
    assert not old.exists()


@pytest.mark.parametrize(("packer", "name"), [(make_ffcv_dataset, "photos.beton"), (make_webdataset, "shards")])
def test_packing_again_removes_what_a_killed_run_left(tmp_path: Path, packer: object, name: str) -> None:
    """Found by killing packers a thousand times: a hidden part as large as the whole stayed for good."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "images" / "a.jpg")
    final = tmp_path / name
    left = tmp_path / f".{final.stem}.3-1.tmp{final.suffix}"
    left.mkdir()
    assert packer.main([str(tmp_path / "images"), str(final)]) == 0  # type: ignore[attr-defined]
    assert final.exists() and not left.exists()
