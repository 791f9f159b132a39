"""Building the wheel: the folders of the checkout as one package, so that site-packages gains one name.

In the checkout `train` and `tools` import by folder name (`from models.losses import info_nce`). Installed like that
they would take the names `models`, `train` and `tools` from every other project. So the wheel has them as
`regatta.training` and `regatta.commands` (`regatta.train` is the function), and this command rewrites the imports of
the copies. The names of commands in their texts become those of the installed command.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from setuptools.command.build_py import build_py

PACKAGES = {
    "pipeline": "regatta.pipeline",
    "models": "regatta.models",
    "train": "regatta.training",
    "tools.wheel": "regatta",
    "tools": "regatta.commands",
}
"""Folder of the checkout -> package of the wheel, the longer name first."""

COMMANDS = {
    "train/main.py": "regatta train",
    "train/evaluate.py": "regatta evaluate",
    "tools/slurm.py": "regatta slurm",
    "tools/make_ffcv_dataset.py": "regatta pack",
    "tools/make_webdataset.py": "regatta shards",
    "tools/export_backbone.py": "regatta export",
    "tools/embed.py": "regatta embed",
    "tools/analyze.py": "regatta analyze",
    "tools/report.py": "regatta report",
    "tools/doctor.py": "regatta doctor",
}
"""Script of the checkout -> what a user of the wheel types."""


def renamed(module: str) -> str:
    """The wheel's name of a module of the checkout; any other name as it is."""
    for folder, package in PACKAGES.items():
        if module == folder or module.startswith(folder + "."):
            return package + module.removeprefix(folder)
    return module


def rewritten(source: str) -> str:
    """The source of a module as the wheel has it.

    Args:
        source: of a module of the checkout.

    Returns:
        The same lines; imports and the names of commands are those of the wheel.

    Raises:
        ValueError: an import that cannot be renamed, as `import train.main`, which would bind another name.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            start = node.lineno - 1
            # The module's name stands on the first line, whatever is imported from it.
            lines[start] = lines[start].replace(f"from {node.module} ", f"from {renamed(node.module)} ", 1)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if renamed(alias.name) != alias.name:
                    raise ValueError(f"line {node.lineno}: write `from ... import` instead of `import {alias.name}`")
    text = "".join(lines)
    for script, command in COMMANDS.items():
        text = re.sub(rf"(\bpython )?\b{re.escape(script)}", command, text)
    return text


LEFT_OUT = {
    "regatta": ("build",),
    # They read or write files of the checkout.
    "regatta.commands": ("plot_results", "quickstart", "record_run", "record_transfer", "reproduce"),
}
"""Package -> its modules that only a checkout has a use for."""


APART = ("results", "examples", "reproduction", "wheel")
"""Folders of `tools` that only a checkout has a use for, or that are the package itself."""


def packages(root: Path) -> dict[str, str]:
    """Package of the wheel -> its folder in the checkout: every folder below `PACKAGES` that holds modules."""
    found = {}
    for folder, package in PACKAGES.items():
        top = root.joinpath(*folder.split("."))
        for path in (top, *sorted(each for each in top.rglob("*") if each.is_dir())):
            inner = path.relative_to(top).parts
            if not set(inner) & set(APART) and any(path.glob("*.py")):
                found[".".join((package, *inner))] = path.relative_to(root).as_posix()
    return found


class BuildPackage(build_py):
    """setuptools' `build_py` over `packages`, with the imports of every copied module rewritten."""

    def initialize_options(self) -> None:
        """Tell setuptools the packages; listed by hand they would miss the next new folder."""
        super().initialize_options()
        found = packages(Path(self.distribution.src_root or "."))
        self.distribution.packages = list(found)
        self.distribution.package_dir = dict(found)

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """(package, module, file) of each module of a package that goes into the wheel."""
        left_out = LEFT_OUT.get(package, ())
        return [each for each in super().find_package_modules(package, package_dir) if each[1] not in left_out]

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        """Copy one module into the build folder and rewrite the copy."""
        target, copied = super().build_module(module, module_file, package)
        path = Path(target)
        # An editable installation copies nothing; it serves the checkout as it is.
        if path.is_file() and not path.samefile(module_file):
            path.write_text(rewritten(Path(module_file).read_text(encoding="utf-8")), encoding="utf-8")
        return target, copied
