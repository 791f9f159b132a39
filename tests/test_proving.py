"""Kernels are proved before they are used: planted faults are refused and named, and the run trains on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.methods import METHODS
from models.ops import batch_norm_act, box_pool, masked_pool
from models.ops.choice import CHOICES
from models.ops.host_library import HostLibrary, batch_norm_library
from tests.method_cases import SWIN_METHODS, small_backbones
from tests.planted_kernels import plant
from tests.runs import TINY, last_wins, rows
from tests.test_fake_cuda import settings
from train.config import Config
from train.errors import UserMistake
from train.main import main
from train.proving import apart, choose
from train.proving.calls import operator_calls
from train.proving.gradients import gradient_problem
from train.proving.kernels import box_trial, mask_trial, norm_trial, queue_trial
from train.proving.prover import Candidate, Results, Trial, Verdict, compare_largest, prove
from train.proving.setting import method_and_inputs, setting_of
from train.proving.steps import Passes, step_candidates
from train.resolve import resolve
from train.runtime import Runtime

CPU = torch.device("cpu")
ALONE = Runtime(0, 1, CPU, torch.float32, False)
RIGHT = Verdict("batch_norm_act", True, True, "", 1.0, 2.0, 3)
WRONG = Verdict("box_pool", False, False, "wrong at (3, 7): y is off by 2", checked=1)


@pytest.fixture(autouse=True)
def choices_as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No choice and no planted kernel outlives a test, and no cache is shared."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    modules = [__import__("sys").modules[each.__module__] for each in (batch_norm_act, box_pool, masked_pool)]
    kernels = [module.kernels_for for module in modules]
    yield
    for module, before in zip(modules, kernels, strict=True):
        module.kernels_for = before  # type: ignore[attr-defined]
    for each in CHOICES.values():
        each.set("auto")


def always(seconds: float, usual: float) -> Any:
    return lambda candidate, other: (candidate(), other(), (seconds, usual))[2]


def trials_of(operator: str, dtype: torch.dtype) -> list[Trial]:
    if operator == "batch_norm_act":
        cases = ((False, False), (True, False), (True, True))
        return [norm_trial((6, 7, 5, 3), dtype, 2, relu, residual, True, 1, CPU) for relu, residual in cases]
    if operator == "box_pool":
        return [box_trial((3, 7, 5, 3), dtype, True, 1, CPU)]
    return [mask_trial((3, 8, 5, 3), (2, 3), dtype, dtype, 1, CPU)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", ["batch_norm_act", "box_pool", "masked_pool"])
def test_right_kernels_are_used_and_planted_faults_are_refused(operator: str, dtype: torch.dtype) -> None:
    candidate = Candidate(operator, lambda: trials_of(operator, dtype))
    plant(operator, "right")
    verdict = prove(candidate, always(1.0, 2.0))
    assert (verdict.right, verdict.faster, verdict.reason) == (True, True, "")
    assert verdict.usual_seconds == 2 * verdict.seconds == 2.0 * verdict.checked
    assert not prove(candidate, always(2.0, 1.0)).faster and not prove(candidate, always(1.0, 1.01)).faster
    for fault in ("sign", "tail", "nan", "twice"):
        for backward in (False, True):
            plant(operator, fault, backward)
            verdict = prove(candidate, always(1.0, 2.0))
            assert not verdict.right, (fault, backward)
            wanted = "the gradient of" if backward else " is off by"
            assert verdict.reason.startswith("wrong at (") and wanted in verdict.reason, (fault, verdict.reason)
    plant(operator, "raise", backward=True)
    assert "raised RuntimeError: an illegal instruction was met at (" in prove(candidate, always(1.0, 2.0)).reason


def test_the_queue_by_blocks_is_compared_with_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = Candidate("queue_contrast", lambda: [queue_trial(7, 300, 24, torch.float32, 0.2, 1, CPU)])
    assert prove(candidate, always(1.0, 2.0)).right
    module: Any = __import__("sys").modules["models.ops.queue_contrast"]
    monkeypatch.setattr(module, "_queue_sumexp", lambda rows, queue, t: _without_last(rows, queue, t, module))
    assert "the loss is off by" in prove(candidate, always(1.0, 2.0)).reason


def _without_last(rows: torch.Tensor, queue: torch.Tensor, temperature: float, module: Any) -> Any:
    logits = rows @ queue[:-100].T / temperature
    maximum = logits.detach().amax(1)
    return (logits - maximum[:, None]).exp().sum(1), maximum


def test_what_is_not_the_candidates_fault_is_looked_at_again() -> None:
    def no_memory() -> Results:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    def fine() -> Results:
        return {"y": torch.ones(2)}

    for usual, exact in ((no_memory, fine), (fine, no_memory)):
        trial = Trial("two ones", fine, usual, exact, 1, compare_largest)
        verdict = prove(Candidate("any", lambda trial=trial: [trial]), always(1, 2))  # type: ignore[misc]
        assert not verdict.right and not verdict.final and "could not be checked at two ones" in verdict.reason


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_calls_are_found_and_nothing_moves(method: str) -> None:
    setting = setting_of(settings(method), ALONE)
    with small_backbones():
        module, inputs = method_and_inputs(setting)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        calls = operator_calls(setting, module, inputs)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        names = {call.name for call in calls}
        assert ("batch_norm_act" in names) == (method not in SWIN_METHODS)
        assert ("box_pool" in names) == method.startswith("regioncl")
        assert ("window_attention" in names) == (method in SWIN_METHODS)


# The forms of a step.


def region_setting(*flags: str) -> Any:
    return setting_of(settings("regioncl-m", *flags), ALONE)


def test_only_what_is_left_open_is_tried() -> None:
    assert [each.name for each in step_candidates(region_setting())] == ["shared_forward", "cuda_graph"]
    assert step_candidates(region_setting("--region.no-shared-forward", "--cuda-graph")) == []
    assert [each.name for each in step_candidates(setting_of(settings("moco-v2"), ALONE))] == ["cuda_graph"]
    for runtime in (dataclasses.replace(ALONE, dtype=torch.float16), dataclasses.replace(ALONE, world_size=2)):
        names = [each.name for each in step_candidates(setting_of(settings("moco-v2", "--bn.group-size=4"), runtime))]
        assert names == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_forward_pass_is_right_and_a_wrong_gradient_of_the_trunk_is_refused(dtype: torch.dtype) -> None:
    setting = dataclasses.replace(region_setting(), dtype=dtype)
    with small_backbones():
        passes = Passes(setting, *method_and_inputs(setting))
    plain, exact = passes.plain(), passes.exact()
    assert passes.compare(passes.shared(), plain, exact) == ""
    for factor in (2.0, 0.0, -1.0):
        spoiled = {name: value * factor if "encoder" in name else value for name, value in plain.items()}
        assert "the gradient of encoder" in passes.compare(spoiled, plain, exact), factor
    assert "the loss is" in passes.compare({**plain, "loss": plain["loss"] * 1.2}, plain, exact)


def test_gradients_are_compared_parameter_by_parameter() -> None:
    reference = {"a": torch.randn(50, generator=torch.Generator().manual_seed(0)), "bias": torch.full((3,), 1e-6)}
    assert gradient_problem({**reference, "bias": -reference["bias"]}, reference, torch.bfloat16) == ""
    assert "bias has length" in gradient_problem({**reference, "bias": torch.ones(3)}, reference, torch.bfloat16)
    assert "are missing or new, a among them" in gradient_problem({"bias": reference["bias"]}, reference, torch.float32)
    holes = reference["a"].clone()
    holes[0] = torch.nan
    assert "a is not finite" in gradient_problem({**reference, "a": holes}, reference, torch.float32)


# The process apart.


def test_a_candidate_that_ends_its_process_leaves_the_others_theirs() -> None:
    verdicts = apart.prove_apart(region_setting(), "tests.planted_kernels:deadly", 300.0)
    found = {verdict.name: verdict for verdict in verdicts}
    assert found["first"].right and found["last"].right
    assert not found["deadly"].right and "its process ended with signal 11" in found["deadly"].reason


@pytest.mark.slow
def test_a_candidate_that_never_returns_costs_the_time_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "HANGS_S", 0.0)
    known = [Verdict("last", True, True)]
    found = {v.name: v for v in apart.prove_apart(region_setting(), "tests.planted_kernels:hanging", 40.0, known)}
    assert found["first"].right and found["last"].right and "no answer in" in found["hanging"].reason


def test_without_a_plan_there_is_a_reason() -> None:
    (verdict,) = apart.prove_apart(region_setting(), "tests.planted_kernels:unreadable", 300.0)
    assert not verdict.right and not verdict.final and "no plan" in verdict.reason


# What a run uses.


def of(*flags: str) -> Config:
    return resolve(last_wins(["--method", "regioncl-m", *TINY, *flags]))


@pytest.fixture
def provable(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU counts as a device with kernels; a proof is a list of verdicts, and is counted."""
    proofs: list[int] = []
    monkeypatch.setattr(choose, "DEVICES", {"cpu"})

    def proved(setting: Any, plan: str, budget: float, known: Any) -> list[Verdict]:
        proofs.append(len(known))
        return [RIGHT, WRONG, dataclasses.replace(WRONG, name="cuda_graph", final=len(proofs) > 1)]

    monkeypatch.setattr(choose, "prove_apart", proved)
    return proofs


def test_a_verdict_is_made_once_on_a_card(provable: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    config, built = of("--deterministic", "false"), batch_norm_library().is_built()
    choice = choose.settle(config, ALONE, None)
    assert choice.source == "proved now" and choice.uses("batch_norm_act") and not choice.uses("box_pool")
    # The unfinished verdict alone is made again.
    assert choose.settle(config, ALONE, None).source == "proved now" and provable == [0, 2]
    assert choose.settle(config, ALONE, None).source == "proved before on this card" and len(provable) == 2
    choose.settle(of("--deterministic", "false", "--image-size", "96"), ALONE, None)
    assert len(provable) == 3, "other shapes were not proved"
    # Compiled meanwhile: kernels that looked slow when Python launched them get another look.
    monkeypatch.setattr(HostLibrary, "is_built", lambda self: not built)
    assert choose.settle(config, ALONE, None).source == "proved now"
    line = choose.told(choice)
    assert "batch_norm_act 2.00x (2e+03 -> 1e+03 ms a step)" in line
    assert "left out: box_pool (wrong at (3, 7): y is off by 2)" in line


def test_what_is_recorded_holds(provable: list[int]) -> None:
    config = of("--deterministic", "false")
    recorded = {**config.to_json(), "kernels": choose.settle(config, ALONE, None).to_json()}
    recorded = json.loads(json.dumps(recorded))
    choice = choose.settle(of(), ALONE, recorded)
    assert choice.source == "as recorded" and choice.uses("batch_norm_act") and len(provable) == 1
    # A run of before there were verdicts goes on without kernels.
    del recorded["kernels"], recorded["run"]["kernels"]
    assert not choose.settle(config, ALONE, recorded).verdicts and len(provable) == 1
    # Asked for otherwise, it is proved again.
    assert choose.settle(of("--kernels", "on"), ALONE, {**recorded, "run": {"kernels": "auto"}}).asked == "on"


def test_a_stopwatch_decides_nothing_of_a_deterministic_run(provable: list[int]) -> None:
    assert "not timed with --deterministic" in choose.told(choose.settle(of(), ALONE, None)) and not provable
    assert choose.settle(of("--kernels", "on"), ALONE, None).uses("batch_norm_act")
    assert not choose.settle(of("--deterministic", "false", "--kernels", "off"), ALONE, None).verdicts


def test_on_takes_what_is_right_and_slower(provable: list[int]) -> None:
    slower = dataclasses.replace(RIGHT, faster=False, seconds=3.0)
    for asked in ("auto", "on"):
        choice = choose.Choice(asked, "proved now", "", (slower, WRONG))
        assert choice.uses("batch_norm_act") == (asked == "on") and not choice.uses("box_pool")


def test_what_one_rank_refuses_none_uses() -> None:
    refused = dataclasses.replace(RIGHT, right=False, faster=False, reason="wrong")
    (agreed,) = choose._agreed([[RIGHT], [refused]])
    assert not agreed.right and agreed.reason == "rank 1: wrong"
    assert choose._agreed([[RIGHT], [RIGHT]]) == (RIGHT,)


def test_a_choice_switches_what_it_names() -> None:
    verdicts = (RIGHT, WRONG, dataclasses.replace(RIGHT, name="shared_forward"))
    queue = dataclasses.replace(WRONG, name="queue_contrast")
    config = choose.apply(of(), choose.Choice("auto", "proved now", "", (*verdicts, queue)))
    assert config.model.region.shared_forward is True and config.run.cuda_graph is False
    modes = {name: each.mode for name, each in CHOICES.items()}
    assert modes == {
        "batch_norm_act": "cuda",
        "augmentation": "auto",
        "box_pool": "definition",
        "masked_pool": "auto",
        "queue_contrast": "definition",
        "window_attention": "auto",
    }
    # What the user has set is not touched.
    given = of("--region.no-shared-forward", "--no-cuda-graph")
    assert choose.apply(given, choose.Choice("auto", "proved now", "", verdicts)) == given


def test_on_without_a_gpu_is_the_users_mistake() -> None:
    with pytest.raises(UserMistake, match="--kernels on needs a CUDA device"):
        choose.settle(of("--kernels", "on"), ALONE, None)
    assert choose.told(choose.settle(of(), ALONE, None)) == ""


def test_a_run_with_a_wrong_kernel_says_so_trains_and_goes_on_as_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line: the proof runs in its own process, with kernels that the CPU can run."""
    monkeypatch.setattr(choose, "DEVICES", {"cpu"})
    monkeypatch.setattr(choose, "PLAN", "tests.planted_kernels:wrong_boxes")
    monkeypatch.setattr(choose, "BUDGET_S", 300.0)
    flags = ["--method", "regioncl-m", *TINY, "--deterministic", "false", "--run-dir", str(tmp_path / "run")]
    assert main([*last_wins(flags), "--max-steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "box_pool (wrong at (3, 7, 5, 3) float32: the means is off by" in said
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["kernels"]
    found = {each["name"]: each for each in recorded["verdicts"]}
    assert recorded["source"] == "proved now" and not found["box_pool"]["right"] and found["batch_norm_act"]["right"]
    monkeypatch.setattr(choose, "prove_apart", None)
    assert main([*last_wins(flags), "--max-steps", "4"]) == 0
    assert "kernels, as recorded" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == [2, 4]


def test_the_card_is_named_with_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a card: what PyTorch would be asked for is replaced, all else is what runs there."""
    properties = type("Properties", (), {"name": "NVIDIA H200", "total_memory": 143 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    text = choose.device_text(torch.device("cuda", 0))
    assert text.startswith("NVIDIA H200, 146432 MiB, ") and "driver" in text.lower() and torch.__version__ in text
