"""What every command of the tools shares: a parser that shows defaults, and the way from arguments to an exit code."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from train.errors import run_to_exit_code
from train.flags import OneLineParser


def make_parser(description: str) -> OneLineParser:
    """A parser whose `--help` shows every default."""
    return OneLineParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def positive(text: str) -> int:
    """The `type` of a flag that takes a whole number of at least 1."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def parse(parser: OneLineParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments.

    Raises:
        UserMistake: one line that says what is wrong; for an unknown flag it names the nearest valid one.
    """
    return parser.parse_once(argv)


def call(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command and give its exit code, as `train.errors.run_to_exit_code`."""
    return run_to_exit_code(lambda: main(argv))


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end the process as Ctrl-C does, with temporary files removed."""
    signal.signal(signal.SIGTERM, _interrupt)


def run_main(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command with the process's arguments and leave with its exit code; SIGTERM cleans up as Ctrl-C does."""
    interrupt_on_sigterm()
    sys.exit(call(main, sys.argv[1:]))
