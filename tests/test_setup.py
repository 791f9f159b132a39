"""`tools/setup.sh` with a Python that only pretends to install: what it does, what it names, doing nothing twice."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "bash cat cut sha256sum find sort xargs head tail wc mktemp rm mv grep tr awk flock id uname dirname mkdir cp env "
    "sleep touch sed"
)

# Answers what the script asks of an interpreter and logs each call. What FAKE_BAD matches cannot be installed.
FAKE_PYTHON = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$FAKE_LOG"
case "$*" in
  "-c import sys; raise SystemExit"*) exit "${FAKE_OLD:-0}" ;;
  "-c import sys; print"*) echo 3.11 ;;
  "-c import os, sysconfig"*) echo True ;;
  "-m venv "*) shift 2; mkdir -p "$1/bin"; cp "$0" "$1/bin/python"; echo "version = 3.11" >"$1/pyvenv.cfg" ;;
  *"--version") ;;
  "-c import ffcv.loader") [ -f "$FAKE_LOG.ffcv" ] || { echo "No module named ffcv" >&2; exit 1; } ;;
  *"pip install"*)
    sleep "${FAKE_SLOW:-0}"
    for argument in "$@"; do
      case "$argument" in *"/constraints"|*requirements.txt) continue ;; esac
      if [ -n "${FAKE_BAD:-}" ] && [ -f "$argument" ] && grep -qE "$FAKE_BAD" "$argument"; then
        echo "no build of $FAKE_BAD for this machine" >&2; exit 1
      fi
      if [ -f "$argument" ] && grep -q "^ffcv==" "$argument"; then touch "$FAKE_LOG.ffcv"; fi
    done ;;
  "-") cat >/dev/null; exit "${FAKE_MISMATCH:-0}" ;;
  "-c import sys; from train.cards import problems_of"*) sed 's/^/no code for /' ;;
  "-m pipeline.native_build") exit "${FAKE_NATIVE:-0}" ;;
  *) echo "the fake Python does not know: $*" >&2; exit 9 ;;
esac
"""


class Checkout:
    """A copy of what set-up reads, in a folder with spaces in its path."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a check out"
        self.elsewhere = folder / "else where"
        self.log = folder / "calls"
        self.elsewhere.mkdir()
        (self.root / "tools").mkdir(parents=True)
        (self.root / "pipeline" / "native").mkdir(parents=True)
        for name in ("setup.sh", "requirements.txt"):
            shutil.copyfile(ROOT / "tools" / name, self.root / "tools" / name)
        (self.root / "pipeline" / "native_build.py").touch()
        (self.root / "pipeline" / "native" / "views.cpp").write_text("int views;\n")
        self.python = folder / "fake python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for command in COMMANDS.split():
            found = shutil.which(command)
            assert found, f"{command} is needed"
            (self.bin / command).symlink_to(found)

    def environment(self, **extra: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "FAKE_LOG": str(self.log), "REGATTA_PYTHON": str(self.python), **extra}

    def setup(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(self.root / "tools" / "setup.sh"), *arguments]
        return subprocess.run(
            command, cwd=self.elsewhere, env=self.environment(**extra), capture_output=True, text=True, timeout=60
        )

    def calls(self) -> list[str]:
        found = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return found

    def tools(self, *names: str) -> None:
        """Put commands on the path that do nothing and succeed."""
        for name in names:
            (self.bin / name).write_text("#!/usr/bin/env bash\nexit 0\n")
            (self.bin / name).chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def installs(calls: list[str]) -> list[str]:
    return [call for call in calls if "pip install" in call and not call.endswith(" uv")]


@pytest.mark.smoke
def test_the_second_time_nothing_is_done(checkout: Checkout) -> None:
    checkout.tools("g++", "pkg-config")
    first = checkout.setup()
    assert first.returncode == 0, first.stderr
    assert "ready" in first.stdout and "missing" not in first.stdout
    assert (checkout.root / ".venv" / "bin" / "python").exists()
    calls = checkout.calls()
    assert len(installs(calls)) == 2, "one call for all groups, one for FFCV"
    groups = re.findall(r"^# \[([a-z-]+)\]", (ROOT / "tools" / "requirements.txt").read_text(), re.MULTILINE)
    # A group that is in no call is a package that users are told they have.
    assert len(groups) > 7 and all(f"/{group}.txt" in " ".join(installs(calls)) for group in groups)
    assert "-m pipeline.native_build" in calls

    began = time.monotonic()
    second = checkout.setup()
    assert second.returncode == 0 and second.stdout == ""
    assert time.monotonic() - began < 1
    assert checkout.calls() == [], "not even Python was started"


@pytest.mark.parametrize("changed", ["tools/requirements.txt", "pipeline/native/views.cpp", ".venv/pyvenv.cfg"])
def test_a_change_sets_up_again(checkout: Checkout, changed: str) -> None:
    checkout.tools("g++", "pkg-config")
    checkout.setup()
    checkout.calls()
    with (checkout.root / changed).open("a") as stream:
        stream.write("\n# changed\n")
    assert checkout.setup().returncode == 0
    assert installs(checkout.calls())


def test_a_group_that_cannot_be_installed_is_named_and_the_rest_is_there(checkout: Checkout) -> None:
    checkout.tools("g++", "pkg-config")
    answer = checkout.setup(FAKE_BAD="nvidia-dali")
    assert answer.returncode == 0, answer.stderr
    (line,) = [line for line in answer.stdout.splitlines() if "missing" in line]
    assert "[dali]" in line and "no build of nvidia-dali" in line and "--retry" in line
    tried = " ".join(installs(checkout.calls()))
    assert all(f"/{group}.txt" in tried for group in ("core", "ffcv", "webdataset", "eval", "dev"))

    again = checkout.setup()
    assert "[dali]" in again.stdout, "what is missing is said each time"
    assert not checkout.calls(), "but not tried again unasked"
    healed = checkout.setup("--retry")
    assert "missing" not in healed.stdout and installs(checkout.calls())


def test_without_the_core_nothing_is_ready(checkout: Checkout) -> None:
    answer = checkout.setup(FAKE_BAD="safetensors")
    assert answer.returncode == 1
    assert "[core]" in answer.stderr and "no build of safetensors" in answer.stderr
    assert "ready" not in answer.stdout
    assert checkout.setup().returncode == 0, "a failure leaves nothing that stands in the way"


def test_torch_and_torchvision_that_do_not_fit_are_named(checkout: Checkout) -> None:
    answer = checkout.setup(FAKE_MISMATCH="1")
    assert answer.returncode == 1 and "torch and torchvision do not fit together" in answer.stderr
    assert "remove .venv" in answer.stderr


def test_without_compiler_and_apt_the_line_to_run_is_printed(checkout: Checkout) -> None:
    answer = checkout.setup(FAKE_BAD="ffcv==1", FAKE_NATIVE="1")
    assert answer.returncode == 0, answer.stderr
    wanted = "sudo apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev libjpeg-dev"
    assert wanted in answer.stdout
    assert "FFCV" in answer.stdout and "native decoder" in answer.stdout
    checkout.calls()
    checkout.tools("g++")
    checkout.setup()
    assert installs(checkout.calls()), "a compiler that has appeared is reason enough to try again"


def test_a_card_that_torch_has_no_code_for_is_told(checkout: Checkout) -> None:
    checkout.tools("g++", "pkg-config", "nvidia-smi")
    listing = '[ "$*" = "--query-gpu=name,compute_cap --format=csv,noheader" ] && echo "Tesla V100, 7.0"'
    (checkout.bin / "nvidia-smi").write_text(f"#!/usr/bin/env bash\n{listing}\n")
    answer = checkout.setup()
    assert answer.returncode == 0, answer.stderr
    assert "setup: GPU: no code for Tesla V100, 7.0\n" in answer.stdout
    (checkout.bin / "nvidia-smi").write_text("#!/usr/bin/env bash\necho no driver; exit 9\n")
    (checkout.root / ".venv" / "regatta-setup").unlink()
    again = checkout.setup()
    assert again.returncode == 0 and "ready" in again.stdout, "a listing that fails stops nothing"


def test_two_at_once_do_not_disturb_each_other(checkout: Checkout) -> None:
    checkout.tools("g++", "pkg-config")
    command = ["bash", str(checkout.root / "tools" / "setup.sh")]
    both = [
        subprocess.Popen(command, env=checkout.environment(FAKE_SLOW="1"), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(installs(checkout.calls())) == 2, "only one of them installed"
    assert sum("waiting for it" in text for text in said) == 1


def test_a_broken_environment_is_made_anew_but_nothing_else_is_removed(checkout: Checkout) -> None:
    checkout.tools("g++", "pkg-config")
    checkout.setup()
    (checkout.root / ".venv" / "bin" / "python").unlink()
    assert "making it anew" in checkout.setup().stdout
    shutil.rmtree(checkout.root / ".venv")
    (checkout.root / ".venv").mkdir()
    (checkout.root / ".venv" / "thesis.txt").touch()
    answer = checkout.setup()
    assert answer.returncode == 1 and "is in the way" in answer.stderr
    assert (checkout.root / ".venv" / "thesis.txt").exists()


def test_mistakes(checkout: Checkout) -> None:
    unknown = checkout.setup("--retri")
    assert unknown.returncode == 2 and "--retry" in unknown.stderr
    old = checkout.setup(FAKE_OLD="1")
    assert old.returncode == 1 and "no Python 3.11 or newer" in old.stderr
    shown = checkout.setup("--help")
    assert shown.returncode == 0 and "--no-system" in shown.stdout
    assert not (checkout.root / ".venv").exists()


def test_scripts_are_valid_bash() -> None:
    for path in [*sorted((ROOT / "tools").glob("*.sh")), ROOT / ".ci" / "run"]:
        answer = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        assert os.access(path, os.X_OK), f"{path.name} is not executable"
