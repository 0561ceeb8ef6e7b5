"""Prompt lookup: what followed the last tokens when they occurred before (Saxena, 2023, "Prompt lookup decoding")."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

import torch

from inference.sequence import Sequence
from inference.speculation.config import SpeculationConfig
from inference.speculation.drafter import SeesTokensOnly, Wanted
from inference.speculation.rejection import Drafts, Places


class _Occurrences:
    """Where runs of tokens of a growing sequence ended last, but for the run at its end."""

    def __init__(self, lengths: range) -> None:
        self._lengths = lengths  # of runs, the longest first
        self._after: dict[tuple[int, ...], int] = {}  # by run: place of the token that followed it
        self._known = 0  # places up to which it was looked at

    def continuation(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` tokens that followed what is now at the end, the newest occurrence of the longest run."""
        for place in range(max(self._known, 1), len(tokens)):
            for length in self._lengths:
                if length <= place:
                    self._after[tuple(tokens[place - length : place])] = place
        self._known = len(tokens)
        for length in self._lengths:
            after = self._after.get(tuple(tokens[-length:])) if length <= len(tokens) else None
            if after is not None:
                # It goes on into the end itself: what repeats with this period goes on repeating.
                period = len(tokens) - after
                return [tokens[after + i % period] for i in range(most)]
        return []


class NGramDrafter(SeesTokensOnly):
    """Drafts from a sequence's own prompt and continuation. Costs the device nothing."""

    def __init__(self, config: SpeculationConfig, device: torch.device) -> None:
        self._lengths = range(config.ngram_max, config.ngram_min - 1, -1)
        self._device = device
        self._seen: WeakKeyDictionary[Sequence, _Occurrences] = WeakKeyDictionary()
        self._found: WeakKeyDictionary[Sequence, list[int]] = WeakKeyDictionary()

    def wanted(self, sequence: Sequence, most: int) -> int:
        occurrences = self._seen.setdefault(sequence, _Occurrences(self._lengths))
        found = self._found[sequence] = occurrences.continuation(sequence.tokens, most)
        return len(found)

    def draft(self, wanted: Seq[Wanted], places: Places) -> Drafts:
        most = max(one.num_drafts for one in wanted)
        rows = [(self._found[one.sequence][: one.num_drafts] + [0] * most)[:most] for one in wanted]
        tokens = torch.tensor(rows)
        if self._device.type == "cuda":
            tokens = tokens.pin_memory().to(self._device, non_blocking=True)
        return Drafts(tokens)

    def describe(self) -> str:
        return f"prompt lookup of {self._lengths[-1]} to {self._lengths[0]} tokens"
