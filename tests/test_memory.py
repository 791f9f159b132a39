"""A lack of device memory ends in one line with the flag and the value to try."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train.loop
from train.backbone_io import build_encoder, save_backbone
from train.config import Config
from train.errors import UserMistake
from train.evaluate import main as evaluate
from train.inputs import check_batch
from train.main import main as pretrain
from train.memory import evaluation_remedy, naming_remedy, training_remedy
from train.resolve import resolve
from train.runtime import Runtime

TOLD = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB"
CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, False)


def no_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError(TOLD)


def test_a_step_without_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train.loop, "take_step", no_memory)
    flags = (
        "--method moco-v2 --loader synthetic --data 64 --arch resnet18 --image-size 32 --global-batch 16 --device cpu"
    )
    flags += " --queue-size 16 --bn.group-size 4 --holdout 0 --run-dir"
    assert pretrain([*flags.split(), str(tmp_path / "run")]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("regatta:")]
    assert line == "regatta: CUDA out of memory. Tried to allocate 2.00 GiB; try --micro-batch 8"


def test_an_evaluation_without_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = build_encoder("resnet18")
    save_backbone(encoder, tmp_path / "backbone.safetensors", arch="resnet18", method="moco-v2")
    monkeypatch.setattr(type(encoder), "forward", no_memory)
    flags = "--loader synthetic --data 8 --val-data 8 --image-size 64 --device cpu --checkpoint"
    assert evaluate(["knn", *flags.split(), str(tmp_path / "backbone.safetensors")]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("regatta:")]
    assert line.endswith("Tried to allocate 2.00 GiB; try --image-size 32")


def configured(batch: int, group: int, *more: str) -> Config:
    flags = ["--method", "moco-v2", "--global-batch", str(batch), "--bn.group-size", str(group), *more]
    return resolve([*flags, "--queue-size", "4096", "--image-size", "224"])


@pytest.mark.parametrize(
    ("batch", "group", "world", "more", "words"),
    [
        (256, 32, 1, (), "--micro-batch 128"),
        (256, 32, 1, ("--micro-batch", "64"), "--micro-batch 32"),
        (96, 32, 1, (), "--micro-batch 32"),  # half of it, 48, would cut a group
        (256, 32, 4, (), "--micro-batch 32"),
        (256, 0, 1, (), "--micro-batch 128"),
        (256, 32, 1, ("--cuda-graph",), "--micro-batch 128 without --cuda-graph"),
        (256, 32, 8, (), "--image-size 160"),  # one group a device is the least
        (2, 0, 1, (), "--image-size 160"),
    ],
)
def test_a_micro_batch_keeps_groups_whole(
    batch: int, group: int, world: int, more: tuple[str, ...], words: str
) -> None:
    config = configured(batch, group, *more)
    told = training_remedy(config, replace(CPU, world_size=world))
    assert told == words
    if told.startswith("--micro-batch"):
        size = int(told.split()[1])
        check_batch(replace(config, run=replace(config.run, micro_batch=size)), world)


def test_where_no_smaller_micro_batch_is_left_precision_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = replace(CPU, device=torch.device("cuda"), world_size=8)
    for capability, words in (((9, 0), "--precision bf16"), ((7, 0), "--precision fp16")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, found=capability: found)
        assert training_remedy(configured(256, 32), on_gpu) == words
    half = replace(on_gpu, dtype=torch.bfloat16)
    assert training_remedy(configured(256, 32), half) == "--image-size 160"


def test_an_evaluation_halves_its_batch_as_long_as_ranks_have_two_images() -> None:
    assert evaluation_remedy(CPU, 16, 0).startswith("--global-batch 8,")
    # Half of 40 is 20, which does not divide over eight ranks.
    assert evaluation_remedy(replace(CPU, world_size=8), 40, 0).startswith("--global-batch 16,")
    assert evaluation_remedy(replace(CPU, world_size=8), 16, 224) == "--image-size 160"
    assert "more memory" in evaluation_remedy(CPU, 2, 0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(""),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
    ],
)
def test_what_libraries_call_it(error: RuntimeError) -> None:
    with pytest.raises(UserMistake, match="try --less") as caught, naming_remedy(lambda: "--less"):
        raise error
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error


def test_another_fault_keeps_its_kind() -> None:
    with pytest.raises(RuntimeError, match="illegal") as caught, naming_remedy(lambda: "--less"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert not isinstance(caught.value, UserMistake)
