"""The native decoder: crops to the bit, pixels against PIL, every kind of JPEG, damage, sanitizers."""

from __future__ import annotations

import ctypes
import io
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import native_build
from pipeline.decoder import native_library, pil_views
from pipeline.geometry import draw_crops
from pipeline.interface import ViewSpec
from pipeline.layouts import (
    BASELINE,
    CHECK_CRC,
    CHECKSUM,
    DAMAGED,
    JOB,
    LIBJPEG_ONLY,
    OK,
    REFUSE_ROTATED,
    TOO_LARGE,
    UNREADABLE,
    UNSUPPORTED,
    WHOLE_IMAGE,
    view_array,
)
from pipeline.native_build import NativeUnavailable, build, compiler
from pipeline.refusal import MAX_PIXELS

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
PAIR = (ViewSpec("view1", 224), ViewSpec("view2", 224, draw_id=1))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = native_library(instead=None)
    assert loaded is not None
    return loaded


@pytest.fixture
def any_level(library: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    yield library
    library.rg_force_level(-1)


class Decode:
    """Decodes records with one thread; `job` fields can be set."""

    def __init__(self, library: ctypes.CDLL):
        self.library, self.pool = library, library.rg_pool_open(1)

    def __call__(
        self, record: bytes, views: tuple[ViewSpec, ...], index: int = 0, max_pixels: int = MAX_PIXELS, **job: object
    ) -> tuple[int, list[np.ndarray]]:
        jobs, specs = np.zeros(1, dtype=JOB), view_array(views)
        array = np.frombuffer(record, dtype=np.uint8)
        jobs["data"], jobs["size"], jobs["index"] = array.ctypes.data, len(record), index
        for name, value in job.items():
            jobs[name] = value
        # A margin on both sides shows writes outside the view.
        guarded = [np.full(2 * 64 + spec.size**2 * 3, 77, dtype=np.uint8) for spec in views]
        pointers = np.array([each.ctypes.data + 64 for each in guarded], dtype=np.uint64)
        failed = self.library.rg_decode(
            self.pool, jobs.ctypes.data, 1, specs.ctypes.data, len(views), pointers.ctypes.data, 3, 1, max_pixels
        )
        assert failed == (jobs["status"][0] != OK)
        for each in guarded:
            assert (each[:64] == 77).all() and (each[-64:] == 77).all()
        return int(jobs["status"][0]), [
            each[64:-64].reshape(spec.size, spec.size, 3) for each, spec in zip(guarded, views, strict=True)
        ]


@pytest.fixture(scope="module")
def decode(library: ctypes.CDLL) -> Iterator[Decode]:
    made = Decode(library)
    yield made
    library.rg_pool_close(made.pool)


@pytest.fixture(scope="module")
def large_photos(unpack: Callable[..., Path]) -> list[Image.Image]:
    folder = unpack("photos-mixed-size", lambda name: "/n01" in name or "/n02" in name)
    return [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())[:24]]


def jpeg(image: Image.Image, **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, "JPEG", **{"quality": 90, **options})  # type: ignore[arg-type]
    return target.getvalue()


def packed_at_400(image: Image.Image, **options: object) -> bytes:
    small = image.copy()
    small.thumbnail((400, 400))
    return jpeg(small, **options)


def gaps(decode: Decode, data: bytes, views: tuple[ViewSpec, ...], index: int) -> np.ndarray:
    status, cut = decode(data, views, index)
    assert status == OK
    expected = pil_views(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), views, 3, 1, index)
    return np.concatenate([np.abs(a.astype(int) - b).ravel() for a, b in zip(cut, expected, strict=True)])


@pytest.mark.parametrize(
    "spec",
    [
        ViewSpec("v", 224),
        ViewSpec("v", 224, scale=(0.08, 1.0), ratio=(0.5, 2.0), draw_id=1),
        ViewSpec("v", 96, scale=(0.9, 1.0), ratio=(0.2, 0.3), draw_id=2),  # mostly the fallback
        ViewSpec("v", 224, kind="center"),
        ViewSpec("v", 224, kind="whole"),
    ],
)
def test_crops_have_the_bits_of_numpy(library: ctypes.CDLL, spec: ViewSpec) -> None:
    random, specs, box = np.random.default_rng(0), view_array([spec]), np.zeros(4, dtype=np.int64)
    n = 4000
    heights, widths = random.integers(1, 3000, n), random.integers(1, 3000, n)
    index = random.integers(0, 1 << 32, n)
    seed, epoch = 0xFEDCBA9876543210, 4_000_000_000
    expected = draw_crops(spec, seed, epoch, index, heights, widths)
    for row in range(n):
        sides = int(heights[row]), int(widths[row])
        library.rg_crop(specs.ctypes.data, seed, epoch, int(index[row]), *sides, box.ctypes.data)
        assert box.tolist() == expected[row].tolist()


@pytest.mark.parametrize("size", [*range(70), 1000, 4097])
def test_crc_is_zlibs(library: ctypes.CDLL, size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size + 3, dtype=np.uint8)
    for start in range(3):  # any alignment
        part = data[start : start + size]
        assert library.rg_crc32(part.ctypes.data, size) == zlib.crc32(part.tobytes())


def test_pictures_are_as_close_to_pil_as_promised(decode: Decode, large_photos: list[Image.Image]) -> None:
    found = np.concatenate(
        [gaps(decode, packed_at_400(photo), PAIR, index) for index, photo in enumerate(large_photos)]
    )
    assert found.mean() <= 0.40 and np.percentile(found, 99) <= 2.2, (found.mean(), np.percentile(found, 99))


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"restart_marker_blocks": 7},
        {"optimize": True},
        {"quality": 30},
        {"keep_rgb": True},
    ],
)
def test_kinds_of_jpeg(decode: Decode, large_photos: list[Image.Image], options: dict[str, object]) -> None:
    photo = large_photos[0].resize((397, 301))  # not whole blocks in either direction
    found = gaps(decode, jpeg(photo, **options), PAIR, 5)
    assert found.mean() < 0.6 and np.percentile(found, 99) <= 4


def test_gray_and_bicubic(decode: Decode, large_photos: list[Image.Image]) -> None:
    photo = large_photos[1].resize((397, 301))
    assert gaps(decode, jpeg(photo.convert("L")), PAIR, 2).mean() < 0.3
    bicubic = tuple(ViewSpec(spec.name, 224, interpolation="bicubic", draw_id=spec.draw_id) for spec in PAIR)
    assert gaps(decode, jpeg(photo), bicubic, 2).mean() < 0.7
    # A different filter must make a difference.
    assert not np.array_equal(decode(jpeg(photo), bicubic, 2)[1][0], decode(jpeg(photo), PAIR, 2)[1][0])


VEX = re.compile(r"\t(v[a-z]+|kmov[a-z]|shlx|shrx|sarx|rorx)\b")  # instructions that a processor without AVX lacks


@pytest.mark.parametrize("name", ["views", "augment"])
def test_shared_functions_hold_no_targets_instructions(name: str) -> None:
    """The linker keeps one copy of an inline function, so only functions of a target may need its processor."""
    if "avx2" not in native_build.TARGETS or shutil.which("objdump") is None:
        pytest.skip("there is one target, or nothing to take the library apart with")
    command = ["objdump", "-dC", "--no-show-raw-insn", str(build(name))]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = {part.splitlines()[0]: part for part in text.split("\n\n") if VEX.search(part)}
    strangers = [title for title in functions if not re.search(r"regatta::avx(2|512|512_vbmi)::", title)]
    assert len(functions) > 3 and not strangers, strangers


@pytest.mark.parametrize("width,height", [(1, 1), (1, 40), (40, 1), (7, 9), (17, 2000), (3000, 20), (65_000, 2)])
@pytest.mark.parametrize("size", [1, 5, 33, 224])
def test_odd_sizes(decode: Decode, width: int, height: int, size: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)
    data = jpeg(smooth, quality=95, subsampling=0)
    views = (ViewSpec("a", size, kind="whole"), ViewSpec("b", size), ViewSpec("c", size, interpolation="bicubic"))
    found = gaps(decode, data, views[:2], 9)
    assert found.mean() < 1.0
    assert gaps(decode, data, views[2:], 9).mean() < 2.5  # PIL clips to 0..255 between its two passes, noise overshoots


def test_instruction_sets_agree_to_the_bit(
    decode: Decode, large_photos: list[Image.Image], any_level: ctypes.CDLL
) -> None:
    if any_level.rg_level() == 0:
        pytest.skip("this processor has no vector kernels to compare")
    views = (
        *PAIR,
        ViewSpec("small", 21, draw_id=2),
        ViewSpec("cubic", 100, interpolation="bicubic", draw_id=3),
        ViewSpec("whole", 50, kind="whole"),
    )
    strip = Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 4000, 3), dtype=np.uint8))
    for index, photo in enumerate([*large_photos[:4], strip]):
        data = jpeg(photo)
        results = []
        for level in range(3):
            any_level.rg_force_level(level)
            results.append(decode(data, views, index)[1])
        for cut in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(results[0], cut, strict=True))


def test_constant_images_stay_constant(decode: Decode) -> None:
    for color in ((0, 0, 0), (255, 255, 255), (200, 30, 90)):
        data = jpeg(Image.new("RGB", (333, 222), color), quality=100, subsampling=0)
        expected = np.asarray(Image.open(io.BytesIO(data)))[0, 0].astype(int)
        for view in decode(data, PAIR, 4)[1]:
            assert np.abs(view.astype(int) - expected).max() <= 1


def as_libjpeg(library: ctypes.CDLL, records: list[bytes], flags: int, views: tuple[ViewSpec, ...]) -> np.ndarray:
    """Assert that statuses, sizes and pixels are those of libjpeg; returns which records our own decoder served."""
    specs, pool, results = view_array(views), library.rg_pool_open(2), []
    arrays = [np.frombuffer(record, dtype=np.uint8) for record in records]
    for extra in (0, LIBJPEG_ONLY):
        jobs = np.zeros(len(records), dtype=JOB)
        jobs["data"], jobs["size"] = [array.ctypes.data for array in arrays], [len(record) for record in records]
        jobs["index"] = jobs["slot"] = np.arange(len(records))
        jobs["flags"] = flags | extra
        outs = [np.zeros((len(records), spec.size, spec.size, 3), dtype=np.uint8) for spec in views]
        pointers = np.array([out.ctypes.data for out in outs], dtype=np.uint64)
        library.rg_decode(
            pool, jobs.ctypes.data, len(jobs), specs.ctypes.data, len(views), pointers.ctypes.data, 3, 1, MAX_PIXELS
        )
        results.append((jobs, outs))
    library.rg_pool_close(pool)
    (ours, found), (general, expected) = results
    for field in ("status", "width", "height"):
        assert (ours[field] == general[field]).all(), np.flatnonzero(ours[field] != general[field])
    for mine, theirs in zip(found, expected, strict=True):
        assert np.array_equal(mine, theirs)
    assert not (general["decoder"] == BASELINE).any()
    return (ours["status"] == OK) & (ours["decoder"] == BASELINE)


CROPS_AND_WHOLE = (ViewSpec("a", 96), ViewSpec("b", 64, draw_id=1), ViewSpec("c", 200, kind="whole"))


@pytest.mark.parametrize("flags", [0, WHOLE_IMAGE])
def test_data_that_ends_early_is_damage(library: ctypes.CDLL, large_photos: list[Image.Image], flags: int) -> None:
    whole = jpeg(large_photos[3].resize((150, 110)))
    records = [whole[: -2 - missing] + whole[-2:] for missing in range(1, 40)]
    assert not as_libjpeg(library, records, flags, CROPS_AND_WHOLE).any()


@pytest.mark.parametrize("level", [1, 2])
def test_our_decoder_has_the_bits_of_libjpeg(
    any_level: ctypes.CDLL, large_photos: list[Image.Image], level: int
) -> None:
    any_level.rg_force_level(level)
    if any_level.rg_level() < level:
        pytest.skip("this processor lacks the instructions")
    photo = large_photos[0].resize((397, 301))
    kinds: list[dict[str, object]] = [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"restart_marker_blocks": 7},
        {"keep_rgb": True},
        {"restart_marker_rows": 2},
        {"optimize": True},
        {"quality": 1},
        {"quality": 100, "subsampling": 0},
    ]
    records = [jpeg(photo, **kind) for kind in kinds] + [jpeg(photo.convert("L"))]
    for side in (1, 7, 8, 9, 15, 16, 17, 31, 33):
        records.append(jpeg(large_photos[1].resize((side, 49 - side)), subsampling=side % 3))
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    records += [jpeg(Image.fromarray(noise), quality=quality) for quality in (50, 100)]
    for views in (CROPS_AND_WHOLE, CROPS_AND_WHOLE[:2], CROPS_AND_WHOLE[:1]):
        for flags in (0, WHOLE_IMAGE):
            assert as_libjpeg(any_level, records, flags, views).all()


def test_what_is_not_plainly_sound_is_left_to_libjpeg(library: ctypes.CDLL, large_photos: list[Image.Image]) -> None:
    photo = large_photos[2].resize((160, 120))
    good, restarts = jpeg(photo), jpeg(photo, restart_marker_blocks=5)
    huge = bytearray(jpeg(photo.convert("L"), quality=100))
    table = huge.index(b"\xff\xdb") + 5
    huge[table : table + 64] = b"\xff" * 64  # coefficients beyond those of any picture
    missing = good.replace(b"\xff\xc4", b"\xff\xe3", 1)
    records = [
        jpeg(photo, progressive=True),
        jpeg(photo.convert("CMYK")),
        good[:-2],
        good[:-2] + b"\x00\x00\xff\xd9",
        good[: len(good) // 2],
        restarts.replace(b"\xff\xd3", b"\xff\xd5", 1),
        restarts.replace(b"\xff\xd0", b"", 1),
        bytes(huge),
        missing,
        b"\xff\xd8",
        b"",
    ]
    assert not as_libjpeg(library, records[:-1], WHOLE_IMAGE, CROPS_AND_WHOLE).any()
    if library.rg_level() > 0:
        assert as_libjpeg(library, [good, restarts], WHOLE_IMAGE, CROPS_AND_WHOLE).all()


def test_real_files_decode_as_with_libjpeg(library: ctypes.CDLL, unpack: Callable[..., Path]) -> None:
    odd = [path.read_bytes() for path in sorted((unpack("odd-images") / "files").iterdir())]
    mixed = [path.read_bytes() for path in sorted(unpack("photos-mixed-size").iterdir())]
    small = [path.read_bytes() for path in sorted(unpack("photos-val", lambda name: "00.JPEG" in name).rglob("*.JPEG"))]
    for records in ([record for record in odd if record], mixed, small):
        ours = as_libjpeg(library, records, WHOLE_IMAGE | REFUSE_ROTATED, CROPS_AND_WHOLE)
        assert library.rg_level() == 0 or ours.any()


def test_a_pipe_in_place_of_a_file_is_refused(decode: Decode, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    path = ctypes.create_string_buffer(os.fsencode(tmp_path / "pipe.jpg"))
    assert decode(b"-", PAIR, data=0, path=ctypes.addressof(path))[0] == UNREADABLE


def test_every_refusal_has_its_status(decode: Decode, large_photos: list[Image.Image], tmp_path: Path) -> None:
    photo = large_photos[2].resize((320, 240))
    data = jpeg(photo)
    assert decode(data, PAIR, crc=zlib.crc32(data), flags=CHECK_CRC)[0] == OK
    assert decode(data, PAIR, crc=zlib.crc32(data) ^ 1, flags=CHECK_CRC)[0] == CHECKSUM
    assert decode(b"no image", PAIR)[0] == DAMAGED
    assert decode(data[: len(data) // 3], PAIR, flags=WHOLE_IMAGE)[0] == DAMAGED
    assert decode(data[:-2], PAIR, flags=WHOLE_IMAGE)[0] == DAMAGED
    assert decode(data, PAIR, max_pixels=320 * 240 - 1)[0] == TOO_LARGE
    assert decode(jpeg(photo.convert("CMYK")), PAIR)[0] == UNSUPPORTED
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = jpeg(photo, exif=exif)
    assert decode(rotated, PAIR, flags=REFUSE_ROTATED)[0] == UNSUPPORTED
    assert decode(rotated, PAIR)[0] == OK
    exif[0x0112] = 1
    assert decode(jpeg(photo, exif=exif), PAIR, flags=REFUSE_ROTATED)[0] == OK
    path = ctypes.create_string_buffer(os.fsencode(tmp_path / "absent.jpg"))
    assert decode(data, PAIR, data=0, path=ctypes.addressof(path))[0] == UNREADABLE
    (tmp_path / "there.jpg").write_bytes(data)
    path = ctypes.create_string_buffer(os.fsencode(tmp_path / "there.jpg"))
    assert np.array_equal(decode(data, PAIR, data=0, path=ctypes.addressof(path))[1], decode(data, PAIR)[1])
    assert decode(data, PAIR)[0] == OK  # after all that


def test_rgb_pixels_give_the_same_views_as_a_jpeg_of_them(library: ctypes.CDLL, decode: Decode) -> None:
    pixels = np.asarray(Image.radial_gradient("L").resize((199, 130)).convert("RGB"))
    specs = view_array(PAIR)
    outs = [np.zeros((2, 224, 224, 3), dtype=np.uint8) for _ in PAIR]
    pointers = np.array([out.ctypes.data for out in outs], dtype=np.uint64)
    library.rg_views_of_rgb(pixels.ctypes.data, 130, 199, specs.ctypes.data, 2, 1, pointers.ctypes.data, 3, 1, 8)
    for out, expected in zip(outs, pil_views(pixels, PAIR, 3, 1, 8), strict=True):
        assert np.abs(out[1].astype(int) - expected).max() <= 1 and not out[0].any()


def test_damage_to_packed_records_is_noticed(decode: Decode, large_photos: list[Image.Image]) -> None:
    random = np.random.default_rng(5)
    for photo in large_photos[:8]:
        data = packed_at_400(photo)
        crc = zlib.crc32(data)
        for length in (1, 40):
            at = int(random.integers(len(data) - length))
            broken = data[:at] + bytes(255 - byte for byte in data[at : at + length]) + data[at + length :]
            assert decode(broken, PAIR, crc=crc, flags=CHECK_CRC)[0] == CHECKSUM


def sanitizer_runtime(name: str) -> str | None:
    """Path of a sanitizer's runtime, which must be loaded before Python itself."""
    found = subprocess.run([compiler() or "g++", f"-print-file-name={name}"], capture_output=True, text=True)
    path = found.stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


@pytest.mark.parametrize("seconds", [4, pytest.param(300, marks=pytest.mark.slow)])
def test_damaged_files_under_sanitizers(seconds: int, large_photos: list[Image.Image], tmp_path: Path) -> None:
    runtime = sanitizer_runtime("libasan.so")
    if runtime is None:
        pytest.skip("the compiler has no address sanitizer")
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    library = build("views", flags)
    photo = large_photos[3].resize((150, 110))
    samples = [
        jpeg(photo, quality=70),
        jpeg(photo, subsampling=0),
        jpeg(photo, progressive=True),
        jpeg(photo.convert("L")),
        jpeg(photo, restart_marker_blocks=3),
        jpeg(photo.convert("CMYK")),
        jpeg(photo, optimize=True, subsampling=1),
    ]
    paths = []
    for number, sample in enumerate(samples):
        paths.append(str(tmp_path / f"{number}.jpg"))
        Path(paths[-1]).write_bytes(sample)
    script = Path(__file__).with_name("fuzz_native.py")
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(library), str(seconds), "0", *paths],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds + 120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tried, decoded, ours = map(int, done.stdout.split())
    assert tried > 50 and 0 < ours < decoded < tried


def test_no_compiler_is_said_once_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(native_build, "compiler", lambda: None)
    monkeypatch.setattr(native_build, "_cache_folders", lambda: iter([tmp_path]))
    monkeypatch.setattr(native_build, "_told", set())
    native_build._load.cache_clear()
    try:
        for _ in range(2):
            assert native_build.try_load("views", "PIL decodes") is None
        with pytest.raises(NativeUnavailable, match="apt install g"):
            native_build.load("views")
        said = capfd.readouterr().err
        assert said.count("no C++ compiler") == 1 and "PIL decodes" in said
    finally:
        native_build._load.cache_clear()


def test_a_refused_thread_is_an_answer_not_the_end_of_the_process(library: ctypes.CDLL) -> None:
    code = (
        f"import sys, resource; sys.path[0:0] = [{str(Path(__file__).resolve().parents[1])!r}]\n"
        "from pipeline.decoder import native_library\n"
        "library = native_library(); used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20),) * 2)\n"
        "print(library.rg_pool_open(4096))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == "None", done.stderr


def test_builds_at_once_and_after_a_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = tmp_path / "native"
    sources.mkdir()
    (sources / "tiny.cpp").write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }')
    code = (
        f"import sys; sys.path[0:0] = [{str(Path(__file__).resolve().parents[1])!r}]\n"
        f"from pathlib import Path; from pipeline import native_build as b; b.SOURCES = Path({str(sources)!r})\n"
        "print(b.load('tiny').answer())"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [rank.communicate()[0].strip() for rank in ranks] == ["42"] * 3
    built = [path.name for path in (sources / "build").iterdir() if path.suffix == ".so"]
    assert len(built) == 1
    monkeypatch.setattr(native_build, "SOURCES", sources)
    (sources / "tiny.cpp").write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 43; }')
    assert ctypes.CDLL(str(build("tiny"))).answer() == 43
    (sources / "tiny.cpp").write_text("syntax error")
    with pytest.raises(NativeUnavailable, match="could not build tiny.cpp"):
        build("tiny")
    assert not list((sources / "build").glob(".*.so*"))
