"""Where an export goes: what can be told of the place before PyTorch is imported and a backbone is read."""

from __future__ import annotations

from pathlib import Path

from train.errors import UserMistake

ENDINGS = {"torchvision": ".safetensors", "timm": ".safetensors", "detectron2": ".pkl", "hf": "", "onnx": ".onnx"}
"""Export format -> ending of its file; "" for a folder."""


def check_place(out: Path, target: str, overwrite: bool) -> None:
    """Refuse a place that an export cannot have.

    Args:
        out: file, or folder for "hf".
        target: a key of `ENDINGS`.
        overwrite: whether what is there may be replaced.

    Raises:
        UserMistake: something is there, or the ending is another format's.
    """
    if out.exists() and not overwrite:
        raise UserMistake(f"OUT {out} exists; choose another name or give --overwrite")
    ending = ENDINGS[target]
    if ending and out.suffix != ending:
        raise UserMistake(f"OUT {out}: a {target} export ends in {ending}; for example {out.stem}{ending}")
