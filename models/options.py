"""Fields of configuration dataclasses that carry their own help line, bounds and choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Option:
    """What is known of one configuration field beside its type and default.

    Attributes:
        help: the line that `--help` shows for its flag.
        least: the smallest value allowed; None for no bound, here and in the next three.
        most: the largest value allowed.
        above: every allowed value is larger than this.
        below: every allowed value is smaller than this.
        choices: the only values allowed; empty allows all.
        free_on_resume: a run may continue with another value, because what it computes does not depend on this one.
    """

    help: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    free_on_resume: bool = False

    def problem(self, value: Any) -> str:
        """What is wrong with a value, to be read after the field's name; empty where nothing is.

        A tuple must keep the bounds in each of its elements. Values that are no numbers have no bounds.
        """
        if self.choices and value not in self.choices:
            return f"{value!r} is unknown; choose from {', '.join(map(str, self.choices))}"
        elements = value if isinstance(value, tuple) else (value,)
        numbers = [each for each in elements if isinstance(each, int | float)]
        if all(self._fits(number) for number in numbers):
            return ""
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return shown + self._bounds()

    def _fits(self, number: float) -> bool:
        return (
            (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def _bounds(self) -> str:
        low = self.least if self.least is not None else self.above
        high = self.most if self.most is not None else self.below
        open_ends = [end for end in (self.above, self.below) if end is not None]
        if low is not None and high is not None:
            apart = f", {' and '.join(f'{end:g}' for end in open_ends)} itself excluded" if open_ends else ""
            return f" is outside {low:.12g}..{high:.12g}{apart}"
        if self.least == 0:
            return " is negative; give 0 or more"
        if self.least is not None:
            return f": must be at least {self.least:g}"
        if self.above is not None:
            return f": must be above {self.above:g}"
        return f": must be {'at most' if self.most is not None else 'below'} {high:g}"


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] = (),
    free_on_resume: bool = False,
) -> Any:
    """A dataclass field with a default and an `Option`, whose attributes the other arguments are."""
    known = Option(help, least, most, above, below, tuple(choices), free_on_resume)
    return field(default=default, metadata={"option": known})
