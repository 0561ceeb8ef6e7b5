"""What became of drafted tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Self


@dataclass
class DraftCounts:
    """Drafted tokens by their place behind a sequence. Filled by SpeculativeRunner.

    A draft is tried if all before it stood, and stands if it is tried and accepted. What stood behind the end of a
    document counts here, though nobody sees it.
    """

    steps: int = 0  # of single sequences, with at least one drafted token
    drafted: list[int] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, drafted: int, accepted: int) -> None:
        """A step of a sequence that had so many drafts, of which the first `accepted` stood."""
        missing = drafted - len(self.drafted)
        for places in (self.drafted, self.tried, self.accepted):
            places += [0] * missing
        self.steps += 1
        for place in range(drafted):
            self.drafted[place] += 1
            self.tried[place] += place <= accepted
            self.accepted[place] += place < accepted

    def since(self, before: Self) -> Self:
        """What was counted after `before`, a copy of these as they were then; what is no count is as it is now."""
        changes: dict[str, Any] = {}
        for name, now in vars(self).items():
            then = getattr(before, name)
            if isinstance(now, list):
                changes[name] = [one - other for one, other in zip_longest(now, then, fillvalue=0)]
            elif type(now) is int:
                changes[name] = now - then
        return replace(self, **changes)

    @property
    def acceptance(self) -> list[float]:
        """By place, the share of tried drafts that stood: sum_x min(p(x), q(x)) in expectation."""
        return [stood / tried if tried else 0.0 for stood, tried in zip(self.accepted, self.tried, strict=True)]

    @property
    def mean_length(self) -> float:
        """Tokens that a step gave a sequence, on average: the drafts that stood, and one more."""
        return 1 + sum(self.accepted) / self.steps if self.steps else 1.0


@dataclass
class SpeculationCounts(DraftCounts):
    """Of an engine."""

    speculating: bool = True  # now; false: switched off
    switched: int = 0  # how often it was switched off or on again
    why: str = ""  # the last switch, with its reason
    steps_with: int = 0  # of the engine, with drafts
    steps_without: int = 0  # of the engine, in which sequences were continued without any
    speed_up: float | None = None  # tokens per second with drafts over those without, as last estimated
