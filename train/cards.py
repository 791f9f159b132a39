"""Does this build of PyTorch have code for a card, and which build has? The first kernel would die otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from .errors import UserMistake

Capability = tuple[int, int]
_CUDA_12_FROM, _CUDA_13_FROM = (5, 0), (7, 5)
# CUDA 13 has no code for Volta and older; PyTorch published its last wheels for CUDA 12 with version 2.14.
_CUDA_12_BUILD = (
    "a build for CUDA 12.6 (cu126), which PyTorch has up to 2.14: "
    "pip install 'torch==2.14.*' torchvision, from the index that pytorch.org names for cu126"
)


def architectures() -> list[str]:
    """What this build has code for, as `sm_80` (machine code) or `compute_80` (PTX); empty without CUDA."""
    # PyTorch's own list is empty where the driver does not start, as one older than CUDA 13 with a V100.
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)()
    return torch.cuda.get_arch_list() or (flags or "").split()


def has_code(capability: Capability, built_for: Iterable[str]) -> bool:
    """Whether any of `architectures` runs on a card of this compute capability.

    Machine code runs on cards of the same generation and an equal or later revision, PTX on all that are not older. A
    letter at the end (`sm_90a`) ties either to one capability. What has another form, as ROCm's, is not judged.
    """
    known = [found for each in built_for if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", each))]
    return not known or any(_runs(capability, found) for found in known)


def _runs(capability: Capability, built: re.Match[str]) -> bool:
    made_for = (int(built[2]), int(built[3]))
    if built[4] == "a":
        return capability == made_for
    return capability >= made_for and (built[1] == "compute" or capability[0] == made_for[0])


def card_problem(name: str, capability: Capability) -> str:
    """One sentence where this build of PyTorch cannot run on the card, with the build that can; empty where it can."""
    built_for = architectures()
    if has_code(capability, built_for):
        return ""
    return (
        f"{name} (sm_{capability[0]}{capability[1]}): PyTorch {torch.__version__} for CUDA {torch.version.cuda} has no "
        f"code for this card, only {', '.join(built_for)}; install {_build_for(capability)}"
    )


def _build_for(capability: Capability) -> str:
    if capability < _CUDA_12_FROM:
        return "nothing: no PyTorch from 2.10 on has code for it; use another card or --device cpu"
    return _CUDA_12_BUILD if capability < _CUDA_13_FROM else "the newest PyTorch, by the line on pytorch.org"


def refuse_without_code(device: torch.device) -> None:
    """Refuse a CUDA device that this build of PyTorch has no code for; other devices pass.

    Raises:
        UserMistake: it has none; the message names the build to install.
    """
    if device.type != "cuda":
        return
    problem = card_problem(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if problem:
        raise UserMistake(problem)


def problems_of(listing: Iterable[str]) -> list[str]:
    """The problems of the cards that `nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader` lists, each once.

    `tools/setup.sh` asks, on machines where PyTorch may not be able to start the driver.
    """
    cards = dict.fromkeys(re.findall(r"^(.+), *(\d+)\.(\d+)\s*$", "\n".join(listing), re.MULTILINE))
    found = (card_problem(name, (int(major), int(minor))) for name, major, minor in cards)
    return [problem for problem in found if problem]
