"""A process of its own that has `libcuda.c` for a driver: launches through the project's launcher, told as JSON.

The driver must be there before anything asks for `libcuda.so.1`, and must never meet a process that has a real one, so
`test_driver.py` runs this file apart: `python -m tests.ptx.driver_session LIBRARY`.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

STUB = ctypes.CDLL(sys.argv[1])  # first: later searches for its soname find it

import torch  # noqa: E402
from cuda.bindings import driver  # noqa: E402

from models.ops import batch_norm_act_kernels as norm  # noqa: E402
from models.ops.launcher import CudaModule, Launcher, loader  # noqa: E402
from models.ops.nvrtc import cached_binary, find_nvrtc  # noqa: E402
from pipeline.kernels import fused_augment  # noqa: E402

OPTIONS = ("-DFEATURE=Float32", "-DVECTOR=1")
KERNEL, BLOCK = "batch_norm_move_running", (norm.THREADS, 1, 1)
STUB.stub_reason.restype = ctypes.c_char_p


class Launch(ctypes.Structure):
    """What the driver wrote down of a launch."""

    _fields_ = [
        ("kernel", ctypes.c_char * 64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("arguments", ctypes.c_ubyte * 512),
    ]


STUB.stub_launch.restype = ctypes.POINTER(Launch)


def context_of(device: int) -> Any:
    """The primary context of a device."""
    return driver.cuDevicePrimaryCtxRetain(device)[1]


def stand_in_for_torch() -> None:
    """`torch.cuda` where there is no GPU: a guard that binds no context, and a runtime call that does.

    PyTorch's guard too calls nothing where the device is the current one already.
    """
    binds = SimpleNamespace(cuda_stream=7, synchronize=lambda: driver.cuCtxSetCurrent(context_of(0)))
    torch.cuda.device = lambda device: nullcontext()
    torch.cuda.current_stream = lambda *device: binds
    torch.cuda.current_device = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda device: 7  # type: ignore[attr-defined]
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_capability = lambda device=None: (8, 0)


def tell_sizes_of_arguments() -> None:
    """The driver learns the length of each structure whose address is taken: the launcher passes an address alone."""
    plain = ctypes.addressof

    def addressof(value: Any) -> int:
        address = plain(value)
        if isinstance(value, ctypes.Structure):
            STUB.stub_offer(ctypes.c_void_p(address), ctypes.c_size_t(ctypes.sizeof(value)))
        return address

    ctypes.addressof = addressof


def outcome(action: Callable[[], Any]) -> str:
    """ "launched", or the error and the driver's reason."""
    before = STUB.stub_launch_count()
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error} ({STUB.stub_reason().decode()})"
    return "launched" if STUB.stub_launch_count() == before + 1 else "nothing was launched"


def in_a_thread(action: Callable[[], Any]) -> Any:
    """What `action` gives in a thread that has done no CUDA work."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    thread.join()
    return results[0]


class Short(ctypes.Structure):
    """Batch norm's arguments without the last two, which is eight bytes less with the padding."""

    _fields_ = norm.Arguments._fields_[:-2]


class Long(ctypes.Structure):
    """Batch norm's arguments and one more."""

    _fields_ = [*norm.Arguments._fields_, ("more", ctypes.c_longlong)]


def with_the_other_device_current(launch: Launcher) -> dict[str, Any]:
    """A launch in a thread that works on the other device: whether it went, and whose context it leaves behind."""
    driver.cuCtxSetCurrent(context_of(1))
    result = outcome(lambda: launch(KERNEL, (1, 1, 1), BLOCK, norm.Arguments()))
    return {"result": result, "restored": int(driver.cuCtxGetCurrent()[1]) == int(context_of(1))}


def raw(action: Callable[[], tuple]) -> list:
    """Status of a call of the driver itself, and its reason."""
    status = int(action()[0])
    return [status, STUB.stub_reason().decode() if status else ""]


def direct() -> dict[str, list]:
    """What the driver says to calls that the launcher never makes."""
    cubin = cached_binary(find_nvrtc(), norm.SOURCE, (8, 0), OPTIONS)
    module = driver.cuModuleLoadData(cubin)[1]
    kernel = driver.cuModuleGetFunction(module, KERNEL.encode())[1]
    arguments = norm.Arguments()
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))

    def launch(grid: tuple[int, int, int] = (1, 1, 1), block: tuple[int, int, int] = (32, 1, 1), shared: int = 0):
        return driver.cuLaunchKernel(kernel, *grid, *block, shared, 0, ctypes.addressof(pointers), 0)

    large = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    said = {
        "plain": raw(launch),
        "in a cold thread": in_a_thread(lambda: raw(launch)),
        "no blocks": raw(lambda: launch((1, 0, 1))),
        "blocks along z": raw(lambda: launch((1, 1, 65536))),
        "threads": raw(lambda: launch(block=(512, 3, 1))),
        "shared memory": raw(lambda: launch(shared=60000)),
        "no such kernel": raw(lambda: driver.cuModuleGetFunction(module, b"absent")),
        "no cubin": raw(lambda: driver.cuModuleLoadData(b"text, not a cubin")),
        "no context to load in": in_a_thread(lambda: raw(lambda: driver.cuModuleLoadData(cubin))),
    }
    driver.cuFuncSetAttribute(kernel, large, 60000)
    said["shared memory that was asked for"] = raw(lambda: launch(shared=60000))
    return said


def through_the_launcher() -> dict[str, Any]:
    """Launches that a network makes, and some that it must not."""
    device, tile = torch.device("cuda:0"), (fused_augment.THREADS, 1, 1)
    launch = loader(norm.SOURCE, norm.KERNELS, device)(OPTIONS)
    augment = fused_augment.loaded(CudaModule, device)
    arguments = norm.Arguments(rows=12, channels=5, momentum=0.25)
    said: dict[str, Any] = {"warm": outcome(lambda: launch(KERNEL, (3, 1, 1), BLOCK, arguments))}
    seen = STUB.stub_launch(STUB.stub_launch_count() - 1).contents
    said["seen"] = [seen.kernel.decode(), list(seen.grid), list(seen.block), seen.stream]
    said["same arguments"] = bytes(seen.arguments)[: seen.bytes] == bytes(arguments)
    said["cold"] = in_a_thread(lambda: outcome(lambda: launch(KERNEL, (3, 1, 1), BLOCK, arguments)))
    said["other device"] = in_a_thread(lambda: with_the_other_device_current(launch))
    said["grid"] = [outcome(lambda g=g: launch(KERNEL, g, BLOCK, arguments)) for g in ((1, 65536, 1), (1, 1, 0))]
    said["sizes"] = [outcome(lambda a=a: launch(KERNEL, (3, 1, 1), BLOCK, a())) for a in (Short, Long)]
    work = fused_augment.Arguments()
    said["augment"] = outcome(lambda: augment("augment", (1, 1, 1), tile, work))
    said["augment, cold"] = in_a_thread(lambda: outcome(lambda: augment("augment", (1, 1, 1), tile, work)))
    said["augment, grid"] = outcome(lambda: augment("augment", (1, 65536, 1), tile, work))
    return said


if __name__ == "__main__":
    driver.cuInit(0)
    stand_in_for_torch()
    tell_sizes_of_arguments()
    driver.cuCtxSetCurrent(context_of(0))
    print(json.dumps({"direct": direct(), "launcher": through_the_launcher()}))
