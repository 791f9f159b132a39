"""Packing on Ray: two workers give the epochs of one process, and a killed worker costs its part alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.manifest import manifest_path, read_manifest
from tests.test_packing_parts import dest_of, epochs, jpeg, pack
from tools import make_ffcv_dataset, make_webdataset
from tools.support.ray_engine import default_parts

ROOT = Path(__file__).resolve().parents[1]
PACKERS = [make_ffcv_dataset, make_webdataset]


def test_the_number_of_parts_follows_from_the_images_alone():
    assert [default_parts(count) for count in (1, 40, 100_000, 1_281_167, 10**8)] == [1, 8, 8, 64, 256]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--engine", "ray", "--part", "1/2"), "leave out --part"),
        (("--parts", "3"), "belong to --engine ray"),
        (("--ray-address", "a:1"), "belong to --engine ray"),
        (("--engine", "ray", "--parts", "-1"), "choose 1 or more"),
    ],
)
def test_flags_of_the_engine(flags, words, tmp_path, capsys):
    assert pack(make_ffcv_dataset, tmp_path, tmp_path / "p.beton", *flags) == 2
    assert words in capsys.readouterr().err


def test_without_ray_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert pack(make_ffcv_dataset, tmp_path, tmp_path / "p.beton", "--engine", "ray") == 2
    said = capsys.readouterr().err.strip()
    assert "pip install ray" in said and "\n" not in said


@pytest.fixture
def many(tmp_path) -> Path:
    """Two hundred photos of four classes."""
    for number in range(200):
        path = tmp_path / "photos" / f"c{number // 50}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two workers on this machine, whose address is set."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    yield os.environ["RAY_ADDRESS"]
    os.environ.pop("RAY_ADDRESS")
    if before is not None:
        os.environ["RAY_ADDRESS"] = before
    ray.shutdown()


def on_ray(packer, source: Path, dest: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, packer.__file__, str(source), str(dest), "--engine", "ray", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("packer", PACKERS)
def test_two_workers_pack_what_one_process_packs(packer, many, tmp_path, cluster):
    one, dest = dest_of(packer, tmp_path / "one"), dest_of(packer, tmp_path / "ray")
    assert pack(packer, many, one) == 0
    run = on_ray(packer, many, dest, "--parts", "5")
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    data = str(tmp_path / "ray/p-*.beton") if packer is make_ffcv_dataset else str(dest)
    (seen, pipeline), (expected, whole) = epochs(data), epochs(str(one))
    assert seen == expected and pipeline.data_hash == whole.data_hash and "5 of 5" in said
    # Again: nothing is packed twice.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*-of-5*") if path.suffix in (".beton", ".tar")}
    run = on_ray(packer, many, dest, "--parts", "5", "--ray-address", cluster)
    assert run.wait(300) == 0 and len(times) == 5
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())


def test_a_killed_worker_loses_nothing(many, tmp_path, cluster):
    """Every process that packs is killed once, in the midst of its part."""
    import psutil

    for path in many.rglob("*.jpg"):
        path.write_bytes(path.read_bytes() + os.urandom(64) * 20_000)  # so that a part takes a while to read
    dest = tmp_path / "ray.beton"
    run = on_ray(make_ffcv_dataset, many, dest, "--parts", "6")
    killed: set[int] = set()
    while run.poll() is None:
        open_now = [
            process.pid
            for process in psutil.process_iter(["name"])
            if "_place" in (process.info["name"] or "") and process.pid not in killed
        ]
        if len(killed) < 2 and open_now and list(tmp_path.glob(".ray-*.tmp.beton")):
            os.kill(open_now[0], signal.SIGKILL)
            killed.add(open_now[0])
        time.sleep(0.02)
    said = run.stdout.read()
    assert run.returncode == 0, said
    assert len(killed) == 2, "two workers were killed"
    assert pack(make_ffcv_dataset, many, tmp_path / "one.beton") == 0
    assert epochs(f"{tmp_path}/ray-*.beton")[0] == epochs(str(tmp_path / "one.beton"))[0]
    assert read_manifest(manifest_path(dest)).num_samples == 200
    assert not list(tmp_path.glob(".*"))
