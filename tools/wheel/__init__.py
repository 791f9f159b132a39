"""Regatta: self-supervised vision training built for images per second.

`train`, `embed`, `evaluate` and `export` are the commands as functions. `Loader` and `Pretraining` serve a loop of
one's own. `methods` has the methods by name. All are imported on first use, because PyTorch takes seconds.
"""

from __future__ import annotations

import importlib.metadata
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.methods import METHODS as methods
    from tools.wheel.functions import Callback, embed, evaluate, export, train
    from tools.wheel.loader import Loader
    from tools.wheel.pretraining import Pretraining

try:
    __version__ = importlib.metadata.version("regatta")
except importlib.metadata.PackageNotFoundError:  # a folder on the path that was never installed
    __version__ = "unknown"

__all__ = ["Callback", "Loader", "Pretraining", "__version__", "embed", "evaluate", "export", "methods", "train"]

_CHECKOUT = Path(__file__).resolve().parents[2]
if __name__ == "regatta" and (_CHECKOUT / "pyproject.toml").is_file():
    # An editable installation has no copies with renamed imports (`build.py`): it uses the checkout's own names.
    sys.path.append(str(_CHECKOUT))

_HOMES = {
    "Callback": ".functions",
    "train": ".functions",
    "embed": ".functions",
    "evaluate": ".functions",
    "export": ".functions",
    "Loader": ".loader",
    "Pretraining": ".pretraining",
}


def __getattr__(name: str) -> Any:
    if name == "methods":
        from models.methods import METHODS

        return METHODS
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
