"""What the tools' command lines share: an unknown flag fails in one line that names the nearest valid one."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from train.errors import UserMistake
from train.flags import OneLineParser


def make_parser(prog: str, description: str) -> OneLineParser:
    """A parser whose help shows every default and whose errors are one line."""
    return OneLineParser(
        prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def parse(parser: OneLineParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed arguments.

    Raises:
        UserMistake: on an unknown flag, naming the nearest valid one, or on a value that does not fit.
    """
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        nearest = difflib.get_close_matches(name, parser.known_flags(), n=1, cutoff=0.0)
        kind = "flag" if name.startswith("-") else "argument"
        raise UserMistake(f"unknown {kind} {name}; the nearest valid flag is {nearest[0]}; --help lists all")
    return namespace
