"""A signal to a command that runs others lets the current one save, and no other begin."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A child that saves on SIGTERM, as training does, and says so in a file.
CHILD = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(int(sys.argv[2]))
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1] + ".begun").touch()
time.sleep(60)
"""
PARENT = """
import sys
from tools.support.stoppable import Commands
commands = Commands(float(sys.argv[3]))
child = [sys.executable, "-c", {child!r}]
first = commands.call([*child, sys.argv[1], sys.argv[2]])
second = commands.call([*child, sys.argv[1] + "2", "0"])
print(first, second)
"""


@pytest.mark.parametrize("code", [75, 1])
@pytest.mark.parametrize("clock", [False, True])
def test_the_current_command_saves_and_no_other_begins(tmp_path: Path, code: int, clock: bool) -> None:
    place = tmp_path / "child"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(child=CHILD), str(place), str(code), "0.03" if clock else "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "child.begun").exists():
        time.sleep(0.05)
    if not clock:
        parent.send_signal(signal.SIGTERM)
    said, _ = parent.communicate(timeout=30)
    assert place.read_text() == "saved" and said.split() == ["75", "75"]
    assert not (tmp_path / "child2.begun").exists()


def test_exit_codes_are_those_of_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.support.stoppable import Commands

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    commands = Commands()
    for program, code in (("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137), ("pass", 0)):
        assert commands.call([sys.executable, "-c", program]) == code


def test_nothing_is_started_once_a_stop_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.support import stoppable

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    commands = stoppable.Commands()
    commands.stop()
    monkeypatch.setattr(stoppable.subprocess, "Popen", lambda *_, **__: pytest.fail("a command began"))
    assert commands.call([sys.executable, "-c", "pass"]) == 75
