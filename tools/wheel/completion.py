"""Completion in the shell: commands, then the flags that a command's own `--help` shows, then a flag's choices."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Sequence

from train.errors import UserMistake

Main = Callable[[Sequence[str]], int]

_BASH = """_regatta() {
    local words
    words=$(regatta __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _regatta regatta"""
_SCRIPTS = {"bash": _BASH, "zsh": "autoload -U +X bashcompinit && bashcompinit\n" + _BASH}

# As argparse prints them: a flag at the start of an indented line, with its choices behind it.
_FLAG = re.compile(r"^ {2,}(?:-\w, )?(--[\w.-]+)(?:[ =]\{([^}]+)\})?", re.MULTILINE)


def script(shell: str) -> str:
    """What makes a shell complete `regatta`, for `eval "$(regatta completion bash)"`.

    Raises:
        UserMistake: a shell that is not supported.
    """
    if shell not in _SCRIPTS:
        raise UserMistake(f"regatta completion {shell}: choose from {', '.join(_SCRIPTS)}")
    return _SCRIPTS[shell]


def candidates(words: Sequence[str], commands: Sequence[str], load: Callable[[str], Main]) -> list[str]:
    """What the last of the words may become.

    Args:
        words: those after `regatta`, the last one unfinished or empty.
        commands: their names.
        load: gives the `main(argv)` of one.

    Returns:
        Words that the shell filters by what was typed; empty where a file name is wanted.
    """
    if len(words) < 2:
        return list(commands)
    if words[0] not in commands or words[0] == "completion":
        return list(_SCRIPTS) if words[0] == "completion" else []
    flags = dict(_FLAG.findall(_help(load(words[0]), words[1:-1])))
    chosen = flags.get(words[-2], "")
    if chosen:
        return chosen.split(",")
    return list(flags) if words[-1].startswith("-") else []


def _help(main: Main, before: Sequence[str]) -> str:
    """The help of a command. What was typed before decides it: a protocol, or the method whose flags are shown."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        main([*_telling(before), "--help"])
    return said.getvalue()


def _telling(words: Sequence[str]) -> list[str]:
    # The other flags could be unfinished or wrong, and would be answered instead of the help.
    kept = [word for word in words[:1] if not word.startswith("-")]
    for flag, value in zip(words, words[1:], strict=False):
        if flag in ("--method", "--recipe"):
            kept += [flag, value]
    return kept
