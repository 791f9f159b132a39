"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photos beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder of real photos (../shared/data) is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def unpack(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`unpack(name, keep)`: the top folder of `name.tar` with the members for which `keep(member_name)` is true."""

    def extract(name: str, keep: Callable[[str], bool] = lambda _: True) -> Path:
        target = tmp_path_factory.mktemp(name)
        with tarfile.open(shared_data / f"{name}.tar") as archive:
            archive.extractall(target, [m for m in archive if m.isfile() and keep(m.name)], filter="data")
        return target / name

    return extract


@pytest.fixture(scope="session")
def photos(unpack: Callable[..., Path]) -> Callable[[int], Path]:
    """`photos(n)`: a folder of class folders with n training photos of each of the ten classes."""

    def take(per_class: int) -> Path:
        seen: dict[str, int] = {}

        def keep(member: str) -> bool:
            folder = member.split("/")[1]
            seen[folder] = seen.get(folder, 0) + 1
            return seen[folder] <= per_class

        return unpack("photos-train", keep)

    return take


@pytest.fixture(scope="session")
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
