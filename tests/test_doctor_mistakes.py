"""Mistakes that a run can start with, really made: the doctor answers each in one line with thing and remedy.

What cannot be made here, a GPU and its driver above all, a full disk and a small machine, is faked at the one call that
asks for it; such cases say "faked". The default test makes the checks that a mistake is for; the slow one all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import socket
import stat
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.beton import BetonReader
from tests.runs import last_wins
from tools import doctor, make_ffcv_dataset
from tools.preflight import checks, devices, disk, images, limits, memory, settings, speed
from tools.preflight.examination import Examination
from train import checkpoint
from train.main import main as train
from train.resolve import resolve
from train.runtime import Runtime

TINY = (
    "--method regioncl-m --arch resnet18 --image-size 64 --epochs 2 --global-batch 8 --queue-size 64 --hidden-dim 32 "
    "--dim 16 --bn.group-size 4 --holdout 0 --device cpu"
).split()


def photo(path: Path, seed: int, side: tuple[int, int] = (90, 70)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(side).save(path, quality=90)
    return path


@dataclass
class Bench:
    """Where one mistake is made.

    Attributes:
        here: an empty folder.
        patch: takes everything back after the test.
        photos: sixteen good photos of two classes.
    """

    here: Path
    patch: pytest.MonkeyPatch
    photos: Path

    def copy(self, name: str = "mine") -> Path:
        """A copy of the photos to spoil."""
        return Path(shutil.copytree(self.photos, self.here / name))

    def packed(self) -> Path:
        target = self.here / "photos.beton"
        assert make_ffcv_dataset.main([str(self.photos), str(target), "--workers", "1"]) == 0
        return target

    def limit(self, which: int, soft: int) -> None:
        """Set a real limit of this process, until the test ends."""
        before, hard = resource.getrlimit(which)
        self.undo.append(lambda: resource.setrlimit(which, (before, hard)))
        resource.setrlimit(which, (soft, hard))

    def full(self, module: object, free: int) -> None:
        """Faked: the disk that the module asks about has so much free."""
        usage = namedtuple("usage", "total used free")
        self.patch.setattr(
            module, "shutil", SimpleNamespace(disk_usage=lambda path: usage(10**12, 10**12 - free, free))
        )

    def gpus(self, count: int, dtype: torch.dtype = torch.bfloat16) -> None:
        """Faked: the process works on one of so many GPUs."""

        @contextlib.contextmanager
        def start(run: object) -> Iterator[Runtime]:
            yield Runtime(0, 1, torch.device("cuda"), dtype, False)

        self.patch.setattr("train.runtime.start", start)
        self.patch.setattr(torch.cuda, "device_count", lambda: count)

    def __post_init__(self) -> None:
        self.undo: list[Callable[[], None]] = []


Seed = Callable[[Bench], list[str]]


@dataclass
class Mistake:
    """One seeded mistake.

    Attributes:
        name: what is wrong, in words.
        seed: makes the mistake; gives the flags beyond `TINY`, which win over them.
        line: pattern of the one line.
        checks: those that are to find it; none where the flags alone are refused.
    """

    name: str
    seed: Seed
    line: str
    checks: tuple[object, ...] = ()


def flags(text: str) -> Seed:
    return lambda bench: text.split()


def data(make: Callable[[Bench], object], more: str = "") -> Seed:
    return lambda bench: ["--data", str(make(bench)), *more.split()]


def variable(name: str, value: str | None = None, more: str = "") -> Seed:
    """A variable of the environment; without a value it names a file where a folder is wanted."""

    def seed(bench: Bench) -> list[str]:
        if value is None:
            (bench.here / "file").write_text("")
        bench.patch.setenv(name, str(bench.here / "file") if value is None else value)
        return more.split()

    return seed


def port_in_use(bench: Bench) -> list[str]:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    bench.undo.append(taken.close)
    bench.patch.setenv("MASTER_ADDR", "127.0.0.1")
    bench.patch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
    return []


def card_without_code(bench: Bench) -> list[str]:
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "get_device_name": "Tesla V100-SXM2-32GB",
        "get_device_capability": (7, 0),
    }.items():
        bench.patch.setattr(torch.cuda, name, lambda *_, found=value: found)
    bench.patch.setattr("train.cards.architectures", lambda: ["sm_80", "sm_90"])
    return ["--device", "auto"]


def driver_without_torch(bench: Bench) -> list[str]:
    """A program of that name which lists a card, as on a machine with the CPU build of PyTorch."""
    program = bench.here / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: H100'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    bench.patch.setenv("PATH", str(bench.here), prepend=os.pathsep)
    bench.patch.setattr(torch.cuda, "is_available", lambda: False)
    return ["--device", "auto"]


def too_few_gpus(bench: Bench) -> list[str]:
    bench.gpus(2)
    return ["--processes", "4"]


def one_of_eight(bench: Bench) -> list[str]:
    bench.gpus(8)
    return []


def without_nccl(bench: Bench) -> list[str]:
    bench.gpus(2)
    bench.patch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    return ["--processes", "2"]


def little_shared_memory(bench: Bench) -> list[str]:
    bench.gpus(2)
    bench.full(limits, 64 << 20)
    return ["--processes", "2"]


def full_disk(bench: Bench) -> list[str]:
    bench.full(checkpoint, 1 << 20)
    return []


def full_scratch(bench: Bench) -> list[str]:
    bench.full(limits, 1 << 20)
    return []


def quota(bench: Bench) -> list[str]:
    (bench.here / "cpu.max").write_text("50000 100000\n")
    bench.patch.setattr(limits, "CPU_QUOTA", bench.here / "cpu.max")
    return []


def limited(which: int, soft: int) -> Seed:
    def seed(bench: Bench) -> list[str]:
        bench.limit(which, soft)
        return []

    return seed


def small_address_space(bench: Bench) -> list[str]:
    real = resource.getrlimit
    of = {resource.RLIMIT_AS: (4 << 30, -1)}
    bench.patch.setattr(limits.resource, "getrlimit", lambda which: of.get(which) or real(which))
    return []


def little_memory(free_mib: int) -> Seed:
    def seed(bench: Bench) -> list[str]:
        bench.patch.setattr(memory, "free_bytes", lambda device, sharing: free_mib << 20)
        return ["--global-batch", "64"]

    return seed


def run_dir_is_a_file(bench: Bench) -> list[str]:
    (bench.here / "run").write_text("")
    return ["--run-dir", str(bench.here / "run" / "a")]


def a_run_of_other_settings(bench: Bench) -> list[str]:
    place = ["--run-dir", str(bench.here / "run")]
    argv = last_wins([*TINY, "--loader", "synthetic", "--data", "16", "--no-report", "--max-steps", "1", *place])
    assert train(argv) == 0
    return ["--loader", "synthetic", "--data", "16", "--optim.lr", "0.5", *place]


def a_run_to_overwrite(bench: Bench) -> list[str]:
    (bench.here / "run").mkdir()
    (bench.here / "run" / "config.json").write_text("{}")
    return ["--run-dir", str(bench.here / "run"), "--resume", "never"]


def cut_photo(bench: Bench) -> Path:
    folder = bench.copy()
    victim = folder / "a" / "00.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    return folder


def tiny_photo(bench: Bench) -> Path:
    folder = bench.copy()
    photo(folder / "a" / "icon.jpg", 99, (16, 12))
    return folder


def repeated_photo(bench: Bench) -> Path:
    folder = bench.copy()
    shutil.copy(folder / "a" / "00.jpg", folder / "a" / "00 (copy).jpg")
    return folder


def blank_photo(bench: Bench) -> Path:
    folder = bench.copy()
    Image.new("RGB", (90, 70), (7, 7, 7)).save(folder / "a" / "blank.png")
    return folder


def cut_pack(bench: Bench) -> Path:
    packed = bench.packed()
    packed.write_bytes(packed.read_bytes()[:-100])
    return packed


def flipped_byte(bench: Bench) -> Path:
    packed = bench.packed()
    reader = BetonReader(packed)
    content = bytearray(packed.read_bytes())
    content[int(reader.offsets[3] + reader.sizes[3] // 2)] ^= 0x55
    packed.write_bytes(content)
    return packed


def zip_file(bench: Bench) -> Path:
    shutil.make_archive(str(bench.here / "photos"), "zip", bench.photos)
    return bench.here / "photos.zip"


def video(bench: Bench) -> Path:
    (bench.here / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(300))
    return bench.here / "film.mp4"


def empty_folder(bench: Bench) -> Path:
    (bench.here / "empty").mkdir()
    return bench.here / "empty"


def validated(make: Callable[[Bench], Path]) -> Seed:
    return lambda bench: ["--data", str(bench.photos), "--val-data", str(make(bench))]


def flat_folder(bench: Bench) -> Path:
    return photo(bench.here / "flat" / "1.jpg", 1).parent


def other_classes(bench: Bench) -> Path:
    folder = bench.copy("other")
    (folder / "a").rename(folder / "zebra")
    return folder


def rates(loading: float, stepping: float, busy: float, packed: bool = False) -> Seed:
    """Faked: what the two measurements find here."""

    def seed(bench: Bench) -> list[str]:
        bench.patch.setattr(speed, "loader_rate", lambda pipeline: (loading, busy))
        bench.patch.setattr(speed, "step_rate", lambda config, runtime, local: (stepping, 0.0))
        return ["--data", str(bench.packed() if packed else bench.photos)]

    return seed


SPEED = (settings.built, images.openable, speed.loader, speed.step, speed.finish)
DATA = (images.openable,)
LOOK = (images.openable, images.contents)
VALIDATION = (images.openable, images.validation)
BATCH = (settings.batch,)
MISTAKES = [
    # What flags, recipes and files say.
    Mistake("a mistyped flag", flags("--global-bach 8"), r"--global-bach; the nearest valid flag is --global-batch"),
    Mistake("a flag of another trainer", flags("--lr 0.1"), r"--lr; the nearest valid flag is --optim.lr"),
    Mistake("no such method", flags("--method regionclm"), r"--method regionclm.*choose from moco-v2"),
    Mistake("another method's recipe", flags("--recipe byol"), r"--recipe byol belongs to --method byol"),
    Mistake("no number", flags("--epochs many"), r"--epochs many.*give a whole number"),
    Mistake("out of bounds", flags("--optim.lr -1"), r"--optim.lr -1.0 is negative; give 0 or more"),
    Mistake("no such config", flags("--config /nowhere.json"), r"/nowhere.json.*give the config.json of a run"),
    # Cards, processes, ports.
    Mistake("no GPU here", flags("--device cuda"), r"PyTorch sees no CUDA device.*use --device cpu"),
    Mistake("a V100, faked", card_without_code, r"V100.*no code for this card.*CUDA 12.6"),
    Mistake("torch without CUDA", driver_without_torch, r"GPU that torch cannot use.*install", (devices.cards,)),
    Mistake("too few GPUs, faked", too_few_gpus, r"--processes 4, but 2 GPUs.*--processes 2", (devices.processes,)),
    Mistake("idle GPUs, faked", one_of_eight, r"one of 8 GPUs.*give --processes 8", (devices.processes,)),
    Mistake("no NCCL, faked", without_nccl, r"no NCCL.*CUDA build", (devices.processes,)),
    Mistake("too few cores", flags("--processes 999"), r"--processes 999 on \d+ cores.*or fewer", (devices.processes,)),
    Mistake("no port", variable("MASTER_PORT", "http"), r"MASTER_PORT=http.*export a number", (devices.meeting,)),
    Mistake("a taken port", port_in_use, r"MASTER_PORT=\d+ is in use.*export another", (devices.meeting,)),
    Mistake("no srun", variable("SLURM_NTASKS", "8"), r"SLURM has 8 tasks.*write srun", (devices.meeting,)),
    # Limits of the system.
    Mistake("few files", limited(resource.RLIMIT_NOFILE, 200), r"limited to 200.*ulimit -n 4096", (limits.open_files,)),
    Mistake(
        "Docker's shared memory, faked", little_shared_memory, r"shm.*64.0 MiB.*--shm-size", (limits.shared_memory,)
    ),
    Mistake("TMPDIR is a file", variable("TMPDIR"), r"temporary files.*export TMPDIR", (limits.scratch,)),
    Mistake("a full TMPDIR, faked", full_scratch, r"temporary files.*1.0 MiB free.*free space", (limits.scratch,)),
    Mistake("no cache", variable("XDG_CACHE_HOME"), r"compiled kernels.*export XDG_CACHE_HOME", (limits.scratch,)),
    Mistake("CPU time", limited(resource.RLIMIT_CPU, 9999), r"9,999 s.*ulimit -t", (limits.time_limits,)),
    Mistake("a container's share, faked file", quota, r"0.5 of \d+ cores.*--workers 1", (limits.cores,)),
    Mistake(
        "too many workers", flags("--workers 10000"), r"--workers 10000 on \d+ cores.*leave it out", (limits.cores,)
    ),
    Mistake("one thread", variable("OMP_NUM_THREADS", "1"), r"OMP_NUM_THREADS=1.*unset", (limits.cores,)),
    Mistake(
        "address space, faked", small_address_space, r"4.00 GiB.*ulimit -v", (settings.built, limits.memory_limits)
    ),
    Mistake("file size", limited(resource.RLIMIT_FSIZE, 1 << 20), r"1.0 MiB.*ulimit -f", (settings.built, disk.space)),
    # Disk.
    Mistake("run folder below a file", run_dir_is_a_file, r"--run-dir.*is a file.*choose another", (disk.run_folder,)),
    Mistake("a full disk, faked", full_disk, r"checkpoints of.*1.0 MiB free.*free space", (settings.built, disk.space)),
    Mistake(
        "all kept", flags("--keep-checkpoints 0"), r"all are kept.*--keep-checkpoints 2", (settings.built, disk.space)
    ),
    Mistake("another run's folder", a_run_of_other_settings, r"optim.lr.*choose another --run-dir", (disk.run_folder,)),
    Mistake(
        "a run overwritten", a_run_to_overwrite, r"--resume never overwrites.*another --run-dir", (disk.run_folder,)
    ),
    # Sizes that do not fit.
    Mistake("ranks", flags("--processes 3"), r"--global-batch 8 does not divide over 3.*multiple of 3", BATCH),
    Mistake("groups", flags("--bn.group-size 3"), r"--bn.group-size 3 does not divide.*choose a divisor", BATCH),
    Mistake("queue", flags("--queue-size 4"), r"--queue-size 4 is smaller.*raise it", BATCH),
    Mistake("micro-batch", flags("--micro-batch 3"), r"--micro-batch 3 does not divide.*choose a divisor", BATCH),
    Mistake("tiny groups", flags("--bn.group-size 2"), r"--bn.group-size 2.*give 16 or more", BATCH),
    Mistake("small plain norm", flags("--bn.mode plain"), r"--bn.mode plain.*--bn.mode sync", BATCH),
    Mistake(
        "warm-up", flags("--schedule.warmup-epochs 10"), r"warm-up of 10 epochs.*--schedule.warmup-epochs 0.2", BATCH
    ),
    Mistake("SGD's rate", flags("--optim.kind adamw --optim.lr 10"), r"far too high for adamw.*0.001", BATCH),
    Mistake("cells", flags("--image-size 100"), r"--image-size 100.*choose 96 or 128", (settings.built,)),
    Mistake("no weights", flags("--init /nowhere.pth"), r"/nowhere.pth", (settings.built,)),
    Mistake("no such stage", flags("--freeze layer9"), r"layer9", (settings.built,)),
    Mistake("no such backbone", flags("--arch resnet99"), r"resnet99.*choose", (settings.built,)),
    # Memory, faked at what is free.
    Mistake(
        "too much memory", little_memory(400), r"memory: about.*give --micro-batch \d+", (settings.built, memory.fits)
    ),
    Mistake(
        "far too much", little_memory(1), r"no micro-batch fits: lower --image-size", (settings.built, memory.fits)
    ),
    # Data.
    Mistake("no data", flags(""), r"--data is needed.*make_ffcv_dataset.py", DATA),
    Mistake("no such folder", flags("--data /nowhere/photos"), r"/nowhere/photos does not exist.*check the path", DATA),
    Mistake("an empty folder", data(empty_folder), r"empty.*give a folder of photos", DATA),
    Mistake("a zip", data(zip_file), r"photos.zip is a zip archive.*unpack it", DATA),
    Mistake("a video", data(video), r"film.mp4 is a video.*ffmpeg", DATA),
    Mistake("an unmatched pattern", flags("--data /nowhere/*.beton"), r"no file matches.*quote a pattern", DATA),
    Mistake("a cut pack", data(cut_pack), r"photos.beton.*truncated", DATA),
    Mistake(
        "few images", data(lambda b: b.photos, "--global-batch 64"), r"16 images.*fewer than --global-batch 64", DATA
    ),
    Mistake("the wrong loader", data(lambda b: b.photos, "--loader webdataset"), r"index.json.*make_webdataset", DATA),
    Mistake("a cut photo", data(cut_photo), r"1 of all 16 .*00.jpg.*mend or remove", LOOK),
    Mistake("a thumbnail", data(tiny_photo), r"smaller than 32 px.*icon.jpg.*16 x 12", LOOK),
    Mistake("a copy", data(repeated_photo), r"copies of another.*00.*remove the copies", LOOK),
    Mistake("a blank image", data(blank_photo), r"one colour alone.*blank.png.*remove them", LOOK),
    Mistake("a flipped byte", data(flipped_byte), r"other bytes than were packed.*pack again", LOOK),
    Mistake("unlabelled", validated(flat_folder), r"--val-data.*needs labels.*one sub-folder a class", VALIDATION),
    Mistake("other classes", validated(other_classes), r"(zebra|differ)", VALIDATION),
    Mistake("the same images", validated(lambda b: b.photos), r"is --data itself.*not trained on", VALIDATION),
    # Speed; the rates are faked, what follows from them is not.
    Mistake("unpacked", rates(10, 100, 0.9), r"decoding is the limit; pack once.*make_ffcv_dataset", SPEED),
    Mistake("slow decoding", rates(10, 100, 0.9, True), r"decoding is.*--max-resolution", SPEED),
    Mistake("slow disk", rates(10, 100, 0.1), r"the disk is the limit; move.*--order sharded", SPEED),
    Mistake("CPU model", rates(100, 10, 0.1), r"the model is the limit; a GPU.*--arch resnet18", SPEED),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for number in range(16):
        photo(folder / "ab"[number % 2] / f"{number:02d}.jpg", number)
    return folder


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path):
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "LOADER_S", 0.05)
    monkeypatch.setattr(speed, "STEP_S", 0.05)
    monkeypatch.setattr(speed, "UPDATE_S", 0.05)
    made = Bench(tmp_path, monkeypatch, photos)
    yield made
    for undo in made.undo:
        undo()


def answers(bench: Bench, mistake: Mistake, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of the doctor about a seeded mistake that are not "ok"; it never raises."""
    argv = last_wins([*TINY, *mistake.seed(bench)])
    capsys.readouterr()
    code = doctor.main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert code == (2 if any(line.startswith("FAULT") for line in lines) else 0)
    return lines


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_each_mistake_has_its_line(bench: Bench, mistake: Mistake, capsys: pytest.CaptureFixture[str]) -> None:
    # Only what is asked: a whole look takes a minute, seventy of them an hour.
    bench.patch.setattr(checks, "CHECKS", mistake.checks)
    lines = answers(bench, mistake, capsys)
    found = [line for line in lines if re.search(mistake.line, line)]
    assert len(found) == 1, lines
    assert "; " in found[0], "no remedy"


def test_there_are_enough() -> None:
    assert len(MISTAKES) >= 40 and len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize(
    ("dtype", "host", "line"),
    [
        (torch.bfloat16, 0.95, "the host is the limit; give --compile"),
        (torch.float32, 0.1, "the model is the limit; --precision auto"),
        (torch.bfloat16, 0.1, "the model is the limit; a larger --global-batch, --region.shared-forward"),
    ],
)
def test_the_limits_of_a_gpu(dtype: torch.dtype, host: float, line: str) -> None:
    """Faked: rates of a GPU; the four limits of the README are these two, and the loader's two in the table."""
    examination = Examination(
        resolve(TINY),
        Runtime(0, 1, torch.device("cuda"), dtype, False),
        1,
        loader_rate=100,
        step_rate=10,
        host_share=host,
    )
    found = speed.limit(examination)
    assert line in f"{found.text}; {found.remedy}"


def test_a_good_run_has_no_fault(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """All checks, measured: rates, finish and memory are told; nothing is written."""
    packed = bench.packed()
    capsys.readouterr()
    assert doctor.main([*TINY, "--data", str(packed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["level"] for each in found} <= {"ok", "note"}
    text = "\n".join(each["text"] for each in found)
    for words in ("16 images, 2 classes", "memory: about", "loader: ", "steps: ", "finish: 4 steps", "is the limit"):
        assert words in text
    assert sorted(path.name for path in bench.here.iterdir()) == [
        "photos.beton",
        "photos.manifest.json",
        "photos.rejected.jsonl",
    ]
