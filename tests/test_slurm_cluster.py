"""A SLURM of two nodes on this machine, of Debian's packages: a stopped job requeues itself and loses nothing.

`apt-get install slurm-wlm munge`, as root. The two nodes are two daemons of this machine under names of their own.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.runs import TINY, comparable, free_port, rows, run
from tools import slurm
from tools.support.cli import call

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CONFIG = """
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Path]:
    """The folder of a running cluster, whose configuration is set in the environment."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.skip(f"needs SLURM ({', '.join(missing) or 'is there'}; apt-get install slurm-wlm munge) and root")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    host, config = socket.gethostname().partition(".")[0], folder / "slurm.conf"
    ports = {name: free_port() for name in ("control", "first", "second")}
    config.write_text(CONFIG.format(folder=folder, host=host, **ports))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    files = [
        f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(config)
    try:
        subprocess.run(["munged", "--force", f"--key-file={key}", *files], check=True, capture_output=True)
        subprocess.run(["slurmctld", "-f", config], check=True, capture_output=True)
        for node in ("n1", "n2"):
            subprocess.run(["slurmd", "-N", node, "-f", config], check=True, capture_output=True)
        until(lambda: ask("sinfo", "-h", "-o", "%T") == "idle", 60, "both nodes are idle")
        yield folder
    finally:
        for path in [*folder.glob("slurm*.pid"), folder / "munge.pid"]:
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.5)


def state(job: str) -> str:
    fields = dict(word.partition("=")[::2] for word in ask("scontrol", "show", "job", job, "--oneliner").split())
    return fields["JobState"]


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "launcher"), [(1, "srun"), (2, "srun"), (2, "torchrun")])
def test_a_stopped_job_requeues_itself_and_ends_as_undisturbed(cluster, tmp_path, monkeypatch, nodes, launcher):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    training = ["--method", "moco-v2", "--recipe", "moco-v2", *TINY, "--run-dir"]
    assert run([*training, str(tmp_path / "whole")], nodes) == [0] * nodes
    script, struck = tmp_path / "train.sbatch", tmp_path / "struck"
    size = f"--nodes {nodes} --gpus-per-node 0 --cpus-per-task 1 --time 30 --launcher {launcher}".split()
    own = ["--output", str(script), "--logs", str(tmp_path / "logs"), *size]
    assert call(slurm.main, [*own, "--", *training, str(struck)]) == 0
    job = ask("sbatch", "--parsable", str(script))
    until(lambda: (struck / "metrics.jsonl").exists() and bool(rows(struck, "train")), 200, "the first row")
    # What `--signal=B:TERM@...` has SLURM do ahead of the time limit.
    ask("scancel", "--batch", "--signal=TERM", job)
    until(lambda: state(job) == "PENDING", 100, "the job is in the queue again")
    # SLURM holds a requeued job back for two minutes, in which its nodes forget the stopped one.
    time.sleep(5)
    ask("scontrol", "update", f"jobid={job}", "StartTime=now")
    until(lambda: state(job) not in ("PENDING", "RUNNING", "COMPLETING"), 300, "the job has ended")
    (log,) = (tmp_path / "logs").iterdir()
    text = log.read_text()
    assert state(job) == "COMPLETED", text[-3000:]
    assert "start 0: n" in text and "start 1: n" in text and len(rows(struck, "resume")) == 1, text[-3000:]
    assert comparable(struck) == comparable(tmp_path / "whole")
