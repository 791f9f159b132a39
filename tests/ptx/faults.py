"""Faults to plant in the kernels' sources, each with the case that must bring it to light and the check that sees it.

A source that a fault no longer fits fails the test, so that the list follows the kernels. Checks are the first words
of the reports of `runtime.h`, "order" for a result that depends on the order of threads or blocks, and "value" for one
that is not the definition's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.ops.nvrtc import read_source

from .cases import Case, Make, augmented, box, norm, running, soft
from .module import PtxModule

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BARRIER = "__syncthreads();"
UNUSED = "reads memory that nobody wrote and makes nothing of it, which no sanitizer of the host looks for"
LEAVE = "    if (p.channel >= a.channels) return;\n"
READ_SUMS = """#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        level[v] = levels[v * ROW + p.lane];
        slope[v] = slopes[v * ROW + p.lane];
    }
"""


@dataclass(frozen=True)
class Fault:
    """A change of a source: `old` becomes `new` at its `nth` place; `case` runs it, `seen` may speak.

    `on_ptx_alone` is why no sanitizer can see it; empty where one should.
    """

    source: str
    old: str
    new: str
    case: Case
    seen: tuple[str, ...]
    nth: int = 0
    by_default: bool = False
    on_ptx_alone: str = ""

    def plant(self, text: str) -> str:
        """The source with the fault in it."""
        parts = text.split(self.old)
        assert len(parts) > self.nth + 1, f"the source has no such place any more: {self.old!r}"
        head, tail = self.old.join(parts[: self.nth + 1]), self.old.join(parts[self.nth + 1 :])
        return head + self.new + tail

    def make(self) -> Make:
        """A maker of launchers that have the fault."""

        def launcher(source: Path, options: tuple[str, ...], shared: Mapping[str, int]) -> Any:
            assert source.name == self.source
            return PtxModule(self.plant(read_source(source)), options, shared_bytes=shared)

        return launcher


NORM, SOFT, BOX, AUGMENT = "batch_norm_act.cu", "masked_pool.cu", "box_pool.cu", "augment.cu"
odd_norm = norm((4, 7, 3, 3, 2), F32)
packed_norm = norm((6, 48, 5, 3, 3), BF16)
split_norm, long_norm = norm((2, 64, 8, 8, 1), BF16, 4), norm((2, 64, 8, 8, 1), BF16, 1)
odd_soft = soft((3, 7, 1, 2, 3, 3), F32)
many_soft = soft((2, 36, 12, 11, 3, 3), BF16)
odd_box = box((6, 7, 3, 5), F16)
packed_box = box((6, 264, 7, 7), BF16)
tile = augmented((31, 33), F16, batch=2)
tiles = augmented((36, 68), F32, batch=3)

FAULTS: dict[str, Fault] = {
    "no barrier before a block's statistics are summed": Fault(
        NORM,
        f"    }}\n    {BARRIER}\n    const int column",
        "    }\n    const int column",
        odd_norm,
        ("race", "uninitialised"),
    ),
    "no barrier before a join reuses its memory": Fault(
        NORM, f"    {BARRIER}\n    shared[threadIdx.y", "    shared[threadIdx.y", odd_norm, ("race",)
    ),
    "no barrier before a join reads": Fault(
        NORM, f"= value;\n    {BARRIER}", "= value;", odd_norm, ("race", "uninitialised")
    ),
    "no barrier after parameters are staged": Fault(
        NORM, f"        {BARRIER}\n        // Nobody", "        // Nobody", odd_norm, ("race", "uninitialised")
    ),
    "partial results of all blocks in one place": Fault(
        NORM, "a.splits + blockIdx.y) * a.channels + c;", "a.splits) * a.channels + c;", split_norm, ("race",)
    ),
    "return before a barrier": Fault(
        NORM,
        "    affine.load(a, p, staged);\n    if (p.channel >= a.channels) return;",
        "    if (p.channel >= a.channels) return;\n    affine.load(a, p, staged);",
        odd_norm,
        ("divergence",),
    ),
    "shared array of statistics too short": Fault(
        NORM, "float means[VECTOR * PLANE]", "float means[VECTOR * 200]", odd_norm, ("bounds",)
    ),
    "vector load at an odd offset": Fault(
        NORM, "load_pack(a.x, p.offset(a, row))", "load_pack(a.x, p.offset(a, row) + 1)", long_norm, ("alignment",)
    ),
    "a slice counts a row too few": Fault(
        NORM, "(count - slice - 1) / slices + 1", "(count - slice - 1) / slices", odd_norm, ("value",)
    ),
    "sign of the mean's part in the gradient": Fault(NORM, "(grad[v] - fmaf", "(grad[v] + fmaf", odd_norm, ("value",)),
    "last row is not normalised": Fault(
        NORM, "start < p.count; start += AHEAD", "start < p.count - 1; start += AHEAD", odd_norm, ("value",)
    ),
    "splits counted from one too many": Fault(
        NORM, "a.splits - 1 - blockIdx.y", "a.splits - blockIdx.y", packed_norm, ("value", "bounds")
    ),
    "lanes beyond the channels read parameters that nobody staged": Fault(
        NORM,
        "        if (p.channel >= a.channels) return;\n#pragma unroll",
        "#pragma unroll",
        odd_norm,
        ("uninitialised",),
        by_default=True,
        on_ptx_alone=UNUSED,
    ),
    "lanes beyond the channels read sums that nobody staged": Fault(
        NORM,
        f"{LEAVE}    float level[VECTOR], slope[VECTOR];\n{READ_SUMS}",
        f"    float level[VECTOR], slope[VECTOR];\n{READ_SUMS}{LEAVE}",
        odd_norm,
        ("uninitialised",),
        on_ptx_alone=UNUSED,
    ),
    "running statistics past the channels": Fault(NORM, "    if (c >= a.channels) return;", "", running, ("bounds",)),
    "every thread counts the batch": Fault(NORM, "if (c == 0) *a.batches", "*a.batches", running, ("race",)),
    "no barrier after the weights' sums": Fault(
        SOFT,
        f"scale[i] = inverse(sum);\n    }}\n    {BARRIER}",
        "scale[i] = inverse(sum);\n    }",
        many_soft,
        ("race", "uninitialised"),
    ),
    "no barrier between two masks": Fault(
        SOFT, f"        {BARRIER}\n        share(", "        share(", odd_soft, ("race",), by_default=True
    ),
    "no barrier before a mask's sums are read": Fault(
        SOFT,
        f"= weight_sums[m];\n        {BARRIER}",
        "= weight_sums[m];",
        odd_soft,
        ("race", "uninitialised"),
        by_default=True,
    ),
    "shuffle in divergent code": Fault(
        SOFT, "        sum = warp_sum(sum);", "        if (lane < 16) sum = warp_sum(sum);", odd_soft, ("divergence",)
    ),
    "row of products too short": Fault(SOFT, "[MAPS][MAX_POSITIONS]", "[MAPS][8]", many_soft, ("race", "bounds")),
    "room for too few sums": Fault(SOFT, "scale[MAX_SUMS]", "scale[8]", many_soft, ("bounds",)),
    "pooled channels past the last": Fault(SOFT, "if (c >= a.channels) continue;", "", odd_soft, ("bounds", "race")),
    "wrong group of a channel": Fault(
        SOFT, "channel / (a.channels / a.groups)", "channel / a.groups", many_soft, ("value", "bounds")
    ),
    "no barrier before a box is summed": Fault(
        BOX, f"    {BARRIER}\n", "", odd_box, ("race", "uninitialised"), by_default=True
    ),
    "box means past the last channel": Fault(
        BOX, "if (c >= a.channels) continue;", "", odd_box, ("bounds", "race"), by_default=True
    ),
    "last position has no gradient": Fault(
        BOX,
        "    for (int s = slice; s < positions; s += SLICES) {\n        const long long",
        "    for (int s = slice; s < positions - 1; s += SLICES) {\n        const long long",
        odd_box,
        ("value", "order"),
        by_default=True,
    ),
    "wrong sign in an instruction of the GPU alone": Fault(
        BOX,
        '"=h"(bits) : "f"(value)',
        '"=h"(bits) : "f"(-value)',
        packed_box,
        ("value",),
        by_default=True,
        on_ptx_alone="stands in an instruction that the host's compiler leaves out",
    ),
    "no barrier before the blur": Fault(
        AUGMENT, "    END_PHASE;\n    // Phase 2", "    // Phase 2", tile, ("race", "uninitialised")
    ),
    "no barrier between the two passes of the blur": Fault(
        AUGMENT,
        "total[o];\n            }\n        }\n        END_PHASE;",
        "total[o];\n            }\n        }",
        tile,
        ("race", "uninitialised"),
    ),
    "no barrier behind the blur": Fault(
        AUGMENT,
        "total[o];\n            }\n        }\n        END_PHASE;",
        "total[o];\n            }\n        }",
        tile,
        ("race",),
        nth=1,
    ),
    "no barrier in the sum of luma": Fault(
        AUGMENT, "sums[t] += sums[t + half];\n        END_PHASE;", "sums[t] += sums[t + half];", tile, ("race",)
    ),
    "groups of four where two align": Fault(
        AUGMENT, "a.width % 4 == 0", "a.width % 2 == 0", augmented((8, 66), F16, batch=1), ("alignment", "value")
    ),
    "rows of a tile too short": Fault(
        AUGMENT, "STRIDE = HALO_W + 1,", "STRIDE = HALO_W - 20,", tiles, ("race", "value")
    ),
    "blur reads past the halo": Fault(
        AUGMENT, "input < available ? line[input * step] : 0.0f", "line[input * step]", tile, ("uninitialised",)
    ),
    "parts of luma in one place": Fault(AUGMENT, "image * PARTS + BLOCK_X]", "image * PARTS]", tile, ("race",)),
}
