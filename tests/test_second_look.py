"""Files that libjpeg decodes without a word although they are damaged: every loader refuses them as the packer does."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import decoder, second_look
from pipeline.interface import PipelineConfig, ViewSpec
from pipeline.jpeg import check_jpeg
from pipeline.layouts import JOB, OK, WHOLE_IMAGE, view_array
from pipeline.loaders import build_pipeline
from pipeline.refusal import ImageRefused
from tests.faults.images import seeds

from .small_stores import pack

GOOD = 14
VIEW = ViewSpec("v", 16, kind="whole")


def libjpeg_takes(data: bytes) -> bool:
    """Whether the compiled decoder alone, without the second look, makes a picture of a file."""
    library, specs = decoder.native_library(), view_array([VIEW])
    assert library is not None
    record, out = np.frombuffer(data, dtype=np.uint8), np.zeros((1, 16, 16, 3), dtype=np.uint8)
    jobs = np.zeros(1, dtype=JOB)
    jobs["data"], jobs["size"], jobs["flags"] = record.ctypes.data, len(record), WHOLE_IMAGE
    outs, pool = np.array([out.ctypes.data], dtype=np.uint64), library.rg_pool_open(1)
    library.rg_decode(pool, jobs.ctypes.data, 1, specs.ctypes.data, 1, outs.ctypes.data, 0, 0, 1 << 24)
    library.rg_pool_close(pool)
    return bool(jobs["status"][0] == OK)


def silent_damage(kind: str, reason: str) -> bytes:
    """A file with one or two changed bits, which libjpeg takes and `check_jpeg` refuses for `reason`."""
    whole, draw = seeds()[kind], random.Random(7)
    scan = whole.find(b"\xff\xda")
    for _ in range(20_000):
        changed = bytearray(whole)
        for _ in range(draw.choice([1, 2])):
            changed[draw.randrange(scan + 20, len(whole))] ^= 1 << draw.randrange(8)
        try:
            check_jpeg(bytes(changed))
        except ImageRefused as refusal:
            if reason in str(refusal) and libjpeg_takes(bytes(changed)):
                return bytes(changed)
    raise AssertionError("libjpeg notices all such damage now")


@pytest.fixture(scope="module")
def damaged() -> list[bytes]:
    return [
        silent_damage("jpeg", "a code that does not exist"),
        silent_damage("gray", "coded data left over"),
        silent_damage("progressive", "a code that does not exist"),
        silent_damage("progressive", "coded data left over"),
    ]


@pytest.fixture
def photos(damaged: list[bytes], tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, data in enumerate([*damaged, *[seeds()["progressive"]] * GOOD]):
        (folder / f"{number:02d}.jpg").write_bytes(data)
    return folder


@pytest.mark.parametrize("augment", ["", "mocov2"])
@pytest.mark.parametrize("store", ["folder", "reference", "packed", "ffcv", "dali"])
def test_every_loader_refuses_them(photos: Path, damaged: list[bytes], tmp_path: Path, store: str, augment: str):
    data, loader = photos, {"packed": "folder"}.get(store, store)
    if store in ("packed", "ffcv"):
        # As FFCV itself packs: no manifest, so no checksum vouches for a record.
        data = pack(photos, tmp_path / "photos.beton", with_manifest=False)
    if store == "dali":
        pytest.importorskip("nvidia.dali")
    config = PipelineConfig(str(data), (VIEW,), 6, workers=2, order="sequential", augment=augment, dtype=torch.float32)
    pipeline = build_pipeline(loader, config, quiet=True)
    try:
        for epoch in (0, 1):
            pipeline.set_epoch(epoch)
            rows = torch.cat([batch.views["v"] for batch in pipeline]).int()
            # All whole files are one picture, and one of them stands in the place of each damaged one.
            assert augment or (rows - rows[-1:]).abs().max() <= (10 if store == "dali" else 0)
            assert sorted(pipeline.stats().bad_records) == list(range(len(damaged)))
    finally:
        pipeline.close()


def test_sound_files_are_looked_at_once_and_baseline_files_never(photos: Path, damaged: list[bytes], monkeypatch):
    looked: list[bytes] = []
    monkeypatch.setattr(second_look, "check_jpeg", lambda data: (looked.append(data), check_jpeg(data))[1])
    for number in range(3):
        (photos / f"baseline{number}.jpg").write_bytes(seeds()["jpeg"])
    config = PipelineConfig(str(photos), (VIEW,), 7, workers=2, order="sequential")
    pipeline = build_pipeline("folder", config, quiet=True)
    for epoch in range(3):
        pipeline.set_epoch(epoch)
        list(pipeline)
    pipeline.close()
    assert looked.count(seeds()["progressive"]) == GOOD
    assert seeds()["jpeg"] not in looked


def test_a_file_that_vanishes_between_the_looks_is_refused(photos: Path, monkeypatch):
    def vanished(data: bytes) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(second_look, "check_jpeg", vanished)
    config = PipelineConfig(str(photos), (VIEW,), 6, workers=1, order="sequential", drop_last=False)
    pipeline = build_pipeline("folder", config, quiet=True)
    # The general path has the last word, and finds the files there and whole.
    assert sum(len(batch.index) for batch in pipeline) == GOOD + 4
    assert sorted(pipeline.stats().bad_records) == list(range(4))
    pipeline.close()
