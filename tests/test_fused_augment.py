"""The C++ pass and the GPU kernels against the PyTorch definition on the same parameters."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from models.ops.launcher import CudaModule
from pipeline import augment, augment_native, native_build
from pipeline.augment import COLUMN, COLUMNS, JITTER_ORDERS, AugmentParams, apply, draw, params_from_table
from pipeline.kernels import fused_augment
from pipeline.profiles import PROFILES

from .cuda_host import compiles_for
from .test_augment import SSL_PROFILES, levels_of, sample_images

needs_native = pytest.mark.skipif(augment_native.library() is None, reason="no C++ compiler")
TOLERANCE = 2e-3  # grey levels: float rounding


def reference(images: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    return levels_of(apply(images, params, torch.float64))


def processor_lanes() -> list[int]:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return [4] + [8] * ("avx2" in flags and "fma" in flags) + [16] * ("avx512dq" in flags and "avx512vl" in flags)


def native(
    images: torch.Tensor, params: AugmentParams, dtype: torch.dtype = torch.float32, **options: int
) -> torch.Tensor:
    radius = params.blur_radius(images)
    return augment_native.augment(images, params.table, params.profile.gray_first, radius, dtype, **options)


@needs_native
@pytest.mark.parametrize("lanes", processor_lanes())
@pytest.mark.parametrize("name", [*SSL_PROFILES, "linear", "none"])
def test_native_agrees_with_the_definition(name, lanes):
    for side in (64, 33):  # whole vectors, and a rest of every kind
        images = sample_images(25, side)
        for view in range(PROFILES[name].num_views):
            params = draw(name, 5, 0, np.arange(25), view)
            difference = levels_of(native(images, params, lanes=lanes)) - reference(images, params)
            assert difference.abs().max() < TOLERANCE


@needs_native
@pytest.mark.parametrize("side", [2, 3, 5, 15, 16, 17, 31, 65, 224])
def test_native_agrees_on_odd_sizes(side):
    images = sample_images(10, side)
    for lanes in processor_lanes():
        params = draw("byol", 1, 0, np.arange(10), 0)
        assert (levels_of(native(images, params, lanes=lanes)) - reference(images, params)).abs().max() < TOLERANCE


@needs_native
def test_native_handles_images_that_are_not_square():
    images = sample_images(6, 48)[:, :, :21, :]
    params = draw("byol-care", 1, 0, np.arange(6), 1)
    assert (levels_of(native(images, params)) - reference(images, params)).abs().max() < TOLERANCE


def all_orders_table(name: str) -> np.ndarray:
    """(24, 14): every order of the jitter, with changing combinations of the profile's other operations."""
    table = np.zeros((24, len(COLUMNS)), dtype=np.float32)
    for bit, column in enumerate(("flip", "gray", "blur", "solarize")):
        if column in PROFILES[name].operations:
            table[:, COLUMN[column]] = (np.arange(24) * 5 + 3) >> bit & 1
    for column, value in (("brightness", 1.4), ("contrast", 0.6), ("saturation", 1.4), ("hue", -0.4), ("jitter", 1)):
        table[:, COLUMN[column]] = value
    table[:, COLUMN["order0"] : COLUMN["order0"] + 4] = JITTER_ORDERS
    table[:, COLUMN["sigma"]] = 0.1 + np.arange(24) / 13
    return table


@needs_native
@pytest.mark.parametrize("name", ["mocov2", "mocov1", "byol-care", "byol"])
def test_native_keeps_every_order_of_jitter_with_every_other_operation(name):
    images = sample_images(24, 40)
    params = params_from_table(name, all_orders_table(name))
    assert (levels_of(native(images, params)) - reference(images, params)).abs().max() < TOLERANCE


@needs_native
def test_native_output_types():
    images = sample_images(20, 50)
    params = draw("byol", 3, 0, np.arange(20), 1)
    exact = native(images, params)
    assert torch.equal(native(images, params, torch.bfloat16), exact.bfloat16())
    assert torch.equal(native(images, params, torch.float16), exact.half())
    grey_levels = native(images, params, torch.uint8)
    assert (grey_levels - levels_of(exact)).abs().max() <= 0.501
    for result in (exact, grey_levels):
        assert result.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="not torch.float64"):
        native(images, params, torch.float64)


@needs_native
def test_native_is_the_same_for_any_layout_threads_and_batch():
    images = sample_images(11, 37)
    params = draw("mocov2", 3, 0, np.arange(11), 0)
    whole = native(images, params, threads=1)
    assert torch.equal(whole, native(images, params, threads=3))
    assert torch.equal(whole, native(images.to(memory_format=torch.channels_last), params))
    for number in range(11):
        alone = native(images[number : number + 1], draw("mocov2", 3, 0, np.array([number]), 0))
        assert torch.equal(alone[0], whole[number])
    assert native(images[:0], draw("mocov2", 3, 0, np.arange(0), 0)).shape == (0, 3, 37, 37)


@needs_native
def test_native_refuses_what_it_cannot_do():
    images, params = sample_images(2, 8), draw("mocov2", 0, 0, np.arange(2), 0)
    with pytest.raises(ValueError, match="8 x 8 px with a blur of 8"):
        augment_native.augment(images, params.table, False, 8)
    with pytest.raises(ValueError, match="no registers of 5 floats"):
        native(images, params, lanes=5)


def test_choice_of_implementation_and_its_reasons():
    cpu = torch.device("cpu")
    fastest = "native" if augment_native.library() is not None else "reference"
    assert augment.choose_implementation(cpu, torch.float32)[0] == fastest
    assert augment.choose_implementation(cpu, torch.float64)[0] == "reference"
    assert augment.choose_implementation(torch.device("cuda"), torch.float16)[0] == "reference"
    with pytest.raises(ValueError, match="choose one of auto, reference, native, kernel"):
        augment.choose_implementation(cpu, torch.float32, "fast")
    with pytest.raises(ValueError, match="use 'auto'"):
        augment.choose_implementation(torch.device("cuda"), torch.float32, "native")
    assert augment.choose_implementation(torch.device("cuda"), torch.float16, "kernel")[0] == "kernel"
    with pytest.raises(ValueError, match="is for a CUDA device"):
        augment.choose_implementation(cpu, torch.float16, "kernel")
    images, params = sample_images(3, 24), draw("byol", 0, 0, np.arange(3), 0)
    definition = apply(images, params, implementation="reference")
    assert torch.equal(apply(images, params), definition) == (fastest == "reference")
    assert (levels_of(apply(images, params)) - levels_of(definition)).abs().max() < TOLERANCE


def test_without_a_compiler_the_definition_takes_over_and_says_so_once(monkeypatch, capsys):
    def refuse(*arguments: object) -> None:
        raise native_build.NativeUnavailable("no C++ compiler was found")

    monkeypatch.setattr(native_build, "build", refuse)
    monkeypatch.setattr(native_build, "_told", set())
    native_build._load.cache_clear()
    augment_native.library.cache_clear()
    try:
        images, params = sample_images(2, 16), draw("byol", 0, 0, np.arange(2), 0)
        for _ in range(3):
            assert torch.equal(apply(images, params), apply(images, params, implementation="reference"))
        assert capsys.readouterr().err.count("many times slower") == 1
        with pytest.raises(RuntimeError, match="could not be built"):
            apply(images, params, implementation="native")
    finally:
        native_build._load.cache_clear()
        augment_native.library.cache_clear()


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory) -> fused_augment.Launch:
    """The kernels' own source, compiled for the host: each phase of a block is a loop over its threads."""
    compiler = native_build.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("kernels") / "augment.so"
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    subprocess.run([*command, "-x", "c++", str(fused_augment.SOURCE), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))

    def launch(name: str, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: ctypes.Structure) -> None:
        assert block == (fused_augment.THREADS, 1, 1) and grid[2] == 1
        getattr(library, f"host_{name}")(ctypes.byref(arguments), *grid[:2])

    return launch


def kernel(
    launch: fused_augment.Launch, images: torch.Tensor, params: AugmentParams, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    radius = params.blur_radius(images)
    return fused_augment.augment(images, params.table, params.profile.gray_first, radius, dtype, launch=launch)


@pytest.mark.parametrize("name", [*SSL_PROFILES, "linear", "none"])
def test_kernel_agrees_with_the_definition(name, host_kernels):
    images = sample_images(15, 72)  # more than one tile in both directions, the last ones cut off
    for view in range(PROFILES[name].num_views):
        params = draw(name, 5, 0, np.arange(15), view)
        difference = levels_of(kernel(host_kernels, images, params)) - reference(images, params)
        assert difference.abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["mocov2", "mocov1", "byol-care", "byol"])
def test_kernel_keeps_every_order_of_jitter_with_every_other_operation(name, host_kernels):
    images = sample_images(24, 40)
    params = params_from_table(name, all_orders_table(name))
    assert (levels_of(kernel(host_kernels, images, params)) - reference(images, params)).abs().max() < TOLERANCE


@pytest.mark.parametrize("shape", [(2, 2), (5, 5), (31, 33), (64, 64), (65, 66), (40, 130), (224, 224)])
def test_kernel_agrees_on_odd_shapes(shape, host_kernels):
    images = sample_images(4, max(shape))[:, :, : shape[0], : shape[1]]
    params = draw("byol", 1, 0, np.arange(4), 0)
    result = kernel(host_kernels, images, params)
    assert result.shape == images.shape and result.is_contiguous(memory_format=torch.channels_last)
    assert (levels_of(result) - reference(images, params)).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["kernel", "native"])
def test_error_is_at_most_twice_that_of_the_definition_in_the_same_dtype(dtype, implementation, host_kernels):
    if implementation == "native" and augment_native.library() is None:
        pytest.skip("no C++ compiler")
    images = sample_images(40, 56)
    # Maxima over all profiles: that of one profile is a single pixel's chance (ratios from 0.6 to 2.04 in float32).
    worst = {"fused": 0.0, "eager": 0.0}
    for name in SSL_PROFILES:
        params = draw(name, 7, 0, np.arange(40), 1)
        exact = apply(images, params, torch.float64)
        fused = (
            kernel(host_kernels, images, params, dtype) if implementation == "kernel" else native(images, params, dtype)
        )
        eager = apply(images, params, dtype, implementation="reference")
        assert fused.dtype == dtype
        for key, result in (("fused", fused), ("eager", eager)):
            worst[key] = max(worst[key], float((result.double() - exact).abs().max()))
    assert worst["fused"] <= 2 * worst["eager"]


def test_kernel_refuses_what_it_cannot_do(host_kernels):
    images, params = sample_images(2, 24), draw("mocov2", 0, 0, np.arange(2), 0)
    with pytest.raises(ValueError, match="at most 8 taps to each side on 24 x 24 px, not 9"):
        fused_augment.augment(images, params.table, False, 9, launch=host_kernels)
    with pytest.raises(ValueError, match="not torch.float64"):
        fused_augment.augment(images, params.table, False, 1, torch.float64, launch=host_kernels)
    with pytest.raises(ValueError, match="up to 65535 images, not 65536"):
        fused_augment.augment(images[:1].expand(65536, 3, 24, 24), params.table, False, 1, launch=host_kernels)
    for table in (params.table.double(), params.table[:1], params.table[:, 1:], params.table.to("meta")):
        with pytest.raises(ValueError, match=r"table must be \(2, 14\) torch.float32 on cpu, not"):
            fused_augment.augment(images, table, False, 1, launch=host_kernels)
    assert len(COLUMNS) == fused_augment.COLUMNS
    assert kernel(host_kernels, images[:0], draw("mocov2", 0, 0, np.arange(0), 0)).shape == (0, 3, 24, 24)
    for profile in PROFILES.values():
        assert 4 * profile.sigma_range[1] <= fused_augment.REACH


def test_launch_parameters_are_those_of_the_source():
    source = fused_augment.SOURCE.read_text()
    constants = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)[,;]", source)}
    assert fused_augment.THREADS == constants["THREADS"]
    assert fused_augment.PARTS == constants["PARTS"]
    assert fused_augment.REACH == constants["REACH"]
    assert fused_augment.TILE == (constants["TILE_H"], constants["TILE_W"])
    halo_rows, halo_columns = (side + 2 * constants["REACH"] for side in fused_augment.TILE)
    planes = 3 * halo_rows * (halo_columns + 1) + halo_rows * (constants["TILE_W"] + 1)
    assert planes + 2 * constants["REACH"] + 1 + 2 * constants["RUN"] == fused_augment.SHARED_FLOATS
    assert fused_augment.SHARED_BYTES["augment"] <= 64 * 1024  # what a block may have on sm_75
    declared = re.search(r"struct Arguments \{(.*?)\n\};", source, re.S)
    assert declared is not None
    members = re.sub(r"//.*", "", declared.group(1))
    names = [name for line in members.split(";") for name in re.findall(r"(\w+)\s*(?:,|$)", line)]
    assert names == [field[0] for field in fused_augment.Arguments._fields_]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_kernels_compile_for_the_gpu(capability):
    compiles_for(fused_augment.SOURCE, tuple(fused_augment.SHARED_BYTES), capability, [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_a_gpu_agree_with_the_definition():
    images = sample_images(20, 224)
    for name in SSL_PROFILES:
        params = draw(name, 5, 0, np.arange(20), 1)
        moved = params.to("cuda", non_blocking=True)
        radius = params.blur_radius(images)
        launch = fused_augment.loaded(CudaModule, torch.device("cuda", 0))
        view = fused_augment.augment(
            images.cuda(), moved.table, params.profile.gray_first, radius, torch.float32, launch=launch
        )
        assert (levels_of(view.cpu()) - reference(images, params)).abs().max() < TOLERANCE
        assert (levels_of(apply(images.cuda(), moved).cpu()) - reference(images, params)).abs().max() < TOLERANCE
