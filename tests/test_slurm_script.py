"""Batch scripts of SLURM: what they derive, when they requeue, what is refused before a job waits in the queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import slurm
from tools.support.batch_scripts import array_script
from tools.support.cli import call
from train.slurm import meeting_place

TRAINING = ["--method", "moco-v2", "--data", "my photos.beton", "--global-batch", "64"]


def write(folder: Path, *flags: str, training: list[str] = TRAINING) -> Path:
    script = folder / "train.sbatch"
    own = ["--output", str(script), "--logs", str(folder / "logs"), *flags]
    assert call(slurm.main, [*own, "--", *training]) == 0
    return script


def directives(script: Path) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


def test_what_the_job_asks_for(tmp_path, capsys):
    script = write(tmp_path, "--nodes", "2", "--gpus-per-node", "4", "--partition", "a100", "--sbatch=--account=me")
    asked = directives(script)
    assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""
    assert asked | {"output": ""} == {
        "job-name": "moco-v2",
        "nodes": "2",
        "ntasks-per-node": "4",
        "cpus-per-task": "8",
        "gpus-per-node": "4",
        "time": "24:00:00",
        "signal": "B:TERM@300",
        "requeue": "",
        "open-mode": "append",
        "output": "",
        "partition": "a100",
        "account": "me",
    }
    assert asked["output"] == f"{tmp_path}/logs/%x-%j.log" and (tmp_path / "logs").is_dir()
    assert "'my photos.beton'" in script.read_text() and f"next: sbatch {script}" in capsys.readouterr().out
    asked = directives(write(tmp_path, "--nodes", "2", "--gpus-per-node", "4", "--launcher", "torchrun", "--name", "x"))
    assert (asked["ntasks-per-node"], asked["cpus-per-task"], asked["job-name"]) == ("1", "32", "x")
    asked = directives(write(tmp_path, "--gpus-per-node", "0", "--tasks-per-node", "2", "--cpus-per-task", "1"))
    assert (asked["ntasks-per-node"], asked["cpus-per-task"]) == ("2", "1") and "gpus-per-node" not in asked


@pytest.mark.parametrize(
    ("flags", "training", "words"),
    [
        ([], [], "behind --"),
        ([], ["--method", "moco-v2"], "--data is needed"),
        ([], [*TRAINING, "--qeue-size", "3"], "--queue-size"),
        ([], [*TRAINING, "--processes", "8"], "give --tasks-per-node"),
        (["--nodes", "3"], TRAINING, "a multiple of 24"),
        (["--time", "tomorrow"], TRAINING, "--time tomorrow"),
        (["--tasks-per-node", "2"], TRAINING, "one GPU"),
        (["--gpus-per-node", "-1"], TRAINING, "cannot be negative"),
        (["--launcher", "mpirun"], TRAINING, "mpirun"),
    ],
)
def test_mistakes_are_told_before_a_job_waits(tmp_path, capsys, flags, training, words):
    arguments = ["--output", str(tmp_path / "s"), "--logs", str(tmp_path / "logs"), *flags, "--", *training]
    assert call(slurm.main, arguments) == 2 and not (tmp_path / "s").exists()
    assert words in capsys.readouterr().err


FAKES = {
    "scontrol": 'case "$1 $2" in "show hostnames") printf "n3\\nn4\\n";; "show node") '
    'echo "NodeName=$3 Arch=x86_64 NodeAddr=10.0.0.$(echo $3 | tr -d n) NodeHostName=$3";; '
    '*) echo "$@" >> "$CALLS";; esac',
    # It takes its time, so that the second signal comes while the first is passed on.
    "scancel": 'echo "$@" >> "$CALLS"; sleep 0.3; touch "$TOLD"',
    "srun": 'echo "srun $MASTER_ADDR $MASTER_PORT $*" >> "$CALLS"; for i in $(seq 200); do [ -e "$TOLD" ] && break; '
    '[ -n "$AT_ONCE" ] && break; sleep 0.05; done; exit "$CODE"',
}


def execute(script: Path, folder: Path, code: int, stop: bool, nodes: int = 2) -> tuple[int, list[str]]:
    """Run a script among pretended SLURM commands; gives its exit code and what it called."""
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    job = {"JOB_ID": "1001", "JOB_NODELIST": "n[3-4]", "JOB_NUM_NODES": str(nodes), "CPUS_PER_TASK": "8"}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))},
        **{f"SLURM_{name}": value for name, value in job.items()},
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "TOLD": str(folder / "told"),
        "CODE": str(code),
        "AT_ONCE": "" if stop else "yes",
    }
    shell = subprocess.Popen(["bash", script], env=environment, stdout=subprocess.PIPE)
    if stop:
        deadline = time.monotonic() + 20
        while not (calls.exists() and "srun" in calls.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        shell.send_signal(signal.SIGTERM)
        while "TERM" not in calls.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        shell.send_signal(signal.SIGTERM)
    return shell.wait(30), calls.read_text().splitlines()


def test_the_meeting_place_is_derived_in_the_script(tmp_path):
    script = write(tmp_path)
    _, calls = execute(script, tmp_path / "two", 0, stop=False)
    # The address that SLURM itself uses for the first node, and the port that train/slurm.py would take.
    port = meeting_place({"SLURM_JOB_ID": "1001"})["MASTER_PORT"]
    assert calls[0].startswith(f"srun 10.0.0.3 {port} --kill-on-bad-exit=0 --wait=0 --cpus-per-task=8 {sys.executable}")
    assert calls[0].endswith("train/main.py --method moco-v2 --data my photos.beton --global-batch 64")
    assert execute(script, tmp_path / "one", 0, stop=False, nodes=1)[1][0].startswith(f"srun 127.0.0.1 {port} ")
    _, calls = execute(write(tmp_path, "--launcher", "torchrun"), tmp_path / "torchrun", 0, stop=False)
    assert "-m torch.distributed.run --nnodes=2 --nproc_per_node=8 --rdzv_id=1001" in calls[0]
    assert f"--rdzv_backend=c10d --rdzv_endpoint=10.0.0.3:{port} " in calls[0]


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_job_is_requeued_where_the_run_was_stopped_and_saved(tmp_path, launcher):
    script = write(tmp_path, "--launcher", launcher)
    # torchrun ends with 1 where its processes ended with 75.
    stopped = 75 if launcher == "srun" else 1
    code, calls = execute(script, tmp_path / "stopped", stopped, stop=True)
    assert code == stopped and calls[1:] == ["--signal=TERM 1001", "requeue 1001"], "told once, requeued once"
    for name, ended, stop in (("done", 0, False), ("mistake", 2, False), ("done in time", 0, True)):
        code, calls = execute(script, tmp_path / name, ended, stop)
        assert code == ended and not [call for call in calls if "requeue" in call], name
    # A server that was too busy ends a run with 75 without any signal; only srun keeps that code.
    code, calls = execute(script, tmp_path / "busy", 75, stop=False)
    assert ("requeue 1001" in calls) == (launcher == "srun")


def test_the_array_of_a_table_is_told_directly(tmp_path):
    script = tmp_path / "table.sbatch"
    script.write_text(array_script(["python", "tools/reproduce.py", "a b"], 10, 8))
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""
    assert "--array=0-9" in text and "python tools/reproduce.py 'a b' --task" in text
    assert 'kill -TERM "$child"' in text and 'requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"' in text
