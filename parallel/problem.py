"""A problem of a configuration: what is wrong, and changes that mend it, as data and as the line that a user reads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_VALUES = 4
"""Of a field of numbers, or of changes of several fields, that an error offers: the nearest ones."""


@dataclass(frozen=True)
class Advice:
    """Changes of a configuration, each of which by itself mends a problem. At least one."""

    changes: tuple[Mapping[str, Any], ...]  # each: dotted field to value, the nearest first

    @property
    def shown(self) -> int:
        """How many of the changes an error offers: all choices among names."""
        names = all(isinstance(value, str) for change in self.changes for value in change.values())
        return len(self.changes) if names else MAX_VALUES

    def __str__(self) -> str:
        nearest = sorted(self.changes[: self.shown], key=_order)
        (field, _), *rest = nearest[0].items()
        if all(next(iter(change)) == field and list(change.items())[1:] == rest for change in nearest):
            *others, last = (shown(change[field]) for change in nearest)
            first = f"{field}={', '.join(others)}{' or ' if others else ''}{last}"
            return " with ".join([first, *(f"{name}={shown(value)}" for name, value in rest)])
        return " or ".join(
            " with ".join(f"{name}={shown(value)}" for name, value in change.items()) for change in nearest
        )


class Problem(str):
    """One line: field, value, why it cannot be, and what to use instead. `what` leaves the last part out.

    advice: other values. words: what to do instead that is no change of a value, as an imperative.
    """

    what: str
    advice: tuple[Advice, ...]
    words: str

    def __new__(cls, what: str, *advice: Advice | None, words: str = "") -> Problem:
        given = tuple(some for some in advice if some is not None)
        instead = [f"use {', or '.join(map(str, given))}"] * bool(given) + [words] * bool(words)
        problem = super().__new__(cls, "; ".join([what, ", or ".join(instead)]) if instead else what)
        problem.what, problem.advice, problem.words = what, given, words
        return problem

    def with_legal_advice(self, is_legal: Callable[[Mapping[str, Any]], bool]) -> Problem:
        """With the changes that are legal, as many as are shown.

        Where none is and there are no words of advice either, the line says so.
        """
        kept = []
        for advice in self.advice:
            legal: list[Mapping[str, Any]] = []
            for change in advice.changes:
                if len(legal) < advice.shown and is_legal(change):
                    legal.append(change)
            kept.append(Advice(tuple(legal)) if legal else None)
        if not self.advice or any(kept) or self.words:
            return Problem(self.what, *kept, words=self.words)
        fields = dict.fromkeys(field for advice in self.advice for change in advice.changes for field in change)
        return Problem(f"{self.what}; no other {' or '.join(fields)} alone is legal beside the other settings")


def kind_of(problem: str) -> str:
    """The same for two problems that differ in nothing but values and advice."""
    return re.sub(r"=[^\s,;]+|\d+(\.\d+)?", "#", without_advice(problem))


def without_advice(problem: str) -> str:
    return problem.what if isinstance(problem, Problem) else problem


def values(field: str, candidates: Iterable[Any], *, near: float | None = None) -> Advice | None:
    """Use one of these of a field, the nearest to `near` first; None where there is none."""
    found = list(dict.fromkeys(candidates))
    if near is not None:
        found.sort(key=lambda value: (abs(value - near), value))
    return Advice(tuple({field: value} for value in found)) if found else None


def change(**fields: Any) -> Advice:
    """Use these together; a field is written group__name."""
    return Advice(({name.replace("__", ".", 1): value for name, value in fields.items()},))


def multiples(step: int, near: int) -> list[int]:
    """The nearest positive multiples of a number, four on either side."""
    below = near // step * step
    return [m for m in range(below - 3 * step, below + 5 * step, step) if m > 0 and m != near]


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"[{','.join(map(shown, value))}]" if isinstance(value, (list, tuple)) else str(value)


def _order(change: Mapping[str, Any]) -> float:
    """Ascending numbers, all else as it was."""
    value = next(iter(change.values()))
    return value if len(change) == 1 and type(value) in (int, float) and math.isfinite(value) else 0
