"""Evaluations tell how far they are, and end within seconds of a signal with the code that says what to do next."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train.eval.detect
import train.eval.linear
import train.eval.progress
import train.eval.segment
import train.eval.semi
import train.measure.features
import train.stop
from pipeline import fetch
from tools.support.drawn_sets import coco_document, write_coco
from train.backbone_io import build_encoder, save_backbone
from train.errors import Stopped
from train.eval.progress import Progress, in_threads
from train.evaluate import main
from train.stop import STOP_SIGNALS, EvaluationWatch, SignalWatch, handlers_kept, watched

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "narrow.safetensors"
    torch.manual_seed(0)
    save_backbone(build_encoder("resnet10-w16"), path, arch="resnet10-w16")
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number in range(24):
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the tests' own process, which a slow machine must not end; programs of their own set theirs."""
    monkeypatch.setattr(train.stop, "GRACE_S", 600.0)


def command(protocol: str, backbone: Path, photos: Path, out: Path, *more: str) -> list[str]:
    flags = f"{protocol} --checkpoint {backbone} --data {photos} --val-data {photos} --output {out} --device cpu"
    return [*flags.split(), "--image-size", "32", *more]


class After:
    """Lets a function through so many times, and raises a signal at the next call; a second one would end the tests."""

    def __init__(self, function: Callable[..., Any], calls: int) -> None:
        self.function, self.left = function, calls

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)
        self.left -= 1
        return self.function(*arguments, **named)


@pytest.mark.parametrize("protocol", ["knn", "linear", "fewshot", "semi"])
def test_features_are_left_at_a_signal(
    protocol: str,
    backbone: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is saved: the command starts over, and says so with the code of an interrupt."""
    monkeypatch.setattr(train.measure.features, "_encode", After(train.measure.features._encode, 0))
    # Several batches, so that another piece of work would follow.
    monkeypatch.setattr("train.eval.session.FEATURE_BATCH", 4)
    more = [] if protocol == "knn" else ["--epochs", "1", "--global-batch", "8"]
    more += ["--fraction", "1.0"] if protocol in ("fewshot", "semi") else []
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert main(command(protocol, backbone, photos, tmp_path / "out.json", *more)) == 130
    assert "stopped by SIGTERM; the same command starts over: nothing was saved yet" in capsys.readouterr().err
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize(("protocol", "place"), [("linear", "pool"), ("semi", "fine_tune_epoch")])
def test_what_has_saved_an_epoch_goes_on(
    protocol: str,
    place: str,
    backbone: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = getattr(train.eval, protocol)
    more = ["--epochs", "3", "--global-batch", "8", "--deterministic"]
    more += ["--fraction", "1.0"] if protocol == "semi" else []
    with monkeypatch.context() as patched:
        # The linear probe takes three steps an epoch; the second epoch is left in its midst.
        patched.setattr(module, place, After(getattr(module, place), 4 if protocol == "linear" else 1))
        assert main(command(protocol, backbone, photos, tmp_path / "out.json", *more)) == 75
    assert "stopped by SIGTERM; the same command goes on from step 3" in capsys.readouterr().err
    assert main(command(protocol, backbone, photos, tmp_path / "out.json", *more)) == 0
    assert "continued after step 3" in capsys.readouterr().out
    assert main(command(protocol, backbone, photos, tmp_path / "whole.json", *more)) == 0
    kept = [
        re.sub(r'"seconds": [\d.]+|"output": "[^"]*"|"list": "[^"]*"', "", (tmp_path / name).read_text())
        for name in ("out.json", "whole.json")
    ]
    assert kept[0] == kept[1]


LONG_CALL = """
import hashlib, os, signal, sys, threading
import train.stop
from train.errors import run_to_exit_code
train.stop.GRACE_S = 0.5
with train.stop.watched(leave=True) as watch:
    watch.saved = sys.argv[1]
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    # One call into C, without Python's lock: no handler written in Python runs until it ends, after half an hour or so.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)
"""


@pytest.mark.parametrize(("saved", "code"), [("", 130), ("step 7", 75)])
def test_one_long_operation_is_left_in_its_midst(saved: str, code: int) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", LONG_CALL, saved], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code and time.monotonic() - begun < 30
    assert done.stderr.startswith("regatta: stopped by SIGTERM; the same command ") and done.stderr.count("\n") == 1


SLOW_WRITING = LONG_CALL.replace(
    "    # One call",
    """    with watch.whole_writing():
        import time
        time.sleep(3)
        print("written", flush=True)
    # One call""",
)


def test_a_checkpoint_is_written_to_its_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SLOW_WRITING, ""], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "written\n" and done.returncode == 130


def test_segmentation_is_left_while_its_files_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "r18.safetensors"
    save_backbone(build_encoder("resnet18"), weights, arch="resnet18")
    for kind, value in (("images", (90, 20, 30)), ("labels", 0)):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for number in range(6):
            picture = Image.new("RGB" if kind == "images" else "L", (32, 32), value)
            picture.save(tmp_path / "data" / kind / f"{number}.png")
    seen: list[int] = []
    inspected = train.eval.segment.inspect_all

    def asked(pairs: Any, runtime: Any, threads: int, after_pair: Callable[[], object]) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return inspected(pairs, runtime, threads, lambda: (seen.append(1), after_pair()))

    monkeypatch.setattr(train.eval.segment, "inspect_all", asked)
    data = str(tmp_path / "data")
    flags = ["--checkpoint", str(weights), "--data", data, "--val-data", data, "--device", "cpu", "--steps", "2"]
    assert main(["segment", *flags]) == 130 and len(seen) == 1
    assert "starts over" in capsys.readouterr().err


def test_detection_is_left_while_its_images_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "r18.safetensors"
    save_backbone(build_encoder("resnet18"), weights, arch="resnet18")
    write_coco(tmp_path / "coco", coco_document(4))
    write_coco(tmp_path / "coco", coco_document(2), "val")
    monkeypatch.setattr(train.eval.detect, "prove_images", After(train.eval.detect.prove_images, 0))
    data = str(tmp_path / "coco")
    assert main(["detect", "--checkpoint", str(weights), "--data", data, "--val-data", data, "--device", "cpu"]) == 130
    assert "starts over" in capsys.readouterr().err


def test_threads_leave_what_is_waiting() -> None:
    done: list[int] = []

    def work(item: int) -> int:
        time.sleep(0.01)
        done.append(item)
        return item

    def stop() -> None:
        raise Stopped("now")

    assert in_threads(work, range(5), 2, lambda: None) == [0, 1, 2, 3, 4]
    done.clear()
    with pytest.raises(Stopped):
        in_threads(work, range(1000), 2, stop)
    assert len(done) < 20


def test_lines_say_share_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train.eval.progress, "EVERY_S", 0.0)
    with Progress("features of val.beton", 40, "batches", True, done=10) as progress:
        progress._begun -= 10.0  # ten seconds for the ten pieces that follow
        for _ in range(10):
            progress.step()
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"features of val.beton: 50% \(20 of 40 batches\), 0:00:2\d left at \d\d:\d\d:\d\d", last)
    with Progress("features", 40, "batches", False) as progress:
        progress.step()
    assert capsys.readouterr().err == ""


def test_a_bar_moves_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("features", 4, "batches", True) as progress:
        for _ in range(4):
            time.sleep(0.11)  # a bar is drawn ten times a second at most
            progress.step()
    drawn = capsys.readouterr().err
    assert "features:  50%" in drawn and "2/4" in drawn and "batches/s" in drawn


def test_a_caller_s_thread_hears_no_signals() -> None:
    found: list[Any] = []

    def evaluate() -> None:
        with watched() as watch:
            watch.check()
            found.append(watch)

    thread = threading.Thread(target=evaluate)
    thread.start()
    thread.join()
    assert isinstance(found[0], EvaluationWatch) and found[0].asked == ""


def test_inner_blocks_share_the_watch() -> None:
    with watched(leave=True) as outer:
        with watched() as inner:
            assert inner is outer
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        with pytest.raises(Stopped, match="stopped by SIGUSR1") as stopped:
            outer.check()
        assert stopped.value.code == 130
        assert fetch._stopping
    assert not fetch._stopping, "what this process does next waits for busy servers again"


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_signal_is_the_caller_s_again_after_a_run_in_its_process(number: signal.Signals) -> None:
    def callers_own(*_: object) -> None:
        raise AssertionError("only to be set")

    before = signal.signal(number, callers_own)
    try:
        with pytest.raises(Stopped), handlers_kept():
            SignalWatch()
            assert signal.getsignal(number) != callers_own
            fetch.stop_waiting()
            raise Stopped("as after a signal")
        assert signal.getsignal(number) == callers_own
        assert not fetch._stopping, "what the caller does next waits for busy servers again"
    finally:
        signal.signal(number, before)


def test_a_handler_that_only_the_embedding_program_knows_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(signal, "getsignal", lambda _: None)
        with handlers_kept():
            pass
    with pytest.raises(TypeError):
        signal.signal(signal.SIGUSR1, None)
