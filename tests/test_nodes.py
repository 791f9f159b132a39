"""Two machines, as two network namespaces: one is lost, the rest ends in time with its name, the same command goes on.

Needs the right to make network namespaces (root, `ip` of iproute2). Each machine runs a torchrun of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runs import TINY, comparable, free_port, last_wins, rows, run
from tests.test_slurm_cluster import until
from tests.test_together import ranks_of

MAIN = Path(__file__).resolve().parents[1] / "train" / "main.py"
LIMIT_S = 25


@dataclass(frozen=True)
class Machine:
    """A network namespace with one address and one interface to the other machine."""

    name: str
    interface: str
    address: str

    def call(self, *command: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True, capture_output=True)

    def link(self, state: str) -> None:
        """Set the interface up or down: as a cable that is pulled, nobody is told."""
        self.call("ip", "link", "set", self.interface, state)


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("network namespaces need root and iproute2")
    made = [Machine(f"rg{os.getpid()}{side}", f"rg{side}", f"10.77.31.{n}") for n, side in ((1, "a"), (2, "b"))]
    probe = subprocess.run(["ip", "netns", "add", made[0].name], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no network namespace can be made here: {probe.stderr.strip()}")
    try:
        subprocess.run(["ip", "netns", "add", made[1].name], check=True)
        first, second = made
        pair = ["ip", "link", "add", first.interface, "netns", first.name, "type", "veth", "peer", "name"]
        subprocess.run([*pair, second.interface, "netns", second.name], check=True)
        for machine in made:
            machine.call("ip", "addr", "add", f"{machine.address}/24", "dev", machine.interface)
            machine.call("ip", "link", "set", "lo", "up")
            machine.link("up")
        yield made
    finally:
        for machine in made:
            subprocess.run(["ip", "netns", "delete", machine.name], capture_output=True)


def start(
    machines: list[Machine], port: int, argv: list[str], logs: Path, restarts: int = 0, meeting: str = "static"
) -> list[subprocess.Popen[bytes]]:
    """A torchrun on each machine; the first one's is where they meet."""
    launchers = []
    for number, machine in enumerate(machines):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": machine.interface}
        place = [f"--node_rank={number}", f"--master_addr={machines[0].address}", f"--master_port={port}"]
        if meeting == "c10d":
            # Both namespaces have the host name of this machine, by which torchrun would tell who keeps the store.
            host = ["--rdzv-conf", f"is_host={1 - number}", f"--rdzv-endpoint={machines[0].address}:{port}"]
            place = ["--rdzv-backend=c10d", "--rdzv-id=job", *host, f"--local-addr={machine.address}"]
        place += [f"--max-restarts={restarts}"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *place]
        command = ["ip", "netns", "exec", machine.name, *launcher, str(MAIN), *argv]
        with (logs / f"{number}.log").open("ab") as log:
            launchers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return launchers


def lose(machines: list[Machine], launchers: list[subprocess.Popen[bytes]], how: str) -> None:
    """What befalls the second machine."""
    if how == "link":
        machines[1].link("down")
        return
    # `ip netns exec` becomes the command, so that the launcher is the child itself.
    for pid in (launchers[1].pid, *ranks_of(launchers[1].pid)):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "link"])
def test_a_lost_machine_ends_the_job_and_the_same_command_goes_on(tmp_path, machines, how):
    common = last_wins(
        ["--method", "moco-v2", "--recipe", "moco-v2", *TINY, "--hang-timeout", str(LIMIT_S), "--run-dir"]
    )
    whole, struck = tmp_path / "whole", tmp_path / "struck"
    assert run([*common, str(whole)], 2) == [0, 0]
    port = free_port()
    launchers = start(machines, port, [*common, str(struck)], tmp_path)
    until(lambda: (struck / "metrics.jsonl").exists() and bool(rows(struck, "checkpoint")), 200, "a checkpoint")
    lose(machines, launchers, how)
    # torchrun looks after its processes every few seconds and gives them some more to end.
    until(lambda: launchers[0].poll() is not None, LIMIT_S + 60, "the job of the machine that is left has ended")
    said = [line for line in (tmp_path / "0.log").read_text().splitlines() if line.startswith("regatta: ")]
    assert said and "rank 1" in said[-1] and ("gone" in said[-1] or "no sign of life" in said[-1]), said
    if how == "link":
        until(lambda: launchers[1].poll() is not None, LIMIT_S + 60, "the machine that was cut off has ended")
        machines[1].link("up")
    assert all(launcher.wait(30) for launcher in launchers)
    again = start(machines, free_port(), [*common, str(struck)], tmp_path)
    assert [launcher.wait(300) for launcher in again] == [0, 0], (tmp_path / "0.log").read_text()[-3000:]
    assert len(rows(struck, "resume")) == 1 and comparable(struck) == comparable(whole)


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("meeting", ["static", "c10d"])
def test_launchers_of_two_machines_start_their_processes_again(tmp_path, machines, meeting, culprit):
    """A killed rank ends the one on the other machine; both launchers start theirs again, which meet and go on."""
    common = last_wins(
        ["--method", "moco-v2", "--recipe", "moco-v2", *TINY, "--hang-timeout", str(LIMIT_S), "--run-dir"]
    )
    whole, struck = tmp_path / "whole", tmp_path / "struck"
    assert run([*common, str(whole)], 2) == [0, 0]
    launchers = start(machines, free_port(), [*common, str(struck)], tmp_path, restarts=3, meeting=meeting)
    until(lambda: (struck / "metrics.jsonl").exists() and bool(rows(struck, "checkpoint")), 200, "a checkpoint")
    os.kill(ranks_of(launchers[culprit].pid)[0], signal.SIGKILL)
    said = [(tmp_path / f"{number}.log") for number in (0, 1)]
    assert [launcher.wait(300) for launcher in launchers] == [0, 0], [log.read_text()[-2000:] for log in said]
    assert len(rows(struck, "resume")) == 1 and comparable(struck) == comparable(whole)
