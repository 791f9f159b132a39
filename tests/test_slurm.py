"""What SLURM's variables say: ranks only under srun, a port of each job's own, the first node as meeting place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.runs import TINY, finish
from train.runtime import _launch_environment
from train.slurm import first_node, meeting_place, step_ranks

BATCH = {
    "SLURM_JOB_ID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "8",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly these variables of a launcher, and takes back what the code adds."""
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is taken back after the test
        monkeypatch.delenv(name)

    def give(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"MASTER_ADDR": "gpu03", "MASTER_PORT": "29741"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"},
    ],
)
def test_a_batch_scripts_own_python_is_one_process(environment, more) -> None:
    environment({**BATCH, **more})
    assert _launch_environment() == (0, 1, 0) and "RANK" not in os.environ


def test_tasks_of_srun_meet_on_the_first_node_at_the_jobs_port(environment) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_ID": "0", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}
    environment({**BATCH, **step, "SLURM_JOB_ID": "1001"})
    assert _launch_environment() == (11, 16, 3)
    assert os.environ["MASTER_ADDR"] == "gpu03" and os.environ["MASTER_PORT"] == str(15000 + 1001 * 8)
    assert os.environ["RANK"] == "11" and os.environ["WORLD_SIZE"] == "16"


def test_what_the_user_exports_stands(environment) -> None:
    environment({**BATCH, "SLURM_STEP_NUM_TASKS": "8", "MASTER_ADDR": "ib-gpu03", "MASTER_PORT": "29741"})
    assert _launch_environment() == (0, 8, 0)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("ib-gpu03", "29741")


def test_ports_of_jobs_and_steps_differ_and_are_no_outgoing_ones() -> None:
    ports = {
        meeting_place({"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)})["MASTER_PORT"]
        for j in range(2000)
        for s in range(8)
    }
    assert len(ports) == 16000 and all(15000 <= int(port) < 32768 for port in ports)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-07,9],cpu1", "gpu03"),
        ("a-b[7,9]", "a-b7"),
        ("cpu1,gpu[3-4]", "cpu1"),
        ("r[1-2]n[05-08]", "r1n05"),
        ("node[001]", "node001"),
        ("", ""),
    ],
)
def test_first_node_of_a_list(nodes, first) -> None:
    assert first_node(nodes) == first


def test_one_node_needs_no_name_and_a_bound_gpu_is_number_0() -> None:
    place = meeting_place({"SLURM_STEP_NODELIST": "gpu03", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": "7"})
    assert place["MASTER_ADDR"] == "127.0.0.1"
    task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    assert step_ranks(task) == (1, 2, 1)
    assert (
        step_ranks({**task, "SLURM_GPUS_PER_TASK": "1"})
        == step_ranks({**task, "SLURM_GPUS_PER_TASK": "a100:1"})
        == (1, 2, 0)
    )


@pytest.mark.slow
def test_two_jobs_on_one_node_do_not_meet(environment, tmp_path: Path, monkeypatch) -> None:
    from tests import runs

    jobs = {}
    for job in ("1001", "1002"):
        log = tmp_path / f"{job}.log"
        for rank in range(2):
            values = {"SLURM_JOB_ID": job, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"}
            shared = {**values, "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1", "GLOO_SOCKET_IFNAME": "lo"}
            process = runs._CONTEXT.Process(target=runs._enter, args=([*argv(tmp_path / job)], shared, str(log)))
            process.start()
            jobs.setdefault(job, []).append(process)
    assert [finish(processes) for processes in jobs.values()] == [[0, 0], [0, 0]]
    assert all(runs.rows(tmp_path / job, "start")[0]["world_size"] == 2 for job in jobs)


def argv(run_dir: Path) -> list[str]:
    return [*"--method moco-v2 --recipe moco-v2".split(), *TINY, "--run-dir", str(run_dir), "--max-steps", "3"]
