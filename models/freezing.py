"""Stages of a backbone that stay as they are while the rest is trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def freeze_stages(trunk: nn.Module, stages: Sequence[str]) -> None:
    """Take the gradient from the parameters of some parts of a backbone.

    Args:
        trunk: the backbone.
        stages: names of its modules or parameters, as in its `state_dict`, such as "layer1" or "cls_token".

    Raises:
        ValueError: a name that the backbone does not have, or names that leave nothing to train.
    """
    modules, parameters = dict(trunk.named_modules()), dict(trunk.named_parameters())
    for stage in stages:
        if stage in modules and stage:
            modules[stage].requires_grad_(False)
        elif stage in parameters:
            parameters[stage].requires_grad_(False)
        else:
            own = [name for name, _ in [*trunk.named_children(), *trunk.named_parameters(recurse=False)]]
            raise ValueError(f"--freeze {stage} is no part of the backbone; choose from {', '.join(own)}")
    if stages and not any(parameter.requires_grad for parameter in trunk.parameters()):
        raise ValueError(f"--freeze {','.join(stages)} leaves nothing of the backbone to train; leave out a stage")
