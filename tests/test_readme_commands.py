"""Every command of the README's evaluation section runs as it stands there, on a tiny run, tiny data and few steps."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import runs
from tests.small_stores import pack
from train.evaluate import PROTOCOLS

ROOT = Path(__file__).resolve().parents[1]
SECTION = "## Evaluation and export"
# What makes a protocol tiny: appended to its command.
FEW_STEPS = {
    "knn": "--loader folder",
    "linear": "--loader folder --epochs 1",
    "fewshot": "--loader folder --epochs 1",
    "semi": "--loader folder --epochs 1",
    "detect": "--steps 1 --global-batch 2 --train-sides 64 --test-side 64 --longest-side 96 --precise-bn-steps 1",
    "segment": "--steps 1 --global-batch 2 --crop 32,32 --scale 96,64 --channels 8",
}
ANALYSES = "--loader folder --images 2 --probe-images 20"


def few_boxes(unpack: Callable[..., Path]) -> Path:
    """The detection sample with few images."""
    folder = unpack("detection-sample")
    for part, count in (("train", 6), ("val", 2)):
        path = folder / "annotations" / f"instances_{part}.json"
        document = json.loads(path.read_text())
        document["images"] = document["images"][:count]
        kept = {image["id"] for image in document["images"]}
        document["annotations"] = [item for item in document["annotations"] if item["image_id"] in kept]
        path.write_text(json.dumps(document))
    return folder


def few_streets(unpack: Callable[..., Path]) -> Path:
    """The segmentation sample with the first four images of each part."""
    stems: dict[str, set[str]] = {}

    def keep(member: str) -> bool:
        path = Path(member)
        if path.suffix == ".json":
            return True
        part = stems.setdefault(path.parts[1], set())
        if len(part) < 4:
            part.add(path.stem)
        return path.stem in part

    return unpack("segmentation-sample", keep)


SAMPLES = {"detect": few_boxes, "segment": few_streets}
"""What stands in for the data of a protocol that has formats of its own."""


def commands(section: str = SECTION) -> list[str]:
    """The commands of the section's code blocks."""
    text = (ROOT / "README.md").read_text()
    (body,) = re.findall(rf"^{re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```sh\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = commands()


def test_the_section_shows_every_protocol_and_tool() -> None:
    words = [shlex.split(command, comments=True) for command in COMMANDS]
    assert {line[2] for line in words if line[1] == "train/evaluate.py"} == set(PROTOCOLS)
    assert {line[1] for line in words} >= {"tools/export_backbone.py", "tools/analyze.py", "tools/report.py"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the README's commands name: runs/regioncl-m, train.beton and val.beton."""
    folder = tmp_path_factory.mktemp("readme")
    random = np.random.default_rng(0)
    for part, each in (("train", 8), ("val", 3)):
        for label, number in ((label, number) for label in range(6) for number in range(each)):
            path = folder / part / f"class{label}" / f"{part}{label}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = np.array([40 * label, 255 - 40 * label, 128]) + random.integers(-25, 25, (48, 48, 3))
            Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(path)
        pack(folder / part, folder / f"{part}.beton")
    run_dir = folder / "runs" / "regioncl-m"
    # One of the architectures that every export knows.
    more = ["--arch", "resnet18", "--epochs", "1", "--max-steps", "2"]
    tiny = ["--method", "regioncl-m", *runs.TINY, "--run-dir", str(run_dir), *more]
    assert runs.run(runs.last_wins(tiny), log=folder / "log.txt") == [0], (folder / "log.txt").read_text()
    return folder


def data_given(words: list[str]) -> list[int]:
    """Positions of the data paths of a command."""
    return [place + 1 for place, word in enumerate(words) if word in ("--data", "--val-data")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(shlex.split(command, comments=True)[1:3]))
def test_command_runs(
    command: str,
    workplace: Path,
    unpack: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, script, *arguments = shlex.split(command, comments=True)
    assert program == "python" and (ROOT / script).is_file()
    monkeypatch.chdir(workplace)
    protocol = arguments[0] if script == "train/evaluate.py" else ""
    if protocol:
        arguments += FEW_STEPS[protocol].split()
    if protocol in SAMPLES:
        sample = str(SAMPLES[protocol](unpack))
        for place in data_given(arguments):
            arguments[place] = sample
    elif script == "tools/analyze.py":
        arguments += ANALYSES.split()
    before = {path for path in workplace.rglob("*") if path.is_file()}
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    assert main(arguments) == 0, capsys.readouterr().err
    written = {path for path in workplace.rglob("*") if path.is_file()} - before
    if protocol:
        (path,) = (workplace / "runs" / "regioncl-m").glob(f"eval-{protocol}*.json")
        result = json.loads(path.read_text())
        assert result["protocol"] == protocol and result["method"] == "regioncl-m"
    elif script == "tools/analyze.py":
        assert {path.suffix for path in written} == {".png", ".json"}
    else:
        assert written, "the command wrote nothing"
