"""Parts of a benchmark that run in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence

from tools.bench.rows import ROOT


def output_of(command: Sequence[str], name: str, environment: Mapping[str, str] | None = None) -> str:
    """Standard output of a Python command in the checkout.

    Args:
        command: arguments of the interpreter.
        name: what the command is called in an error.
        environment: its variables; those of this process by default.

    Raises:
        RuntimeError: with the last line of what it said, when it failed.
    """
    answer = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or [f"ended with {answer.returncode}"])[-1]
        raise RuntimeError(f"{name}: {last}")
    return answer.stdout
