"""The methods by name."""

from __future__ import annotations

from .base import Method
from .moco_v2 import MoCoV2
from .regioncl_m import RegionCLM

METHODS: dict[str, type[Method]] = {
    "moco-v2": MoCoV2,
    "regioncl-m": RegionCLM,
}
