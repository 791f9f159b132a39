"""Is a candidate right, and is it faster? Knows nothing of kernels or GPUs: it takes calls, and a timer.

A candidate is an implementation that would take the place of a usual one. Each of its trials is a call at one shape,
with the usual implementation, and with an exact one in a wider dtype. It is right where it errs about as little as the
usual one does in the same dtype, in every result and gradient of every trial.

Source of the rule: Dao-AILab/flash-attention's tests, where the error against a high-precision reference is bounded by
that of PyTorch in the same dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Results = dict[str, Tensor]
Call = Callable[[], Results]
Timer = Callable[[Call, Call], tuple[float, float]]
Compare = Callable[[Results, Results, Results], str]

USUAL_ERRORS = 4.0
"""How many times the usual implementation's error a candidate's may be: both are rounded, in another order."""
ROUNDS = 3
GAIN = 1.02
"""How many times faster a candidate must be: less than this is within what two timings of one call differ by."""


@dataclass(frozen=True)
class Trial:
    """One call of a candidate.

    Attributes:
        what: shapes and settings in words.
        candidate: gives the results by name, gradients included.
        usual: what runs where the candidate is left out; same names.
        exact: the definition in a wider dtype; same names.
        calls: how often a step makes this call; 0 for a shape that no step has, which is compared and not timed.
        compare: (candidate's, usual's, exact results) -> what is wrong, empty for nothing.
    """

    what: str
    candidate: Call
    usual: Call
    exact: Call
    calls: float
    compare: Compare


@dataclass(frozen=True)
class Candidate:
    """An implementation that may be used.

    Attributes:
        name: for the user and for `config.json`.
        trials: makes the trials one by one, so that the tensors of one alone are held.
    """

    name: str
    trials: Callable[[], Iterable[Trial]]


@dataclass(frozen=True)
class Verdict:
    """What was found about one candidate.

    Attributes:
        name: of the candidate.
        right: whether it agreed with its definition everywhere.
        faster: whether it took less time than the usual one.
        reason: why it is left out; empty where it is right and faster.
        seconds: of its calls in a step; 0 where it was not timed.
        usual_seconds: of the usual implementation's calls.
        checked: number of shapes that were compared.
        final: false for one that was not looked at (time ran out, no memory), which another start looks at again.
    """

    name: str
    right: bool
    faster: bool
    reason: str = ""
    seconds: float = 0.0
    usual_seconds: float = 0.0
    checked: int = 0
    final: bool = True


class _LeftOut(Exception):
    """Carries why a candidate is left out."""

    def __init__(self, reason: str, final: bool = True) -> None:
        super().__init__(reason)
        self.final = final


def prove(candidate: Candidate, timer: Timer) -> Verdict:
    """Compare and time a candidate; whatever it raises is a verdict, not an error."""
    times, checked = [0.0, 0.0], 0
    trials = iter(candidate.trials())
    while True:
        try:
            trial = _next(trials)
            if trial is None:
                break
            _compare(trial)
            checked += 1
            if trial.calls:
                for place, seconds in enumerate(timer(trial.candidate, trial.usual)):
                    times[place] += trial.calls * seconds
        except _LeftOut as left_out:
            return Verdict(candidate.name, False, False, str(left_out), checked=checked, final=left_out.final)
        except Exception as error:  # the timer's own calls of the candidate
            return Verdict(candidate.name, False, False, f"raised {_told(error)}", checked=checked)
    if not checked:
        return Verdict(candidate.name, False, False, "no call of this run can use it")
    faster = times[0] * GAIN <= times[1]
    return Verdict(candidate.name, True, faster, "" if faster else "slower", times[0], times[1], checked)


def _next(trials: Iterator[Trial]) -> Trial | None:
    try:
        return next(trials, None)
    except torch.OutOfMemoryError as error:
        raise _LeftOut(f"could not be checked: {_told(error)}", final=False) from None
    except Exception as error:
        raise _LeftOut(f"could not be checked: {_told(error)}") from None


def _compare(trial: Trial) -> None:
    """Refuse a trial whose results are wrong.

    Raises:
        _LeftOut: naming the shape, the result and the numbers.
    """
    try:
        exact, usual = trial.exact(), trial.usual()
    except Exception as error:
        # The fault is not the candidate's; memory may suffice another time.
        raise _LeftOut(f"could not be checked at {trial.what}: {_told(error)}", final=False) from None
    try:
        problem = trial.compare(trial.candidate(), usual, exact)
    except Exception as error:
        raise _LeftOut(f"raised {_told(error)} at {trial.what}") from None
    if problem:
        raise _LeftOut(f"wrong at {trial.what}: {problem}")


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def compare_largest(candidate: Results, usual: Results, exact: Results) -> str:
    """`Compare` by the largest error of any element: for results that depend smoothly on their inputs."""
    return _compare_by(lambda error: error.abs().amax(), 1e-5, candidate, usual, exact)


def compare_mean(candidate: Results, usual: Results, exact: Results) -> str:
    """`Compare` by the mean error: where rounding decides a step, as solarising does at its threshold."""
    # Two hundredths of a grey level out of 255, in units of the normalised views.
    return _compare_by(lambda error: error.abs().mean(), 1e-4, candidate, usual, exact)


def _compare_by(
    measure: Callable[[Tensor], Tensor], slack: float, candidate: Results, usual: Results, exact: Results
) -> str:
    if candidate.keys() != exact.keys():
        return f"gives {', '.join(candidate)} instead of {', '.join(exact)}"
    for name, truth in exact.items():
        ours, plain = candidate[name], usual[name]
        if ours.shape != truth.shape or ours.dtype != plain.dtype:
            return f"{name} is {tuple(ours.shape)} {ours.dtype}, not {tuple(truth.shape)} {plain.dtype}"
        if not truth.numel():
            continue
        scale = float(truth.abs().amax())
        error, known = (float(measure(each.to(truth.dtype) - truth)) for each in (ours, plain))
        rounding = 2 * torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0
        # Written so that NaN is refused as well.
        if not error <= max(USUAL_ERRORS * known, (rounding + slack) * scale):
            return f"{name} is off by {error:.3g} where PyTorch is by {known:.3g} (largest value {scale:.3g})"
    return ""


def timer_for(device: torch.device) -> Timer:
    """Times two calls in turn on a device: median seconds of each, after a call of each to warm up."""
    clock = _cuda_seconds if device.type == "cuda" else _wall_seconds

    def timed(first: Call, second: Call) -> tuple[float, float]:
        for call in (first, second):
            call()
        rounds = [(clock(first), clock(second)) for _ in range(ROUNDS)]
        medians = [sorted(column)[ROUNDS // 2] for column in zip(*rounds, strict=True)]
        return medians[0], medians[1]

    return timed


def _wall_seconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _cuda_seconds(call: Call) -> float:
    """Wall time of a call and its device work: what the host needs to launch is a part of what a step waits for."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    # Twice, so that launches of the second run ahead as they do in a step.
    call()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / 2
