"""Evaluation from the command line: ImageNet-ReaL, published file lists, one pass for all learning rates, two ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from models.norm import convert_batch_norm
from pipeline.interface import Batch
from tests.distributed import run_ranks
from tests.test_eval import ListPipeline
from tools.make_ffcv_dataset import main as pack
from train.backbone_io import build_encoder, save_backbone
from train.errors import run_to_exit_code
from train.eval import semi
from train.eval import session as protocol_session
from train.eval.linear import LinearHeads, LinearRecipe, train_heads
from train.evaluate import main
from train.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
COLOURS = [(220, 30, 30), (30, 200, 40), (40, 60, 220), (230, 220, 40)]


def write_photo(path: Path, colour: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-30, 30, (40, 40, 3))
    Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_backbone(build_encoder("resnet18"), run / "backbone.safetensors", arch="resnet18", method="regioncl-m")
    (run / "config.json").write_text(json.dumps({"run": {"method": "regioncl-m"}, "recipe": {"image_size": 32}}))
    return run


def evaluate(checkpoint: Path, out: Path, protocol: str, data: Path, val: Path, *more: str) -> dict:
    flags = ["--data", str(data), "--val-data", str(val), "--loader", "folder", "--output", str(out), *more]
    assert main([protocol, "--checkpoint", str(checkpoint), *flags]) == 0
    return json.loads(out.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet-ReaL


@pytest.mark.parametrize(("k", "used"), [("1,500", [1, 16]), ("500", [16]), ("16,17,20,3", [16, 3])])
def test_no_more_neighbours_vote_than_there_are(
    checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], k: str, used: list[int]
) -> None:
    for image in range(16):
        write_photo(tmp_path / "photos" / f"n{image // 4}" / f"{image}.jpg", image // 4, image)
    result = evaluate(checkpoint, tmp_path / "out.json", "knn", tmp_path / "photos", tmp_path / "photos", "--k", k)
    assert [row["k"] for row in result["results"]] == used
    said = capsys.readouterr().out
    assert "--data has 16 images that can be read, which all vote" in said and ("--k 500" in said) == ("500" in k)


def test_a_hundred_short_epochs_are_not_a_hundred_lines(
    checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for image in range(8):
        write_photo(tmp_path / "photos" / f"n{image // 4}" / f"{image}.jpg", image // 4, image)
    where = (checkpoint, tmp_path / "out.json", "linear", tmp_path / "photos", tmp_path / "photos")
    few = ("--epochs", "12", "--global-batch", "8")
    result = evaluate(*where, *few)
    assert capsys.readouterr().out.count("top-1 ") - 1 < 3, "one line, and a table"
    monkeypatch.setattr(protocol_session, "SELDOM_S", 0)
    assert evaluate(*where, *few)["results"] == result["results"]
    said = capsys.readouterr().out
    assert len(re.findall(r"^epoch \d+/12: top-1", said, re.MULTILINE)) == 12
    assert re.search(r"^replaces the result of .* in .*out\.json$", said, re.MULTILINE)


@pytest.mark.parametrize(("protocol", "more"), [("knn", ["--k", "1"]), ("linear", ["--recipe", "logistic"])])
def test_real_labels_are_those_of_the_image_number(checkpoint, tmp_path: Path, protocol: str, more: list[str]) -> None:
    folder, real = tmp_path / "val", [[0]] * 16
    # Numbers do not follow the order of storage, which is by class.
    for position, number in enumerate(np.random.default_rng(4).permutation(16).tolist()):
        label = position // 4
        write_photo(folder / f"n{label}" / f"ILSVRC2012_val_{number + 1:08d}.JPEG", label, position)
        # Two classes have no label for a quarter and are right elsewhere; the others are wrong but for one image.
        right = position % 4 > 0 if label < 2 else position % 4 == 0
        real[number] = [] if label < 2 and not right else [label, (label + 2) % 4] if right else [(label + 1) % 4]
    (tmp_path / "real.json").write_text(json.dumps(real))
    flags = [*more, "--real-labels", str(tmp_path / "real.json")]
    result = evaluate(checkpoint, tmp_path / "out.json", protocol, folder, folder, *flags)
    row = result["results"][0]
    assert row["top1"] == 1.0, "each image must be its own neighbour, and colours be told apart"
    assert row["real_top1"] == pytest.approx((6 + 2) / (6 + 8))


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm over one value


@pytest.mark.parametrize(
    "words",
    [
        "linear --recipe care",
        "linear --recipe moco-v2 --head-bn yes",
        "semi",
        "semi --bn plain",
        "segment --model upernet --bn sync",
        "segment --model upernet --bn plain",
    ],
)
def test_a_batch_too_small_for_batch_norm_is_one_line(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: str
) -> None:
    """Its last maps have one value a channel, or its head one row; PyTorch's error is no line for a user."""
    if words.startswith("segment"):
        for part in ("train", "val"):
            for image in range(4):
                write_photo(tmp_path / part / "images" / f"{image}.jpg", image, image)
                (tmp_path / part / "labels").mkdir(exist_ok=True)
                labels = np.repeat(np.array([0, 1], np.uint8), 20 * 40).reshape(40, 40)
                Image.fromarray(labels).save(tmp_path / part / "labels" / f"{image}.png")
        more = ["--steps", "1", "--crop", "64,64", "--channels", "8"]
    else:
        for image in range(4):
            write_photo(tmp_path / f"n{image % 2}" / f"{image}.jpg", image % 2, image)
        more = ["--loader", "folder", "--epochs", "1", *(["--fraction", "1"] if "semi" in words else [])]
    data = ["--data", str(tmp_path), "--val-data", str(tmp_path), *more]
    argv = [*words.split(), "--checkpoint", str(checkpoint), *data, "--global-batch", "1"]
    assert run_to_exit_code(lambda: main([*argv, "--output", str(tmp_path / "out.json")])) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("regatta: ") and "batch norm needs" in line and "--global-batch" in line
    assert run_to_exit_code(lambda: main([*argv[:-1], "2", "--output", str(tmp_path / "out.json")])) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Published lists


@pytest.fixture(scope="module")
def misleading(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(training folder, validation folder, list): of each class only the listed two images have the class's colour."""
    root = tmp_path_factory.mktemp("misleading")
    names = []
    for label in range(4):
        for number in range(8):
            name = f"n0144{label}_{31 * number + label}.JPEG"
            listed = number in (3, 6)
            colour = label if listed else (label + 1) % 4
            write_photo(root / "train" / f"n0144{label}" / name, colour, 10 * label + number)
            names += [name] if listed else []
        for number in range(3):
            write_photo(root / "val" / f"n0144{label}" / f"{number}.JPEG", label, 100 + 10 * label + number)
    # As SimCLR's 1percent.txt: bare file names, in no order.
    (root / "1percent.txt").write_text("\n".join(reversed(names)) + "\n")
    return root / "train", root / "val", root / "1percent.txt"


def test_a_published_list_chooses_the_labelled_images(checkpoint: Path, misleading, tmp_path: Path) -> None:
    train, val, names = misleading
    logistic = ["--recipe", "logistic", "--lrs", "0.01"]
    listed = evaluate(checkpoint, tmp_path / "a.json", "fewshot", train, val, "--list", str(names), *logistic)
    assert listed["train_images"] == 8 and listed["share"] == 8 / 32 and listed["top1"] == 1.0
    every = evaluate(checkpoint, tmp_path / "b.json", "fewshot", train, val, "--fraction", "1", *logistic)
    assert every["train_images"] == 32 and every["top1"] < 0.5, "the images that are not listed mislead"


def test_a_published_list_finds_packed_images(checkpoint: Path, misleading, tmp_path: Path) -> None:
    train, val, names = misleading
    assert pack([str(train), str(tmp_path / "train.beton"), "--workers", "1"]) == 0
    flags = ["--list", str(names), "--recipe", "logistic", "--lrs", "0.01"]
    result = evaluate(checkpoint, tmp_path / "out.json", "fewshot", tmp_path / "train.beton", val, *flags)
    assert result["train_images"] == 8 and result["top1"] == 1.0
    flags = [*flags[:2], "--epochs", "1"]
    result = evaluate(checkpoint, tmp_path / "semi.json", "semi", tmp_path / "train.beton", val, *flags)
    assert result["train_images"] == 8 and result["share"] == 8 / 32


# ---------------------------------------------------------------------------------------------------------------------
# One pass, two ranks


def test_several_learning_rates_share_one_pass_of_the_backbone(checkpoint, misleading, tmp_path, monkeypatch) -> None:
    encoded = []
    forward = type(build_encoder("resnet18")).forward
    monkeypatch.setattr(
        type(build_encoder("resnet18")),
        "forward",
        lambda self, images: (encoded.append(len(images)), forward(self, images))[1],
    )
    train, val, _ = misleading
    counts = []
    for lrs in ("0.1", "0.1,0.3,1"):
        encoded.clear()
        flags = ["--recipe", "lewel-b", "--epochs", "2", "--lrs", lrs]
        result = evaluate(checkpoint, tmp_path / "out.json", "linear", train, val, *flags)
        assert [row["lr"] for row in result["results"]] == [float(lr) for lr in lrs.split(",")]
        counts.append(sum(encoded))
    assert counts == [2 * 32 + 12] * 2, "images through the backbone: two epochs, and the validation images once"


def heads_on_ranks(rank: int, world: int, optimizer: str) -> list[np.ndarray]:
    """Weights of two classifiers after six steps; each rank sees its part of every batch."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 32, 6, generator=generator), torch.randint(0, 4, (3, 32), generator=generator)
    size = 32 // world
    mine = slice(rank * size, (rank + 1) * size)
    heads = LinearHeads(6, 4, 2, False, 0)
    recipe = LinearRecipe("test", optimizer, 1.0, 32, 2, "cosine-step")  # type: ignore[arg-type]
    lrs = [30.0, 200.0] if optimizer == "lars" else [0.3, 2.0]
    train_heads(heads, lambda epoch: [(a[mine], b[mine]) for a, b in zip(x, y, strict=True)], 3, 2, recipe, lrs)
    return [value.detach().numpy() for value in heads.state_dict().values()]


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_heads_trained_on_two_ranks_have_the_weights_of_one(tmp_path: Path, optimizer: str) -> None:
    alone = heads_on_ranks(0, 1, optimizer)
    for rank in run_ranks(heads_on_ranks, 2, tmp_path, optimizer):
        for mine, theirs in zip(rank, alone, strict=True):
            assert np.linalg.norm(mine - theirs) <= 1e-4 * np.linalg.norm(theirs)


def fine_tuning_update(rank: int, world: int) -> list[np.ndarray]:
    """What a step of fine-tuning adds to each weight and each running statistic; each rank sees its part of a batch."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(16, 3, 64, 64, generator=generator)  # loaders deliver finished views
    size = 16 // world
    part = slice(rank * size, (rank + 1) * size)
    batch = Batch({"view": pixels[part]}, torch.arange(16)[part], torch.arange(16)[part] % 4)
    torch.manual_seed(0)
    encoder = convert_batch_norm(build_encoder("resnet18"), "sync")
    model = semi.Classifier(encoder, 512, 4, 0)
    before = [value.detach().clone() for value in model.state_dict().values() if value.is_floating_point()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    runtime = Runtime(rank, world, torch.device("cpu"), torch.float32, False)
    session = SimpleNamespace(runtime=runtime, config=SimpleNamespace(seed=0))
    semi.fine_tune_epoch(session, model, optimizer, None, ListPipeline([batch]), 0)  # type: ignore[arg-type]
    after = [value.detach() for value in model.state_dict().values() if value.is_floating_point()]
    return [(new - old).numpy() for new, old in zip(after, before, strict=True)]


def test_fine_tuning_on_two_ranks_takes_the_step_of_one(tmp_path: Path) -> None:
    alone = fine_tuning_update(0, 1)
    for rank in run_ranks(fine_tuning_update, 2, tmp_path):
        for mine, theirs in zip(rank, alone, strict=True):
            # Noise of 1e-7 in the pixels already moves a step through so few images by up to 1.6 percent.
            assert np.linalg.norm(mine - theirs) <= 0.05 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("knn --k 3,20", id="knn"),
        pytest.param("semi --fraction 1 --epochs 2 --global-batch 16", id="semi", marks=pytest.mark.slow),
    ],
)
def test_torchrun_with_two_gloo_ranks(checkpoint: Path, misleading, tmp_path: Path, command: str) -> None:
    train, val, _ = misleading
    protocol, *flags = command.split()
    one = evaluate(checkpoint, tmp_path / "one.json", protocol, train, val, *flags)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [
        protocol,
        "--checkpoint",
        str(checkpoint),
        "--data",
        str(train),
        "--val-data",
        str(val),
        "--loader",
        "folder",
        "--output",
        str(tmp_path / "two.json"),
        *flags,
    ]
    done = subprocess.run(
        [*launch, str(ROOT / "train/evaluate.py"), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["world_size"] == 2 and one["world_size"] == 1
    assert done.stdout.count("all 120 tensors") == 1, "one rank speaks"
    for mine, theirs in zip(two["results"], one["results"], strict=True):
        for name in mine.keys() & theirs.keys() - {"best_epoch"}:
            # One image of twelve may lie on the border that the order of sums moves.
            assert mine[name] == pytest.approx(theirs[name], abs=1 / 12 + 1e-9), name
