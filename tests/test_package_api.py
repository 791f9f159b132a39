"""The Python interface, on the checkout's own modules: loader, a method for a loop of one's own, features, keywords."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.interface import ViewSpec
from tools import embed as embed_command
from tools.wheel.functions import embed, evaluate, export, train
from tools.wheel.loader import Loader
from tools.wheel.pretraining import Pretraining
from train.backbone_io import build_encoder, save_backbone
from train.keywords import arguments_of
from train.measure.features import normalise
from train.stop import STOP_SIGNALS

SMALL = {"recipe": "regioncl-m-small", "arch": "resnet18", "image_size": 64, "global_batch": 8, "queue_size": 64}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number in range(20):
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    torch.manual_seed(0)
    save_backbone(build_encoder("resnet18"), path, arch="resnet18", method="moco-v2")
    return path


def test_any_number_of_views(photos: Path) -> None:
    with Loader(photos, views=5, size=32, batch_size=8, augment="byol") as loader:
        batches = list(loader)
    assert len(loader) == len(batches) == 2 and loader.num_samples == 20 and loader.classes == ("a", "b")
    views = batches[0].views
    assert list(views) == [f"view{number}" for number in range(1, 6)]
    assert all(view.shape == (8, 3, 32, 32) and view.dtype == torch.float32 for view in views.values())
    # Every view has draws of its own.
    assert len({view.sum().item() for view in views.values()}) == 5


def test_the_first_views_do_not_depend_on_how_many_there_are(photos: Path) -> None:
    two, four = (next(iter(Loader(photos, views=count, size=32, batch_size=8, seed=3))) for count in (2, 4))
    for name in two.views:
        torch.testing.assert_close(two.views[name], four.views[name], rtol=0, atol=0)


def test_passes_are_epochs_and_can_be_taken_up(photos: Path) -> None:
    def orders(loader: Loader, passes: int) -> list[list[int]]:
        return [[index for batch in loader for index in batch.index.tolist()] for _ in range(passes)]

    first, second = orders(Loader(photos, views=1, size=32, batch_size=4), 2)
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    later = Loader(photos, views=1, size=32, batch_size=4)
    later.set_epoch(1, first_step=3)
    assert orders(later, 1) == [second[12:]] and later.epoch == 2


def test_raw_crops_and_views_of_one_s_own(photos: Path) -> None:
    batch = next(iter(Loader(photos, views=2, size=32, batch_size=4, augment=None)))
    assert batch.views["view2"].dtype == torch.uint8
    whole = Loader(
        photos, views=[ViewSpec("all", 24, kind="whole")], augment=None, batch_size=8, shuffle=False, drop_last=False
    )
    batches = list(whole)
    assert [len(batch.index) for batch in batches] == [8, 8, 4] and batches[0].views["all"].shape == (8, 3, 24, 24)
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(20))


def test_too_few_images_for_a_batch_are_refused(photos: Path) -> None:
    with pytest.raises(ValueError, match="20 images are fewer than one global batch of 64"):
        Loader(photos, batch_size=64)
    with pytest.raises(ValueError, match="at least one view"):
        Loader(photos, views=0)


def test_a_region_method_trains_in_a_loop_of_one_s_own(photos: Path) -> None:
    task = Pretraining("regioncl-m", device="cpu", bn={"group_size": 4}, **SMALL)
    loader, optimizer = task.loader(photos), task.optimizer()
    before = task.method.momentum_encoder.conv1.weight.clone()
    losses = []
    for step, batch in enumerate(loader):
        inputs = task.inputs(batch, step)
        assert inputs.mixed["view1"].shape == (8, 3, 64, 64) and inputs.box_cells["view1"].shape == (8, 4)
        task.set_learning_rate(optimizer, step + 5, len(loader))
        output = task.method(inputs)
        output.loss.backward()
        optimizer.step()
        task.after_step(output, step, len(loader))
        losses.append(output.loss.item())
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert not torch.equal(before, task.method.momentum_encoder.conv1.weight)
    assert task.method.queue.rows.shape == (64, 128)


def test_the_loop_of_one_s_own_computes_what_training_computes(photos: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "bn": {"group_size": 4}, "seed": 5}
    steps = {"max_steps": 2, "log_every": 1, "device": "cpu", "report": False}
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    run = train(data=photos, out=tmp_path / "run", method="regioncl-m", **steps, **settings)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    wanted = [row["loss"] for row in run.rows if row["kind"] == "train"]
    task = Pretraining("regioncl-m", device="cpu", **settings)
    loader, optimizer = task.loader(photos), task.optimizer()
    found = []
    task.method.train()
    for step, batch in enumerate(loader):
        task.set_learning_rate(optimizer, step, len(loader))
        output = task.method(task.inputs(batch, step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.after_step(output, step, len(loader))
        found.append(output.loss.item())
    assert found == pytest.approx(wanted, rel=1e-4)


def test_features_of_a_folder(photos: Path, backbone: Path, tmp_path: Path) -> None:
    made = embed(photos, checkpoint=backbone, out=tmp_path / "deep" / "features.npz", image_size=32, device="cpu")
    held = np.load(tmp_path / "deep" / "features.npz")
    assert held["features"].shape == (20, 512) and held["features"].dtype == np.float32
    assert held["names"].tolist() == sorted(f"{'ab'[n % 2]}/{n:02}.png" for n in range(20))
    assert held["labels"].tolist() == [0] * 10 + [1] * 10 and made.bad == 0
    raw = Loader(
        photos, views=[ViewSpec("c", 32, kind="center")], augment=None, batch_size=20, shuffle=False, drop_last=False
    )
    torch.manual_seed(0)
    encoder = build_encoder("resnet18").eval()
    with torch.no_grad():
        wanted = encoder(normalise(next(iter(raw)).views["c"])).mean(dim=(2, 3)).numpy()
    np.testing.assert_allclose(made.features, wanted, rtol=1e-4, atol=1e-5)


def test_images_of_a_list_and_of_a_table_keep_their_names(photos: Path, backbone: Path, tmp_path: Path) -> None:
    paths = sorted(photos.rglob("*.png"))
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    settings = {"checkpoint": backbone, "image_size": 32, "device": "cpu"}
    assert embed(tmp_path / "list.txt", **settings).names.tolist() == [str(path) for path in paths]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "t.parquet")
    assert embed(tmp_path / "t.parquet", **settings).names.tolist() == [path.name for path in paths]


def test_the_embed_command(photos: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "features.npy"
    flags = ["--image-size", "32", "--device", "cpu", "--batch", "7"]
    assert embed_command.main([str(backbone), str(photos), str(out), *flags]) == 0
    assert "20 images, 512 features each" in capsys.readouterr().out and np.load(out).shape == (20, 512)
    assert embed_command.main([str(backbone), str(photos), str(tmp_path / "features.txt")]) == 2
    assert "written to .npz or .npy" in capsys.readouterr().err


def test_evaluate_gives_the_result(photos: Path, backbone: Path, tmp_path: Path) -> None:
    asked = {"checkpoint": backbone, "data": photos, "val_data": photos, "image_size": 32, "k": (1, 3), "device": "cpu"}
    result = evaluate("knn", **asked)
    # Each image finds itself.
    assert result["top1"] == 1.0 and [row["k"] for row in result["results"]] == [1, 3]
    assert evaluate("knn", output=tmp_path / "kept.json", **asked)["top1"] == 1.0 and (tmp_path / "kept.json").exists()


def test_export_gives_the_card(backbone: Path, tmp_path: Path) -> None:
    card = export(backbone, tmp_path / "out.safetensors", format="torchvision")
    assert card.is_file() and (tmp_path / "out.safetensors").is_file()
    with pytest.raises(ValueError, match="choose from torchvision"):
        export(backbone, tmp_path / "x", format="keras")


def test_a_mistake_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--global-batch"):
        train(data="40", out=tmp_path, method="moco-v2", batch_size=4)
    with pytest.raises(ValueError, match="choose from moco-v2"):
        Pretraining("moco")


def test_keywords_are_flags() -> None:
    assert arguments_of({"global_batch": 8, "optim": {"lr": 0.1, "betas": (0.9, 0.95)}, "compile": None}) == [
        "--global-batch=8",
        "--optim.lr=0.1",
        "--optim.betas=0.9,0.95",
        "--compile=none",
    ]
    assert arguments_of({"report": False, "run_dir": Path("a b"), "weight_decay": -1.0}) == [
        "--report=false",
        "--run-dir=a b",
        "--weight-decay=-1.0",
    ]


def test_a_thread_trains(photos: Path, tmp_path: Path) -> None:
    flags = {**SMALL, "arch": "resnet10-w16", "image_size": 32, "bn": {"group_size": 4}, "max_steps": 1}
    flags |= {"method": "moco-v2", "recipe": "moco-v2-small", "device": "cpu", "report": False, "data": photos}
    # In a thread Python lets nobody set a handler; a server, or the interface of a program, trains there.
    with ThreadPoolExecutor(1) as threads:
        run = threads.submit(train, out=tmp_path / "thread", **flags).result()
    assert [row["step"] for row in run.of_kind("end")] == [1]
