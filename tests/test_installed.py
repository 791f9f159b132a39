"""What `pip install` gives: a command and a package that need nothing of the checkout, from photos to a report."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.test_few_images import photos_in
from train.record.run import read_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment, in which pip has installed the wheel.

    PyTorch and the other libraries are those of the environment that runs the tests; pip checks their versions.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, check=True
    )
    Path(own.stdout.decode().strip(), "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return python.parent


@pytest.fixture
def run(programs: Path, tmp_path: Path):
    """Runs a program of the environment in a folder of its own and gives what it said."""
    (tmp_path / "work").mkdir()

    def call(program: str, *arguments: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "REGATTA"))}
        # A cache of its own: what others have compiled before must not stand in for sources that are missing.
        environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [programs / program, *arguments],
            cwd=tmp_path / "work",
            env=environment,
            capture_output=True,
            text=True,
            timeout=580,
        )
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
        return done.stdout

    return call


def test_the_command_from_photos_to_a_report(run, tmp_path: Path) -> None:
    work = tmp_path / "work"
    photos_in(work / "photos", 24)
    run("regatta", "pack", "photos", "photos.beton")
    small = "--arch resnet10-w16 --image-size 64 --device cpu --max-steps 2 --run-dir run".split()
    run("regatta", "train", "--method", "regioncl-m", "--data", "photos.beton", *small)
    run("regatta", "embed", "run", "photos", "features.npz")
    run("regatta", "export", "run", "backbone.onnx", "--format", "onnx")
    run("regatta", "report", "run")
    assert np.load(work / "features.npz")["features"].shape[0] == 24
    assert (work / "backbone.onnx").is_file() and "<style>" in (work / "run" / "report.html").read_text()
    where = run("python", "-c", "import regatta.pipeline.decoder as decoder; print(decoder.__file__)").strip()
    native = Path(where).with_name("native") / "build"
    assert list(native.glob("views-*.so")), "the decoder was compiled from the sources of the wheel"


PARQUET = """
import sys
from pathlib import Path
import pyarrow, pyarrow.parquet
cells = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(Path(sys.argv[1]).iterdir())]
pyarrow.parquet.write_table(pyarrow.table({"image": cells}), sys.argv[2])
"""


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_from_sixty_photos_to_an_embedding_in_one_call(kind: str, run, tmp_path: Path) -> None:
    """With defaults alone; one and a half minutes of one core."""
    data = str(photos_in(tmp_path / "photos", 60))
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        run("python", "-c", PARQUET, data, "photos.parquet")
        data = "photos.parquet"
    run("python", "-c", f"import regatta; regatta.embed({data!r}, out='features.npz')")
    made = np.load(tmp_path / "work" / "features.npz")
    assert made["features"].shape == (60, 256) and np.isfinite(made["features"]).all()
    assert read_run(tmp_path / "work" / "features.run").config["run"]["recipe"] == "regioncl-m-small"
