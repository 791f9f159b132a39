"""What every command of the tools shares: flags that fail in one line, and exit codes."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

USER_MISTAKE = 2
TOO_MANY_BAD = 3
INTERRUPTED = 130


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose `--help` shows every default and which takes no abbreviated flags."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )


def positive(text: str) -> int:
    """The `type` of a flag that takes a whole number of at least 1."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments.

    Raises:
        ValueError: one line that says what is wrong; for an unknown flag it names the nearest valid one.
    """
    known = list(parser._option_string_actions)
    for token in argv:
        if token == "--":
            break
        flag = token.split("=")[0]
        if re.fullmatch(r"-[-\w.]*[A-Za-z][-\w.]*", flag) and flag not in known:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)
            raise ValueError(f"unknown flag {flag}; the nearest valid one is {near[0]} (see --help)")

    def fail(message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")

    parser.error = fail  # type: ignore[method-assign]
    return parser.parse_args(argv)


def call(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command and give its exit code; a user's mistake becomes one line on standard error and code 2.

    A `ValueError` or an `OSError` (a path that is missing, read-only or full) is taken for the user's mistake. With
    REGATTA_TRACEBACK=1 in the environment it is raised instead, for whoever looks for a fault in the program.
    """
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        if os.environ.get("REGATTA_TRACEBACK") == "1":
            raise
        # The system's own errors name cause and path only.
        remedy = "; check the path, its permissions and the free space" if getattr(error, "errno", None) else ""
        print(" ".join(str(error).split()) + remedy, file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("stopped before it was done; nothing was left under a final name", file=sys.stderr)
        return INTERRUPTED


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def run_main(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command with the process's arguments and leave with its exit code; SIGTERM cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(call(main, sys.argv[1:]))
