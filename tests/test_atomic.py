"""What a killed writer leaves behind goes away with the next one, and what another one is still writing does not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from PIL import Image

from pipeline.atomic import remove_leftovers, replacing
from tools import make_ffcv_dataset, make_webdataset


def _write_and_wait(final: Path) -> None:
    with replacing(final) as temporary:
        temporary.mkdir()
        (temporary / "part").touch()
        time.sleep(60)


def test_only_what_ended_processes_left_goes_away(tmp_path: Path) -> None:
    final = tmp_path / "shards"
    writer = multiprocessing.get_context("spawn").Process(target=_write_and_wait, args=(final,))
    writer.start()
    while not list(tmp_path.glob(".shards.*.tmp/part")):
        time.sleep(0.05)
    elsewhere = tmp_path / ".shards.another.host-3-1.tmp"
    elsewhere.mkdir()
    remove_leftovers(final, sole_writer=False)
    assert len(list(tmp_path.glob(".shards.*.tmp"))) == 2, "both may still be written"
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    remove_leftovers(final, sole_writer=False)
    assert list(tmp_path.iterdir()) == [elsewhere]
    remove_leftovers(final)
    assert not list(tmp_path.iterdir())


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
    # As a process of a container before this one would have named it.
    final = tmp_path / name
    left = tmp_path / f".{final.stem}.{socket.gethostname()}-{os.getpid()}-1.tmp{final.suffix}"
    left.mkdir()
    assert packer.main([str(tmp_path / "images"), str(final)]) == 0  # type: ignore[attr-defined]
    assert final.exists() and not left.exists()
