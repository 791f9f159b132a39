"""A method with all that a training loop of one's own needs of it: network, data, inputs of a step, schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from models.methods.base import Method, StepInputs, StepOutput
from pipeline.interface import Batch
from tools.wheel.loader import Loader
from train.build import build_method, check_fit, feature_grid
from train.cards import refuse_without_code
from train.inputs import InputBuilder, train_views
from train.keywords import arguments_of
from train.optim import build_optimizer, set_learning_rate
from train.resolve import resolve
from train.runtime import Runtime, choose_dtype
from train.schedules import ema_at, lr_at


class Pretraining:
    """A method by name, built as `regatta train` builds it, for a loop of one's own or a Lightning module.

    Args:
        method: name of the method, a key of `regatta.methods`.
        device: where to train; "auto" takes a GPU where there is one.
        precision: "auto", "fp32" or "bf16": what `step` computes in, and the type of the views.
        options: recipe, architecture and hyper-parameters by the names of the command's flags: `recipe`, `arch`,
            `image_size`, `global_batch`, `epochs`, `seed`, `init`, nested ones as a dict: `optim={"lr": 0.1}`.

    Attributes:
        method: the network: `method(inputs)` gives a `StepOutput`; `method.encoder` is the backbone.
        config: every resolved option.
        runtime: device, rank and precision.

    Raises:
        ValueError: an unknown option or a value that does not fit; the message names the flag and the remedy.
    """

    def __init__(self, method: str, *, device: str = "auto", precision: str = "auto", **options: Any) -> None:
        asked = {"method": method, "device": device, "precision": precision, **options}
        self.config = resolve(arguments_of(asked))
        where = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        refuse_without_code(torch.device(where))
        together = dist.is_available() and dist.is_initialized()
        self.runtime = Runtime(
            rank=dist.get_rank() if together else 0,
            world_size=dist.get_world_size() if together else 1,
            device=torch.device(where),
            dtype=choose_dtype(precision, torch.device(where)),
            compile=False,
        )
        self.method: Method = build_method(self.config, self.runtime)
        check_fit(self.config, self.runtime, self.method)
        self._step = 0
        self._builder = InputBuilder(
            self.config, self.method, self.runtime, feature_grid(self.method, self.config.recipe.image_size)
        )

    def loader(self, data: str | Path, **settings: Any) -> Loader:
        """The views that the method trains on, in batches of the recipe's size.

        Args:
            data: as `Loader` takes it.
            settings: more arguments of `Loader`, such as `workers`.
        """
        recipe = self.config.recipe
        return Loader(
            data,
            views=train_views(self.config),
            augment=recipe.augment.profile,
            batch_size=recipe.global_batch // self.runtime.world_size,
            seed=self.config.run.seed,
            device=self.runtime.device,
            dtype=self.runtime.dtype,
            **settings,
        )

    def inputs(self, batch: Batch, step: int, epoch: int = 0) -> StepInputs:
        """What `method.forward` takes, from a batch of `loader`: views, regions and their partners, key shuffling.

        Args:
            batch: of this process, with the views of `loader`.
            step: number of the step from the start of training; the draws of regions follow from it.
            epoch: that the step belongs to; SwAV's queue begins in one.
        """
        self._step = step
        (inputs,) = self._builder.build(batch, step, epoch)
        return inputs

    def optimizer(self) -> torch.optim.Optimizer:
        """The recipe's optimizer over the method's parameters, with its parameter groups."""
        optimizer = build_optimizer(self.method, self.config.recipe.optim, self.config.recipe.global_batch)
        # SwAV leaves its prototypes alone at first. In a hook, because a loop would forget the call without a word.
        optimizer.register_step_pre_hook(lambda *_: self.method.before_update(self._step))
        return optimizer

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int, steps_per_epoch: int) -> float:
        """Give an optimizer of `optimizer()` the recipe's learning rate of a step, and return it."""
        recipe = self.config.recipe
        rate = lr_at(step, steps_per_epoch, recipe.epochs, recipe.schedule, recipe.optim, recipe.global_batch)
        set_learning_rate(optimizer, rate)
        return rate

    def after_step(self, output: StepOutput, step: int, steps_per_epoch: int) -> None:
        """What follows an optimizer step: the momentum network moves, new keys enter the queue.

        Args:
            output: of the step's forward pass.
            step: its number.
            steps_per_epoch: batches of an epoch.
        """
        recipe = self.config.recipe
        total = steps_per_epoch * recipe.epochs
        self.method.after_step(output, ema_at(step + self.method.ema_index_offset, total, recipe.ema))
