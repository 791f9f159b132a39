"""The page about ImageNet: its commands, from the archive to the report, on drawn pictures at a tiny size."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import runs
from train.resolve import resolve

PAGE = Path(__file__).resolve().parents[1] / "tools" / "examples" / "imagenet.md"
CLASSES = [f"n0{number}" for number in range(4)]
SMALL = (
    "--image-size 64 --global-batch 8 --queue-size 16 --hidden-dim 32 --dim 16 --bn.group-size 4 --device cpu".split()
)
FEW_STEPS = {
    "doctor": ["--arch", "resnet10-w16", *SMALL],
    "main": ["--arch", "resnet18", "--epochs", "1", "--max-steps", "2", "--no-report", *SMALL],
    "linear": ["--epochs", "1"],
}


def commands() -> list[list[str]]:
    """The words of each command of the page, behind its launcher."""
    (block,) = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    lines += [
        shlex.split(found.replace("--run", "")) for found in re.findall(r"`(python tools/.*?)`", PAGE.read_text())
    ]
    return [line[2 if line[0] == "torchrun" else 1 :] for line in lines]


def photo(seed: int) -> bytes:
    coded = io.BytesIO()
    colour = np.array([60 * (seed % 4), 255 - 60 * (seed % 4), 128])
    noise = np.random.default_rng(seed).integers(-25, 25, (48, 48, 3))
    Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(coded, "JPEG")
    return coded.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The archive of training images, a tar of one tar a class, and the folder that torchvision makes."""
    (tmp_path / "imagenet").mkdir()
    with tarfile.open(tmp_path / "imagenet" / "ILSVRC2012_img_train.tar", "w") as archive:
        for label, name in enumerate(CLASSES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as of_class:
                for number in range(12):
                    add(of_class, f"{name}_{number}.JPEG", photo(4 * number + label))
            add(archive, f"{name}.tar", inner.getvalue())
    for number in range(12):
        path = tmp_path / "imagenet" / "val" / CLASSES[number % 4] / f"ILSVRC2012_val_{number:08}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(100 + number))
    return tmp_path


def test_the_training_is_the_published_one() -> None:
    (training,) = [words[1:] for words in commands() if words[0] == "train/main.py"]
    config = resolve(training)
    assert (config.run.recipe, config.recipe.arch, config.run.processes) == ("regioncl-m", "resnet50", 8)
    assert config.recipe.global_batch % 8 == 0


@pytest.mark.slow
def test_from_the_archive_to_the_report(
    data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    ran = []
    for script, *words in commands():
        if script == "-c":
            assert "ImageNet('/data/imagenet', 'val')" in words[0]
            continue
        words = [word.replace("/data", str(data)) for word in words]
        if "--processes" in words and script != "tools/reproduce.py":
            del words[words.index("--processes") : words.index("--processes") + 2]
        name = words[0] if script == "train/evaluate.py" else Path(script).stem
        main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
        assert main(runs.last_wins([*words, *FEW_STEPS.get(name, [])])) == 0, capfd.readouterr().err
        ran.append(name)
    said = capfd.readouterr().out
    assert ran[:2] == ["make_ffcv_dataset"] * 2 and {"main", "linear", "knn", "report", "reproduce"} <= set(ran)
    assert "train.beton: 48 images, 4 classes" in said and "val.beton: 12 images, 4 classes" in said
    assert (data / "backbone.safetensors").is_file() and (data / "runs/regioncl-m/report.html").is_file()
