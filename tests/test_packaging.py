"""The wheel holds one package, `regatta`, with everything it needs, and its two names are the same code."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.test_layout import imports, relative, sources

ROOT = Path(__file__).resolve().parents[1]
NATIVE = (".cpp", ".h", ".cu", ".cuh")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the files that git tracks, away from the checkout, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "source" / name)
    readme = folder / "source" / "README.md"
    if not readme.exists():
        readme.write_text("# regatta\n")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_site_packages_gains_one_name(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in contents(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"regatta"}


def test_the_wheel_holds_every_library_file(wheel: Path) -> None:
    names = set(contents(wheel))
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "pipeline", "models"], capture_output=True, text=True)
    wanted = [name for name in tracked.stdout.split() if name.endswith((".py", *NATIVE)) and (ROOT / name).is_file()]
    assert len(wanted) > 20
    missing = [name for name in wanted if f"regatta/{name}" not in names]
    assert not missing, f"missing from pyproject.toml's packages or package-data: {missing}"


def test_the_wheel_holds_no_application(wheel: Path) -> None:
    strangers = [
        n for n in contents(wheel) if n.startswith("regatta/") and n.split("/")[1] in ("train", "tools", "tests")
    ]
    assert not strangers


def test_the_installed_package_imports_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        "import sys, regatta, regatta.pipeline.loaders, regatta.models.methods as methods\n"
        "assert not {'pipeline', 'models', 'train', 'tools'} & set(sys.modules), 'the checkout was imported'\n"
        "print(regatta.__file__); print(*methods.METHODS)"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr[-1500:]
    assert answer.stdout.startswith(str(site)) and "regioncl-m" in answer.stdout


def test_requirements_are_exact_and_cover_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [item for group in project["optional-dependencies"].values() for item in group]
    lines = (ROOT / "tools" / "requirements.txt").read_text().splitlines()
    pinned = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    names = [line.partition("==")[0].lower() for line in pinned]
    assert all(line.count("==") == 1 and " " not in line and not line.startswith("-") for line in pinned), pinned
    assert len(set(names)) == len(names)

    def name(requirement: str) -> str:
        return requirement.partition(">")[0].partition("=")[0].partition("<")[0].strip().lower()

    lacking = {name(item) for item in project["dependencies"] + extras} - set(names)
    assert not lacking, f"named in pyproject.toml but not pinned in tools/requirements.txt: {lacking}"


# Where the name that is imported is not the name that is installed.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "nvidia": "nvidia-dali-cuda130",
    "pillow_heif": "pillow-heif",
    "faster_coco_eval": "faster-coco-eval",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}
# Brought along by torch, or looked for and done without.
UNPINNED = {"cuda", "triton", "detectron2"}


def test_everything_that_is_imported_is_pinned() -> None:
    ours = {"pipeline", "models", "train", "tools", "tests", "regatta"}
    pinned = {line.partition("==")[0] for line in (ROOT / "tools" / "requirements.txt").read_text().splitlines()}
    lacking: dict[str, str] = {}
    for path in sources("pipeline", "models", "train", "tools", "tests"):
        for name, _ in imports(ast.parse(path.read_text())):
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in ours | UNPINNED:
                if DISTRIBUTIONS.get(top, top) not in pinned:
                    lacking[top] = relative(path)
    assert not lacking, f"imported but not pinned in tools/requirements.txt: {lacking}"
