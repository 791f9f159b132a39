"""The launcher of all kernels against a driver that refuses what a real one refuses, and the compiler's cache."""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.ops import launcher, nvrtc
from models.ops.launcher import CudaModule
from models.ops.nvrtc import Nvrtc, cache_folder, cached_binary, find_nvrtc
from pipeline.augment import draw
from pipeline.kernels import fused_augment
from tests.cuda_host import nvrtc_or_skip
from tests.fake_driver import PRIMARY, FakeDriver, FakeTorchCuda

DEVICE = torch.device("cuda", 0)
TINY = 'extern "C" __global__ void f(float* x) { x[0] = 1; }'


class Arguments(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p)]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    """The stub in place of the driver, on a GPU of compute capability 8.0, with an empty cache."""
    nvrtc_or_skip()
    made = FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=made))
    stand_in = SimpleNamespace(
        cuda=FakeTorchCuda(made, (8, 0)),
        device=torch.device,
        _C=SimpleNamespace(_cuda_getCurrentRawStream=lambda device: 7),
    )
    monkeypatch.setattr(launcher, "torch", stand_in)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.cu"
    path.write_text(TINY)
    return path


def launch(module: CudaModule, grid: tuple[int, int, int] = (3, 2, 1)) -> None:
    module("f", grid, (32, 8, 1), Arguments())


def test_a_launch_reaches_the_driver(driver: FakeDriver, source: Path) -> None:
    launch(CudaModule(source, (), DEVICE, {"f": 60_000}))
    assert driver.launches == [("f", (3, 2, 1), (32, 8, 1), 60_000, 7)]
    assert driver.shared == {b"f": 60_000} and driver.images[0][:4] == b"\x7fELF"


@pytest.mark.parametrize("other", [None, 0x3000])
def test_a_thread_without_the_context_gets_it_for_the_launch(
    driver: FakeDriver, source: Path, other: int | None
) -> None:
    """A backward pass runs in a thread of its own, which may never have called CUDA before."""
    module, failed = CudaModule(source, (), DEVICE, {"f": 0}), []

    def cold() -> None:
        stack = driver.stack
        stack += [other] if other else []
        before = list(stack)
        try:
            launch(module)
        except RuntimeError as error:
            failed.append(error)
        if stack != before:
            failed.append(RuntimeError("the thread's own context was not given back"))

    thread = threading.Thread(target=cold)
    thread.start()
    thread.join()
    assert not failed and len(driver.launches) == 1
    launch(module)
    assert driver.stack == [PRIMARY]


@pytest.mark.parametrize("grid", [(1, 65536, 1), (1, 1, 65536), (0, 1, 1), (1, 1, 0)])
def test_a_grid_that_no_gpu_takes_is_named(driver: FakeDriver, source: Path, grid: tuple[int, int, int]) -> None:
    module = CudaModule(source, (), DEVICE, {"f": 0})
    with pytest.raises(ValueError, match=rf"tiny.cu, f: a grid of \({', '.join(map(str, grid))}\) blocks"):
        launch(module, grid)


def test_a_refused_launch_names_kernel_and_grid(driver: FakeDriver, source: Path) -> None:
    module = CudaModule(source, (), DEVICE, {"f": 0})
    said = r"tiny.cu, launch of f, grid \(3, 1, 1\), block \(2048, 1, 1\).*INVALID_VALUE"
    with pytest.raises(RuntimeError, match=said):
        module("f", (3, 1, 1), (2048, 1, 1), Arguments())


def test_capturing_is_asked_of_the_module_s_device(driver: FakeDriver, source: Path) -> None:
    driver.capturing.add("cuda:1")
    CudaModule(source, (), DEVICE, {"f": 0})
    with pytest.raises(RuntimeError, match="tiny.cu must be loaded before a CUDA graph is captured"):
        CudaModule(source, (), torch.device("cuda", 1), {"f": 0})


def test_a_damaged_file_in_the_cache_is_compiled_again(driver: FakeDriver, source: Path) -> None:
    CudaModule(source, (), DEVICE, {"f": 0})
    (kept,) = cache_folder().iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(b"damaged")
    CudaModule(source, (), DEVICE, {"f": 0})
    assert driver.images == [whole, b"damaged", whole] and kept.read_bytes() == whole
    driver.damaged.add(whole)
    with pytest.raises(RuntimeError, match="tiny.cu, loading it.*INVALID_IMAGE"):
        CudaModule(source, (), DEVICE, {"f": 0})
    assert len(driver.images) == 5, "compiled again once, not for ever"


def test_a_gpu_newer_than_the_compiler_gets_ptx(driver: FakeDriver, source: Path) -> None:
    newest = find_nvrtc().architectures[-1]
    launcher.torch.cuda.capability = (99, 0)  # type: ignore[attr-defined]
    launch(CudaModule(source, (), DEVICE, {"f": 0}))
    assert f".target sm_{newest}".encode() in driver.images[0] and driver.images[0].endswith(b"\0")
    assert find_nvrtc().flags((8, 0), ())[0] == "--gpu-architecture=sm_80"
    with pytest.raises(RuntimeError, match="sm_10"):
        find_nvrtc().compile(TINY, "tiny.cu", (1, 0))


def test_the_augmentation_runs_through_the_same_launcher(driver: FakeDriver) -> None:
    """Compiled once for all processes, and launched with the shared memory that it asks for."""
    images = torch.zeros(3, 3, 40, 40, dtype=torch.uint8)
    table = draw("mocov2", 0, 0, np.arange(3), 0).table
    bytes_of = fused_augment.SHARED_BYTES
    module = CudaModule(fused_augment.SOURCE, (), DEVICE, bytes_of)
    fused_augment.augment(images, table, False, 1, launch=module)
    assert driver.launches == [
        ("mean_luma", (fused_augment.PARTS, 3, 1), (256, 1, 1), bytes_of["mean_luma"], 7),
        ("augment", (2, 3, 1), (256, 1, 1), bytes_of["augment"], 7),
    ]
    assert [path.name.partition("-")[0] for path in cache_folder().iterdir()] == ["augment"]


def test_errors_of_the_compiler_are_shown() -> None:
    with pytest.raises(RuntimeError, match="undefined_name"):
        nvrtc_or_skip().compile("__global__ void f() { undefined_name(); }", "broken.cu", (8, 0))


def test_compiled_kernels_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = nvrtc_or_skip()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "tiny.cu"
    source.write_text('extern "C" __global__ void f(float* x) { x[0] = N; }')
    first = cached_binary(compiler, source, (8, 0), ("-DN=1",))
    monkeypatch.setattr(Nvrtc, "compile", lambda *arguments: pytest.fail("compiled again"))
    assert cached_binary(compiler, source, (8, 0), ("-DN=1",)) == first
    with pytest.raises(pytest.fail.Exception):
        cached_binary(compiler, source, (8, 0), ("-DN=2",))
    flags = Nvrtc.flags
    monkeypatch.setattr(Nvrtc, "flags", lambda *given: [*flags(*given), "--fmad=false"])
    with pytest.raises(pytest.fail.Exception):  # a flag that is always passed is a part of the key as well
        cached_binary(compiler, source, (8, 0), ("-DN=1",))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    compiler = nvrtc_or_skip()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def full(*names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nvrtc.os, "replace", full)
    assert cached_binary(compiler, source, (8, 0), ())[:4] == b"\x7fELF"
    assert list(cache_folder().iterdir()) == []
