"""`python -m regatta COMMAND`, which is what torchrun can start: `torchrun --nproc_per_node=8 -m regatta train ...`."""

from __future__ import annotations

import sys

from tools.wheel.cli import main

sys.exit(main())
