"""A hundred mistakes of users: each ends in one line and its exit code, and what the line says to do works.

The commands are called in this process, which is fast. The slow form starts each as a user does: under plain Python,
with `--processes 2`, under torchrun, whose exit code is always 1, and under srun.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.loaders import choose_loader
from tests.test_launch import clean
from tests.test_report import write_run
from tests.test_slurm_cluster import cluster  # noqa: F401
from tools import make_ffcv_dataset, make_webdataset
from train.backbone_io import build_encoder, save_backbone
from train.config import Config
from train.errors import run_to_exit_code
from train.inputs import check_batch
from train.resolve import resolve

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "train": "train/main.py",
    "evaluate": "train/evaluate.py",
    "pack": "tools/make_ffcv_dataset.py",
    "shards": "tools/make_webdataset.py",
    "export": "tools/export_backbone.py",
    "report": "tools/report.py",
    "embed": "tools/embed.py",
    "analyze": "tools/analyze.py",
    "doctor": "tools/doctor.py",
    "quickstart": "tools/quickstart.py",
    "reproduce": "tools/reproduce.py",
    "replay": "tools/replay.py",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Everything that the mistakes name, by the words in braces."""
    here = tmp_path_factory.mktemp("world")
    for number in range(8):
        path = here / "photos" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(path)
    assert make_ffcv_dataset.main([str(here / "photos"), str(here / "photos.beton"), "--workers", "1"]) == 0
    # At least two, or two ranks could not read them.
    small = ["--shard-size-mib", "0.006"]
    assert make_webdataset.main([str(here / "photos"), str(here / "shards"), "--workers", "1", *small]) == 0
    assert len(list((here / "shards").glob("*.tar"))) > 1
    (here / "cut.beton").write_bytes((here / "photos.beton").read_bytes()[:-50])
    (here / "foreign.beton").write_bytes(b"something else" * 100)
    shutil.make_archive(str(here / "archive"), "zip", here / "photos")
    (here / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(300))
    (here / "empty").mkdir()
    (here / "file").write_text("x")
    (here / "notes.txt").write_text("no-such-photo.jpg\n")
    save_backbone(build_encoder("resnet10-w16"), here / "weights.safetensors", arch="resnet10-w16", method="moco-v2")
    write_run(here / "run")
    shutil.copytree(here / "photos", here / "spoiled")
    for number in (0, 1, 2):
        (here / "spoiled" / "ab"[number % 2] / f"{number}.jpg").write_bytes(b"")
    files = {"beton": "photos.beton", "cut": "cut.beton", "foreign": "foreign.beton", "zip": "archive.zip"}
    files |= {"video": "film.mp4", "weights": "weights.safetensors", "text": "notes.txt"}
    folders = ("photos", "spoiled", "shards", "empty", "run", "new", "file")
    return {place: str(here / name) for place, name in [*files.items(), *zip(folders, folders, strict=True)]}


@dataclass
class Case:
    """One mistake.

    Attributes:
        command: key of `COMMANDS`.
        argv: arguments; words in braces are places of the world.
        line: pattern of the line on standard error.
        remedy: the arguments after doing what the line says; None where that is not a matter of arguments.
        code: exit code.
        works: tries the remedy; by default that its flags are accepted.
    """

    command: str
    argv: str
    line: str
    remedy: str | None = None
    code: int = 2
    works: str = "parses"
    environment: dict[str, str] = field(default_factory=dict)


def train(argv: str, line: str, remedy: str | None = None, **more: object) -> Case:
    return Case("train", argv, line, remedy, **more)  # type: ignore[arg-type]


MOCO = "--method moco-v2 --device cpu --data {beton}"
TINY = (
    "--device cpu --arch resnet10-w16 --image-size 32 --global-batch 4 --queue-size 8 --bn.group-size 2 --hidden-dim 8 "
    "--dim 8 --run-dir {new} --no-report"
)
READY = f"--method moco-v2 {TINY} --data {{beton}}"
EVAL = "--checkpoint {weights} --data {photos} --val-data {photos}"


def swapped(before: str, after: str, text: str = MOCO) -> str:
    assert before in text
    return text.replace(before, after)


CASES = [
    # Words that train/main.py does not know.
    train("--data {beton}", r"--method is needed: one of moco-v2", MOCO),
    train("--method mocov2 --data {beton}", r"--method mocov2: choose from moco-v2", MOCO),
    train("--method Moco-V2 --data {beton}", r"--method Moco-V2: choose from moco-v2", MOCO),
    train("--method moco-v2 --recipe byol", r"belongs to --method byol", "--method byol --recipe byol"),
    train("--method moco-v2 --recipe nope", r"choose from moco-v2", "--method moco-v2 --recipe moco-v2-800ep"),
    train(f"{MOCO} --global-bach 8", r"nearest valid flag is --global-batch", f"{MOCO} --global-batch 8"),
    train(f"{MOCO} --batch-size 8", r"nearest valid flag is --global-batch", f"{MOCO} --global-batch 8"),
    train(f"{MOCO} --lr 0.1", r"nearest valid flag is --optim.lr", f"{MOCO} --optim.lr 0.1"),
    train(f"{MOCO} --wd 0.1", r"nearest valid flag is --optim.weight-decay", f"{MOCO} --optim.weight-decay 0.1"),
    train(f"{MOCO} --warmup 5", r"is --schedule.warmup-epochs", f"{MOCO} --schedule.warmup-epochs 5"),
    train(f"{MOCO} --amp", r"is --precision", f"{MOCO} --precision bf16"),
    train(f"{MOCO} --fp16", r"is --precision", f"{MOCO} --precision auto"),
    train(f"{MOCO} --model resnet18", r"is --arch", f"{MOCO} --arch resnet18"),
    train(f"{MOCO} --output-dir out", r"is --run-dir", f"{MOCO} --run-dir out"),
    train(f"{MOCO} --num-workers 2", r"is --workers", f"{MOCO} --workers 2"),
    train(f"{MOCO} --tau 0.1", r"is --temperature", f"{MOCO} --temperature 0.1"),
    train(f"{MOCO} --moco-k 4096", r"is --queue-size", f"{MOCO} --queue-size 4096"),
    train(f"{MOCO} --accum-iter 2", r"is --micro-batch", f"{MOCO} --micro-batch 128"),
    train(f"{MOCO} --sync-bn", r"is --bn.mode", f"{MOCO} --bn.mode sync"),
    train(f"{MOCO} --img-size 96", r"is --image-size", f"{MOCO} --image-size 96"),
    train(f"{MOCO} --ckpt w.pth", r"is --init", f"{MOCO} --init w.pth"),
    train(f"{MOCO} --gpus 8", r"torchrun --nproc_per_node=N"),
    train(f"{MOCO} --quux", r"unknown flag --quux; --help lists all flags"),
    train(f"{MOCO} photos", r"unknown argument photos; --help lists all", MOCO),
    train(f"{MOCO} --seed 1 --seed 2", r"--seed is given twice; give it once", f"{MOCO} --seed 2"),
    train("--method moco-v2 --method simsiam", r"--method is given twice; give it once", "--method simsiam"),
    train(f"{MOCO} --region.lower 2", r"unknown flag --region.lower", "--method regioncl-m --region.lower 2"),
    # Values.
    train(f"{MOCO} --epochs ten", r"--epochs ten: give a whole number", f"{MOCO} --epochs 10"),
    train(f"{MOCO} --epochs 0", r"--epochs 0: must be at least 1", f"{MOCO} --epochs 1"),
    train(f"{MOCO} --optim.lr -0.1", r"--optim.lr -0.1 is negative; give 0 or more", f"{MOCO} --optim.lr 0"),
    train(f"{MOCO} --optim.lr nan", r"--optim.lr nan: give a finite number", f"{MOCO} --optim.lr 0.1"),
    train(f"{MOCO} --optim.lr 1e999", r"--optim.lr 1e999: give a finite number", f"{MOCO} --optim.lr 1e3"),
    train(f"{MOCO} --compile maybe", r"choose true or false", f"{MOCO} --compile true"),
    train(f"{MOCO} --seed -1", r"--seed -1 is outside 0..2147483647", f"{MOCO} --seed 2147483647"),
    train(f"{MOCO} --holdout -5", r"--holdout -5 is negative; give 0 or more", f"{MOCO} --holdout 0"),
    train(f"{MOCO} --image-size 7", r"--image-size 7: must be at least 8", f"{MOCO} --image-size 8"),
    train(f"{MOCO} --micro-batch half", r"give a whole number or auto", f"{MOCO} --micro-batch auto"),
    train(f"{MOCO} --order random", r"choose from global, sharded", f"{MOCO} --order global"),
    train(f"{MOCO} --loader torch", r"choose from auto, ffcv", f"{MOCO} --loader auto"),
    train(f"{MOCO} --temperature 0", r"--temperature 0", f"{MOCO} --temperature 0.1"),
    train(f"{MOCO} --ema.momentum 2", r"--ema.momentum 2.0 is outside 0..1", f"{MOCO} --ema.momentum 1"),
    train(f"{MOCO} --optim.betas 0.9", r"--optim.betas 0.9: must be two numbers", f"{MOCO} --optim.betas 0.9,0.99"),
    train(
        f"{MOCO} --schedule.decay steps",
        r"decay steps needs milestones",
        f"{MOCO} --schedule.decay steps --schedule.milestones 3",
    ),
    train(f"{MOCO} --augment.profile linear", r"choose from mocov2", f"{MOCO} --augment.profile mocov2"),
    train(f"{MOCO} --config /nowhere.json", r"/nowhere.json.*give the config.json of a run"),
    train("--method moco-v2 --config {run}", r"is a folder; give the config.json in it", "--config {run}/config.json"),
    train("--config {text}", r"give the config.json of a run", "--config {run}/config.json"),
    # Sizes that do not fit.
    train(f"{READY} --processes 3", r"does not divide over 3 ranks; choose a multiple of 3", works="skipped"),
    train(
        f"{READY.replace('group-size 2', 'group-size 3')}",
        r"--bn.group-size 3.*choose a divisor of [24]",  # of the images of one rank
        READY,
        works="fits",
    ),
    train(f"{READY.replace('queue-size 8', 'queue-size 2')}", r"--queue-size 2.*raise it", READY, works="fits"),
    train(f"{READY} --micro-batch 3", r"choose a divisor", f"{READY} --micro-batch 4", works="fits"),
    # Devices.
    train("--method moco-v2 --data {beton} --device cuda", r"use --device cpu", MOCO),
    train(f"{MOCO} --precision fp16", r"use bf16 or fp32 on the CPU", f"{MOCO} --precision bf16"),
    train(f"{READY} --kernels on", r"leave it out on the CPU", READY),
    # Backbones and weights.
    train(swapped("--data", "--arch resnet99 --data"), r"resnet99.*choose", f"{MOCO} --arch resnet50"),
    train(f"{READY} --init /nowhere.pth", r"/nowhere.pth does not exist", f"{READY} --init {{weights}}", works="opens"),
    train(f"{READY} --init {{text}}", r"notes.txt", f"{READY} --init {{weights}}", works="opens"),
    train(f"{READY} --freeze layer9", r"layer9", f"{READY} --freeze layer1"),
    # Data.
    train(
        "--method moco-v2 --device cpu",
        r"--data is needed: pack.*make_ffcv_dataset.py FOLDER photos.beton",
        "{photos} {new}.beton",
        works="packs",
    ),
    train(
        swapped("{beton}", "/nowhere.beton", READY),
        r"/nowhere.beton does not exist; check the path, or pack",
        READY,
        works="opens",
    ),
    train(
        swapped("{beton}", "{empty}", READY),
        r"holds no image files; give a folder of photos",
        swapped("{beton}", "{photos}", READY),
        works="opens",
    ),
    train(
        swapped("{beton}", "{zip}", READY),
        r"is a zip archive: unpack it and give the folder",
        swapped("{beton}", "{photos}", READY),
        works="opens",
    ),
    train(swapped("{beton}", "{video}", READY), r"is a video: take single frames out of it"),
    train(swapped("{beton}", "{cut}", READY), r"cut.beton.*truncated"),
    train(swapped("{beton}", "{foreign}", READY), r"foreign.beton cannot be read as a packed file.*make one with"),
    train(swapped("{beton}", "'{photos}/*.webp'", READY), r"no file matches.*quote a pattern"),
    train(swapped("{beton}", "{photos},/nowhere", READY), r"/nowhere of .*does not exist"),
    train(
        swapped("{beton}", "{shards}/p-{{000000..000009}}.tar", READY),
        r"is not in the index.*name shards that are in it",
    ),
    train(
        f"{READY.replace('global-batch 4', 'global-batch 16').replace('queue-size 8', 'queue-size 16')}",
        r"8 images to train on are fewer than --global-batch 16",
        READY,
        works="opens",
    ),
    train(
        f"{READY} --loader synthetic",
        r"takes a number of images.*reads no",
        f"{READY.replace('{beton}', '8')} --loader synthetic",
        works="opens",
    ),
    train(f"{READY} --loader webdataset", r"index.json|shards", swapped("{beton}", "{shards}", READY), works="opens"),
    train(f"{READY} --val-data /nowhere", r"/nowhere does not exist", f"{READY} --val-data {{photos}}", works="opens"),
    train(f"{READY} --run-dir2 x", r"nearest valid flag is --run-dir", READY),
    train(swapped("{new}", "{file}/run", READY), r"--run-dir.*choose a folder that can be written", READY),
    # Evaluation.
    Case(
        "evaluate",
        "",
        r"a protocol is needed",
        f"knn {EVAL} --k 1 --image-size 32 --output {{new}}.json",
        works="evaluates",
    ),
    Case("evaluate", "lineer", r"nearest is linear"),
    Case("evaluate", f"knn {EVAL} --epoch 3", r"unknown flag --epoch"),
    Case("evaluate", "knn --data {photos} --val-data {photos}", r"--checkpoint is needed"),
    Case("evaluate", f"knn {EVAL.replace('{weights}', '/nowhere')}", r"/nowhere does not exist"),
    Case("evaluate", f"knn {EVAL.replace('{weights}', '{empty}')}", r"empty"),
    Case("evaluate", f"knn {EVAL.replace('--val-data {photos}', '--val-data /no')}", r"--val-data /no does not exist"),
    Case("evaluate", f"knn {EVAL} --k 0", r"--k 0"),
    Case("evaluate", f"linear {EVAL} --recipe moco", r"choose from moco-v2"),
    Case("evaluate", f"knn {EVAL} --trials 2 --output a.json", r"draws nothing"),
    # Packing.
    Case("pack", "{photos}", r"DEST"),
    Case(
        "pack", "{photos} {new}.bin", r"end in .beton; write .*new.bin.beton", "{photos} {new}.bin.beton", works="packs"
    ),
    Case(
        "pack", "{photos} {beton}", r"is there already; add --overwrite", "{photos} {beton} --overwrite", works="packs"
    ),
    Case("pack", "{empty} {new}.beton", r"holds no image files", "{photos} {new}.beton", works="packs"),
    Case("pack", "/nowhere {new}.beton", r"/nowhere does not exist"),
    Case("pack", "{zip} {new}.beton", r"is a zip archive: unpack it"),
    Case("pack", "{photos} {new}.beton --max-bad 2", r"0 to 1", "{photos} {new}.beton --max-bad 1", works="packs"),
    Case(
        "pack",
        "{photos} {new}.beton --jpeg-quality 101",
        r"1 to 100",
        "{photos} {new}.beton --jpeg-quality 100",
        works="packs",
    ),
    Case("pack", "{text} {new}.beton", r"not one image of .*notes.txt can be used"),
    Case(
        "pack",
        "{spoiled} {new}.beton",
        r"3 of 8 images are bad.*--max-bad",
        "{spoiled} {new}.beton --max-bad 0.4",
        3,
        "packs",
    ),
    Case("shards", "{photos} {new} --shard-size 3", r"--shard-size-mib"),
    Case("shards", "{photos} {file}", r"file"),
    # Export, features, reports and the rest.
    Case("export", "{weights} {new}.safetensors --format keras", r"invalid choice.*torchvision"),
    Case("export", "{weights} {new}.bin --format onnx", r"ends in .onnx"),
    Case("export", "{weights} {weights} --format torchvision", r"exists.*--overwrite"),
    Case("export", "/nowhere {new}.safetensors --format torchvision", r"/nowhere does not exist"),
    Case("embed", "{weights} {photos} {new}.txt", r"written to .npz or .npy"),
    Case("embed", "/nowhere {photos} {new}.npz", r"/nowhere does not exist"),
    Case("embed", "{weights} {photos} {new}.npz --batch 0", r"not a whole number of at least 1"),
    Case("report", "{empty}", r"config.json"),
    Case("report", "", r"RUN|runs"),
    Case("report", "{run} --ot x.html", r"nearest valid flag is --out"),
    Case("analyze", "gradcam {weights} --data {photos} --out a.jpg", r".png"),
    Case("analyze", "boxes {weights} --data {photos} --out a.png", r"--annotations is needed"),
    Case("analyze", "align {empty} --data {photos} --out a.png", r"not a run's folder"),
    Case("doctor", "/nowhere", r"/nowhere does not exist; give a run's folder or a packed file"),
    Case("doctor", "{empty}", r"has no config.json"),
    Case("doctor", "--decod 3", r"nearest valid flag is --decode"),
    Case("quickstart", "/nowhere", r"/nowhere"),
    Case("quickstart", "--minutes nan", r"--minutes"),
    Case("reproduce", "table-99", r"table-99"),
    Case("replay", "{empty}", r"no step of this run was skipped; give another run"),
]


def filled(text: str, world: dict[str, str]) -> list[str]:
    return shlex.split(text.format(**world))


def call(command: str, argv: list[str]) -> int:
    main: Callable[[list[str]], int] = import_module(COMMANDS[command].removesuffix(".py").replace("/", ".")).main
    # The packers' mains raise; the scripts put this around them.
    return run_to_exit_code(lambda: main(argv))


def parses(argv: list[str]) -> None:
    resolve(argv)


def fits(argv: list[str]) -> None:
    config: Config = resolve(argv)
    check_batch(config, 1)


def opens(argv: list[str]) -> None:
    """Training takes one step."""
    run = Path(argv[argv.index("--run-dir") + 1])
    shutil.rmtree(run, ignore_errors=True)
    if resolve(argv).run.loader == "auto":
        choose_loader(resolve(argv).run.data)
    assert call("train", [*argv, "--max-steps", "1"]) == 0


def packs(argv: list[str]) -> None:
    assert call("pack", [*argv, "--workers", "1"]) == 0


def evaluates(argv: list[str]) -> None:
    assert call("evaluate", [*argv, "--device", "cpu"]) == 0


WORKS: dict[str, Callable[[list[str]], None]] = {
    "parses": parses,
    "fits": fits,
    "opens": opens,
    "packs": packs,
    "evaluates": evaluates,
}


def clear(world: dict[str, str]) -> None:
    """Remove what an earlier case has made."""
    for made in Path(world["new"]).parent.glob("new*"):
        shutil.rmtree(made) if made.is_dir() else made.unlink()


def name_of(case: Case) -> str:
    return f"{case.command} {case.argv[-50:]}"


def only_line(said: str, case: Case) -> str:
    """The one line of the command on standard error, without what a loader says of its choice."""
    lines = [line for line in said.strip().splitlines() if not line.startswith("loader: ")]
    assert "Traceback" not in said and len(lines) == 1, said
    assert re.search(case.line, lines[0]), lines[0]
    return lines[0]


ALONE = [case for case in CASES if "--processes" not in case.argv]
"""Those that this process can meet by itself."""


@pytest.mark.parametrize("case", ALONE, ids=name_of)
def test_a_mistake_is_one_line_whose_remedy_works(
    case: Case,
    world: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    clear(world)
    capfd.readouterr()
    assert call(case.command, filled(case.argv, world)) == case.code
    only_line(capfd.readouterr().err, case)
    clear(world)
    if case.remedy is not None:
        WORKS[case.works](filled(case.remedy, world))


def test_there_are_a_hundred() -> None:
    assert len(CASES) >= 100 and len({(case.command, case.argv) for case in CASES}) == len(CASES)


LAUNCHED = [case for case in ALONE if case.command == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_as_a_script(case: Case, world: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / COMMANDS[case.command]), *filled(case.argv, world)]
    done = subprocess.run(command, cwd=tmp_path, env=clean(), capture_output=True, text=True, timeout=300)
    assert done.returncode == case.code, done.stderr
    only_line(done.stderr, case)


def launched(command: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=clean(**more), capture_output=True, text=True, timeout=300)


def said_once(done: subprocess.CompletedProcess[str], case: Case, code: int) -> None:
    ours = [line for line in done.stderr.splitlines() if line.startswith("regatta: ")]
    assert done.returncode == code, done.stderr
    assert len(ours) == 1 and re.search(case.line, ours[0]), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", LAUNCHED, ids=name_of)
@pytest.mark.parametrize("launcher", ["--processes", "torchrun"])
def test_with_two_processes(case: Case, launcher: str, world: dict[str, str], tmp_path: Path) -> None:
    """One line again, from whichever rank; torchrun's own report follows it, and ends in the same line."""
    clear(world)
    script = str(ROOT / COMMANDS[case.command])

    def command(argv: list[str]) -> list[str]:
        if launcher == "torchrun":
            return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *argv]
        return [sys.executable, script, *argv, "--processes", "2"]

    done = launched(command(filled(case.argv, world)), tmp_path)
    said_once(done, case, 1 if launcher == "torchrun" else case.code)
    if case.works == "opens" and case.remedy is not None:
        clear(world)
        done = launched(command([*filled(case.remedy, world), "--max-steps", "1"]), tmp_path)
        assert done.returncode == 0, done.stderr


UNDER_SRUN = [
    *LAUNCHED,
    *(case for case in CASES if case.command == "evaluate" and re.search(r"nowhere|--k 0", case.argv)),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", UNDER_SRUN, ids=name_of)
def test_under_srun(case: Case, world: dict[str, str], tmp_path: Path, cluster: Path) -> None:  # noqa: F811
    """Two tasks on one node say it once, and srun passes the exit code on."""
    clear(world)
    tasks = ["srun", "--nodes=1", "--ntasks=2", "--cpus-per-task=1", sys.executable, str(ROOT / COMMANDS[case.command])]
    settings = {"SLURM_CONF": str(cluster / "slurm.conf"), "GLOO_SOCKET_IFNAME": "lo"}
    said_once(launched([*tasks, *filled(case.argv, world)], tmp_path, **settings), case, case.code)
    if case.works == "opens" and case.remedy is not None:
        clear(world)
        done = launched([*tasks, *filled(case.remedy, world), "--max-steps", "1"], tmp_path, **settings)
        assert done.returncode == 0, done.stderr
