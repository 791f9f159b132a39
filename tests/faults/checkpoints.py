"""Damage checkpoints in every way that fits in a byte and see that no wrong state is ever loaded.

`python -m tests.faults.checkpoints --mutations 2000 [--report FILE.csv]` is the long form; the short one runs in CI.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.errors import UserMistake
from train.eval.tuning import TuningCheckpoints
from train.runtime import Runtime
from train.state import TuningState

RUNTIME = Runtime(0, 1, torch.device("cpu"), torch.float32, False)
SETTINGS = {"lr": 0.1, "seed": 3}
FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


def tiny_state(seed: int = 0) -> TuningState:
    """A network of some hundred bytes with the state of AdamW."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    return TuningState(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def advance(state: TuningState) -> None:
    """One step that changes every piece of the state."""
    state.model(torch.randn(4, 3)).square().sum().backward()
    state.optimizer.step()
    state.step += 1
    state.record.setdefault("losses", []).append(state.step / 7)


def values(state: TuningState) -> list[Any]:
    """Everything in a state, as a copy of comparable values."""
    saved = state.optimizer.state_dict()
    optimizer = [
        (index, name, value.tolist()) for index, entry in saved["state"].items() for name, value in entry.items()
    ]
    model = [(name, value.tolist()) for name, value in state.model.state_dict().items()]
    everything = [state.step, state.record, model, sorted(optimizer), saved["param_groups"]]
    copied: list[Any] = json.loads(json.dumps(everything))
    return copied


def make(root: Path) -> dict[int, list[Any]]:
    """Two checkpoints, of steps 1 and 2, under a folder; returns the values of each state."""
    checkpoints, state = TuningCheckpoints(root, SETTINGS, RUNTIME), tiny_state()
    states = {}
    for _ in range(2):
        advance(state)
        checkpoints.save(state)
        states[state.step] = values(state)
    return states


def mutations(folder: Path, seed: int = 0) -> Iterator[tuple[str, str, bytes]]:
    """(file, what is done, new content) without end: a byte flipped, the file cut, bytes added, zeroed or exchanged."""
    draw = random.Random(seed)
    contents = {name: (folder / name).read_bytes() for name in FILES}
    # In turn over regions, so that headers, hashes and the last bytes all have their share of a short form.
    position = dict.fromkeys(FILES, 0)
    while True:
        for name in FILES:
            data = contents[name]
            position[name] = (position[name] + max(len(data) // 97, 1)) % len(data)
            at = position[name]
            flipped = bytes([data[at] ^ 1 << draw.randrange(8)])
            yield name, "flip", data[:at] + flipped + data[at + 1 :]
            yield name, "cut", data[:at]
            yield name, "append", data + draw.randbytes(1 + draw.randrange(9))
            length = 1 + draw.randrange(64)
            yield name, "zero", data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
            yield name, "exchange", contents[draw.choice([other for other in FILES if other != name])]
            position[name] = (at + draw.randrange(5)) % len(data)


def outcome(root: Path, states: dict[int, list[Any]]) -> tuple[str, str]:
    """(what a restore does, what it says): "newest", "fallback", "refused", or "WRONG" with the reason."""
    state, said = tiny_state(seed=9), io.StringIO()
    before = values(state)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            found = TuningCheckpoints(root, SETTINGS, RUNTIME).restore(state)
        except UserMistake as reason:
            return ("refused", str(reason)) if values(state) == before else ("WRONG", "refused after a change")
        except Exception as reason:  # a traceback is a failure of the reader, whatever it is
            return "WRONG", f"{type(reason).__name__}: {reason}"
    if not found or values(state) != states.get(state.step):
        return "WRONG", f"found {found}, step {state.step}"
    if state.step == 2:
        return "newest", said.getvalue()
    named = "step_00000002 is damaged" in said.getvalue()
    return ("fallback", said.getvalue()) if named else ("WRONG", "fell back without a word")


def attack(count: int, root: Path, seed: int = 0) -> Counter[tuple[str, str, str]]:
    """Outcomes of `count` mutations of the newest checkpoint, by (file, what was done, outcome).

    Raises:
        AssertionError: a wrong state was loaded, or the reader ended with anything but a line.
    """
    states = make(root)
    newest = root / "step_00000002"
    tally: Counter[tuple[str, str, str]] = Counter()
    for (name, kind, data), _ in zip(mutations(newest, seed), range(count), strict=False):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(data)
        result, said = outcome(root, states)
        # White space of the manifest is in no hash; nothing else may differ and still be taken.
        harmless = data == whole or name == "manifest.json"
        assert result == "fallback" or (result == "newest" and harmless), f"{name} {kind}: {result}: {said}"
        tally[name, kind, result] += 1
        (newest / name).write_bytes(whole)
    assert outcome(root, states)[0] == "newest", "the untouched checkpoint must load after all"
    return tally


def main(argv: list[str]) -> int:
    """The long form; prints a table and writes it where `--report` says."""
    parser = argparse.ArgumentParser(description="Mutate a tiny checkpoint and see that no wrong state is loaded.")
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="CSV file to write")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp())
    try:
        tally = attack(arguments.mutations, folder / "checkpoints", arguments.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = [(*key, count) for key, count in sorted(tally.items())]
    for row in rows:
        print("  ".join(map(str, row)))
    print(f"{sum(tally.values())} mutations, no wrong state, no traceback")
    if arguments.report:
        with arguments.report.open("w", newline="") as stream:
            csv.writer(stream).writerows([("file", "mutation", "outcome", "count"), *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
