"""The examples run as a user runs them: from the installed package, on a folder of photos, outside the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import export_backbone
from train.backbone_io import build_encoder, save_backbone

EXAMPLES = Path(__file__).resolve().parents[1] / "tools" / "examples"


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the unpacked wheel."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number in range(40):
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (72, 80, 3), dtype=np.uint8)).save(path)
    return folder


def python(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a foreign folder with the installed package on its path."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-800:] + done.stderr[-1500:]
    return done


def test_the_readme_s_sentence_is_true() -> None:
    lines = (EXAMPLES / "own_loop.py").read_text().splitlines()
    assert len([line for line in lines[2:] if line.strip()]) <= 22
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} == {
        "detector.py",
        "own_loop.py",
        "region_loop.py",
        "lightning_module.py",
        "own_photos.ipynb",
    }, "an example without a test"


@pytest.mark.slow
def test_own_loop(site: Path, photos: Path, tmp_path: Path) -> None:
    said = python(site, tmp_path, str(EXAMPLES / "own_loop.py"), str(photos), "2").stdout.splitlines()
    assert said[-1].startswith("epoch 2 of 2, loss ") and float(said[-1].split()[-1]) < 6


@pytest.mark.slow
def test_region_loop(site: Path, photos: Path, tmp_path: Path) -> None:
    said = python(site, tmp_path, str(EXAMPLES / "region_loop.py"), str(photos), "3").stdout.splitlines()
    losses = [float(line.split()[-1]) for line in said if line.startswith("step ")]
    assert len(losses) == 3 and np.isfinite(losses).all() and len(set(losses)) == 3


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="lightning is not installed (pip install lightning)"
)
def test_lightning(site: Path, photos: Path, tmp_path: Path) -> None:
    done = python(site, tmp_path, str(EXAMPLES / "lightning_module.py"), str(photos), "3")
    assert "`max_steps=3` reached" in done.stdout + done.stderr


@pytest.mark.slow
def test_notebook(site: Path, photos: Path, tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "own_photos.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = code.replace('photos = "photos"', f"photos = {str(photos)!r}")
    said = python(site, tmp_path, "-c", code).stdout
    assert said.count("is most like") == 5
    assert (tmp_path / "runs/photos/export.safetensors").is_file()
    assert np.load(tmp_path / "runs/photos/features.npz")["features"].shape == (40, 512)


@pytest.mark.slow
def test_detector(site: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    weights = tmp_path / "backbone.safetensors"
    save_backbone(build_encoder("resnet18"), weights, arch="resnet18", method="moco-v2")
    assert export_backbone.main([str(weights), str(tmp_path / "export.safetensors"), "--format", "torchvision"]) == 0
    draw = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(5):
        path = tmp_path / "coco" / "images" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(path)
        images.append({"id": number, "file_name": path.name, "height": 60, "width": 80})
        box = {"bbox": [10, 10, 30, 40], "area": 1200, "iscrowd": 0, "category_id": 1 + number}
        if number:  # the first has no objects
            annotations.append({"id": number, "image_id": number, **box})
    (tmp_path / "coco" / "annotations").mkdir()
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": str(k)} for k in range(9)],
    }
    (tmp_path / "coco" / "annotations" / "instances_train.json").write_text(json.dumps(document))
    script = str(EXAMPLES / "detector.py")
    said = python(site, tmp_path, script, "export.safetensors", "coco", "resnet18", "3", "64").stdout.splitlines()
    losses = [float(line.split()[-1]) for line in said if line.startswith("step ")]
    assert len(losses) == 3 and np.isfinite(losses).all() and (tmp_path / "detector.safetensors").is_file()
