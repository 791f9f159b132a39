"""Load compiled kernels into a GPU and launch them on PyTorch's current stream.

Every kernel of the project runs through `CudaModule`, that of the augmentation included. The driver is reached through
`cuda.bindings`, which every CUDA build of torch brings along.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .nvrtc import cached_binary, find_nvrtc

Grid = tuple[int, int, int]
_OnePointer = ctypes.c_void_p * 1
MAX_GRID: Grid = (2**31 - 1, 65535, 65535)
"""Most blocks that a launch may have along x, y and z, on every GPU."""


FUNCTIONS = {
    "launch": "cuLaunchKernel",
    "current_context": "cuCtxGetCurrent",
    "push_context": "cuCtxPushCurrent_v2",
    "pop_context": "cuCtxPopCurrent_v2",
}
"""What C++ calls of the driver to launch a kernel: our name -> symbol."""


@dataclass(frozen=True)
class Addresses:
    """What C++ needs to launch kernels that are loaded in this process.

    Attributes:
        functions: names in `FUNCTIONS`, and "current_stream" for (device index, pointer to the stream) -> status.
        context: in which the kernels were loaded.
        device: its index.
        kernels: name -> handle.
    """

    functions: Mapping[str, int]
    context: int
    device: int
    kernels: Mapping[str, int]


@functools.cache
def _function_addresses() -> dict[str, int]:
    driver, torch_cuda = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libtorch_cuda.so")
    functions = {name: getattr(driver, symbol) for name, symbol in FUNCTIONS.items()}
    # PyTorch's C interface for compiled models: it stays as it is from one version to the next.
    functions["current_stream"] = torch_cuda.aoti_torch_get_current_cuda_stream
    return {name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in functions.items()}


class Launcher(Protocol):
    """Runs a kernel that takes one structure by value."""

    def __call__(self, kernel: str, grid: Grid, block: Grid, arguments: ctypes.Structure) -> None:
        """Launch `kernel` and return at once."""


class CudaModule:
    """Kernels of one compiled source on one device; calling it launches one of them."""

    def __init__(
        self, source: Path, options: Sequence[str], device: torch.device, shared_bytes: Mapping[str, int]
    ) -> None:
        """Compile (or fetch from the cache) and load.

        Args:
            source: the `.cu` file.
            options: compiler flags.
            device: a CUDA device.
            shared_bytes: kernel name -> dynamic shared memory of a block, for every kernel that will be launched.

        Raises:
            RuntimeError: no NVRTC, no driver bindings, a source that does not compile, or a stream that is capturing a
                CUDA graph: a module must be loaded before.
        """
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise RuntimeError(f"cuda.bindings is missing ({error}); pip install cuda-bindings") from None
        self._driver: Any = driver
        self._success = driver.CUresult.CUDA_SUCCESS
        self._name, self._device, self._shared = source.name, device, shared_bytes
        # Capturing and the context are questions to the current device, so the module's must be that here.
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"{source.name} must be loaded before a CUDA graph is captured: run one step first")
            torch.cuda.current_stream().synchronize()  # the device has a context from here on, and this thread too
            self._context = self._checked(driver.cuCtxGetCurrent(), "its context")
            self._context_address, self._index = int(self._context), torch.cuda.current_device()
            self._module = self._load(source, options)
            self._functions = {kernel: self._function(kernel) for kernel in shared_bytes}

    def _load(self, source: Path, options: Sequence[str]) -> object:
        """The loaded module; what the cache holds is compiled again, once, if the driver refuses it."""
        nvrtc, capability = find_nvrtc(), torch.cuda.get_device_capability(self._device)
        status, *values = self._driver.cuModuleLoadData(cached_binary(nvrtc, source, capability, options))
        if status == self._driver.CUresult.CUDA_SUCCESS:
            return values[0]
        # A file that was damaged on disk would otherwise fail in every run until someone finds and deletes it.
        binary = cached_binary(nvrtc, source, capability, options, fresh=True)
        return self._checked(self._driver.cuModuleLoadData(binary), "loading it")

    def _function(self, kernel: str) -> object:
        function = self._checked(self._driver.cuModuleGetFunction(self._module, kernel.encode()), f"kernel {kernel}")
        if self._shared[kernel]:  # more than 48 KiB a block must be asked for
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            set_size = self._driver.cuFuncSetAttribute(function, attribute, self._shared[kernel])
            self._checked(set_size, f"shared memory of {kernel}")
        return function

    def _checked(self, result: tuple, what: str) -> Any:
        status, *values = result
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{self._name}, {what}: {status!r}")
        return values[0] if values else None

    @contextlib.contextmanager
    def _bound(self) -> Iterator[None]:
        """Within the block the calling thread, which has another context or none, has that of the module.

        A launch needs a current context, and `torch.cuda.device` makes none where the device is the current one
        already: a thread whose first CUDA work is this launch (a backward pass, a loader) has none. Triton and
        Transformer Engine met the error (triton-lang/triton#3729, NVIDIA/TransformerEngine#734).
        """
        self._checked(self._driver.cuCtxPushCurrent(self._context), "binding its context")
        try:
            yield
        finally:
            self._checked(self._driver.cuCtxPopCurrent(), "giving the context back")

    def __call__(self, kernel: str, grid: Grid, block: Grid, arguments: ctypes.Structure) -> None:
        """Launch on the current stream of the module's device. The driver copies the arguments in the call.

        Raises:
            ValueError: a grid that no GPU takes; the driver would only say "invalid value".
            RuntimeError: the driver refuses the launch.
        """
        if not (1 <= grid[0] <= MAX_GRID[0] and 1 <= grid[1] <= MAX_GRID[1] and 1 <= grid[2] <= MAX_GRID[2]):
            raise ValueError(f"{self._name}, {kernel}: a grid of {grid} blocks is outside 1..{MAX_GRID}")
        # A ResNet-50 launches hundreds of these in a step: the usual case calls two getters and the driver.
        if torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._device):
                self(kernel, grid, block, arguments)
        elif self._has_context():
            self._launch(kernel, grid, block, arguments)
        else:
            with self._bound():
                self._launch(kernel, grid, block, arguments)

    def addresses(self) -> Addresses:
        """What C++ needs to launch the kernels.

        Raises:
            OSError: the driver's or PyTorch's library is not found by its name.
            AttributeError: it lacks one of the functions.
        """
        kernels = {name: int(function) for name, function in self._functions.items()}  # type: ignore[call-overload]
        return Addresses(_function_addresses(), self._context_address, self._index, kernels)

    def _has_context(self) -> bool:
        status, current = self._driver.cuCtxGetCurrent()
        return status == self._success and int(current) == self._context_address

    def _launch(self, kernel: str, grid: Grid, block: Grid, arguments: ctypes.Structure) -> None:
        pointers = _OnePointer(ctypes.addressof(arguments))
        # The number that `torch.cuda.current_stream` would wrap in an object; Triton takes it the same way.
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        function, shared = self._functions[kernel], self._shared[kernel]
        launched = self._driver.cuLaunchKernel(function, *grid, *block, shared, stream, ctypes.addressof(pointers), 0)
        if launched[0] != self._success:
            self._checked(launched, f"launch of {kernel}, grid {grid}, block {block}")


def loader(source: Path, kernels: Sequence[str], device: torch.device) -> Callable[[tuple[str, ...]], Launcher]:
    """A function from compiler options to a launcher of kernels that need no dynamic shared memory."""
    return lambda options: CudaModule(source, options, device, dict.fromkeys(kernels, 0))
