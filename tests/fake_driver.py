"""A CUDA driver that is not one: it keeps contexts and modules as a driver does, and writes down each call.

`models/ops/launcher.py` reaches the driver through `cuda.bindings` and PyTorch's CUDA state through `torch.cuda`; the
fixture of `tests/test_launcher.py` puts this in place of both.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

PRIMARY = 0x1000


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_CONTEXT = 201


class FakeDriver:
    """The entry points that the launcher uses, with a stack of contexts for each thread."""

    CUresult = Result
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self) -> None:
        self.stacks: dict[int, list[int]] = {}
        self.launches: list[tuple] = []
        self.images: list[bytes] = []
        self.shared: dict[bytes, int] = {}
        self.capturing: set[str] = set()
        self.damaged: set[bytes] = set()

    @property
    def stack(self) -> list[int]:
        return self.stacks.setdefault(threading.get_ident(), [])

    def cuCtxGetCurrent(self) -> tuple:
        return Result.CUDA_SUCCESS, self.stack[-1] if self.stack else 0

    def cuCtxPushCurrent(self, context: int) -> tuple:
        self.stack.append(context)
        return (Result.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple:
        return Result.CUDA_SUCCESS, self.stack.pop()

    def cuModuleLoadData(self, image: bytes) -> tuple:
        self.images.append(image)
        bad = image in self.damaged or not image.startswith((b"\x7fELF", b"//", b"\n//"))
        return Result.CUDA_ERROR_INVALID_IMAGE if bad else Result.CUDA_SUCCESS, 0x2000

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple:
        return Result.CUDA_SUCCESS, name

    def cuFuncSetAttribute(self, function: bytes, attribute: int, value: int) -> tuple:
        self.shared[function] = value
        return (Result.CUDA_SUCCESS,)

    def cuLaunchKernel(self, function: bytes, *given: Any) -> tuple:
        grid, block, shared, stream = given[:3], given[3:6], given[6], given[7]
        if not self.stack or self.stack[-1] != PRIMARY:
            return (Result.CUDA_ERROR_INVALID_CONTEXT,)
        if grid[1] > 65535 or grid[2] > 65535 or 0 in grid or max(block) > 1024:
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        self.launches.append((function.decode(), grid, block, shared, stream))
        return (Result.CUDA_SUCCESS,)


class FakeTorchCuda:
    """What the launcher asks `torch.cuda`: a guard that binds no context, and streams whose runtime call binds one."""

    def __init__(self, driver: FakeDriver, capability: tuple[int, int]) -> None:
        self.driver, self.capability, self.current = driver, capability, "cuda:0"

    def device(self, device: object) -> Any:
        self.current = str(device)  # PyTorch's guard too calls nothing where the device is the current one
        return nullcontext()

    def current_device(self) -> int:
        return int(self.current.rpartition(":")[2])

    def get_device_capability(self, device: object) -> tuple[int, int]:
        return self.capability

    def is_current_stream_capturing(self) -> bool:
        return self.current in self.driver.capturing

    def current_stream(self) -> SimpleNamespace:
        def synchronize() -> None:
            if not self.driver.stack:
                self.driver.stack.append(PRIMARY)

        return SimpleNamespace(cuda_stream=7, synchronize=synchronize)
