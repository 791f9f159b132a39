"""Registers of batch norm's kernels leave room for as many blocks as hide the waits for memory; see `registers.py`."""

from __future__ import annotations

import pytest

from models.ops.batch_norm_act_host import KERNELS
from models.ops.batch_norm_act_kernels import BLOCKS_A_MULTIPROCESSOR, SOURCE

from .module import need_tools
from .registers import JOINS, Resources, cuobjdump, resources

LAST_PASS = "batch_norm_backward_input"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_registers_leave_room_for_the_blocks_of_a_pass(capability: tuple[int, int]) -> None:
    """A gate or a residual that is asked for in the loop over rows leaves two blocks of the last pass, not three."""
    need_tools()
    if cuobjdump() is None:
        pytest.skip("no cuobjdump")
    found = resources(SOURCE, capability)
    assert set(KERNELS) <= set(found)
    blocks = {kernel: found[kernel].blocks() for kernel in KERNELS if kernel not in JOINS}
    wanted = {kernel: 3 if kernel.startswith(LAST_PASS) else BLOCKS_A_MULTIPROCESSOR for kernel in blocks}
    assert {kernel: number for kernel, number in blocks.items() if number < wanted[kernel]} == {}
    assert {kernel: taken.stack for kernel, taken in found.items() if taken.stack} == {}


@pytest.mark.parametrize(
    ("registers", "blocks"), [(32, 8), (64, 4), (65, 3), (80, 3), (81, 2), (96, 2), (128, 2), (129, 1)]
)
def test_blocks_by_registers(registers: int, blocks: int) -> None:
    """NVIDIA's occupancy calculator gives these for blocks of 256 threads."""
    assert Resources(registers, 0).blocks(256) == blocks
