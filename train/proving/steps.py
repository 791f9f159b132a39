"""The trials of a step's forms: forward and backward as a CUDA graph, and view and composites in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from models.methods.base import Method, StepInputs

from ..cuda_graph import GraphedForwardBackward
from .gradients import gradient_problem
from .prover import Candidate, Results, Trial
from .setting import CUDA_GRAPH, SHARED_FORWARD, Setting, method_and_inputs

LOSS_ERROR = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_GRADIENT = "gradient of "
ForwardBackward = Callable[[Method, StepInputs], torch.Tensor]


def step_candidates(setting: Setting) -> list[Candidate]:
    """What the user has left open and this run can have.

    One process only: the ranks of several would have to take their trials in step, as each holds collectives.
    """
    run, region = setting.config.run, getattr(setting.config.model, "region", None)
    candidates: list[Candidate] = []
    if setting.several:
        return candidates
    if region is not None and region.shared_forward is None:
        candidates.append(Candidate(SHARED_FORWARD, partial(_trials, setting, SHARED_FORWARD)))
    # The loss scale of fp16 changes between steps, which a graph would freeze.
    if run.cuda_graph is None and setting.dtype is not torch.float16:
        candidates.append(Candidate(CUDA_GRAPH, partial(_trials, setting, CUDA_GRAPH)))
    return candidates


def _trials(setting: Setting, name: str) -> Iterator[Trial]:
    method, inputs = method_and_inputs(setting)
    passes = Passes(setting, method, inputs)
    candidate = passes.shared if name == SHARED_FORWARD else passes.graphed
    recipe = setting.config.recipe
    what = f"a step of {recipe.global_batch} images of {recipe.image_size} px"
    yield Trial(what, candidate, passes.plain, passes.exact, 1, passes.compare)


@dataclass
class Passes:
    """Forward and backward of one method on the same inputs, in the forms that are compared.

    Attributes:
        setting: device and dtype.
        method: whose gradients are taken.
        inputs: of the step.
    """

    setting: Setting
    method: Method
    inputs: StepInputs
    _graph: GraphedForwardBackward | None = None

    def plain(self) -> Results:
        """Two forward passes, launched one kernel after the other."""
        return self._step(self.setting, self.inputs, shared=False)

    def shared(self) -> Results:
        """View and composites in one forward pass."""
        return self._step(self.setting, self.inputs, shared=True)

    def exact(self) -> Results:
        """The plain passes in fp32."""
        wide = replace(self.setting, dtype=torch.float32)
        mixed = {name: view.float() for name, view in self.inputs.mixed.items()}
        view1, view2 = self.inputs.view1.float(), self.inputs.view2.float()
        small = tuple(view.float() for view in self.inputs.small_views)
        inputs = replace(self.inputs, view1=view1, view2=view2, mixed=mixed, small_views=small)
        return self._step(wide, inputs, shared=False)

    def graphed(self) -> Results:
        """The plain passes, replayed from a graph after the first call."""
        if self._graph is None:
            self._graph = GraphedForwardBackward(self.method, self.setting.runtime)
        return self._results(self._graph(self.inputs).loss)

    def _step(self, setting: Setting, inputs: StepInputs, shared: bool) -> Results:
        before = self.method.config
        if hasattr(before, "region"):
            self.method.config = replace(before, region=replace(before.region, shared_forward=shared))  # type: ignore
        try:
            with setting.runtime.autocast():
                loss = self.method(inputs).loss
            loss.backward()
        finally:
            self.method.config = before
        return self._results(loss.detach())

    def _results(self, loss: torch.Tensor) -> Results:
        named = {f"{_GRADIENT}{name}": p.grad for name, p in self.method.named_parameters() if p.grad is not None}
        # The next call must not add to these.
        self.method.zero_grad(set_to_none=True)
        return {"loss": loss, **named}

    def compare(self, candidate: Results, usual: Results, exact: Results) -> str:
        """What is wrong with a form's loss or gradients."""
        loss, truth = float(candidate["loss"]), float(exact["loss"])
        if not abs(loss - truth) <= LOSS_ERROR[self.setting.dtype] * abs(truth):
            return f"the loss is {loss:.6g}, in fp32 {truth:.6g}"
        found, reference = (
            {name.removeprefix(_GRADIENT): each for name, each in results.items() if name != "loss"}
            for results in (candidate, exact)
        )
        return gradient_problem(found, reference, self.setting.dtype)
