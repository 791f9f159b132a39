"""The long report goes on where it stopped, says what it ran, and ends with 1 where a check spoke."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import report
from .cases import Case
from .module import watched_tensors


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The shapes that were run; none is, in truth."""
    done: list[Case] = []

    def on_ptx(case: Case) -> dict[str, Any]:
        done.append(case)
        return {"said": "", "launches": 2, "blocks": 10}

    monkeypatch.setattr(report, "on_ptx", on_ptx)
    monkeypatch.setattr(report, "commit", lambda: "abc")
    return done


def command(path: Path, *more: str) -> list[str]:
    return ["--shapes", "8", "--parts", "ptx", "--output", str(path), *more]


def test_an_interrupted_report_goes_on(ran: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plain, over = tmp_path / "checks.txt", report.on_ptx, 3

    def interrupted(case: Case) -> dict[str, Any]:
        if len(ran) == over:
            raise KeyboardInterrupt
        return plain(case)

    monkeypatch.setattr(report, "on_ptx", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.main(command(path))
    monkeypatch.setattr(report, "on_ptx", plain)
    assert report.main(command(path, "--minutes", "0")) == report.GO_ON and not path.exists()
    assert report.main(command(path)) == 0
    assert len(ran) == len(set(ran)) == 8
    assert path.read_text().splitlines() == [
        "python -m tests.ptx.report --shapes 8 --parts ptx",
        "commit abc",
        "PTX of sm_80: 8 of 8 random shapes without a report (norm 2, soft 2, box 2, augmentation 2)",
        "  16 launches, 80 blocks, both orders of threads and blocks",
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_another_commit_does_not_go_on(ran: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checks.txt"
    assert report.main(command(path, "--minutes", "0")) == report.GO_ON
    monkeypatch.setattr(report, "commit", lambda: "def")
    assert report.main(command(path)) == 2 and not ran


def test_a_check_that_speaks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "on_ptx", lambda case: {"said": "1 reports: race", "launches": 1, "blocks": 1})
    path = tmp_path / "checks.txt"
    assert report.main(command(path)) == 1
    text = path.read_text()
    assert "0 of 8" in text and text.count("1 reports: race") == 8


def test_a_silent_sanitizer_misses_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "what_is_seen", lambda fault: fault.seen[0])
    monkeypatch.setattr(report, "seen_on_fibers", lambda fault: {"threads": "", "addresses": "" if fault.nth else "x"})
    path = tmp_path / "checks.txt"
    assert report.main(["--parts", "faults", "--output", str(path)]) == 1
    assert "not seen on fibers: no barrier behind the blur" in path.read_text()


def test_new_tensors_are_filled_while_launches_are_watched() -> None:
    """A faulty kernel that leaves a value out must not find the right one in memory of before."""
    with watched_tensors():
        fresh = [torch.empty(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        fresh += [torch.empty_like(fresh[0]), fresh[0].new_empty(3, 5)]
        assert all(each.isnan().all() for each in fresh)
        assert (torch.empty(64, dtype=torch.uint8) == 255).all()
    assert not torch.are_deterministic_algorithms_enabled()
