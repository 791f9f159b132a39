"""Analyses: each figure against a case worked by hand, and every command once."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from torch import nn

from models.alignment import AlignmentHead
from tools.analyze import main
from tools.support.analyses import _name_colours
from train.backbone_io import save_backbone
from train.build import build_method
from train.checkpoint import write_checkpoint
from train.eval import analysis
from train.record.page import render
from train.record.run import read_run
from train.resolve import resolve
from train.runtime import Runtime


class Toy(nn.Module):
    """images -> the images themselves as a feature map."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def test_grad_cam_of_a_linear_head_is_its_weighted_map() -> None:
    images = torch.randn(2, 3, 4, 4)
    weight = torch.randn(5, 3)
    classes = torch.tensor([4, 1])
    got = analysis.grad_cam(Toy(), lambda pooled: pooled @ weight.T, images, classes)
    expected = torch.einsum("bc,bchw->bhw", weight[classes], images).relu() / 16
    torch.testing.assert_close(got, expected)
    first, second = analysis.common_scale([got, got * 3])
    assert float(second.max()) == 1.0 and float(first.max()) == pytest.approx(1 / 3)


def test_gradients_are_measured_inside_the_boxes() -> None:
    mask = analysis.box_mask([[(0.0, 0.0, 0.5, 1.0)], [(0.5, 0.5, 1.0, 1.0), (0.75, 0.0, 1.0, 0.25)]], 4)
    assert mask[0].tolist() == [[True, True, False, False]] * 4
    assert mask[1].int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    gradient = torch.where(mask, 3.0, 1.0)
    assert analysis.inside_outside(gradient, mask) == (3.0, 1.0)
    with pytest.raises(ValueError, match="no pixel"):
        analysis.inside_outside(gradient, torch.zeros_like(mask))


def test_input_gradient_is_that_of_each_image() -> None:
    class Quadratic(nn.Module):
        def forward(self, inputs):
            return type("Out", (), {"loss": 0.5 * inputs.square().sum(dim=(1, 2, 3)).mean()})

    views = torch.randn(4, 3, 5, 5)
    got = analysis.input_gradient(Quadratic(), views, lambda view: view)
    torch.testing.assert_close(got, views.abs().mean(dim=1))


def test_lewel_maps_sum_to_one_and_do_not_train() -> None:
    head = AlignmentHead(8, 16, 4, 4, 2)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    maps = analysis.lewel_maps(Toy(), head, torch.randn(3, 8, 5, 5))
    assert maps.shape == (3, 4, 5, 5)
    torch.testing.assert_close(maps.sum(dim=(2, 3)), torch.ones(3, 4))
    assert head.training and all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    with pytest.raises(ValueError, match="learned no alignment maps"):
        analysis.lewel_maps(Toy(), AlignmentHead(8, 16, 4, 4, 2, align="random"), torch.randn(3, 8, 5, 5))


def test_neighbours_and_plane() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    index, cosine = analysis.nearest(bank, torch.tensor([[3.0, 0.1]]), 5)
    assert index.tolist() == [[0, 2, 1]] and cosine[0, 0] > 0.99
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 3, 1, 1, 1, 1])
    plane = analysis.principal_plane(rows).double()
    unit = nn.functional.normalize(rows.double())
    singular = torch.linalg.svdvals(unit - unit.mean(dim=0))
    torch.testing.assert_close(plane.norm(dim=0), singular[:2], rtol=1e-5, atol=1e-6)
    assert abs(float(plane[:, 0] @ plane[:, 1])) < 1e-4, "axes must be at right angles"


def write_run(run: Path, *flags: str) -> Path:
    """A run's folder with one checkpoint of an untrained method, as training writes it."""
    run.mkdir()
    config = resolve([*flags, "--image-size", "64", "--bn.group-size", "0"])
    method = build_method(config, Runtime(0, 1, torch.device("cpu"), torch.float32, False))
    (run / "config.json").write_text(json.dumps(config.to_json()))
    knn = [{"kind": "knn", "step": step, "epoch": 0, "time_s": 1.0, "k": 20, "top1": 0.3} for step in (0, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in knn))
    save_backbone(method.encoder, run / "backbone.safetensors", arch=config.recipe.arch, method=config.run.method)
    state = {name: value.contiguous() for name, value in method.state_dict().items()}
    files = {"model.safetensors": save(state), "optimizer.safetensors": save({}), "state.json": b'{"step": 3}'}
    write_checkpoint(run / "checkpoints", "step_00000003", files)
    return run


@pytest.fixture(scope="module")
def lewel_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "lewel", "--method", "lewel-b", "--arch", "resnet18")


def boxed_images(folder: Path) -> list[str]:
    """Flags for four images of noise with a box each."""
    folder.mkdir()
    images, annotations = [], []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 60, "height": 40})
        annotations.append({"image_id": number, "bbox": [10, 10, 30, 20], "iscrowd": 0})
    (folder / "boxes.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return ["--data", str(folder), "--annotations", str(folder / "boxes.json")]


def test_commands_on_backbones(lewel_run: Path, tmp_path: Path) -> None:
    common = ["--loader", "synthetic", "--data", "40", "--image-size", "32", "--images", "3"]
    two = [str(lewel_run), str(lewel_run / "backbone.safetensors")]
    for name, more in (("gradcam", two), ("neighbours", [*two, "--neighbours", "2"]), ("embedding", two)):
        out = tmp_path / f"{name}.png"
        assert main([name, *more, *common, "--out", str(out)]) == 0
        assert np.asarray(Image.open(out)).std() > 5, "an empty picture"
    # Dots of a plane are worth looking at by the hundred, pictures by the handful.
    assert main(["embedding", two[1], *common[:6], "--out", str(tmp_path / "many.png")]) == 0
    assert json.loads((tmp_path / "many.json").read_text())["images"] == 40
    found = json.loads((tmp_path / "neighbours.json").read_text())["neighbours_of_the_same_class"]
    assert found[two[0]] == found[two[1]], "one backbone given twice"


def test_classes_of_dots_have_a_legend() -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots()
    labels = np.array([0, 1, 2, 2])
    dots = axis.scatter(labels, labels, c=labels, cmap="tab10")
    _name_colours(axis, dots, labels, ("cat", "dog"))
    assert [entry.get_text() for entry in axis.get_legend().get_texts()] == ["cat", "dog", "class 2"]
    pyplot.close(figure)


def test_commands_on_methods(lewel_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "align.png"
    common = ["--loader", "synthetic", "--data", "6", "--image-size", "64", "--images", "2", "--maps", "2"]
    assert main(["align", str(lewel_run), *common, "--out", str(out)]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["maps"] == 256
    assert main(["boxes", str(lewel_run), *boxed_images(tmp_path / "boxed"), "--out", str(tmp_path / "b.png")]) == 0
    # In COCO's layout, by the folder that `detect` takes.
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    shutil.move(tmp_path / "boxed" / "boxes.json", tmp_path / "coco" / "annotations" / "instances_val.json")
    shutil.move(tmp_path / "boxed", tmp_path / "coco" / "images")
    coco = ["--data", str(tmp_path / "coco"), "--annotations", f"{tmp_path}/coco/annotations/instances_val.json"]
    assert main(["boxes", str(lewel_run), *coco, "--out", str(tmp_path / "above.png")]) == 0
    assert (tmp_path / "above.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    (row,) = json.loads((tmp_path / "b.json").read_text())["curves"][str(lewel_run)]
    assert row["step"] == 3 and row["inside"] > 0 and row["outside"] > 0
    # The k-NN of the run stands beside its gradients.
    picture = Image.open(tmp_path / "b.png")
    assert picture.width > 2 * picture.height


def test_swin_and_the_report_of_its_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "swin", "--method", "regioncl-moby")
    data = ["--loader", "synthetic", "--data", "20", "--images", "2"]
    assert main(["gradcam", str(run), *data]) == 0
    assert main(["boxes", str(run), *boxed_images(tmp_path / "boxed"), "--images", "2"]) == 0
    (row,) = json.loads((run / "analysis-boxes.json").read_text())["curves"][str(run)]
    assert row["inside"] > 0
    capfd.readouterr()
    assert main(["align", str(run), *data]) == 2
    assert "regioncl-moby, which has no alignment maps" in capfd.readouterr().err
    (run / "stray.png").write_bytes(b"no picture")
    (run / "stray.json").write_text('{"analysis": "gradcam"}')
    page = render([read_run(run)])
    assert "Grad-CAM" in page and "Gradient inside object boxes" in page
    for name in ("gradcam", "boxes"):
        assert base64.b64encode((run / f"analysis-{name}.png").read_bytes()).decode() in page


def test_images_without_labels_agree_with_nobody(lewel_run: Path, tmp_path: Path) -> None:
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    flags = ["--loader", "folder", "--data", str(tmp_path), "--images", "2", "--out", str(tmp_path / "out" / "n.png")]
    assert main(["neighbours", str(lewel_run), *flags]) == 0
    found = json.loads((tmp_path / "out" / "n.json").read_text())["neighbours_of_the_same_class"]
    assert found == {str(lewel_run): None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gradcam", "x", "--data", "8", "--out", "a.jpg"], ".png"),
        (["gradcam", "x", "--data", "8", "--out", "a.png", "--image", "3"], "--image"),
        (["boxes", "x", "--data", "8", "--out", "a.png"], "--annotations is needed"),
        (["align", "nowhere", "--data", "8", "--out", "a.png"], "not a run's folder"),
        (["embedding", "nowhere", "--data", "8", "--loader", "synthetic", "--out", "a.png"], "does not exist"),
        (["gradcam", "x", "--data", "8", "--out", "a.png", "--images", "0"], "at least 1"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capfd.readouterr().err.strip()
    assert "\n" not in error and message in error
