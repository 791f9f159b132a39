"""The machine under a run: process group, device, precision, compilation."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.prefetch import set_sharing_processes

from .cards import refuse_without_code
from .config import RunConfig
from .errors import RunEnd, UserMistake
from .meeting import join
from .slurm import meeting_place, step_ranks
from .together import Together

_MEET_S = 60
"""Least patience with the other processes at the start: they begin some time apart, on a busy machine far apart."""


@dataclass(frozen=True)
class Runtime:
    """Where and in what precision this process works.

    Attributes:
        rank: this process among `world_size`.
        world_size: number of processes.
        device: its device.
        dtype: autocast dtype; float32 means no autocast.
        compile: whether heads and losses are compiled.
        host_group: a gloo group for decisions of the host; None with one process.
        together: watches over this rank and listens to the others; None where nobody does.
    """

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    compile: bool
    host_group: Any = None
    together: Together | None = None

    def at(self, place: str) -> None:
        """Note progress and where the main thread is now, such as "saves"; the first note starts `--hang-timeout`."""
        if self.together is not None:
            self.together.at(place)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast in the run's precision; does nothing in fp32."""
        # The weights are fp32 already, so there is nothing to cast.
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def agree(self, flag: bool) -> bool:
        """Whether any process says so; every process must call it at the same step."""
        if self.host_group is None:
            return flag
        # A tensor on the host over gloo: on the device the answer would wait for all queued work.
        said = torch.tensor([int(flag)])
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(said.item())

    def any_rank(self, flag: Tensor) -> Tensor:
        """Whether any process's boolean tensor is true, on the device and without a wait of the host."""
        if self.world_size == 1:
            return flag
        said = flag.to(torch.uint8)
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return said.bool()

    def gather_objects(self, value: Any) -> list[Any]:
        """The small picklable values of all processes, in rank order; every process must call it."""
        if self.host_group is None:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        # Over gloo as well: NCCL would move the pickled bytes through the device and wait for it.
        dist.all_gather_object(gathered, value, group=self.host_group)
        return gathered

    def first_rank_does(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0; an error that ends the run there ends it on every rank, with the same message.

        Without this the other ranks would wait for rank 0 in their next exchange. Every process must call it.

        Raises:
            RunEnd: what `action` raised, on every rank.
        """
        end: RunEnd | None = None
        if self.is_main:
            try:
                action()
            except RunEnd as raised:
                end = raised
        told: RunEnd | None = self.gather_objects(end)[0]
        if told is not None:
            raise told

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all processes joined on the CPU in rank order; processes may hold different numbers of them."""
        return torch.cat(self.gather_objects(rows.cpu()))


def _launch_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun, or from SLURM when srun started one task a process.

    Raises:
        UserMistake: when srun started several tasks that cannot find each other; each would train alone.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    ranks = step_ranks(env)
    if ranks is None:
        return 0, 1, 0
    place = meeting_place(env)
    if "MASTER_ADDR" not in {**env, **place}:
        raise UserMistake(
            f"srun started {ranks[1]} tasks, MASTER_ADDR is not set and SLURM_STEP_NODELIST names no node: export the "
            "first node's name in MASTER_ADDR, or unset SLURM_STEP_NUM_TASKS to train alone"
        )
    # PyTorch's own rendezvous reads these.
    env.update(place, RANK=str(ranks[0]), WORLD_SIZE=str(ranks[1]))
    return ranks


def runs_on_cpu(wanted: str) -> bool:
    """Whether `--device` means the CPU here: it says so, or leaves the choice where there is no GPU."""
    return wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available())


def _choose_device(wanted: str, local_rank: int) -> torch.device:
    if runs_on_cpu(wanted):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserMistake("--device cuda: PyTorch sees no CUDA device here; use --device cpu or check the driver")
    # With --gpus-per-task each task of srun sees its own GPU alone, whatever its number on the node. Processes of
    # torchrun see the same devices, and those beyond them are refused here, where the message can name the flag.
    if torch.cuda.device_count() == 1 and "SLURM_LOCALID" in os.environ and "LOCAL_RANK" not in os.environ:
        local_rank = 0
    if local_rank >= torch.cuda.device_count():
        raise UserMistake(
            f"local rank {local_rank} has no GPU, {torch.cuda.device_count()} are visible; "
            "lower --nproc_per_node or check CUDA_VISIBLE_DEVICES"
        )
    # NCCL's collectives use the current device, which would be GPU 0 for every rank.
    torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank)
    refuse_without_code(device)
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Autocast dtype: `auto` is bf16 from Ampere on, fp16 on older GPUs, fp32 on the CPU."""
    if precision == "auto":
        if device.type == "cpu":
            return torch.float32
        # Compute capability 8 is Ampere, the first with bf16 tensor cores.
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def bind_to_numa_node(device: torch.device) -> None:
    """Keep this process on the cores next to its GPU, where the system tells which those are."""
    if device.type != "cuda" or not hasattr(os, "sched_setaffinity"):
        return
    properties: Any = torch.cuda.get_device_properties(device)
    bus = getattr(properties, "pci_bus_id", None)
    # Not every version of PyTorch tells it.
    if bus is None:
        return
    address = f"{properties.pci_domain_id:04x}:{bus:02x}:{properties.pci_device_id:02x}.0"
    with contextlib.suppress(OSError, ValueError):
        cores: set[int] = set()
        for part in Path(f"/sys/bus/pci/devices/{address}/local_cpulist").read_text().strip().split(","):
            low, _, high = part.partition("-")
            cores.update(range(int(low), int(high or low) + 1))
        # Within the cores that the scheduler gave to this job; an empty set would be refused by the system.
        near = cores & os.sched_getaffinity(0)
        if near:
            os.sched_setaffinity(0, near)


def compiles(wanted: bool | None, device: torch.device) -> bool:
    """Whether heads and losses are compiled: as `wanted`, or by default on a GPU where Triton has what it needs."""
    if wanted is not None or device.type != "cuda":
        return bool(wanted)
    missing = _missing_for_triton()
    if missing:
        print(f"heads are not compiled: Triton needs {missing}", file=sys.stderr)
    return not missing


def _missing_for_triton() -> str:
    """What Triton lacks to build its launcher, a C extension, at the first step; empty where it has all."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc or clang)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"{header}; install python3-dev"


def share_cores(runtime: Runtime) -> None:
    """Tell the decoder how many processes of this machine run on this process's cores; every process must call it.

    The affinity alone does not say it: a container or the binding to a NUMA node gives several ranks the same part of
    the machine, a launcher may give each its own.
    """
    if runtime.world_size == 1 or not hasattr(os, "sched_getaffinity"):
        return
    mine = (socket.gethostname(), frozenset(os.sched_getaffinity(0)))
    sharing = [len(mine[1] & cores) / len(cores) for host, cores in runtime.gather_objects(mine) if host == mine[0]]
    # A rank on twice as many cores takes half of its threads from here.
    set_sharing_processes(max(1, round(sum(sharing))))


def _limit(run: RunConfig) -> timedelta:
    """How long a process waits for the others.

    PyTorch's own limits would end a job before a longer `--hang-timeout`, and keep one waiting beyond a shorter. From
    their first step on `Together` holds the time, and names who is late.
    """
    return timedelta(seconds=max(run.hang_timeout, _MEET_S)) if run.hang_timeout else timedelta(days=365)


@contextlib.contextmanager
def start(run: RunConfig) -> Iterator[Runtime]:
    """Set the process up as the run's flags say, and take the process group down after it."""
    rank, world_size, local_rank = _launch_environment()
    device = _choose_device(run.device, local_rank)
    # fp16 needs the loss scale, and the scaler here is CUDA's.
    if run.precision == "fp16" and device.type == "cpu":
        raise UserMistake("--precision fp16 needs a CUDA device; use bf16 or fp32 on the CPU")
    if world_size > 1:
        bind_to_numa_node(device)
    if run.deterministic:
        # cuBLAS reads it when it starts, and with it sums in one fixed order; a user's own choice stands.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # An algorithm chosen by a stopwatch may differ from run to run.
        torch.backends.cudnn.benchmark = False
    else:
        # Training has fixed shapes, so timing the convolutions once pays.
        torch.backends.cudnn.benchmark = True
    host_group = None
    if world_size > 1:
        limit = _limit(run)
        join("nccl" if device.type == "cuda" else "gloo", rank, world_size, limit)
        # Decisions of the host go over a group of their own, which never waits for the device.
        host_group = dist.new_group(backend="gloo", timeout=limit)
    dtype, compiled = choose_dtype(run.precision, device), compiles(run.compile, device)
    store = dist.distributed_c10d._get_default_store() if world_size > 1 else None
    together = Together(store, rank, world_size, run.hang_timeout)
    runtime = Runtime(rank, world_size, device, dtype, compiled, host_group, together)
    try:
        share_cores(runtime)
        yield runtime
    except (Exception, KeyboardInterrupt) as reason:
        together.end(reason)
        raise
    finally:
        together.close()
        if world_size > 1:
            dist.destroy_process_group()


def wrap_distributed(method: nn.Module, runtime: Runtime, deterministic: bool) -> nn.Module:
    """DDP over the method, or the method itself with one process.

    DDP lays its buckets out anew after the first step, so a resumed run would sum gradients in another order than one
    that was not stopped; with `find_unused_parameters` it keeps the first layout, which `--deterministic` pays for.
    Buffers are not broadcast: that would resend the queue at every step. No `static_graph`: it starts the exchange of
    gradients from tensors that it looks for among the outputs, does not look into a `StepOutput`, and so would exchange
    nothing without a word.
    """
    if runtime.world_size == 1:
        return method
    return nn.parallel.DistributedDataParallel(
        method,
        device_ids=None if runtime.device.type == "cpu" else [runtime.device.index],
        **_without_buffers(),
        gradient_as_bucket_view=True,
        find_unused_parameters=deterministic,
    )


def _without_buffers() -> dict[str, Any]:
    """The arguments by which DDP leaves buffers alone, in this version of PyTorch."""
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    # Where the new name exists the old one makes every rank print a warning. With the new one the buffers of rank 0 are
    # still sent once, at the start, which changes nothing: all ranks hold equal ones then.
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}


@contextlib.contextmanager
def changing_shapes() -> Iterator[None]:
    """Within the block convolutions are chosen by rule, not by a stopwatch.

    For images whose sizes differ: each new shape of each layer would be timed anew, for seconds at nearly every step.
    """
    chosen = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = chosen
