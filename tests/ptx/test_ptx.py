"""NVRTC's PTX of every kernel, run on the CPU with checks; see `module.py` for what they see and leave unproven.

python -m pytest tests/ptx -m slow -k three_architectures    all kernel tests on sm_75, sm_80 and sm_90
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from .cases import ALL, DEFAULT, F32, Make, augmented
from .counts import Counter
from .module import PtxModule, capabilities, need_tools, watched_tensors


@pytest.fixture(autouse=True)
def tensors() -> Iterator[None]:
    need_tools()
    with watched_tensors():
        yield


def on(capability: tuple[int, int], modules: list[PtxModule]) -> Make:
    """A maker of launchers for one architecture, which are kept in `modules`."""

    def make(source: Path, options: tuple[str, ...], shared: Mapping[str, int]) -> Any:
        module = PtxModule(source, options, capability=capability, shared_bytes=shared)
        modules.append(module)
        return module

    return make


@pytest.mark.parametrize("name", DEFAULT)
def test_kernels_on_one_architecture(name: str) -> None:
    modules: list[PtxModule] = []
    DEFAULT[name](on((8, 0), modules))
    assert any(module.launched for module in modules)


def test_the_augmentation_stores_whole_sectors() -> None:
    counts: dict[str, dict[str, int]] = {}

    def make(source: Path, options: tuple[str, ...], shared: Mapping[str, int]) -> Any:
        return Counter(PtxModule(source, options, shared_bytes=shared, both_orders=False), counts)

    augmented((36, 68), F32, "mocov2", batch=1)(make)
    # Rows begin in the middle of a sector here, so a few are counted twice; value by value each would be, four times.
    assert counts["augment"]["store sectors"] < 1.5 * (36 * 68 * 3 * 4 / 32)


@pytest.mark.slow
@pytest.mark.parametrize("capability", capabilities(), ids=str)
@pytest.mark.parametrize("name", ALL)
def test_kernels_on_three_architectures(name: str, capability: tuple[int, int]) -> None:
    modules: list[PtxModule] = []
    ALL[name](on(capability, modules))
    assert any(module.launched for module in modules)
