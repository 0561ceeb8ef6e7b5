"""When drafting pays: a cost model of steps, measured as they happen or configured, and a switch with hysteresis.

Without drafts, R sequences get R tokens in the time t(R) of a step of R tokens. With k drafts each they get y R in
t'(R (1 + k)), drafting included, where y is what a sequence got per step lately. So the speed-up is

    g = y t(R) / t'(R (1 + k))

(with the tokens of prompts that come along added on both sides).

While the weights have to be read for a few tokens as for many, t' is hardly above t and g is nearly y. With many
sequences both grow with the tokens, and g falls below 1: the batch size at which speculation stops paying.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import deque
from statistics import median

from inference.speculation.config import SpeculationConfig
from inference.speculation.counts import SpeculationCounts

logger = logging.getLogger(__name__)

ENOUGH = 3
"""Steps whose median is believed, of the last WINDOW of about as many tokens."""
WINDOW = 9
MEMORY = 0.95
"""What a step's yield still weighs one step later."""


class StepTimes:
    """Seconds of a step by its tokens: the medians of the last measured ones, and lines between them."""

    def __init__(self, known: dict[int, float] | None = None) -> None:
        self._known = known
        self._seconds: dict[int, deque[float]] = {}  # by the number of bits of the tokens
        self._tokens: dict[int, deque[int]] = {}

    def add(self, tokens: int, seconds: float) -> None:
        bits = tokens.bit_length()
        self._seconds.setdefault(bits, deque(maxlen=WINDOW)).append(seconds)
        self._tokens.setdefault(bits, deque(maxlen=WINDOW)).append(tokens)

    def of(self, tokens: float) -> float | None:
        """Seconds of a step of so many tokens; None: not known, as nothing near was measured."""
        points = self._points()
        if not points:
            return None
        if self._known is None and min(abs(round(tokens).bit_length() - p[0].bit_length()) for p in points) > 1:
            return None
        at = bisect_left([p[0] for p in points], tokens)
        if at == 0:
            return points[0][1]
        if at == len(points):  # as many times longer: what a device that is busy does
            return points[-1][1] * max(1.0, tokens / points[-1][0] if len(points) > 1 else 1.0)
        (low, t_low), (high, t_high) = points[at - 1], points[at]
        return t_low + (t_high - t_low) * (tokens - low) / (high - low)

    def _points(self) -> list[tuple[int, float]]:
        if self._known is not None:
            return sorted(self._known.items())
        found = [
            (round(median(self._tokens[bits])), median(seconds))
            for bits, seconds in sorted(self._seconds.items())
            if len(seconds) >= ENOUGH
        ]
        return found


class Policy:
    """Decides before each step whether it has drafts, and counts what became of them."""

    def __init__(self, config: SpeculationConfig) -> None:
        self.config = config
        self.counts = SpeculationCounts()
        plain = {n: ms / 1e3 for n, ms in config.step_ms.items()} or None
        self._plain = StepTimes(plain)
        self._drafting = StepTimes(plain and {n: s + config.draft_ms / 1e3 for n, s in plain.items()})
        self._measures = plain is None
        self._prompts = 0  # tokens of prompts in the last step
        self._given = self._computed = self._sequences = 0.0  # of steps with drafts: sums that fade
        self._since = 0  # steps since the switch, or since the other way was tried
        self._trying = 0  # steps for which the other way is still tried
        self._patience = config.probe_interval
        self.forced: bool | None = None  # set by who measures both ways: drafts in every step, or in none

    @property
    def active(self) -> bool:
        """Whether the next step is to have drafts."""
        return self.counts.speculating != (self._trying > 0)

    def consider(self, sequences: int) -> None:
        """Before a step in which so many sequences are continued: switch, where that pays."""
        if sequences == 0:
            return
        if self.forced is not None:
            self._trying, self.counts.speculating = 0, self.forced
            return
        config, counts = self.config, self.counts
        limit = config.max_batch
        if limit is not None and sequences > (limit if counts.speculating else limit * (1 - config.hysteresis)):
            self._trying = 0
            self._switch(False, f"{sequences} sequences are more than speculation.max_batch={limit}")
            return
        if not config.switch_off:
            self._switch(True, f"{sequences} sequences are few enough")
            return
        if self._trying:
            self._trying -= 1
            if self._trying:
                return
        self._judge(sequences)

    def observe(
        self, *, sequences: int, computed: int, given: int, prompts: int, active: bool, seconds: float | None
    ) -> None:
        """After a step that continued so many sequences: what it computed for them and gave them, in tokens.

        prompts: tokens that it computed besides. active: as it was before the step. seconds: None where something else
        would be measured with it.
        """
        self._prompts = prompts
        if active and sequences:
            fade = (MEMORY * self._given, MEMORY * self._computed, MEMORY * self._sequences)
            self._given, self._computed, self._sequences = fade[0] + given, fade[1] + computed, fade[2] + sequences
        if computed > sequences:
            self.counts.steps_with += 1
        elif sequences:
            self.counts.steps_without += 1
        if seconds is not None and self._measures:
            (self._drafting if active else self._plain).add(computed + prompts, seconds)

    def gain(self, sequences: int, *, best: bool = False) -> float | None:
        """The speed-up at a batch size; None: not known yet. best: if all drafts stood."""
        if not self._sequences:
            return None
        rows = self._computed / self._sequences
        plain = self._plain.of(sequences + self._prompts)
        drafting = self._drafting.of(sequences * rows + self._prompts)
        if plain is None or drafting is None:
            return None
        return (rows if best else self._given / self._sequences) * plain / drafting

    def _judge(self, sequences: int) -> None:
        config, counts = self.config, self.counts
        self._since += 1
        gain = self.gain(sequences)
        if gain is None:
            self._measure(sequences)
            return
        counts.speed_up = gain
        if counts.speculating and gain < 1:
            self._switch(False, f"it makes {sequences} sequences {gain:.2f} times as fast")
        elif not counts.speculating and gain > 1 + config.hysteresis:
            self._patience = config.probe_interval
            self._switch(True, f"it makes {sequences} sequences {gain:.2f} times as fast")
        elif self._since >= self._patience:
            self._since = 0
            self._try_the_other_way(sequences)

    def _try_the_other_way(self, sequences: int) -> None:
        """For a few steps: what it costs, or gives, may have changed."""
        if self.counts.speculating:
            self._trying = ENOUGH + 1 if self._measures else 0
            return
        # Not where it would not pay if every draft stood; and more seldom each time that it was of no use.
        best = self.gain(sequences, best=True)
        if best is not None and best > 1 + self.config.hysteresis:
            self._trying = ENOUGH + 1
        self._patience = min(2 * self._patience, 16 * self.config.probe_interval)

    def _measure(self, sequences: int) -> None:
        """Have a step of the way that is not known at this batch size."""
        known = self._plain.of(sequences + self._prompts) is not None
        self._trying = ENOUGH + 1 if self.counts.speculating != known else 0

    def _switch(self, on: bool, why: str) -> None:
        if on == self.counts.speculating:
            return
        self._since = self._trying = 0
        self.counts.speculating, self.counts.switched = on, self.counts.switched + 1
        self.counts.why = f"speculation switched {'on' if on else 'off'}: {why}"
        logger.info(self.counts.why)
