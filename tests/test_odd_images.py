"""Damaged, hostile and unusual files: through the decode function, the packer and the folder loader."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import images
from pipeline.beton import BetonReader
from pipeline.images import decode_rgb
from pipeline.interface import PipelineConfig, ViewSpec
from pipeline.manifest import manifest_of
from pipeline.refusal import ImageRefused
from tools import make_ffcv_dataset

ROOT = Path(__file__).resolve().parents[1]
MAX_SIDE = 400


@pytest.fixture(autouse=True)
def without_heif(monkeypatch) -> None:
    """What the set expects of HEIF is without the optional package; tests/test_data_sources.py tries it with."""
    monkeypatch.setattr(images, "_reads_heif", lambda: False)


@pytest.fixture(scope="module")
def odd(unpack) -> Path:
    return unpack("odd-images")


@pytest.fixture(scope="module")
def cases(odd) -> list[dict]:
    found = json.loads((odd / "expectations.json").read_text(encoding="utf-8"))["files"]
    assert len(found) >= 140 and all((odd / "files" / case["name"]).exists() for case in found)
    return found


def wrong_size(case: dict, width: int, height: int) -> bool:
    # g4_orientation_5.tif: the set's width and height are the upright ones already (PIL turns a TIFF itself), so what
    # it calls "oriented" is turned twice; both are allowed there, elsewhere only the upright size.
    allowed = [case.get("size_if_oriented") or [case["width"], case["height"]]]
    if case["name"].endswith(".tif"):
        allowed.append([case["width"], case["height"]])
    return [width, height] not in allowed


def far_from_mean(case: dict, pixels: np.ndarray, tolerance: float = 4) -> bool:
    step = 1 + pixels.size // 30_000_000  # of the 48 megapixels a part is enough
    mean = pixels[::step, ::step].reshape(-1, 3).mean(axis=0)
    return "mean_rgb" in case and bool(np.abs(mean - case["mean_rgb"]).max() > tolerance)


def outcome(data: bytes) -> np.ndarray | str:
    try:
        return decode_rgb(data)
    except ImageRefused as refusal:
        return str(refusal)


def test_decode_function_meets_every_expectation(odd, cases):
    wrong = []
    for case in cases:
        data = (odd / "files" / case["name"]).read_bytes()
        got = outcome(data)
        if isinstance(got, str):
            if case["expect"] == "decode" or not got or "\n" in got or "0x7" in got:
                wrong.append((case["name"], got))
            assert outcome(data) == got  # the same every time
            continue
        assert got.dtype == np.uint8 and got.ndim == 3 and got.shape[2] == 3
        if case["expect"] == "reject" or wrong_size(case, got.shape[1], got.shape[0]) or far_from_mean(case, got):
            wrong.append((case["name"], got.shape, got.reshape(-1, 3).mean(axis=0)))
    assert not wrong


def test_sixteen_bits_are_scaled_and_transparency_is_white(odd):
    gray = decode_rgb((odd / "files/gray16.png").read_bytes())
    assert abs(gray.mean() - 117) < 1.5 and gray.max() == round(59998 / 257)
    assert (decode_rgb((odd / "files/all_transparent.png").read_bytes()) == 255).all()


def test_half_decoded_files_are_refused(odd):
    names = ["cut_25.jpg", "cut_75.jpg", "progressive_cut.jpg", "zeroed_middle.jpg", "bit_flips.jpg", "no_eoi.jpg"]
    names += ["header_taller_than_data.jpg", "ultrahdr.jpg", "truncated_image.png", "bad_idat_crc.png"]
    for name in names:
        assert isinstance(outcome((odd / "files" / name).read_bytes()), str), name


MEMORY_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pipeline.images import decode_rgb
from pipeline.refusal import ImageRefused
for path in sorted(Path(sys.argv[2]).iterdir()):
    try:
        decode_rgb(path.read_bytes())
    except ImageRefused:
        pass
# The peak of this process alone: getrusage's would include that of the test process it was forked from.
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc for the peak of memory")
def test_memory_and_time_stay_bounded(odd):
    # The largest that must decode has 48 megapixels (about 0.5 GiB with PIL's copies); the bombs claim 0.9 to 6,000.
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(ROOT), str(odd / "files")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert int(done.stdout) < 1_300_000  # KiB


def test_packer(odd, cases, tmp_path):
    listed = tmp_path / "all.txt"
    listed.write_text("".join(f"{odd / 'files' / case['name']}\n" for case in cases), encoding="utf-8")
    dest = tmp_path / "odd.beton"
    assert make_ffcv_dataset.main([str(listed), str(dest), "--max-bad", "1"]) == 0
    reader = BetonReader(dest)
    manifest = manifest_of(reader)
    packed = {Path(name).name: number for number, name in enumerate(manifest.sources)}
    lines = (tmp_path / "odd.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    refused = {Path(entry["file"]).name: entry["reason"] for entry in map(json.loads, lines)}
    assert packed.keys() | refused.keys() == {case["name"] for case in cases}
    assert not packed.keys() & refused.keys() and all(refused.values())
    wrong = []
    for case in cases:
        name = case["name"]
        if name in refused:
            if case["expect"] == "decode":
                wrong.append((name, refused[name]))
            continue
        number = packed[name]
        pixels = decode_rgb(reader.record(number).tobytes())
        width, height = (int(reader.widths[number]), int(reader.heights[number]))
        assert pixels.shape[:2] == (height, width) and max(width, height) <= MAX_SIDE
        # A strip 2 pixels high shrinks to 1, so only the whole means are compared, a little wider than before coding.
        if case["expect"] == "reject" or far_from_mean(case, pixels, tolerance=5):
            wrong.append((name, pixels.reshape(-1, 3).mean(axis=0)))
        full = case.get("size_if_oriented") or [case["width"], case["height"]]
        if max(full) <= MAX_SIDE and wrong_size(case, width, height):
            wrong.append((name, width, height))
    assert not wrong


@pytest.mark.parametrize("loader", ["folder", "reference"])
def test_folder_loader(odd, cases, tmp_path, loader):
    from pipeline.loaders import build_pipeline

    listed = tmp_path / "all.txt"
    listed.write_text("".join(f"{odd / 'files' / case['name']}\n" for case in cases), encoding="utf-8")
    config = PipelineConfig(
        data=str(listed),
        views=(ViewSpec("view1", 32, kind="whole"),),
        global_batch=16,
        order="sequential",
        drop_last=False,
    )
    pipeline = build_pipeline(loader, config)
    means = np.zeros((len(cases), 3))
    for batch in pipeline:
        means[batch.index.numpy()] = batch.views["view1"].float().mean(dim=(2, 3)).numpy()
    refused = pipeline.stats().bad_records
    pipeline.close()
    wrong = []
    for number, case in enumerate(cases):
        if number in refused:
            assert case["name"] in refused[number] or str(odd) in refused[number]
            if case["expect"] == "decode":
                wrong.append((case["name"], refused[number]))
        elif case["expect"] == "reject":
            wrong.append((case["name"], "accepted"))
        # Squeezing an image to a square keeps its mean, but for what the antialiasing filter weighs at the borders.
        elif "mean_rgb" in case and np.abs(means[number] - case["mean_rgb"]).max() > 6:
            wrong.append((case["name"], means[number], case["mean_rgb"]))
    assert not wrong
