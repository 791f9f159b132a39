"""The methods by name."""

from __future__ import annotations

from .barlow_twins import BarlowTwins
from .base import Method
from .byol import Byol
from .care import Care
from .densecl import DenseCL
from .lewel_b import LewelB
from .lewel_m import LewelM
from .moby import MoBY
from .moco_v2 import MoCoV2
from .moco_v3 import MoCoV3
from .pixpro import PixPro
from .regioncl_d import RegionCLD
from .regioncl_m import RegionCLM
from .regioncl_m3 import RegionCLM3
from .regioncl_moby import RegionCLMoBY
from .regioncl_s import RegionCLS
from .simclr import SimCLR
from .simsiam import SimSiam
from .swav import SwAV
from .unmix import UnMix

METHODS: dict[str, type[Method]] = {
    "moco-v2": MoCoV2,
    "regioncl-m": RegionCLM,
    "densecl": DenseCL,
    "regioncl-d": RegionCLD,
    "simsiam": SimSiam,
    "regioncl-s": RegionCLS,
    "byol": Byol,
    "care": Care,
    "lewel-m": LewelM,
    "lewel-b": LewelB,
    "moco-v3": MoCoV3,
    "regioncl-m3": RegionCLM3,
    "moby": MoBY,
    "regioncl-moby": RegionCLMoBY,
    "unmix": UnMix,
    "simclr": SimCLR,
    "barlow-twins": BarlowTwins,
    "swav": SwAV,
    "pixpro": PixPro,
}
