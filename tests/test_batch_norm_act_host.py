"""Batch norm's C++ launches against its Python ones: the same kernels, run on the host, and the same bits."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops import batch_norm_act_host, batch_norm_act_kernels, host_library
from models.ops.batch_norm_act_kernels import SOURCE, Arguments, BatchNormActKernels, pack_size
from models.ops.choice import NORM
from models.ops.host_library import HostLibrary, batch_norm_library
from models.ops.launcher import Addresses
from models.ops.layout import STORAGE
from models.ops.nvrtc import cache_folder
from tests.cuda_host import HostModule
from tests.test_batch_norm_act import CASES, DTYPES, EPS, FORMS, make_map, normal, parameters

CONTEXT, STREAM = 0x100, 0x7
Pointer = ctypes.c_void_p
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, Pointer, *[ctypes.c_uint] * 7, Pointer, ctypes.POINTER(Pointer), Pointer)
ASK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Pointer))
PUSH = ctypes.CFUNCTYPE(ctypes.c_int, Pointer)
STREAM_OF = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(Pointer))


class Driver:
    """A driver whose kernels are those of a `HostModule`; it writes down launches and keeps a stack of contexts."""

    def __init__(self) -> None:
        self.stack, self.launches, self.refuse = [CONTEXT], [], ""
        self.modules: list[HostModule] = []
        self._functions = {
            "launch": LAUNCH(self._launch),
            "current_context": ASK(self._current),
            "push_context": PUSH(self._push),
            "pop_context": ASK(self._pop),
            "current_stream": STREAM_OF(self._stream),
        }

    def addresses(self, module: HostModule) -> Addresses:
        names = batch_norm_act_host.KERNELS
        self.modules.append(module)
        first = 1 + len(names) * (len(self.modules) - 1)
        functions = {name: ctypes.cast(function, Pointer).value for name, function in self._functions.items()}
        return Addresses(functions, CONTEXT, 0, {name: first + place for place, name in enumerate(names)})

    def _launch(self, kernel, *given) -> int:
        module, place = divmod(kernel - 1, len(batch_norm_act_host.KERNELS))
        name = batch_norm_act_host.KERNELS[place]
        grid, block, (shared, stream, arguments, _) = given[:3], given[3:6], given[6:]
        self.launches.append((name, stream))
        if self.stack[-1:] != [CONTEXT] or shared or name == self.refuse:
            return 201
        self.modules[module](name, grid, block, Arguments.from_address(arguments[0]))
        return 0

    def _current(self, context) -> int:
        context[0] = self.stack[-1] if self.stack else None
        return 0

    def _push(self, context) -> int:
        self.stack.append(context)
        return 0

    def _pop(self, context) -> int:
        context[0] = self.stack.pop()
        return 0

    def _stream(self, device, stream) -> int:
        stream[0] = STREAM
        return 0


@pytest.fixture(scope="module")
def driver() -> Driver:
    return Driver()


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, driver: Driver) -> Callable:
    """Compiler options -> launcher that C++ can use too."""
    folder = tmp_path_factory.mktemp("kernels")

    @functools.cache
    def made(options: tuple[str, ...]) -> HostModule:
        module = HostModule(SOURCE, options, folder)
        module.addresses = functools.cache(lambda: driver.addresses(module))
        return module

    return made


@pytest.fixture(scope="module")
def operator() -> batch_norm_act_host.Operator:
    """The operator in C++, compiled by the first test that wants it and kept in the user's cache."""
    if batch_norm_library().wait() is None:
        pytest.skip(batch_norm_library().why_not())
    found = batch_norm_act_host.operator()
    assert found is not None
    return found


@pytest.fixture
def kernels(load: Callable, driver: Driver) -> Iterator[BatchNormActKernels]:
    driver.launches.clear()
    yield BatchNormActKernels(load, blocks=8, min_rows=1)
    assert driver.stack == [CONTEXT] and driver.refuse == ""


def by_host(operator, kernels, x, residual, weight, bias, groups, relu):
    plan = kernels.host_plan(x.shape, x.dtype, groups)
    return operator(x, residual, weight, bias, plan, EPS, relu)


def by_python(kernels, x, residual, weight, bias, groups, relu, grad):
    """y, mean, variance, and the gradients of x, residual, weight and bias, by launches from Python."""
    y, mean, variance, mask = kernels.forward(x, residual, weight, bias, groups, EPS, relu, True)
    wants = residual is not None and relu
    made = kernels.backward(grad, x, weight, bias, mean, variance, mask, EPS, relu, wants)
    return [y, mean, variance], [made[0], *([made[1] if relu else grad] if residual is not None else []), *made[2:]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_those_of_launches_from_python(operator, kernels, driver, load, case, dtype) -> None:
    *shape, groups = case
    grad = normal(*shape, dtype=dtype, seed=5).to(memory_format=torch.channels_last)
    launched = load((f"-DFEATURE={STORAGE[dtype]}", f"-DVECTOR={pack_size(shape[1], dtype)}")).launched
    for with_residual, relu in FORMS:
        launched.clear()
        x, weight, bias = make_map(*shape, dtype=dtype), *parameters(shape[1], torch.float32)
        residual = make_map(*shape, dtype=dtype, seed=3) if with_residual else None
        results, gradients = by_python(kernels, x, residual, weight, bias, groups, relu, grad)
        inputs = [t.requires_grad_() for t in (x, residual, weight, bias) if t is not None]
        made = by_host(operator, kernels, x, residual, weight, bias, groups, relu)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, results, strict=True))
        assert made[0].requires_grad and not made[1].requires_grad and not made[2].requires_grad
        given = torch.autograd.grad(made[0], inputs, grad)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(given, gradients, strict=True))
        assert len(launched) == 12 and launched[:6] == launched[6:], "the same kernels"
    assert {stream for _, stream in driver.launches} == {STREAM}


def test_other_layouts_are_copied_and_results_keep_them(operator, kernels) -> None:
    plain = make_map(4, 8, 3, 3, dtype=torch.float32)
    odd = torch.empty(4 * 72 + 1)[1:].view(4, 3, 3, 8).permute(0, 3, 1, 2).copy_(plain)
    grad = normal(4, 8, 3, 3, dtype=torch.float32, seed=5)
    results = []
    for x in (plain, plain.contiguous(), odd):
        x = x.detach().requires_grad_()
        y = by_host(operator, kernels, x, None, None, None, 2, True)[0]
        (made,) = torch.autograd.grad(y, x, grad)
        for tensor in (y, made):
            assert tensor.is_contiguous(memory_format=torch.channels_last) != x.is_contiguous()
        results.append((y, made))
    for y, made in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(made, results[0][1])


def test_only_wanted_gradients_are_given(operator, kernels, driver) -> None:
    x, residual = make_map(4, 8, 3, 3, dtype=torch.float32), make_map(4, 8, 3, 3, dtype=torch.float32, seed=3)
    weight, bias = parameters(8, torch.float32)
    # A frozen parameter, then a frozen trunk in front, then no one who wants anything.
    y = by_host(operator, kernels, x.requires_grad_(), residual, weight, bias.requires_grad_(), 2, True)[0]
    y.sum().backward()
    assert x.grad is not None and bias.grad is not None and weight.grad is residual.grad is None
    assert driver.launches[-1][0] == "batch_norm_backward_input_mask", "nothing is written for a frozen residual"
    y = by_host(operator, kernels, x.detach(), residual.requires_grad_(), weight, None, 2, False)[0]
    y.sum().backward()
    assert residual.grad is not None and torch.equal(residual.grad, torch.ones_like(residual))
    with torch.no_grad():
        assert not by_host(operator, kernels, x, residual, weight, bias, 2, True)[0].requires_grad
    assert driver.launches[-1][0] == "batch_norm_normalise_recompute_added", "no mask is written"
    driver.launches.clear()
    by_host(operator, kernels, x, residual, weight, bias, 2, True)[1].square()
    names = ["batch_norm_statistics", "batch_norm_join_statistics", "batch_norm_normalise_mask_added"]
    assert [name for name, _ in driver.launches] == names


def test_in_place_operations_may_follow_and_saved_tensors_are_watched(operator, kernels) -> None:
    x = make_map(4, 8, 3, 3, dtype=torch.float32).requires_grad_()
    weight, bias = (t.requires_grad_() for t in parameters(8, torch.float32))
    F.relu(by_host(operator, kernels, x, None, weight, bias, 2, False)[0], inplace=True).sum().backward()
    separate = x.grad.clone()
    x.grad = None
    y = by_host(operator, kernels, x, None, weight, bias, 2, True)[0]
    y.sum().backward()
    torch.testing.assert_close(x.grad, separate)
    y = by_host(operator, kernels, x, None, weight, bias, 2, True)[0]
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused(operator, kernels) -> None:
    x = make_map(4, 8, 3, 3, dtype=torch.float32).requires_grad_()
    y = by_host(operator, kernels, x, None, None, None, 1, True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("other", [None, 0x300])
def test_a_thread_without_the_context_gets_it_for_the_launch(operator, kernels, driver, other) -> None:
    x = make_map(2, 8, 3, 3, dtype=torch.float32)
    expected = by_host(operator, kernels, x, None, None, None, 1, True)[0]
    driver.stack[:] = [other] if other else []
    try:
        assert torch.equal(by_host(operator, kernels, x, None, None, None, 1, True)[0], expected)
        assert driver.stack == ([other] if other else [])
        driver.refuse = "batch_norm_normalise_recompute"
        with pytest.raises(RuntimeError, match=r"launch of batch_norm_normalise_recompute, grid \(1, \d+, 1\).* 201"):
            by_host(operator, kernels, x, None, None, None, 1, True)
        assert driver.stack == ([other] if other else []), "an error gives the thread's own context back too"
    finally:
        driver.stack[:], driver.refuse = [CONTEXT], ""


def test_the_operator_goes_through_c_plus_plus(operator, kernels, driver, monkeypatch) -> None:
    """`batch_norm_act` takes the C++ launches where kernels are chosen and the library is there, else Python's."""
    monkeypatch.setattr(batch_norm_act_kernels, "kernels_for", lambda *_: kernels)
    # By its name: the package has a function of that name.
    module = importlib.import_module("models.ops.batch_norm_act")
    monkeypatch.setattr(module, "kernels_for", lambda *_: kernels)
    monkeypatch.setattr(NORM, "why_not", lambda x: None)  # as on a GPU
    monkeypatch.setattr(NORM, "_mode", "cuda")
    x = make_map(4, 8, 3, 3, dtype=torch.float32)
    results: list[Tensor] = []
    for found, launches in ((operator, 3), (None, 0)):
        driver.launches.clear()
        monkeypatch.setattr(batch_norm_act_kernels, "_launches", {})
        monkeypatch.setattr(batch_norm_act_host, "operator", lambda found=found: found)
        results.append(module.batch_norm_act(x, None, None, groups=2, relu=True)[0])
        assert len(driver.launches) == launches
    assert torch.equal(*results)


def test_only_what_fits_goes_through_c_plus_plus(operator, kernels, driver, monkeypatch) -> None:
    """A kernel gets addresses alone: a parameter that it would misread, or a residual of another shape, goes round."""
    monkeypatch.setattr(batch_norm_act_kernels, "kernels_for", lambda *_: kernels)
    monkeypatch.setattr(NORM, "why_not", lambda x: None)  # as on a GPU
    monkeypatch.setattr(batch_norm_act_kernels, "_launches", {})
    monkeypatch.setattr(batch_norm_act_host, "operator", lambda: operator)
    monkeypatch.setattr(NORM, "_mode", "cuda")
    x, launched = make_map(4, 8, 3, 3, dtype=torch.float32), batch_norm_act_kernels.launched_from_host
    assert launched(x, None, None, None, 2, EPS, True) is None, "no plan yet"
    assert batch_norm_act_kernels.plan_from_host(x, None, None, 2)
    assert launched(x, x, torch.ones(8), None, 2, EPS, True) is not None
    driver.launches.clear()
    for wrong in (torch.ones(16)[::2], torch.ones(7), torch.ones(8).double(), torch.ones(8, device="meta")):
        assert launched(x, None, wrong, None, 2, EPS, True) is None
        assert launched(x, None, None, wrong, 2, EPS, True) is None
    assert (
        launched(x, x[:2], None, None, 2, EPS, True) is None
        and launched(x, x.double(), None, None, 2, EPS, True) is None
    )
    monkeypatch.setattr(NORM, "_mode", "auto")
    assert launched(x, None, None, None, 2, EPS, True) is None and not driver.launches


def library_of(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostLibrary:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "tiny.cpp"
    source.write_text(text)
    return HostLibrary(source, "nothing is done")


def test_a_library_is_built_behind_the_run_and_found_again(tmp_path, monkeypatch) -> None:
    if host_library.compiler() is None:
        pytest.skip("no C++ compiler")
    text = 'extern "C" __attribute__((visibility("default"))) int one() { return 1; }'
    library = library_of(text, tmp_path, monkeypatch)
    (cache_folder() / ".tiny-of-a-run-that-ended").mkdir(parents=True)
    assert library.loaded() is None and library.why_not() == "", "asking waits for no compiler"
    path = library.wait()
    assert path is not None and ctypes.CDLL(str(path)).one() == 1
    assert sorted(each.suffix for each in path.parent.iterdir()) == [".lock", ".so"]
    monkeypatch.setattr(host_library, "_compile", lambda *_: pytest.fail("compiled again"))
    assert library_of(text, tmp_path, monkeypatch).wait() == path


def test_what_cannot_be_built_is_told_once(tmp_path, monkeypatch, caplog) -> None:
    broken = library_of("int f() { return undeclared; }", tmp_path, monkeypatch)
    assert broken.wait() is None and "undeclared" in broken.why_not()
    monkeypatch.setattr(host_library, "compiler", lambda: None)
    alone = library_of("int f();", tmp_path, monkeypatch)
    assert alone.wait() is None and alone.loaded() is None and "apt install g++" in alone.why_not()
    assert [record.message.endswith("until then: nothing is done") for record in caplog.records] == [True, True]
    assert not list((tmp_path / "cache").rglob("*.so"))
