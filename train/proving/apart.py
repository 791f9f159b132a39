"""Start the proving process, and turn whatever becomes of it into verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from .child import MARK, Order
from .prover import Verdict
from .setting import Setting

_ROOT = Path(__file__).resolve().parents[(__package__ or "").count(".") + 1]
HANGS_S = 8.0
"""A candidate that has this long for itself and no verdict when time is up is taken to hang."""


def prove_apart(setting: Setting, plan: str, budget_s: float, known: Sequence[Verdict] = ()) -> list[Verdict]:
    """Verdicts about the candidates of a plan, from processes that may die or hang.

    Args:
        setting: of the run.
        plan: "module:function", which makes the candidates from a setting.
        budget_s: seconds for all of it; what has no verdict then is left out, and looked at again at the next start.
        known: final verdicts of before, which are not made again.

    Returns:
        The known verdicts and one for each other candidate.
    """
    verdicts = {verdict.name: verdict for verdict in known}
    deadline = time.monotonic() + budget_s
    while True:
        used = tuple(v.name for v in verdicts.values() if v.right and v.faster)
        ended = _Child(Order(setting, plan, tuple(verdicts), used)).run(deadline)
        verdicts |= {verdict.name: verdict for verdict in ended.verdicts}
        missing = [name for name in ended.names or () if name not in verdicts]
        if ended.names is None:
            return [*verdicts.values(), Verdict("kernels", False, False, f"not looked at: {ended.end}", final=False)]
        if not missing:
            return list(verdicts.values())
        if ended.late or not ended.verdicts:  # one that ends without a verdict would do so again
            return [
                *verdicts.values(),
                *(Verdict(n, False, False, f"not looked at: {ended.end}", final=False) for n in missing),
            ]


class _Child:
    """One proving process, and what it has told."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self.names: list[str] | None = None
        self.verdicts: list[Verdict] = []
        self.late, self.end = False, ""
        self._begun: tuple[str, float] | None = None

    def run(self, deadline: float) -> _Child:
        """Start it and wait for its end, or end it at the deadline."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
        # A rank's variables would make the child look like one of the ranks.
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        with tempfile.TemporaryFile() as errors:
            command = [sys.executable, "-c", f"from {__package__}.child import main; main()"]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, env=environment)
            timer = threading.Timer(max(deadline - time.monotonic(), 0.0), self._give_up, (process,))
            timer.start()
            try:
                self._follow(process)
            finally:
                timer.cancel()
                # An interrupt of the run must not leave it behind.
                if process.poll() is None:
                    process.kill()
                code = process.wait()
            errors.seek(0)
            self._judge(code, errors.read().decode(errors="replace"))
        return self

    def _give_up(self, process: subprocess.Popen[bytes]) -> None:
        self.late = True
        process.kill()

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(self._order.to_json().encode())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended before it had read; its exit code tells
        for line in process.stdout:
            text = line.decode(errors="replace")
            if not text.startswith(MARK):
                continue
            told = json.loads(text.removeprefix(MARK))
            if "names" in told:
                self.names = told["names"]
            elif "begin" in told:
                self._begun = told["begin"], time.monotonic()
            else:
                self.verdicts.append(Verdict(**told["verdict"]))
                self._begun = None

    def _judge(self, code: int, errors: str) -> None:
        lines = errors.strip().splitlines()
        self.end = f"its process ended with {'signal' if code < 0 else 'code'} {abs(code)}"
        if self.late:
            self.end = "no time was left"
        elif lines:
            self.end += f", {lines[-1].strip()}"
        if self._begun is None:
            return
        name, since = self._begun
        if not self.late:
            self.verdicts.append(Verdict(name, False, False, self.end))
        elif time.monotonic() - since > HANGS_S:
            self.verdicts.append(Verdict(name, False, False, f"no answer in {time.monotonic() - since:.0f} s"))
