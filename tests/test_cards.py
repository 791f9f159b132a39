"""A card that this build of PyTorch has no code for is refused before anything runs on it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools.bench.timing import choose_device
from tools.support import machine
from train.cards import has_code, problems_of
from train.errors import UserMistake
from train.evaluate import main as evaluate
from train.main import main as train
from train.runtime import _choose_device

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
V100, BUILD = "Tesla V100-SXM2-16GB", "a build for CUDA 12.6 (cu126)"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A V100 and a PyTorch for CUDA 13."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: V100)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: CUDA_13)
    return monkeypatch


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 0), CUDA_13, False),
        ((7, 5), CUDA_13, True),
        ((8, 0), CUDA_13, True),
        ((8, 9), CUDA_13, True),
        ((9, 0), CUDA_13, True),
        ((12, 1), CUDA_13, True),
        ((11, 0), CUDA_13, False),
        ((8, 0), ["sm_86"], False),
        ((8, 0), ["sm_75"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((7, 0), ["sm_90", "compute_90"], False),
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100f"], True),
        ((9, 0), ["gfx942"], True),
        ((9, 0), [], True),
    ],
)
def test_which_code_runs_on_which_card(capability: tuple[int, int], built_for: list[str], runs: bool) -> None:
    assert has_code(capability, built_for) is runs


def test_training_and_evaluation_end_in_one_line(
    card: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = ["--method", "moco-v2", "--loader", "synthetic", "--data", "64", "--run-dir", str(tmp_path / "run")]
    assert train(run) == 2
    knn = ["knn", "--checkpoint", "any", "--loader", "synthetic", "--data", "8", "--val-data", "8"]
    assert evaluate([*knn, "--output", str(tmp_path / "knn.json")]) == 2
    first, second = capfd.readouterr().err.splitlines()
    assert first == second
    assert f"{V100} (sm_70)" in first and "torch==2.14.*" in first and BUILD in first


def test_benchmarks_refuse_it_and_the_cpu_stays(card: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserMistake, match="no code for this card"):
        choose_device("auto")
    assert choose_device("cpu").type == "cpu"
    card.setattr("torch.cuda.get_arch_list", lambda: ["sm_50", "sm_60", "sm_70"])
    assert _choose_device("auto", 0) == torch.device("cuda", 0)


def test_a_newer_card_is_not_sent_to_an_older_build() -> None:
    newer, older = problems_of(["Rubin, 13.0", "K80, 3.7"])
    assert "the newest PyTorch" in newer and BUILD not in newer
    assert "--device cpu" in older and BUILD not in older


def test_the_doctor_names_the_build(card: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name=V100, major=7, minor=0, total_memory=2**34)
    card.setattr("torch.cuda.get_device_properties", lambda number: properties)
    (finding,) = machine.check_gpu()
    assert finding.level == "fault" and V100 in finding.text and BUILD in finding.remedy
    card.setattr("torch.cuda.get_arch_list", lambda: ["sm_70"])
    (finding,) = machine.check_gpu()
    assert finding.level == "ok" and "fp16" in finding.text


def test_what_nvidia_smi_lists_is_judged_without_a_driver_for_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.get_arch_list", list)  # as where the driver does not start
    monkeypatch.setattr("torch._C._cuda_getArchFlags", lambda: " ".join(CUDA_13), raising=False)
    (line,) = problems_of([f"{V100}, 7.0\n", f"{V100}, 7.0\n", "NVIDIA H200, 9.0\n", "Field not valid\n"])
    assert V100 in line and BUILD in line
