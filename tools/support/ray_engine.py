"""Packing on a Ray cluster: every part of the data set is a task, so that a lost worker costs the part it was at.

Ray is asked for when `--engine ray` is given; nothing else needs it. SOURCE and DEST must be seen under one path by all
nodes, and so must this program, as a checkout or installed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import EXIT_REQUEUE, EXIT_USER_MISTAKE, RunEnd

from .parts import Part, finish

if TYPE_CHECKING:
    from .part_commands import PartPacker

_IMAGES_A_PART = 20_000
_FEWEST, _MOST = 8, 256
_RETRIES = 3
"""How often a part is given to another worker after one was lost."""
_TOOLS = __name__.rpartition(".support.")[0]
"""The package of the commands, which the wheel has under another name than the checkout."""


def default_parts(images: int) -> int:
    """How many parts a data set is divided into.

    It follows from the number of images alone and not from the cluster, so that the same command goes on with the parts
    of a run that was ended, whatever cluster it finds.
    """
    return min(images, max(_FEWEST, min(_MOST, images // _IMAGES_A_PART)))


def pack_on_ray(packer: PartPacker, options: argparse.Namespace) -> int:
    """Pack all parts as tasks of a Ray cluster, then write the manifest over them; returns the exit code.

    Raises:
        ValueError: Ray is not installed, its cluster does not answer, or the user's mistake.
        RunEnd: a part failed, or lost its worker too often.
    """
    ray = _ray()
    source, settings = packer.opened(options)
    of = options.parts or default_parts(len(source))
    files = packer.files(Path(os.path.abspath(options.dest)), of)
    files.check()
    with _cluster(ray, options.ray_address):
        task = ray.remote(num_cpus=options.workers, max_retries=_RETRIES)(_place)
        started = {
            task.remote(packer.module, options, Part(number, of), os.getcwd()): number for number in range(1, of + 1)
        }
        _wait_for(ray, started, of)
    return finish(files, source, settings, options.max_bad)


def _ray() -> Any:
    # Ray reports how it is used to its makers unless told otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray, which is not installed; run: pip install ray") from None
    return ray


@contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    """The cluster at an address, at RAY_ADDRESS, or running here; otherwise one that is started here and ended."""
    # Workers import this program from where it is here.
    root = str(Path(sys.modules[_TOOLS.partition(".")[0]].__path__[0]).parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}}
    try:
        ray.init(address=address or None, runtime_env=environment, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        where = address or os.environ.get("RAY_ADDRESS", "")
        raise ValueError(f"no Ray cluster answers at {where}: {error}; check --ray-address or RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()


def _place(module: str, options: argparse.Namespace, part: Part, folder: str) -> tuple[int, str]:
    """What a worker does: pack one part; gives (exit code, message)."""
    try:
        os.chdir(folder)
        packer: PartPacker = import_module(f"{_TOOLS}.{module}").PARTS
        packer.place(options, part)
    except RunEnd as error:
        return error.code, str(error)
    # Told by the driver, in one line: what a worker prints is not seen.
    except (ValueError, OSError) as error:
        return EXIT_USER_MISTAKE, f"part {part}: {error}"
    return 0, ""


def _wait_for(ray: Any, started: dict[Any, int], of: int) -> None:
    """Wait until every part is packed.

    Raises:
        RunEnd: one of them cannot be; the others are called off.
    """
    waiting, done = dict(started), 0
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        number = waiting.pop(ready)
        try:
            code, text = ray.get(ready)
        except ray.exceptions.RayTaskError:
            raise  # a fault of this program, which keeps its traceback
        except ray.exceptions.RayError as error:
            _call_off(ray, waiting)
            what = f"part {number}/{of} lost its worker {_RETRIES + 1} times ({' '.join(str(error).split())[:200]})"
            raise RunEnd(f"{what}; the same command packs only what lacks", EXIT_REQUEUE) from error
        if code:
            _call_off(ray, waiting)
            raise RunEnd(text, code)
        done += 1
        print(f"part {number}/{of} is packed, {done} of {of}", flush=True)


def _call_off(ray: Any, waiting: dict[Any, int]) -> None:
    for task in waiting:
        ray.cancel(task, force=True)
