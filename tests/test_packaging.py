"""The wheel holds one package, `regatta`, with everything it needs, and its two names are the same code."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.test_layout import imports, relative, sources
from tools.wheel.build import COMMANDS, LEFT_OUT, renamed, rewritten

ROOT = Path(__file__).resolve().parents[1]
NATIVE = (".cpp", ".h", ".cu", ".cuh")


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


def test_the_wheel_holds_the_commands_and_no_name_of_a_checkout(wheel: Path) -> None:
    names = set(contents(wheel))
    # Under its own name `train` would hide the function `regatta.train`.
    assert not [n for n in names if n.startswith("regatta/") and n.split("/")[1] in ("train", "tools", "tests")]
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "train", "tools"], capture_output=True, text=True)
    left_out = {name for modules in LEFT_OUT.values() for name in modules}
    missing = []
    for name in tracked.stdout.split():
        path = Path(name)
        apart = {"results", "examples", "reproduction"} & set(path.parts) or path.stem in left_out
        if apart or path.suffix not in (".py", ".css", ".csv", ".txt") or name == "tools/requirements.txt":
            continue
        place = renamed(".".join(path.parts[:-1])).replace(".", "/") + "/" + path.name
        if (ROOT / name).is_file() and place not in names:
            missing.append(f"{name} as {place}")
    assert not missing, f"missing from pyproject.toml's packages or package-data: {missing}"
    assert "regatta/py.typed" in names and "regatta/build.py" not in names


def test_no_module_of_the_wheel_imports_by_the_checkout_s_names(wheel: Path) -> None:
    wrong = []
    with zipfile.ZipFile(wheel) as archive:
        for name in (name for name in archive.namelist() if name.endswith(".py")):
            source = archive.read(name).decode()
            ours = ("pipeline", "models", "train", "tools")
            wrong += [f"{name}: {found}" for found, _ in imports(ast.parse(source)) if found.split(".")[0] in ours]
            wrong += [f"{name}: names {script}" for script in COMMANDS if script in source]
    assert not wrong, wrong


def test_imports_and_commands_are_renamed() -> None:
    source = """from models.losses import (
    info_nce,
)
def late():
    from tools.wheel.loader import Loader  # from train
    raise ValueError("pack with python tools/make_ffcv_dataset.py, see tools/embed.py; not from models.losses import")
from . import other
import numpy.models
"""
    wanted = """from regatta.models.losses import (
    info_nce,
)
def late():
    from regatta.loader import Loader  # from train
    raise ValueError("pack with regatta pack, see regatta embed; not from models.losses import")
from . import other
import numpy.models
"""
    assert rewritten(source) == wanted
    assert [renamed(name) for name in ("train", "train.eval.knn", "tools.bench", "trainer", "models_zoo.x")] == [
        "regatta.training",
        "regatta.training.eval.knn",
        "regatta.commands.bench",
        "trainer",
        "models_zoo.x",
    ]
    with pytest.raises(ValueError, match="write `from ... import`"):
        rewritten("import train.main\n")


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        about = {
            name.rpartition("/")[2]: archive.read(name).decode() for name in archive.namelist() if "dist-info" in name
        }
    assert "regatta = regatta.cli:main" in about["entry_points.txt"]
    assert "Classifier: Typing :: Typed" in about["METADATA"] and "License-Expression: Apache-2.0" in about["METADATA"]


def test_the_installed_package_imports_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        "import sys, regatta\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'importing the package imports what is slow'\n"
        "import regatta.pipeline.loaders, regatta.models.methods, regatta.functions, regatta.cli\n"
        "loader = regatta.Loader('40', loader='synthetic', size=32, batch_size=8)\n"
        "assert callable(regatta.train) and len(loader) == 5 and regatta.Pretraining and regatta.__version__\n"
        "assert not {'pipeline', 'models', 'train', 'tools'} & set(sys.modules), 'the checkout was imported'\n"
        "print(regatta.__file__); print(*regatta.methods)"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr[-1500:]
    assert answer.stdout.startswith(str(site)) and "regioncl-m" in answer.stdout


def test_the_installed_command_answers(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    def regatta(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(
            [sys.executable, "-m", "regatta", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    listed = regatta("--help")
    assert listed.returncode == 0
    for name in ("pack", "train", "evaluate", "export", "embed", "report", "doctor", "bench"):
        assert f"\n  {name} " in listed.stdout
    assert regatta("train", "--help").stdout.startswith("usage: regatta train ")
    assert regatta("evaluate", "knn", "--help").stdout.startswith("usage: regatta evaluate knn ")
    assert regatta("pack", "--help").stdout.startswith("usage: regatta pack ")
    wrong = regatta("trian")
    assert wrong.returncode == 2 and "the nearest is train" in wrong.stderr and wrong.stderr.count("\n") == 1
    wrong = regatta("train", "--method", "moco-v2", "--batch-size", "4")
    assert wrong.returncode == 2 and "--global-batch" in wrong.stderr
    wrong = regatta("train", "--method", "moco-v2")
    assert wrong.returncode == 2 and "`regatta pack FOLDER photos.beton`" in wrong.stderr
    wrong = regatta("bench", "gpu")
    assert wrong.returncode == 2 and "choose from pipeline, ops, step, train" in wrong.stderr
    assert "complete -o default -F _regatta regatta" in regatta("completion", "bash").stdout
    assert "evaluate" in regatta("__complete", "").stdout.split()
    assert "--box-head" in regatta("__complete", "evaluate", "detect", "--").stdout.split()
    assert "--region.sampling" in regatta("__complete", "train", "--method", "regioncl-m", "--re").stdout.split()
    assert regatta("__complete", "export", "run", "out", "--format", "").stdout.split()[0] == "torchvision"


def test_requirements_are_exact_and_cover_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # Loggers are the libraries of services: whoever has an account installs his own, and set-up installs none.
    groups = {name: group for name, group in project["optional-dependencies"].items() if name != "log"}
    extras = [item for group in groups.values() for item in group]
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
UNPINNED = {"cuda", "triton", "fsspec", "detectron2", "lightning", "ray", "wandb", "mlflow", "trackio"}


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
