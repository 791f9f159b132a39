"""Save and load backbones, and prove that what was loaded is the whole backbone.

A backbone file is safetensors with torchvision's key names and no classifier, and a few strings of metadata. Loading
also takes a run's folder and checkpoints of torchvision and timm; it refuses unless every tensor of the backbone was
found, with its shape, and every tensor of the file was used or is a classifier's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from models.foreign import is_foreign, names_code
from pipeline.atomic import write_atomically

from .checkpoint_layouts import SMALL_VIT_WIDTH, extract
from .errors import UserMistake
from .inert_pickle import Inert, load_inert
from .state import digest

BACKBONE_FILE = "backbone.safetensors"
FORMAT = "regatta-backbone"

_PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# Wrappers that training scripts put around a state dict, and prefixes that DDP and compile put before its keys.
_WRAPPERS = ("state_dict", "model", "module", "model_state", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
_CLASSIFIERS = re.compile(r"^(fc|head|classifier(\.\d+)?|head\.fc|heads\.head)\.(weight|bias)$")
# Constant or unused buffers that some files carry and others do not.
_OPTIONAL = re.compile(r"\.(num_batches_tracked|relative_position_index|attn_mask)$")


@dataclass(frozen=True)
class BackboneSource:
    """What a file or run folder holds, in torchvision's key names.

    Attributes:
        state: backbone and possibly classifier tensors on the CPU.
        origin: the path, or "state dict".
        layout: whose key names they were: "torchvision" (timm's for ResNets as well), "timm", "swin" (the authors').
        metadata: strings stored in a safetensors file, such as arch and method; empty elsewhere.
        folder: the run's folder where it was one.
        original: the tensors by the names that the file has, for backbones that keep their library's own.
        family: whose training checkpoint it was taken out of; empty for a backbone alone.
        left: what else that checkpoint has, in words.
    """

    state: dict[str, Tensor]
    origin: str
    layout: str
    metadata: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    original: dict[str, Tensor] = field(default_factory=dict)
    family: str = ""
    left: str = ""

    def named_for(self, arch: str) -> BackboneSource:
        """The source with the key names of an architecture: a foreign backbone has the file's own."""
        return replace(self, state=self.original, layout="its library's") if is_foreign(arch) else self


@dataclass(frozen=True)
class MatchReport:
    """How a source was matched with a backbone; `__str__` is the line that protocols print.

    Attributes:
        origin: where the tensors came from.
        layout: whose key names they had.
        arch: architecture they were loaded into.
        matched: tensors of the backbone that were loaded.
        parameters: numbers in the matched parameters, without buffers.
        classifier: keys of the file that belong to a classifier and were left.
        optional: keys that only one of the two has and that change no feature.
        family: whose training checkpoint it was taken out of; empty for a backbone alone.
        left: what else that checkpoint has, in words.
    """

    origin: str
    layout: str
    arch: str
    matched: int
    parameters: int
    classifier: tuple[str, ...]
    optional: tuple[str, ...]
    family: str = ""
    left: str = ""

    def __str__(self) -> str:
        text = (
            f"backbone {self.arch}: all {self.matched} tensors ({self.parameters:,} parameters) loaded from "
            f"{self.origin} ({self.layout} names)"
        )
        if self.family:
            text += f"; layout of {self.family}: {self.left}"
        if self.classifier:
            text += f"; left out the classifier: {', '.join(self.classifier)}"
        if self.optional:
            text += f"; {len(self.optional)} constant buffers in only one of the two"
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def backbone_state(encoder: nn.Module) -> dict[str, Tensor]:
    """The encoder's tensors on the CPU, contiguous and not shared, by torchvision key name.

    safetensors refuses channels-last memory, so each tensor is copied into the plain layout.
    """
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()
        for name, tensor in encoder.state_dict().items()
    }


def save_backbone(
    encoder: nn.Module, path: str | Path, *, arch: str, method: str = "", extra: Mapping[str, str] | None = None
) -> None:
    """Write a backbone file so that readers see the old or the new one, never a part.

    Args:
        encoder: trunk whose `state_dict` has torchvision's key names; on any device, in any memory layout.
        path: file to write.
        arch: name in `BACKBONES`.
        method: pre-training method, if any.
        extra: more strings for the metadata.

    Raises:
        OSError: when it cannot be written.
    """
    path = Path(path)
    state = backbone_state(encoder)
    metadata = {
        "format": "pt",
        "writer": FORMAT,
        "arch": arch,
        "method": method,
        "regatta_version": version(),
        "sha256": digest(state),
        **(extra or {}),
    }
    # As bytes: the library's own writer gives its files to the owner alone and hides the number of the system's error.
    write_atomically(path, save(state, metadata))


def version() -> str:
    """The project's version, from the checkout's pyproject.toml, or that of the installed package."""
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if not project.is_file():
        return importlib.metadata.version("regatta")
    text = project.read_text()
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    return found.group(1) if found else "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_backbone(source: str | Path | Mapping[str, Any]) -> BackboneSource:
    """The backbone of a run's folder, a backbone file, a checkpoint of another project, or a state dict.

    Nothing in a pickled file is executed (`inert_pickle.py`). Out of a training checkpoint the trained network's
    backbone is taken (`checkpoint_layouts.py`).

    Raises:
        UserMistake: the path does not exist or holds no state dict.
    """
    if isinstance(source, Mapping):
        return _source(dict(source), "state dict", {}, None)
    path = Path(source)
    folder = path if path.is_dir() else None
    if folder is not None:
        path = folder / BACKBONE_FILE
        if not path.is_file():
            raise UserMistake(
                f"{folder} has no {BACKBONE_FILE}; give the folder of a run that has written a checkpoint, or a file"
            )
    if not path.is_file():
        raise UserMistake(f"checkpoint {path} does not exist; give a run's folder or a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
    elif path.suffix in _PICKLED:
        state, metadata = _read_pickled(path), {}
    else:
        raise UserMistake(f"checkpoint {path}: unknown ending; give .safetensors or one of {', '.join(_PICKLED)}")
    return _source(state, str(path), metadata, folder)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}
            metadata = dict(archive.metadata() or {})
    except (SafetensorError, OSError) as reason:
        if not os.access(path, os.R_OK):
            raise UserMistake(
                f"checkpoint {path} may not be read by this user; it may well be whole: have its owner give the right"
            ) from None
        raise UserMistake(f"checkpoint {path} cannot be read: {reason}; it may be damaged, copy it again") from None
    # Only our own files carry the hash; without it a flipped bit would become a slightly worse figure.
    if "sha256" in metadata and metadata["sha256"] != digest(tensors):
        raise UserMistake(f"checkpoint {path} is not what was written (its SHA-256 differs); copy it again")
    return tensors, metadata


def _read_pickled(path: Path) -> dict[str, Any]:
    try:
        loaded = load_inert(path)
    except Exception as reason:  # unpickling fails in many ways, none of which is ours
        raise UserMistake(
            f"checkpoint {path} cannot be read as plain tensors: {_cause(reason)}; where its code is, save its "
            "state_dict as .safetensors"
        ) from None
    # A pickled function or class gives the stand-in itself.
    if isinstance(loaded, Inert) or (isinstance(loaded, type) and issubclass(loaded, Inert)):
        raise UserMistake(
            f"checkpoint {path} is a whole pickled {loaded.named}, no plain tensors; where its code is, save "
            "model.state_dict() instead"
        )
    if not isinstance(loaded, Mapping):
        raise UserMistake(f"checkpoint {path} holds a {type(loaded).__name__}; save its state_dict instead")
    return dict(loaded)


# What comes before the reason in PyTorch's message, which is many lines of advice.
_BEFORE_REASON = re.compile(r".*(WeightsUnpickler error:|only if you got the file from a trusted source\.)", re.DOTALL)


def _cause(reason: Exception) -> str:
    """One line of what PyTorch says in many, without its advice and without the colours of a terminal."""
    text = _BEFORE_REASON.sub("", re.sub(r"\x1b\[[0-9;]*m", "", str(reason)))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].partition(" Please use")[0][:160].rstrip(".") if lines else type(reason).__name__


def _unwrap(state: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict inside wrappers, without the prefixes that all of its keys share."""
    # Wrappers may be nested, and a file could nest them without end.
    for _ in range(3):
        inner = next((state[name] for name in _WRAPPERS if isinstance(state.get(name), Mapping)), None)
        if inner is None:
            break
        state = dict(inner)
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        # Networks side by side, each with its own state dict.
        parts = [(name, part) for name, part in state.items() if isinstance(part, Mapping)]
        tensors = {
            f"{name}.{key}": value for name, part in parts for key, value in part.items() if isinstance(value, Tensor)
        }
    changed = True
    while changed:
        changed = False
        for prefix in _PREFIXES:
            if tensors and all(name.startswith(prefix) for name in tensors):
                tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
                changed = True
    return tensors


def _source(state: dict[str, Any], origin: str, metadata: dict[str, str], folder: Path | None) -> BackboneSource:
    flat = _unwrap(state)
    if not flat:
        raise UserMistake(f"checkpoint {origin} holds no tensors; give a backbone's state dict")
    taken = extract(flat, origin, str(state.get("arch", "")))
    tensors = taken.tensors
    layout, rename = _detect_layout(tensors)
    renamed = {rename(name): value for name, value in tensors.items()}
    known = {**metadata, "arch": taken.arch} if taken.arch else metadata
    return BackboneSource(renamed, origin, layout, known, folder, tensors, taken.family, taken.left)


# ---------------------------------------------------------------------------------------------------------------------
# Key names

_SWIN_INNER = {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}


def _detect_layout(state: Mapping[str, Tensor]) -> tuple[str, Callable[[str], str]]:
    """Whose key names these are, and the function that turns one of them into torchvision's."""
    # Swin has stages of layers; a ViT's names are timm's here as well.
    if "patch_embed.proj.weight" not in state or "cls_token" in state:
        return "torchvision", lambda name: name
    # The authors put the patch merging at the end of a stage, timm since 0.9 at the start of the next.
    authors = "layers.0.downsample.reduction.weight" in state
    return ("swin", lambda name: swin_to_torchvision(name, 2)) if authors else ("timm", swin_to_torchvision)


def swin_to_torchvision(name: str, downsample_offset: int = 0) -> str:
    """Torchvision's name of a Swin tensor of timm.

    Args:
        name: key as in timm's `SwinTransformer`.
        downsample_offset: 2 where the patch merging of stage i is stored in stage i, as the authors' code does.
    """
    name = re.sub(r"^patch_embed\.proj\.", "features.0.0.", name)
    name = re.sub(r"^patch_embed\.norm\.", "features.0.2.", name)
    name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"features.{2 * int(m[1]) + downsample_offset}.", name)
    name = re.sub(r"^layers\.(\d+)\.blocks\.", lambda m: f"features.{2 * int(m[1]) + 1}.", name)
    for inner, ours in _SWIN_INNER.items():
        name = name.replace(f".{inner}.", f".{ours}.")
    return name


def torchvision_to_swin(name: str, downsample_offset: int = 0) -> str:
    """Inverse of `swin_to_torchvision`."""
    name = re.sub(r"^features\.0\.0\.", "patch_embed.proj.", name)
    name = re.sub(r"^features\.0\.2\.", "patch_embed.norm.", name)

    def stage(match: re.Match[str]) -> str:
        number, rest = int(match[1]), match[2]
        if number % 2:
            return f"layers.{number // 2}.blocks.{rest}"
        return f"layers.{(number - downsample_offset) // 2}.downsample.{rest}"

    name = re.sub(r"^features\.(\d+)\.(.*)$", stage, name)
    for inner, ours in _SWIN_INNER.items():
        name = name.replace(f".{ours}.", f".{inner}.")
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Matching


def _fits(value: Tensor, target: Tensor) -> bool:
    return value.shape == target.shape


def match_backbone(
    source: BackboneSource, target: Mapping[str, Tensor], arch: str
) -> tuple[dict[str, Tensor], MatchReport]:
    """The tensors of a source that fill a backbone completely.

    Args:
        source: what was read.
        target: the backbone's own state dict; only names and shapes are looked at, so it may be on the meta device.
        arch: its name, for messages.

    Returns:
        (name -> tensor for every tensor of the target that the source has, report).

    Raises:
        UserMistake: a tensor of the backbone is missing or of another shape, or a tensor of the source is neither in
            the backbone nor a classifier's; the message names them.
    """
    source = source.named_for(arch)
    taken: dict[str, Tensor] = {}
    wrong = []
    for name, tensor in target.items():
        value = source.state.get(name)
        if value is None:
            continue
        if name.endswith("relative_position_index") and value.numel() == tensor.numel():
            value = value.reshape(tensor.shape)  # (49, 49) in some libraries, flat in others
        if _fits(value, tensor):
            taken[name] = value
        else:
            wrong.append(f"{name} {tuple(value.shape)} instead of {tuple(tensor.shape)}")
    missing = [name for name in target if name not in source.state and not _OPTIONAL.search(name)]
    left = [name for name in source.state if name not in target]
    classifier = tuple(name for name in left if _CLASSIFIERS.match(name))
    unmatched = [name for name in left if name not in classifier and not _OPTIONAL.search(name)]
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for names, what in (
            (missing, "missing"),
            (wrong, "of another shape"),
            (unmatched, "in the file but not in the backbone"),
        )
        if names
    ]
    if problems:
        raise UserMistake(
            f"checkpoint {source.origin} is not a whole {arch}: tensors {'; '.join(problems)}; {_remedy(source, arch)}"
        )
    optional = tuple(n for n in {*left, *target} if _OPTIONAL.search(n) and not (n in target and n in source.state))
    parameters = sum(v.numel() for n, v in taken.items() if not n.endswith(_BUFFER_ENDINGS))
    report = MatchReport(
        source.origin,
        source.layout,
        arch,
        len(taken),
        parameters,
        classifier,
        optional,
        source.family,
        source.left,
    )
    return taken, report


_BUFFER_ENDINGS = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index")


def _remedy(source: BackboneSource, arch: str) -> str:
    """What to do with a file that does not fit an architecture: the one to choose, where the file tells it."""
    with contextlib.suppress(UserMistake):
        if (own := infer_arch(source)) != arch:
            return f"it holds a {own}: choose --arch {own}"
    return "choose the --arch it was trained with, or a file that holds the backbone alone"


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def load_into(
    encoder: nn.Module,
    source: str | Path | Mapping[str, Any] | BackboneSource,
    arch: str,
    say: Callable[[str], object] = print,
) -> MatchReport:
    """Fill an encoder in place, keeping device, dtype and memory layout, and say what was matched.

    Raises:
        UserMistake: as `read_backbone` and `match_backbone`; the encoder is then unchanged.
    """
    if not isinstance(source, BackboneSource):
        source = read_backbone(source)
    _check_heads(source, arch)
    target = encoder.state_dict()
    taken, report = match_backbone(source, target, arch)
    with torch.no_grad():
        for name, value in taken.items():
            if name.endswith("relative_position_index") and not torch.equal(value, target[name].cpu()):
                raise UserMistake(f"checkpoint {source.origin}: {name} orders window positions in another way")
            if name == "pos_embed" and arch in _CLASS_TOKEN_ARCHS and not torch.allclose(value, target[name].cpu()):
                raise UserMistake(
                    f"checkpoint {source.origin}: its positions are not MoCo v3's fixed ones, which --arch {arch} has; "
                    "choose --arch timm:NAME"
                )
            target[name].copy_(value)
    say(str(report))
    return report


def _check_heads(source: BackboneSource, arch: str) -> None:
    # The number of attention heads is in no tensor: the file would load completely and give other features.
    token = source.original.get("cls_token")
    if source.family == "MoCo v3" and is_foreign(arch) and token is not None and token.shape[-1] == SMALL_VIT_WIDTH:
        raise UserMistake(
            f"checkpoint {source.origin} is MoCo v3's vit_small, which has 12 attention heads where {arch} has others; "
            "choose --arch vit-s"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Architectures


def build_encoder(arch: str) -> nn.Module:
    """A fresh trunk: images (B, 3, S, S) -> feature map (B, C, H, W).

    Raises:
        UserMistake: for a name that neither `BACKBONES` nor another library has.
    """
    from models.resnet import BACKBONES, build_backbone

    if arch not in BACKBONES and not is_foreign(arch):
        raise UserMistake(
            f"--arch {arch}: choose from {', '.join(BACKBONES)}, or give timm:NAME, torchvision:NAME or module:factory"
        )
    return build_backbone(arch, "torch" if arch.startswith("swin") else "fan_out")


_CLASS_TOKEN_ARCHS = ("vit-s", "vit-b")
"""Whose names and shapes are those of other ViTs as well, which have other heads and positions."""


def infer_arch(source: BackboneSource) -> str:
    """The architecture of a source: from its metadata, or the only one whose names and shapes all fit.

    Raises:
        UserMistake: when none fits; the message says how near the nearest came.
    """
    from models.resnet import BACKBONES

    recorded = source.metadata.get("arch", "")
    if names_code(recorded):
        # A file must not decide which code is imported and called.
        raise UserMistake(f"checkpoint {source.origin} says that code builds its backbone: give --arch {recorded}")
    if recorded in BACKBONES or is_foreign(recorded):
        return recorded
    scores = {}
    for arch in (name for name in BACKBONES if name not in _CLASS_TOKEN_ARCHS):
        # Names and shapes are all that is compared, so no weights are drawn.
        with torch.device("meta"):
            target = build_encoder(arch).state_dict()
        needed = [name for name in target if not _OPTIONAL.search(name)]
        fitting = sum(1 for n in needed if n in source.state and _fits(source.state[n], target[n]))
        if fitting == len(needed):
            return arch
        scores[arch] = fitting / len(needed)
    best = max(scores, key=lambda arch: scores[arch])
    raise UserMistake(
        f"checkpoint {source.origin} fits no known architecture; nearest is {best} with {scores[best]:.0%} of its "
        f"tensors; known are {', '.join(BACKBONES)}; give --arch timm:NAME or torchvision:NAME for a model of theirs"
    )


@dataclass(frozen=True)
class LoadedBackbone:
    """A filled encoder in eval mode and where it came from."""

    encoder: nn.Module
    arch: str
    source: BackboneSource
    report: MatchReport


def load(
    source: str | Path | Mapping[str, Any], arch: str = "", say: Callable[[str], object] = print
) -> LoadedBackbone:
    """Build the encoder that a run folder, file or state dict holds, and fill it.

    Args:
        source: run folder, `.safetensors`, pickled checkpoint, or a state dict.
        arch: architecture; empty finds it out.
        say: receives the line that tells what was matched.

    Raises:
        UserMistake: as `read_backbone`, `infer_arch` and `match_backbone`.
    """
    read = read_backbone(source)
    arch = arch or infer_arch(read)
    encoder = build_encoder(arch)
    report = load_into(encoder, read, arch, say)
    return LoadedBackbone(encoder.eval(), arch, read, report)


def load_backbone(
    source: str | Path | Mapping[str, Any], arch: str = "", say: Callable[[str], object] = print
) -> nn.Module:
    """The encoder of `load` alone."""
    return load(source, arch, say).encoder
