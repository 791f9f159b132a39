"""Few images and no recipe: a run takes sizes that fit, says so, and keeps what was given; an embedding in one call."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.hyperparameters import CONFIGS
from pipeline.stores import count_images
from tests.test_config import error_line
from tools import make_ffcv_dataset, make_webdataset
from tools.wheel import functions
from train import few_images
from train.backbone_io import build_encoder, save_backbone
from train.few_images import fitted
from train.inputs import check_batch
from train.main import main
from train.recipes import RECIPES
from train.resolve import resolve


def photos_in(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(folder / f"{number:03}.jpg")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos_in(tmp_path_factory.mktemp("sixty") / "photos", 60)


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch):
    """Say how many images every `--data` has."""
    return lambda count: monkeypatch.setattr(few_images, "count_images", lambda data, enough: min(count, enough))


@pytest.mark.parametrize("count", [4, 10, 60, 200])
@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_chosen_fits(method: str, count: int, images) -> None:
    images(count)
    argv = ["--method", method, "--data", "photos"]
    more, line = fitted(argv, resolve(argv))
    config = resolve(more)
    check_batch(config, 1)
    recipe = config.recipe
    assert config.run.recipe == f"{method}-small" and line.startswith(f"{count} images are few")
    assert config.recipe.arch == ("swin-t" if "moby" in method else "resnet10-w32"), "there is no GPU here"
    assert 2 <= count // recipe.global_batch and recipe.epochs * (count // recipe.global_batch) >= 300
    assert recipe.schedule.warmup_epochs < recipe.epochs
    # Keys of the images of a batch before this epoch would be negatives of their own views.
    assert getattr(config.model, "queue_size", 0) <= max(count, recipe.global_batch)


def test_a_gpu_trains_the_recipe_s_backbone(images, monkeypatch: pytest.MonkeyPatch) -> None:
    images(60)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for device, arch in (("auto", "resnet18"), ("cpu", "resnet10-w32")):
        argv = ["--method", "regioncl-m", "--data", "photos", "--device", device]
        more, line = fitted(argv, resolve(argv))
        assert resolve(more).recipe.arch == arch and ("on a CPU" in line) == (device == "cpu")
    argv = ["--method", "regioncl-m", "--data", "photos", "--device", "cpu", "--arch", "resnet50"]
    assert resolve(fitted(argv, resolve(argv))[0]).recipe.arch == "resnet50"


def test_what_was_given_is_kept(images) -> None:
    images(60)
    for flags in (["--recipe", "regioncl-m"], ["--global-batch", "128"]):
        argv = ["--method", "regioncl-m", "--data", "photos", *flags]
        assert fitted(argv, resolve(argv)) == (argv, "")
    argv = ["--method", "regioncl-m", "--data", "photos", "--epochs=3", "--queue_size", "32", "--optim.lr", "0.5"]
    config = resolve(fitted(argv, resolve(argv))[0])
    assert (config.recipe.epochs, config.model.queue_size, config.recipe.optim.lr) == (3, 32, 0.5)


def test_enough_images_change_nothing_and_few_steps_are_told(images) -> None:
    argv = ["--method", "regioncl-m", "--data", "photos"]
    images(1_281_167)
    assert fitted(argv, resolve(argv)) == (argv, "")
    images(2_000)
    same, advice = fitted(argv, resolve(argv))
    assert same == argv and "1 steps an epoch" in advice and "--recipe regioncl-m-small" in advice
    synthetic = [*argv[:2], "--loader", "synthetic", "--data", "60"]
    images(60)
    assert fitted(synthetic, resolve(synthetic)) == (synthetic, "")


def test_images_are_counted_in_every_store(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(photos.iterdir())]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "t.parquet")
    assert make_ffcv_dataset.main([str(photos), str(tmp_path / "p.beton"), "--workers", "1"]) == 0
    assert make_webdataset.main([str(photos), str(tmp_path / "shards"), "--workers", "1"]) == 0
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(photos.iterdir())))
    for name in ("t.parquet", "p.beton", "shards", "list.txt"):
        assert count_images(str(tmp_path / name), 1000) == 60, name
    assert count_images(f"{photos},{tmp_path / 'p.beton'}", 1000) == 120
    assert count_images(str(photos), 7) == 7
    # Unknown without opening, or to be refused by whoever opens them: nothing is chosen.
    assert count_images("https://host/shards", 9) == count_images("/nowhere", 9) == count_images("", 9) == 9


NARROW = ["--arch", "resnet10-w16", "--image-size", "64", "--device", "cpu", "--no-report"]


def test_a_run_says_what_it_chose_and_goes_on_with_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos_in(tmp_path / "photos", 24)
    argv = ["--method", "moco-v2", "--data", str(folder), "--run-dir", str(tmp_path / "run"), *NARROW]
    assert main([*argv, "--max-steps", "1"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0].startswith(
        "24 images are few and no --recipe was given: takes --recipe moco-v2-small --global-batch 8"
    )
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["run"]["recipe"] == "moco-v2-small" and recorded["recipe"]["global_batch"] == 8
    monkeypatch.setattr(few_images, "_LEAST_STEPS", 5000)  # the rules of another version
    assert main([*argv, "--max-steps", "2"]) == 0
    now = json.loads((tmp_path / "run" / "config.json").read_text())
    assert now["recipe"] == recorded["recipe"] and now["model"] == recorded["model"]


def test_a_batch_that_was_given_is_still_refused(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = error_line(capfd, ["--method", "moco-v2", "--data", str(photos), *NARROW[:-1], "--global-batch", "64"])
    assert "60 images to train on are fewer than --global-batch 64" in line


def test_every_method_has_a_small_recipe() -> None:
    assert {f"{method}-small" for method in CONFIGS} <= set(RECIPES)


def test_an_embedding_in_one_call(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training itself is the slow test's below."""
    asked = []

    def trained(*, data: Path, out: Path, method: str, **options: object) -> None:
        asked.append((data, out, method, options))
        out.mkdir()
        weights = out / "backbone.safetensors"
        save_backbone(build_encoder("resnet10-w16"), weights, arch="resnet10-w16", method=method)
        (out / "config.json").write_text(json.dumps(resolve(["--method", method, *NARROW]).to_json()))

    monkeypatch.setattr(functions, "train", trained)
    made = functions.embed(photos, out=tmp_path / "features.npz", device="cpu")
    assert made.features.shape[0] == 60 and (tmp_path / "features.npz").is_file()
    assert asked == [(photos, tmp_path / "features.run", "regioncl-m", {"device": "cpu"})]
    functions.embed(photos, device="cpu")
    assert not asked[1][1].exists(), "without a file nothing stays"
    with pytest.raises(ValueError, match="written to .npz or .npy"):
        functions.embed(photos, out=tmp_path / "features.txt")
    assert len(asked) == 2


@pytest.mark.slow
def test_sixty_photos_to_an_embedding(photos: Path, tmp_path: Path) -> None:
    """With nothing but defaults; about a minute on two quiet cores."""
    made = functions.embed(photos, out=tmp_path / "features.npz")
    assert made.features.shape == (60, 256) and np.isfinite(made.features).all()
    recorded = json.loads((tmp_path / "features.run" / "config.json").read_text())
    assert recorded["run"]["recipe"] == "regioncl-m-small"


def test_no_image_at_all_chooses_nothing(images) -> None:
    """What is wrong with the data is told when they are opened, not sizes for no image."""
    images(0)
    argv = ["--method", "moco-v2", "--data", "photos"]
    assert fitted(argv, resolve(argv)) == (argv, "")
