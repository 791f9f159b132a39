"""What a run uses: as its folder recorded it, as an earlier start on this card found it, or as a proof finds it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.ops.choice import CHOICES
from models.ops.host_library import batch_norm_library
from models.ops.nvrtc import cache_folder
from pipeline.atomic import write_atomically

from ..config import Config
from ..errors import UserMistake
from ..runtime import Runtime
from .apart import prove_apart
from .prover import Verdict
from .setting import CUDA_GRAPH, SHARED_FORWARD, Setting, setting_of

PLAN = "train.proving.child:all_candidates"
DEVICES = {"cuda"}
"""Kinds of devices that have kernels to prove."""
BUDGET_S = 20.0
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Choice:
    """What a run uses, and why.

    Attributes:
        asked: value of `--kernels`.
        source: "proved now", "proved before on this card", "as recorded", or why nothing was looked at.
        device: card and versions that the verdicts are about.
        verdicts: one for each candidate.
    """

    asked: str
    source: str
    device: str
    verdicts: tuple[Verdict, ...] = ()

    def uses(self, name: str) -> bool:
        """Whether the candidate of this name is used."""
        return any(v.name == name and v.right and (v.faster or self.asked == "on") for v in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in `config.json`."""
        return dataclasses.asdict(self)


def settle(config: Config, runtime: Runtime, recorded: Mapping[str, Any] | None) -> Choice:
    """Find what the run uses; every process must call it. The same on all ranks.

    Args:
        config: of the run.
        runtime: this process.
        recorded: configuration in the checkpoint that the run goes on from; None for a new run.

    Raises:
        UserMistake: `--kernels on` without a GPU.
    """
    asked = config.run.kernels
    if runtime.device.type not in DEVICES:
        if asked == "on":
            raise UserMistake("--kernels on needs a CUDA device; leave it out on the CPU")
        return Choice(asked, "no GPU", runtime.device.type)
    if asked == "off":
        return Choice(asked, "switched off", "")
    # Rank 0's folder decides: the others may not see it.
    recorded = runtime.gather_objects(recorded)[0]
    if recorded is not None and recorded["run"].get("kernels", asked) == asked:
        return _recorded(asked, recorded)
    if config.run.deterministic and asked == "auto":
        # Two runs must not differ because a stopwatch did.
        return Choice(asked, "not timed with --deterministic; --kernels on takes those that are right", "")
    return _proved(config, runtime)


def _recorded(asked: str, recorded: Mapping[str, Any]) -> Choice:
    """The recorded choice; none for a run of before there were any, which computed without kernels."""
    held = recorded.get("kernels") or {}
    verdicts = tuple(Verdict(**each) for each in held.get("verdicts", ()))
    return Choice(asked, "as recorded", held.get("device", ""), verdicts)


def _proved(config: Config, runtime: Runtime) -> Choice:
    """By every rank on its own card; what one refuses none uses."""
    setting, device = setting_of(config, runtime), device_text(runtime.device)
    path = _cache_file(setting, device)
    before = _cached(path)
    verdicts, source = before, "proved before on this card"
    if not before or not all(verdict.final for verdict in before):
        final = [verdict for verdict in before if verdict.final]
        verdicts, source = prove_apart(setting, PLAN, BUDGET_S, final), "proved now"
        _keep(path, verdicts)
    return Choice(config.run.kernels, source, device, _agreed(runtime.gather_objects(verdicts)))


def _agreed(of_ranks: Sequence[Sequence[Verdict]]) -> tuple[Verdict, ...]:
    """Rank 0's verdicts, with the refusals of the others in place of its own."""
    agreed = {verdict.name: verdict for verdict in of_ranks[0]}
    for rank, verdicts in enumerate(of_ranks):
        for verdict in verdicts:
            ours = agreed.get(verdict.name)
            if not verdict.right and (ours is None or ours.right):
                agreed[verdict.name] = replace(verdict, reason=f"rank {rank}: {verdict.reason}")
    return tuple(agreed.values())


def apply(config: Config, choice: Choice) -> Config:
    """Switch the kernels of this process, and the configuration with what was left open filled in.

    `config.json` keeps what was asked for; the choice is recorded beside it.
    """
    judged = {verdict.name for verdict in choice.verdicts if verdict.final}
    for name, kernels in CHOICES.items():
        # A queue loss that is wrong in blocks is taken whole. Batch norm's definition would be slower than PyTorch's.
        refused = "definition" if name in judged and name != "batch_norm_act" else "auto"
        kernels.set("cuda" if choice.uses(name) else refused)
    if config.run.cuda_graph is None:
        config = replace(config, run=replace(config.run, cuda_graph=choice.uses(CUDA_GRAPH)))
    region = getattr(config.model, "region", None)
    if region is not None and region.shared_forward is None:
        region = replace(region, shared_forward=choice.uses(SHARED_FORWARD))
        config = replace(config, model=replace(config.model, region=region))
    return config


def told(choice: Choice) -> str:
    """One line: what is used and its gain, what is left out and why; empty where there was nothing to choose."""
    if not choice.verdicts:
        return "" if choice.source in ("no GPU", "switched off") else f"kernels: none, {choice.source}"
    used = [_gain(each) for each in choice.verdicts if choice.uses(each.name)]
    left = [f"{each.name} ({_why(each)})" for each in choice.verdicts if not choice.uses(each.name)]
    line = f"kernels, {choice.source}: {', '.join(used) or 'none is used'}"
    return f"{line}; left out: {', '.join(left)}" if left else line


def _gain(verdict: Verdict) -> str:
    times = f"{1e3 * verdict.usual_seconds:.3g} -> {1e3 * verdict.seconds:.3g} ms a step"
    return f"{verdict.name} {verdict.usual_seconds / max(verdict.seconds, 1e-12):.2f}x ({times})"


def _why(verdict: Verdict) -> str:
    if not verdict.right:
        return verdict.reason
    return f"slower, {verdict.usual_seconds / max(verdict.seconds, 1e-12):.2f}x"


def device_text(device: torch.device) -> str:
    """Card, driver and versions: what a verdict holds for."""
    versions = f"torch {torch.__version__}"
    if device.type != "cuda":
        return f"{device.type}, {versions}"
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory // 2**20
    return f"{properties.name}, {memory} MiB, {_driver_text()}, CUDA {torch.version.cuda}, {versions}"


def _driver_text() -> str:
    """The driver's own version where the system tells it, and the CUDA version that it offers."""
    own, offered = "driver unknown", ""
    # Not there in every container.
    with contextlib.suppress(OSError, IndexError):
        own = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    # Without the bindings, or a library for them, no kernel can be launched, and a changed driver matters less.
    with contextlib.suppress(ImportError, RuntimeError):
        from cuda.bindings import driver

        offered = f" for CUDA {driver.cuDriverGetVersion()[1]}"
    return own + offered


@functools.cache
def _sources() -> str:
    """A hash of all code that a verdict depends on."""
    folders = ("models", "pipeline/kernels", "train/proving")
    files = [path for folder in folders for path in sorted((_ROOT / folder).rglob("*")) if path.is_file()]
    files = [path for path in files if path.suffix in (".py", ".cu", ".h", ".cpp")] + [
        _ROOT / "pipeline" / "augment.py"
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _cache_file(setting: Setting, device: str) -> Path:
    document = setting.config.to_json()
    # These change no shape, and a step costs the same with any value of them.
    for name in ("optim", "schedule", "ema", "epochs"):
        document["recipe"].pop(name)
    open_choices = {name: document["run"][name] for name in ("method", CUDA_GRAPH)}
    # While it is compiled, kernels are launched from Python and look slower than they will be: proved again afterwards.
    host = {"batch norm from C++": batch_norm_library().is_built()}
    parts = (open_choices, document["recipe"], document["model"], str(setting.dtype), setting.several, device, host)
    key = hashlib.sha256(json.dumps([*parts, PLAN, _sources()], sort_keys=True).encode()).hexdigest()
    return cache_folder().parent / "proofs" / f"{key[:32]}.json"


def _cached(path: Path) -> list[Verdict]:
    # Whatever is wrong with the file costs a proof, nothing else.
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [Verdict(**each) for each in json.loads(path.read_text())]
    return []


def _keep(path: Path, verdicts: Sequence[Verdict]) -> None:
    document = json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=1).encode()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, document)
