"""Several processes: one mistake is one line, exit codes survive our own launcher, and signals reach every rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from pipeline.file_kinds import foreign_kind
from pipeline.listing import list_images
from pipeline.loaders import choose_loader
from tests.runs import free_port
from train.config import RunConfig
from train.errors import RunEnd, UserMistake
from train.launch import STARTED_HERE, run_processes, starts_others
from train.main import main
from train.meeting import join
from train.resolve import resolve
from train.runtime import _limit

ROOT = Path(__file__).resolve().parents[1]
SOON = timedelta(seconds=1)
MAIN = str(ROOT / "train/main.py")
WRONG = ["--method", "moco-v2", "--data", "photos", "--dim", "0"]


def clean(**more: str) -> dict[str, str]:
    """The environment without what a launcher sets."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", STARTED_HERE)
    kept = {name: value for name, value in os.environ.items() if name not in launcher and not name.startswith("SLURM")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_ranks_say_the_same_mistake_once(launcher: str) -> None:
    def environment(rank: int) -> dict[str, str]:
        if launcher == "torchrun":
            return clean(RANK=str(rank), WORLD_SIZE="3")
        return clean(SLURM_PROCID=str(rank), SLURM_STEP_NUM_TASKS="3", SLURM_JOB_ID="7", SLURM_STEP_ID="0")

    ranks = [
        subprocess.Popen([sys.executable, MAIN, *WRONG], env=environment(rank), stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2, 2]
    assert "".join(said).count("regatta:") == 1 and "--dim" in "".join(said)


def test_different_mistakes_of_ranks_are_all_said() -> None:
    commands = [[sys.executable, MAIN, *WRONG], [sys.executable, MAIN, "--method", "moco-v2", "--no-such-flag"]]
    ranks = [
        subprocess.Popen(command, env=clean(RANK=str(rank), WORLD_SIZE="2"), stderr=subprocess.PIPE, text=True)
        for rank, command in enumerate(commands)
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert "--dim" in said[0] and "--no-such-flag" in said[1]


def test_the_launcher_is_left_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(WRONG) == 2
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"].startswith("regatta: --dim") and int(message["extraInfo"]["timestamp"]) > 0


@pytest.mark.slow
def test_torchrun_s_report_ends_in_the_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", MAIN, *WRONG]
    done = subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=300)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and sum(line.startswith("regatta:") for line in lines) == 1
    assert "regatta: --dim" in lines[-2], lines[-3:]


SCRIPT = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
"""


def script(folder: Path, body: str) -> str:
    path = folder / "script.py"
    path.write_text(SCRIPT + body)
    return str(path)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(75)", 75),
        ("time.sleep(0.3 * rank); sys.exit(75 if rank else 0)", 75),
        ("sys.exit(2) if rank == 1 else time.sleep(60)", 2),
        ("os.kill(os.getpid(), 9) if rank == 0 else time.sleep(60)", 137),
        ("sys.exit(0 if os.environ['WORLD_SIZE'] == '2' and os.environ['LOCAL_RANK'] == str(rank) else 4)", 0),
    ],
)
def test_the_run_s_code_is_that_of_its_processes(tmp_path: Path, body: str, code: int) -> None:
    started = time.monotonic()
    assert run_processes(2, script(tmp_path, body), []) == code
    assert time.monotonic() - started < 20


def test_a_process_that_heeds_no_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.launch._GRACE_S", 0.3)
    ready = tmp_path / "ready"
    body = (
        f"ready = {str(ready)!r}\n"
        "if rank == 0:\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    open(ready, 'w').close()\n"
        "    time.sleep(60)\n"
        "while not os.path.exists(ready):\n"
        "    time.sleep(0.02)\n"
        "sys.exit(4)"
    )
    started = time.monotonic()
    assert run_processes(2, script(tmp_path, body), []) == 4
    assert time.monotonic() - started < 20


def test_signals_reach_every_process(tmp_path: Path) -> None:
    body = (
        f"folder = {str(tmp_path)!r}\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "open(f'{folder}/{rank}', 'w').close()\n"
        "time.sleep(60)"
    )
    launcher = launched(tmp_path, body)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 75


def test_no_process_outlives_a_launcher_that_was_killed(tmp_path: Path) -> None:
    body = (
        f"folder = {str(tmp_path)!r}\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open(f'{folder}/{rank} asked', 'w').close(), sys.exit(75)))\n"
        "open(f'{folder}/{rank}', 'w').close()\n"
        "time.sleep(60)"
    )
    launcher = launched(tmp_path, body)
    launcher.kill()
    assert launcher.wait(30) == -signal.SIGKILL
    wait_for(tmp_path / "0 asked", tmp_path / "1 asked")


def launched(tmp_path: Path, body: str) -> subprocess.Popen[bytes]:
    """A launcher of two processes, each of which has left a file named by its rank."""
    call = f"run_processes(2, {script(tmp_path, body)!r}, [])"
    program = f"import sys; from train.launch import run_processes; sys.exit({call})"
    launcher = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=clean())
    wait_for(tmp_path / "0", tmp_path / "1")
    return launcher


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.05)


def test_processes_and_another_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (STARTED_HERE, "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert RunConfig().processes == 1 and not starts_others(1) and starts_others(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserMistake, match="torchrun has started"):
        starts_others(2)
    monkeypatch.setenv(STARTED_HERE, "2")
    assert not starts_others(2)


@pytest.mark.slow
def test_a_stopped_run_of_two_processes_ends_with_75(tmp_path: Path) -> None:
    words = (
        "--processes 2 --method moco-v2 --recipe moco-v2-small --loader synthetic --data 64 --global-batch 8 "
        "--queue-size 64 --bn.group-size 4 --arch resnet18 --image-size 32 --device cpu --log-every 1 --run-dir"
    )
    command = [sys.executable, MAIN, *words.split(), str(tmp_path / "run")]
    run = subprocess.Popen(command, env=clean(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    rows, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not (rows.exists() and '"train"' in rows.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=100)
    assert run.returncode == 75, said
    assert sum(line.startswith("regatta:") for line in said.splitlines()) == 1, said


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(held.getsockname()[1]))
        with pytest.raises(UserMistake, match="port in use: 127.0.0.1:.* another MASTER_PORT"):
            join("gloo", 0, 2, SOON)


def test_a_process_that_never_comes_ends_the_wait_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by killing one of two ranks in its first moments: the other one waited for half an hour."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RunEnd, match="not all 2 processes have come to 127.0.0.1:.* within 1 s") as caught:
        join("gloo", 0, 2, SOON)
    assert caught.value.code == 6


@pytest.mark.parametrize(("rank", "launcher"), [(1, ""), (0, "True")])
def test_an_absent_host_ends_the_wait_in_time(rank: int, launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by killing rank 0 at its start: PyTorch's own wait for it lasts up to three times its limit."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", launcher)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: pytest.fail("left to PyTorch"))
    began = time.monotonic()
    line = "nobody answers at 127.0.0.1:.*Connection refused, for 1 s.* was rank 0 killed"
    with pytest.raises(RunEnd, match=line) as end:
        join("gloo", rank, 2, SOON)
    assert end.value.code == 6 and time.monotonic() - began < 3


def test_the_others_wait_for_a_host_that_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    arrived: list[bool] = []

    def meet(*_: object, **__: object) -> object:
        arrived.append(True)
        raise torch.distributed.DistStoreError("as if one more never came")

    monkeypatch.setattr(torch.distributed, "rendezvous", meet)
    with socket.socket() as host:
        late = threading.Timer(0.5, lambda: (host.bind(("127.0.0.1", port)), host.listen()))
        late.start()
        with pytest.raises(RunEnd, match="not all 2 processes have come"):
            join("gloo", 1, 2, timedelta(seconds=30))
        late.join()
    assert arrived


def test_no_one_waits_longer_than_the_run_may_stand_still_or_too_short_for_a_start() -> None:
    limits = [_limit(replace(RunConfig(), hang_timeout=seconds)).total_seconds() for seconds in (3, 7200, 0)]
    assert limits[:2] == [60, 7200] and limits[2] > 1e7


@pytest.mark.parametrize(
    ("reason", "line", "code"),
    [
        ("failed to recv, got 0 bytes: Broken pipe", "another process has left while all were meeting", 1),
        # Rank 0 was there when this one looked, and stands still or has gone since.
        ("The client socket has timed out after 1000ms", "nobody answers at .* was rank 0 killed", 6),
    ],
)
def test_a_rank_that_leaves_while_all_meet_is_no_mistake_of_the_others(
    reason: str, line: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by killing one of four ranks at its start: the others told to check their addresses, with code 2."""

    def gone(*arguments: object, **named: object) -> None:
        raise torch.distributed.DistNetworkError(f"{reason}\nframe #1: ...")

    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(None, 1, 4)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", gone)
    with socket.create_server(("127.0.0.1", 0)) as host:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(host.getsockname()[1]))
        with pytest.raises(RunEnd, match=line) as caught:
            join("gloo", 1, 4, SOON)
    assert caught.value.code == code


@pytest.mark.parametrize(("address", "port"), [("", "29500"), ("127.0.0.1", ""), ("127.0.0.1", "abc")])
def test_a_place_to_meet_that_is_none_is_one_line(address: str, port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserMistake, match="MASTER_ADDR=.* MASTER_PORT=.* export both"):
        join("gloo", 1, 2, SOON)


# --- data that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"PK\x03\x04" + bytes(40), "is a zip archive: unpack it"),
        (b"\x1f\x8b\x08" + bytes(40), "is a gzip archive: unpack it"),
        (b"\0\0\0\x20ftypisom" + bytes(40), "is a video: take single frames"),
        (b"\x1a\x45\xdf\xa3" + bytes(40), "is a video: take single frames"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "is an image: give the folder"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "is an image: give the folder"),
        (b"RIFF\0\0\0\0AVI LIST" + bytes(40), "is a video: take single frames"),
        (bytes(257) + b"ustar\0", "is a tar archive: name it"),
    ],
)
def test_files_that_are_no_list_are_named(tmp_path: Path, head: bytes, what: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(head)
    with pytest.raises(ValueError, match=what):
        list_images(path)


def test_a_list_of_paths_is_none_of_them(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    for text in ("a.jpg\nb.jpg\n", "", "PK/1.jpg\n", "BZ/2.jpg\n"):
        path.write_text(text)
        assert foreign_kind(path) == ""


@pytest.mark.parametrize("pattern", ["nowhere/a-{000..002}.tar", "nowhere/*.tar"])
def test_a_pattern_that_matches_no_shard(tmp_path: Path, pattern: str) -> None:
    from pipeline.shard_store import open_shards

    with pytest.raises(ValueError, match="no file matches"):
        open_shards(str(tmp_path / pattern), "global", 1, 16)


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file matches"):
        choose_loader(str(tmp_path / "*.beton"))


def test_a_folder_as_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match="is a folder; give the config.json in it"):
        resolve(["--config", str(tmp_path)])
