"""Compile CUDA C++ with NVRTC at first use and launch it on PyTorch's current stream.

Both NVRTC and the driver are reached through `cuda.bindings`, which every recent CUDA build of torch brings along.
Compiling needs no GPU.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch


def _checked(result: tuple[Any, ...], what: str) -> Any:
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"{what}: {status!r}")
    return values[0] if values else None


def compile_cubin(source: Path, capability: tuple[int, int]) -> bytes:
    """Machine code of `source` for one compute capability.

    Raises:
        RuntimeError: no NVRTC, or the source does not compile; the message ends with the compiler's log.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise RuntimeError(f"cuda.bindings is missing ({error}); pip install cuda-bindings") from None
    program = _checked(
        nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []), "nvrtcCreateProgram"
    )
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode(), b"--std=c++17"]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status) != 0:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{source.name} for sm_{capability[0]}{capability[1]}: {status!r}\n{log.decode()}")
        cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class Module:
    """The kernels of one source, loaded on one device."""

    def __init__(self, source: Path, device: torch.device, shared_bytes: dict[str, int]) -> None:
        """Compile and load.

        Args:
            source: the `.cu` file.
            device: a CUDA device.
            shared_bytes: kernel name -> dynamic shared memory of a block, for every kernel that will be launched.

        Raises:
            RuntimeError: something is missing or does not compile, or the stream is capturing a CUDA graph.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{source.name} must be loaded before a CUDA graph is captured: run one step first")
        cubin = compile_cubin(source, torch.cuda.get_device_capability(device))
        from cuda.bindings import driver

        self._driver = driver
        self._device = device
        self._shared = shared_bytes
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # from here on the device has a context
            self._module = _checked(driver.cuModuleLoadData(cubin), "cuModuleLoadData")
            self._kernels = {name: self._kernel(name, size) for name, size in shared_bytes.items()}

    def _kernel(self, name: str, shared_bytes: int) -> Any:
        kernel = _checked(self._driver.cuModuleGetFunction(self._module, name.encode()), f"kernel {name}")
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(self._driver.cuFuncSetAttribute(kernel, attribute, shared_bytes), f"shared memory of {name}")
        return kernel

    def launch(self, name: str, grid: tuple[int, int], threads: int, arguments: ctypes.Structure) -> None:
        """Launch one kernel, which takes `arguments` by value, and return at once."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            shared = self._shared[name]
            launched = self._driver.cuLaunchKernel(
                self._kernels[name], *grid, 1, threads, 1, 1, shared, stream, ctypes.addressof(pointers), 0
            )
        _checked(launched, f"launch of {name}")
