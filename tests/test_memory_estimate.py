"""The estimate of a step's memory against two other counts: autograd's saved tensors, and a real step's allocator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from models.hyperparameters import CONFIGS
from tests.runs import last_wins
from train import memory, memory_estimate
from train.build import build_method, build_state
from train.config import Config
from train.errors import UserMistake
from train.inputs import check_batch
from train.memory_estimate import LiveBytes, _inputs, _step, _without_init, _without_values, estimate
from train.resolve import resolve
from train.runtime import Runtime

CPU = torch.device("cpu")
ALONE = Runtime(0, 1, CPU, torch.float32, False)


def small(method: str, batch: int = 16, *more: str) -> Config:
    flags = ["--method", method, "--recipe", f"{method}-small", "--global-batch", str(batch)]
    # A narrow trunk: the larger one's weights would hide what its activations take. Swin's are apart.
    trunk = [] if "moby" in method or "lewel" in method else ["--arch", "resnet10-w16"]
    config = resolve(last_wins([*flags, *trunk, "--image-size", "64", *more]))
    check_batch(config, 1)
    return config


def real_peak(config: Config) -> tuple[int, int]:
    """Bytes that a forward and backward pass with values holds between the two, and at most: the allocator's own."""
    method = build_method(config, ALONE)
    method.train()
    inputs = _inputs(config, method, ALONE, config.recipe.global_batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        output = method(inputs)
        with torch.profiler.record_function("between"):
            pass
        output.loss.backward()
    events = sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = peak = between = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
        elif event.name() == "between":
            between = held
    return between, peak


def check_against_the_allocator(method: str) -> None:
    config = small(method)
    between, peak = real_peak(config)
    found = estimate(config, 1, CPU, torch.float32)
    assert found.activations == pytest.approx(between, rel=0.01)
    # Of its peak the operators' own workspaces are no tensors: in so small a step up to a third, in a large one less.
    assert found.lasting + found.activations + found.passing <= found.lasting - found.gradients + peak * 1.01
    assert found.lasting + found.activations + found.passing >= (found.lasting - found.gradients + peak) * 0.85


@pytest.mark.parametrize("method", ["regioncl-d"])
def test_a_step_takes_what_was_estimated(method: str) -> None:
    check_against_the_allocator(method)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in CONFIGS if name != "regioncl-d"])
def test_a_step_of_every_method_takes_what_was_estimated(method: str) -> None:
    check_against_the_allocator(method)


@pytest.mark.parametrize(
    "method", ["regioncl-m", *(pytest.param(name, marks=pytest.mark.slow) for name in ("byol", "moby", "lewel-b"))]
)
def test_what_is_kept_is_what_autograd_saves(method: str) -> None:
    """Counted by hooks on saved tensors, which know nothing of when memory is taken and given back."""
    config = small(method)
    model = _without_init(config)
    with _without_values(model):
        inputs = _inputs(config, model, ALONE, 16)
        there = {id(t.untyped_storage()) for t in [*model.parameters(), *model.buffers(), *inputs.tensors()]}
        saved: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if id(storage) not in there:
                saved[id(storage)] = storage  # held, so that no other takes its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(inputs)
        counted = sum(storage.nbytes() for storage in saved.values())
        del output
    found = estimate(config, 1, CPU, torch.float32).activations
    # Beside them a forward pass holds its results and, where it keeps an input of a module, nothing else.
    assert counted <= found * 1.001 and found == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("kind", ["adamw", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sgd", "lars"))])
def test_what_lasts_is_what_the_state_holds(kind: str) -> None:
    config = small("regioncl-m", 16, "--optim.kind", kind)
    method = build_method(config, ALONE)
    state = build_state(config, ALONE, method)
    method(_inputs(config, method, ALONE, 16)).loss.backward()
    state.optimizer.step()
    found = estimate(config, 1, CPU, torch.float32)
    held = sum(t.nbytes for t in method.state_dict().values())
    assert found.parameters + found.momentum + found.queue == held
    assert found.queue == config.model.queue_size * config.model.dim * 4
    assert found.gradients == sum(p.grad.nbytes for p in method.parameters() if p.grad is not None)
    # AdamW has a count of steps for each tensor besides.
    averages = [v for entry in state.optimizer.state.values() for v in entry.values() if torch.is_tensor(v) and v.dim()]
    assert found.optimizer == sum(v.nbytes for v in averages)


def test_it_follows_the_micro_batch_the_precision_and_the_device() -> None:
    config = small("regioncl-m", 64)
    whole = estimate(config, 1, CPU, torch.float32)
    parts = estimate(replace(config, run=replace(config.run, micro_batch=16)), 1, CPU, torch.float32)
    assert parts.activations == pytest.approx(whole.activations / 4, rel=0.02)
    assert (parts.lasting, parts.inputs, parts.loader) == (whole.lasting, whole.inputs, whole.loader)
    # Of the second micro-batch on, its own activations lie beside all gradients.
    assert parts.device < whole.device and parts.device > parts.lasting + parts.activations
    half = estimate(config, 1, CPU, torch.bfloat16)
    assert 0.5 <= half.activations / whole.activations < 0.75
    gpu = estimate(config, 1, torch.device("cuda"), torch.bfloat16)
    assert gpu.inputs > half.inputs and gpu.lasting == half.lasting
    assert estimate(config, 4, CPU, torch.float32).activations == pytest.approx(whole.activations / 4, rel=0.02)
    assert "kept for the backward pass" in str(whole) and whole.total(CPU) == whole.device + whole.loader


def test_nothing_is_drawn_from_the_run_s_generator() -> None:
    config = small("moco-v2")
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    estimate(config, 1, CPU, torch.float32)
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["torchvision:efficientnet_b0", "timm:vit_small_patch16_224", "timm:convnext_tiny"])
def test_backbones_of_other_libraries_take_what_was_estimated(arch: str) -> None:
    pytest.importorskip("timm")
    size = "224" if "vit" in arch else "64"
    flags = ["--method", "moco-v2", "--recipe", "moco-v2-small", "--global-batch", "4", "--bn.group-size", "4"]
    config = resolve([*flags, "--arch", arch, "--image-size", size])
    between, _ = real_peak(config)
    assert estimate(config, 1, CPU, torch.float32).activations == pytest.approx(between, rel=0.02)


def test_values_that_decide_shapes_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(self: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        return images[images.sum(dim=(1, 2, 3)) > 0]

    memory_estimate.estimate.cache_clear()
    monkeypatch.setattr("models.resnet.ResNetTrunk.forward", chosen)
    with pytest.raises(UserMistake, match="--arch resnet10-w16: its memory cannot be estimated.*give --micro-batch"):
        estimate(small("simsiam"), 1, CPU, torch.float32)
    memory_estimate.estimate.cache_clear()


def test_memory_that_is_given_back_is_not_counted() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        for _ in range(3):
            passing = kept + 1
            view = passing[:10]
            view.add_(1)
            del passing, view
        assert (live.now, live.peak) == (4000, 8000)
        del kept
        assert live.now == 0


def test_the_host_s_limits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory_estimate.free_bytes(CPU)
    assert 0 < free and memory_estimate.free_bytes(CPU, 2) == pytest.approx(free / 2, rel=0.05)
    monkeypatch.setattr(memory_estimate, "memory_bytes", lambda: 1 << 20)  # a control group that is full
    assert memory_estimate.free_bytes(CPU) == 0
    monkeypatch.undo()
    monkeypatch.setattr(memory_estimate.resource, "getrlimit", lambda which: (1 << 20, 1 << 20))  # ulimit -v
    assert memory_estimate.free_bytes(CPU) == 0


def test_the_line_of_a_gpu_names_what_the_estimate_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is faked at its free memory: the largest micro-batch up to half of the present that fits."""
    config = small("regioncl-m", 64)
    on_gpu = replace(ALONE, device=torch.device("cuda"))

    def needs(size: int) -> int:
        at = replace(config, run=replace(config.run, micro_batch=size))
        return estimate(at, 1, torch.device("cuda"), torch.float32).device

    monkeypatch.setattr(memory, "capacity_bytes", lambda device: needs(32))
    assert memory.training_remedy(config, on_gpu) == "--micro-batch 32"
    monkeypatch.setattr(memory, "capacity_bytes", lambda device: needs(32) - 1)
    assert memory.training_remedy(config, on_gpu) == "--micro-batch 16"
    monkeypatch.setattr(memory, "choose_dtype", lambda precision, device: torch.bfloat16)
    monkeypatch.setattr(memory, "capacity_bytes", lambda device: needs(16) - 1)
    assert memory.training_remedy(config, on_gpu) == "--precision bf16", "groups of 16 images stay whole"

    def broken(*_: object) -> int:
        raise RuntimeError("a backbone that cannot do without values")

    monkeypatch.setattr(memory, "largest_that_fits", broken)
    assert memory.training_remedy(config, on_gpu) == "--micro-batch 32"


def test_the_step_is_the_methods_own() -> None:
    """Twice, because the second pass of a step adds to gradients that are there."""
    model = _without_init(small("simsiam"))
    with _without_values(model):
        inputs, live = _inputs(small("simsiam"), model, ALONE, 16), LiveBytes()
        live.leave_out([*inputs.tensors(), *model.parameters(), *model.buffers()])
        with live:
            first = _step(model, inputs, ALONE, live)
            after = live.now
            second = _step(model, inputs, ALONE, live)
        assert after == sum(p.nbytes for p in model.parameters() if p.requires_grad)
        assert second == first + after
