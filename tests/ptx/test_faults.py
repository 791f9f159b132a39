"""Faults planted in the kernels are seen by the checks on PTX; `faults.py` says which check sees which."""

from __future__ import annotations

import pytest

from .faults import FAULTS, Fault
from .module import CheckFailed, need_tools, watched_tensors

PARAMETERS = [
    pytest.param(fault, id=name, marks=[] if fault.by_default else [pytest.mark.slow]) for name, fault in FAULTS.items()
]


def what_is_seen(fault: Fault) -> str:
    """The message of the check that speaks first; "value" where the result is merely wrong; "nothing"."""
    need_tools()
    try:
        with watched_tensors():
            fault.case(fault.make())
    except CheckFailed as failed:
        return str(failed)
    except (AssertionError, RuntimeError) as wrong:
        return f"value: {wrong}"
    return "nothing"


@pytest.mark.parametrize("fault", PARAMETERS)
def test_a_planted_fault_is_seen(fault: Fault) -> None:
    seen = what_is_seen(fault)
    assert any(check in seen for check in fault.seen), seen


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) >= 20 and sum(fault.by_default for fault in FAULTS.values()) >= 5
