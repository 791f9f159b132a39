"""Linear, few-shot and semi-supervised protocols: recipes, subsets, label sets, ranks, agreement with scikit-learn."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from models.methods import METHODS
from models.swin import SwinTrunk
from pipeline.interface import Batch, PipelineConfig, PipelineStats
from pipeline.loaders import build_pipeline
from tests.runs import last_wins
from train.backbone_io import build_encoder, load_backbone, save_backbone
from train.errors import UserMistake
from train.eval import linear, semi, splits
from train.eval.accuracy import accuracy, read_real_labels
from train.eval.linear import LinearHeads, train_heads
from train.eval.linear_recipes import LINEAR_RECIPES, RECIPE_OF_METHOD, LinearRecipe
from train.eval.options import LinearConfig
from train.evaluate import PROTOCOLS, main, protocol
from train.measure.features import center_view, extract_features
from train.versions import machine, versions

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------------------------
# Features


class ListPipeline:
    """A pipeline over given batches."""

    num_samples, data_hash = 0, ""
    labels = np.zeros(0, dtype=np.int64)

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)

    def set_epoch(self, epoch, first_step=0):
        pass

    def stats(self):
        return PipelineStats()

    def close(self):
        pass


def image_batch(index: list[int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (len(index), 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batch({"center": pixels}, torch.tensor(index), torch.tensor(index) * 10)


def test_features_are_sorted_pooled_and_leave_the_module_as_it_was() -> None:
    encoder = build_encoder("resnet18").train()
    encoder.layer1.eval()  # a module's own flag, not its root's, must come back
    flags = [module.training for module in encoder.modules()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    batches = [image_batch([5, 3], 0), image_batch([], 1), image_batch([1], 2)]
    found = extract_features(encoder, ListPipeline(batches), torch.device("cpu"))
    assert found.samples.tolist() == [1, 3, 5] and found.labels.tolist() == [10, 30, 50]
    assert [module.training for module in encoder.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    images = batches[0].views["center"].float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = encoder.eval()((images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)).mean((2, 3))
    torch.testing.assert_close(found.features[[2, 1]], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no image"):
        extract_features(encoder, ListPipeline([]), torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [0, 9, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5, 6], [math.nan] * 7])
    got = accuracy(logits, torch.tensor([0, 6, 2, 0]), [[0], [1, 5], [], [3]])
    assert (got.top1, got.top5) == (0.25, 0.5)
    assert accuracy(logits[:3], torch.tensor([0, 6, 2]), [[0], [5], []]).real == 0.5  # the empty set is skipped
    assert accuracy(logits[:3, :3], torch.tensor([0, 0, 2])).top5 == 1.0


def test_real_labels_follow_the_file_names(tmp_path: Path) -> None:
    names = [f"n01/ILSVRC2012_val_{number:08d}.JPEG" for number in (3, 1, 2)]
    (tmp_path / "list.json").write_text(json.dumps([[1], [2, 3], []]))
    assert read_real_labels(str(tmp_path / "list.json"), names, 3, 4) == [[], [1], [2, 3]]
    assert read_real_labels(str(tmp_path / "list.json"), None, 3, 4) == [[1], [2, 3], []]
    (tmp_path / "named.json").write_text(json.dumps({Path(n).name: [k] for k, n in enumerate(names)}))
    assert read_real_labels(str(tmp_path / "named.json"), names, 3, 4) == [[0], [1], [2]]
    for file, named, samples, classes, message in [
        ("list.json", None, 5, 4, "3 entries for 5 images"),
        ("list.json", names, 3, 3, "label 3 with 3 classes"),
        ("named.json", None, 3, 4, "needs file names"),
        ("named.json", ["other.jpg"], 1, 4, "no entry for other.jpg"),
        ("none.json", names, 3, 4, "real.json"),
    ]:
        with pytest.raises(UserMistake, match=message):
            read_real_labels(str(tmp_path / file), named, samples, classes)


# ---------------------------------------------------------------------------------------------------------------------
# Linear recipes


def test_recipes_hold_the_published_values_and_every_method_has_one() -> None:
    assert set(METHODS) <= set(RECIPE_OF_METHOD), "a method without a linear recipe"
    values = {
        name: (r.optimizer, r.lr, r.global_batch, r.epochs, r.milestones, r.batch_norm, r.weight_decay)
        for name, r in LINEAR_RECIPES.items()
    }
    assert values["moco-v2"] == ("sgd", 30.0, 256, 100, (60, 80), False, 0.0)
    assert values["regioncl-m"] == ("sgd", 30.0, 1024, 100, (60, 80), False, 0.0)
    assert values["simsiam"] == ("lars", 0.1 * 4096 / 256, 4096, 90, (), False, 0.0)
    assert values["moco-v3"] == ("sgd", 0.1 * 1024 / 256, 1024, 90, (), False, 0.0)
    assert values["moby"] == ("nesterov", 1.0, 512, 100, (), False, 0.0)
    assert values["care"] == ("sgd", 0.2, 256, 80, (), True, 0.0)
    assert values["lewel-b"] == ("sgd", 0.4, 256, 50, (30, 40), False, 0.0)
    assert values["lewel-m"] == ("lars", 3.2, 4096, 90, (), False, 0.0)
    assert values["barlow-twins"] == ("sgd", 0.3, 256, 100, (), False, 1e-6)
    assert values["moco-v3-vit"] == ("sgd", 3.0 * 1024 / 256, 1024, 90, (), False, 0.0)
    assert values["swav"] == ("sgd", 0.3, 256, 100, (), False, 1e-6)
    assert values["simclr"] == ("nesterov", 0.1 * 4096 / 256, 4096, 90, (), False, 1e-6)


def test_learning_rates_over_the_epochs() -> None:
    def at(name: str, epoch: float, epochs: int = 0) -> float:
        recipe = LINEAR_RECIPES[name]
        return linear.lr_factor(recipe, epochs or recipe.epochs, round(epoch * 100), 100)

    assert [round(at("moco-v2", e), 6) for e in (0, 59.99, 60, 79.99, 80, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [round(at("lewel-b", e, 5), 6) for e in (0, 2.9, 3, 4)] == [1, 1, 0.1, 0.01]  # milestones move with epochs
    assert at("simsiam", 45) == pytest.approx(0.5) and at("simsiam", 45.99) == at("simsiam", 45)
    assert at("care", 40.5) < at("care", 40) == pytest.approx(0.5)


def test_mobys_cosine_counts_from_the_start_of_the_run_and_ends_above_zero() -> None:
    recipe, steps = LINEAR_RECIPES["moby"], 10_000

    def at(step: int) -> float:
        return recipe.lr * linear.lr_factor(recipe, recipe.epochs, step, steps // recipe.epochs)

    assert [at(step) for step in (0, 250)] == pytest.approx([0, 0.5])  # the warm-up of 500 steps goes to the peak
    assert at(500) == pytest.approx(5e-6 + (1 - 5e-6) * (1 + math.cos(math.pi / 20)) / 2, rel=1e-12)
    assert at(steps // 2) == pytest.approx((1 + 5e-6) / 2, rel=1e-12)
    assert 5e-6 < at(steps - 1) < 5.1e-6


def test_moby_trains_its_head_with_drop_path_and_validates_without() -> None:
    encoder = SwinTrunk(8, (1, 1, 1, 1), (1, 1, 1, 1)).eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    half = [Batch({"view": images[i : i + 3]}, torch.arange(i, i + 3), torch.arange(i, i + 3)) for i in (0, 3)]

    def session(rank: int = 0, world_size: int = 1) -> Any:
        runtime = SimpleNamespace(
            device=torch.device("cpu"), autocast=contextlib.nullcontext, rank=rank, world_size=world_size
        )
        return SimpleNamespace(encoder=encoder, runtime=runtime, config=SimpleNamespace(seed=3))

    def trained(epoch: int, recipe: str = "moby", batches: Sequence[Batch] = half, **ranks: int) -> torch.Tensor:
        rate = linear.drop_path_of(encoder, LINEAR_RECIPES[recipe])
        deliver = linear.epoch_features(session(**ranks), ListPipeline(batches), rate)
        return torch.cat([features for features, _ in deliver(epoch)])

    whole = [Batch({"view": images}, torch.arange(6), torch.arange(6))]
    validated = extract_features(encoder, ListPipeline(whole), torch.device("cpu"), transform=lambda _, view: view)[0]
    assert torch.allclose(validated, encoder(images).mean(dim=(2, 3)), atol=1e-6)
    assert (trained(0) - validated).abs().max() > 1e-3
    assert torch.equal(trained(1), trained(1)) and not torch.equal(trained(0), trained(1))
    assert torch.allclose(trained(0, "moco-v3"), validated, atol=1e-6)
    # Two ranks of one batch see what one rank sees.
    parts = [trained(0, batches=[half[rank]], rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.allclose(torch.cat(parts), trained(0, batches=whole), atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not any(module.training for module in encoder.modules())
    assert linear.drop_path_of(build_encoder("resnet18"), LINEAR_RECIPES["moby"]) == 0.0


def tables(classes: int = 8, width: int = 12, n: int = 1200) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    parts = []
    for count in (n, 1000):
        labels = torch.randint(0, classes, (count,), generator=generator)
        parts += [centres[labels] + 1.1 * torch.randn(count, width, generator=generator), labels]
    return parts


def test_both_solvers_agree_with_scikit_learn_to_a_tenth_of_a_point() -> None:
    models = pytest.importorskip("sklearn.linear_model")
    x, y, x_val, y_val = tables()
    l2 = 1e-2
    theirs = models.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=2000).fit(x.double().numpy(), y.numpy())
    expected = theirs.score(x_val.double().numpy(), y_val.numpy())
    assert 0.5 < expected < 0.97, "chance or perfection would prove nothing"
    weight, bias = linear.fit_logistic(x, y, 8, l2)
    exact = accuracy(x_val.double() @ weight.T + bias, y_val).top1
    assert abs(exact - expected) <= 0.001
    np.testing.assert_allclose(weight.numpy(), theirs.coef_, atol=2e-4)
    # The stepwise trainer, whose weight decay also reaches the bias, comes to the same optimum.
    recipe = LinearRecipe("test", "sgd", 0.5, len(x), 400, "cosine-step", weight_decay=l2)
    heads = LinearHeads(12, 8, 1, False, 0)
    train_heads(heads, lambda epoch: [(x, y)], 1, 400, recipe, [0.5])
    with torch.no_grad():
        stepped = accuracy(heads.eval()(x_val)[0], y_val).top1
    assert abs(stepped - expected) <= 0.0011


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "lars"])
def test_heads_side_by_side_train_as_each_alone(optimizer: str) -> None:
    x, y, *_ = tables(n=96)
    recipe = LinearRecipe("test", optimizer, 1.0, 32, 3, "cosine-epoch", batch_norm=True)  # type: ignore[arg-type]

    def batches(epoch: int):
        return [(x[i : i + 32], y[i : i + 32]) for i in range(0, 96, 32)]

    def trained(lrs: list[float]) -> list[torch.Tensor]:
        heads = LinearHeads(12, 8, len(lrs), True, 0)
        train_heads(heads, batches, 3, 3, recipe, lrs)
        return [parameter.detach() for parameter in heads.parameters()]

    together, alone = trained([0.1, 1e30, 2.0]), [trained([lr]) for lr in (0.1, 2.0)]
    size = len(alone[0])
    for mine, theirs in zip(together[:size] + together[2 * size :], alone[0] + alone[1], strict=True):
        assert torch.equal(mine, theirs), "a head felt its neighbour, which ran away"


def test_batch_and_recipe_mistakes_are_named() -> None:
    assert linear.batch_for(4096, 0, 1000, 1) == 1000 and linear.batch_for(4096, 0, 1001, 2) == 1000
    assert linear.batch_for(256, 0, 1000, 4) == 256 and linear.batch_for(256, 64, 1000, 4) == 64
    for wanted, world in [(2000, 1), (63, 2)]:
        with pytest.raises(UserMistake, match="global-batch"):
            linear.batch_for(256, wanted, 1000, world)
    assert linear.choose_recipe(LinearConfig(), "care")[0] == "care"
    assert linear.choose_recipe(LinearConfig(head_bn="no"), "care")[1].batch_norm is False
    for config in (
        LinearConfig(recipe="mocov2"),
        LinearConfig(lrs=(0.0,)),
        LinearConfig(eval_every=0),
        LinearConfig(recipe="logistic", epochs=3),
    ):
        with pytest.raises(UserMistake):
            linear.choose_recipe(config, "")


# ---------------------------------------------------------------------------------------------------------------------
# Subsets


def test_balanced_subsets_are_balanced_fixed_and_nested() -> None:
    labels = np.repeat(np.arange(4), [1300, 100, 40, 3])[np.random.default_rng(0).permutation(1443)]
    small, large = splits.balanced_subset(labels, 0.01, 7), splits.balanced_subset(labels, 0.1, 7)
    assert np.bincount(labels[small]).tolist() == [13, 1, 1, 1]
    assert np.bincount(labels[large]).tolist() == [130, 10, 4, 1]
    assert set(small) <= set(large) and (np.diff(large) > 0).all()
    assert np.array_equal(large, splits.balanced_subset(labels, 0.1, 7))
    assert not np.array_equal(large, splits.balanced_subset(labels, 0.1, 8))
    with pytest.raises(UserMistake, match="fraction"):
        splits.balanced_subset(labels, 1.5, 0)


def test_lists_are_read_back_and_wrong_ones_refused(tmp_path: Path) -> None:
    names = ["a/x.jpg", "a/y.jpg", "b/x.jpg", "b/z.jpg"]
    path = tmp_path / "list.txt"
    for known in (names, None):
        splits.write_list(path, np.array([1, 2]), known)
        assert splits.read_list(str(path), known, 4).tolist() == [1, 2]
    path.write_text("# published\nz.jpg\n\ny.jpg\n")
    assert splits.read_list(str(path), names, 4).tolist() == [1, 3]
    for text, known, message in [
        ("q.jpg", names, "not in the data"),
        ("x.jpg", names, "fits 2 images"),
        ("z.jpg\nb/z.jpg", names, "twice"),
        ("7", names, "index 7"),
        ("", names, "names no image"),
        ("z.jpg", None, "file names"),
    ]:
        path.write_text(text)
        with pytest.raises(UserMistake, match=message):
            splits.read_list(str(path), known, 4)


@pytest.mark.parametrize(
    "name",
    [
        "#1 best/x.jpg",
        "# published",
        " lead/x.jpg",
        "tail/x.jpg ",
        "C#/x.jpg",
        "a\u2028b/x.jpg",
        "a\nb.jpg",
        "\udcff.jpg",
    ],
)
def test_a_list_of_ours_names_images_as_people_call_them(tmp_path: Path, name: str) -> None:
    names, path = ["lead/x.jpg", name, "tail/x.jpg", "z.jpg"], tmp_path / "list.txt"
    splits.write_list(path, np.array([1, 3]), names)
    assert splits.read_list(str(path), names, 4).tolist() == [1, 3]


def test_names_that_are_numbers_are_not_taken_for_indices(tmp_path: Path) -> None:
    names, path = ["3", "2", "1", "0"], tmp_path / "list.txt"
    splits.write_list(path, np.array([0, 1]), names)
    assert splits.read_list(str(path), names, 4).tolist() == [0, 1]


def test_classes_of_both_data_sets_must_agree(tmp_path: Path) -> None:
    for folder in ("train/cat", "train/dog", "val/dog", "same/cat", "same/dog"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.jpg").touch()
    splits.check_classes(str(tmp_path / "train"), str(tmp_path / "same"))
    splits.check_classes(str(tmp_path / "train"), str(tmp_path / "val"))  # a lacking class shifts nothing
    with pytest.raises(UserMistake, match="for example in cat"):
        splits.check_classes(str(tmp_path / "val"), str(tmp_path / "train"))


def test_semi_learning_rates() -> None:
    rates = [semi.learning_rates(semi.SemiConfig(), images, 10_000, 256) for images in (100, 1000)]
    assert rates == [(1e-4, 1.0), (0.01, 0.1)]
    assert semi.learning_rates(semi.SemiConfig(lr_head=3.0), 1000, 10_000, 128) == (0.005, 3.0)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_backbone(build_encoder("resnet18"), run / "backbone.safetensors", arch="resnet18", method="care")
    (run / "config.json").write_text(json.dumps({"run": {"method": "care"}, "recipe": {"image_size": 32}}))
    return run


def command(name: str, run: Path, *more: str) -> list[str]:
    return last_wins(
        [name, "--checkpoint", str(run), "--loader", "synthetic", "--data", "160", "--val-data", "60", *more]
    )


def result(run: Path, name: str) -> dict:
    return json.loads((run / f"eval-{name}.json").read_text())


def test_every_protocol_runs_and_writes_its_result(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("knn", checkpoint, "--k", "5,20")) == 0
    found = result(checkpoint, "knn")
    assert found["method"] == "care" and found["image_size"] == 32 and [row["k"] for row in found["results"]] == [5, 20]
    assert found["top1"] == found["results"][0]["top1"] > 0.3  # synthetic classes share colours
    assert found["machine"] == machine(torch.device("cpu")) and found["versions"] == versions()
    assert main(command("linear", checkpoint, "--lrs", "0.1,0.5", "--epochs", "2", "--global-batch", "80")) == 0
    found = result(checkpoint, "linear")
    assert found["recipe"] == "care" and found["batch_norm"] and found["global_batch"] == 80
    assert [row["lr"] for row in found["results"]] == [0.1, 0.5] and found["val_images"] == 60
    assert main(command("linear", checkpoint, "--recipe", "logistic")) == 0
    assert result(checkpoint, "linear")["top1"] > 0.8
    assert main(command("fewshot", checkpoint, "--fraction", "0.25", "--epochs", "1")) == 0
    found = result(checkpoint, "fewshot")
    assert found["train_images"] == 40 and len(Path(found["list"]).read_text().split()) == 40
    assert main(command("semi", checkpoint, "--list", found["list"], "--epochs", "1")) == 0
    assert result(checkpoint, "semi")["train_images"] == 40
    printed = capsys.readouterr().out
    assert printed.count("all 120 tensors (11,176,512 parameters) loaded") == 5
    assert "weighted top-1" in printed and "best top-1" in printed


def test_fine_tuning_learns(checkpoint: Path) -> None:
    steps = ["--fraction", "1", "--epochs", "8", "--global-batch", "16", "--lr-backbone", "0.002", "--lr-head", "0.02"]
    assert main(command("semi", checkpoint, *steps)) == 0
    assert result(checkpoint, "semi")["top1"] > 0.5  # 0.85 when this was written; chance is 0.1


def test_untrained_baseline_is_kept_apart(checkpoint: Path) -> None:
    before = (checkpoint / "eval-knn.json").read_text() if (checkpoint / "eval-knn.json").exists() else None
    assert main(command("knn", checkpoint, "--untrained", "--seed", "3")) == 0
    assert result(checkpoint, "knn-untrained")["untrained"] is True
    after = (checkpoint / "eval-knn.json").read_text() if (checkpoint / "eval-knn.json").exists() else None
    assert before == after


def test_two_ranks_give_the_result_of_one(checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--lrs", "0.5", "--epochs", "2", "--global-batch", "40", "--head-bn", "yes", "--recipe", "lewel-b"]
    assert main(command("linear", checkpoint, *flags, "--output", str(tmp_path / "one.json"))) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = command("linear", checkpoint, *flags, "--output", str(tmp_path / "two.json"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(ROOT / "train/evaluate.py"),
            *both,
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["world_size"] == 2 and done.stdout.count("all 120 tensors") == 1
    assert one["results"] == two["results"] or abs(one["top1"] - two["top1"]) <= 1 / 60 + 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a protocol is needed"),
        (["lineer"], "nearest is linear"),
        (["linear", "--epoch", "3"], "--epochs"),
        (["knn", "--data", "1", "--val-data", "1"], "--checkpoint is needed"),
        (["knn", "--checkpoint", "no", "--data", "8", "--val-data", "8", "--loader", "synthetic"], "no does not exist"),
        (["knn", "--checkpoint", "x", "--data", "/no/such", "--val-data", "8"], "--data /no/such does not exist"),
        (["knn", "--checkpoint", "x", "--data", "8", "--val-data", "8", "--k", "0"], "--k 0"),
        (["linear", "--checkpoint", "x", "--data", "8", "--val-data", "8", "--recipe", "moco"], "choose from moco-v2"),
    ],
)
def test_mistakes_are_one_line_and_code_2(arguments, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capfd.readouterr().err.strip()
    assert "\n" not in error and message in error


def test_the_table_of_protocols_imports() -> None:
    assert {"knn", "linear", "fewshot", "semi"} <= set(PROTOCOLS)
    for name in ("knn", "linear", "fewshot", "semi"):
        assert callable(protocol(name))


def test_help_from_a_foreign_directory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train/evaluate.py"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and all(name in done.stdout for name in PROTOCOLS)


def test_real_photos_through_the_folder_loader(photos, checkpoint: Path, tmp_path: Path) -> None:
    folder = photos(6)
    flags = ["--checkpoint", str(checkpoint), "--data", str(folder), "--val-data", str(folder), "--image-size", "32"]
    assert main(["knn", *flags, "--k", "1", "--output", str(tmp_path / "knn.json")]) == 0
    assert json.loads((tmp_path / "knn.json").read_text())["top1"] == 1.0  # each photo finds itself
    names = splits.source_names(str(folder))
    assert names is not None and len(names) == 60
    output = ["--output", str(tmp_path / "few.json")]
    assert main(["fewshot", *flags, "--fraction", "0.5", "--epochs", "1", "--recipe", "lewel-b", *output]) == 0
    chosen = (tmp_path / "few.list.txt").read_text().split("\n")
    assert len(chosen) == 31 and set(chosen[:-1]) <= set(names)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_imagenette_figures_are_those_of_scikit_learn(photos, unpack, checkpoint: Path, tmp_path: Path) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    models = pytest.importorskip("sklearn.linear_model")
    seen: dict[str, int] = {}

    def first_two_hundred(member: str) -> bool:
        folder = member.split("/")[1]
        seen[folder] = seen.get(folder, 0) + 1
        return seen[folder] <= 200

    train, val = photos(100), unpack("photos-val", first_two_hundred)
    flags = ["--checkpoint", str(checkpoint), "--data", str(train), "--val-data", str(val), "--image-size", "64"]
    assert main(["knn", *flags, "--k", "20", "--output", str(tmp_path / "knn.json")]) == 0
    linear_flags = ["--recipe", "logistic", "--lrs", "0.01", "--output", str(tmp_path / "linear.json")]
    assert main(["linear", *flags, *linear_flags]) == 0
    encoder = load_backbone(checkpoint, say=lambda _: None)
    tables = []
    for folder in (train, val):
        config = PipelineConfig(str(folder), (center_view(64),), 100, order="sequential", drop_last=False)
        pipeline = build_pipeline("folder", config)
        tables.append(extract_features(encoder, pipeline, torch.device("cpu")))
        pipeline.close()
    x, x_val = (table.features.double().numpy() for table in tables)
    y, y_val = (table.labels.numpy() for table in tables)

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    knn = neighbors.KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
    theirs = knn.fit(unit(x), y).score(unit(x_val), y_val)
    assert abs(theirs - json.loads((tmp_path / "knn.json").read_text())["top1"]) <= 0.001
    mean, std = x.mean(axis=0), x.std(axis=0, ddof=1)
    logistic = models.LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=5000).fit((x - mean) / std, y)
    theirs = logistic.score((x_val - mean) / std, y_val)
    assert abs(theirs - json.loads((tmp_path / "linear.json").read_text())["top1"]) <= 0.001
    assert theirs > 0.2, "chance would prove nothing"
    # The stepwise trainer's weight decay reaches the bias, as that of a weight whose feature is always one.
    l2 = 0.1
    rows, val_rows = ((table - mean) / std for table in (x, x_val))
    with_one, val_with_one = (np.hstack([table, np.ones((len(table), 1))]) for table in (rows, val_rows))
    logistic = models.LogisticRegression(C=1 / (l2 * len(x)), fit_intercept=False, tol=1e-8, max_iter=5000)
    theirs = logistic.fit(with_one, y).score(val_with_one, y_val)
    recipe = LinearRecipe("test", "sgd", 0.02, len(x), 2000, "cosine-step", weight_decay=l2)
    heads, batch = LinearHeads(x.shape[1], 10, 1, False, 0), (torch.from_numpy(rows).float(), torch.from_numpy(y))
    train_heads(heads, lambda epoch: [batch], 1, 2000, recipe, [0.02])
    with torch.no_grad():
        ours = accuracy(heads(torch.from_numpy(val_rows).float())[0], torch.from_numpy(y_val)).top1
    assert abs(theirs - ours) <= 0.001
    print(f"trained step by step: {ours:.4f}, scikit-learn: {theirs:.4f}")
