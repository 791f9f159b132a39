"""Threads of a run wait without spinning, so that it gets its share of a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOWN = (
    "import os, sys; import {module}; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY']); "
    "import torch; assert torch.ones(1000, 1000).sum() == 1e6"
)


@pytest.mark.parametrize("module", ["train.main", "train.evaluate", "tools.quickstart"])
@pytest.mark.parametrize(("own", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_is_passive_before_pytorch_is_there_unless_the_user_says_otherwise(
    module: str, own: str | None, policy: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if own is None else {"OMP_WAIT_POLICY": own}
    shown = subprocess.run(
        [sys.executable, "-c", SHOWN.format(module=module)], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == policy
