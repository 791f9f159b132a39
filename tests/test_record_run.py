"""Rows of runs and results name the machine that measured them, not the one that records them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from tools import record_run, record_transfer
from train.errors import UserMistake
from train.resolve import resolve
from train.versions import cpu_name, machine, usable_cores

VERSIONS = {"commit": "0123456789ab+", "torch": "2.11.0", "python": "3.12.3", "numpy": "2.2.0"}


def write_run(folder: Path, recorded: str) -> Path:
    folder.mkdir()
    config = resolve(["--method", "byol", "--recipe", "byol-small", "--epochs", "2"]).to_json()
    (folder / "config.json").write_text(json.dumps({**config, "data_images": 50, "versions": VERSIONS}))
    rows = [
        {"kind": "start", "step": 0, "machine": recorded},
        {"kind": "knn", "step": 0, "epoch": 0, "top1": 0.25},
        {"kind": "train", "step": 2, "epoch": 2, "images_per_s": 80.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("recorded", "device", "cpu", "cores"),
    [
        ("AMD EPYC 7742, rev 2, 3 cores", "cpu", "AMD EPYC 7742, rev 2", "3"),
        (machine(torch.device("cpu")), "cpu", cpu_name(), str(usable_cores())),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB", "", ""),
    ],
)
def test_rows_of_a_run_have_its_machine_and_versions(
    recorded: str, device: str, cpu: str, cores: str, tmp_path: Path
) -> None:
    path = tmp_path / "learning.csv"
    assert record_run.main([str(write_run(tmp_path / "run", recorded)), "--output", str(path)]) == 0
    rows = table(path)
    assert [(row["metric"], row["median"]) for row in rows] == [
        ("20-NN top-1, epoch 0", "0.25"),
        ("training rate", "80"),
    ]
    for row in rows:
        assert (row["device"], row["cpu"], row["cores"]) == (device, cpu, cores)
        assert (row["commit"], row["torch"]) == ("0123456789ab+", "2.11.0")
        assert row["libraries"] == "python=3.12.3 numpy=2.2.0"
        assert row["setting"].startswith("byol-small, resnet18, 64 px") and row["setting"].endswith("epochs 2")


def test_a_folder_without_a_run_leaves_no_rows_of_the_others(tmp_path: Path) -> None:
    path, empty = tmp_path / "learning.csv", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserMistake, match="empty"):
        record_run.main([str(write_run(tmp_path / "run", "CPU, 2 cores")), str(empty), "--output", str(path)])
    assert not path.exists()


def test_rows_of_a_transfer_have_its_machine(tmp_path: Path) -> None:
    result = {
        "protocol": "segment",
        "arch": "resnet18",
        "untrained": False,
        "method": "byol",
        "machine": "NVIDIA H200",
        "versions": VERSIONS,
        "train_images": 9,
        "val_images": 4,
        "global_batch": 2,
        "dtype": "float32",
        "world_size": 1,
        "settings": {"seed": 0, "val_data": "photos"},
        "data_hash": "a",
        "val_data_hash": "b",
        "metrics": {"miou": 0.5},
    }
    (tmp_path / "eval-segment.json").write_text(json.dumps(result))
    path = tmp_path / "transfer.csv"
    assert record_transfer.main([str(tmp_path / "eval-segment.json"), "--output", str(path)]) == 0
    assert [(row["device"], row["torch"]) for row in table(path)] == [("NVIDIA H200", "2.11.0")]
