"""Text of tokens that arrive one by one, and stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

REPLACEMENT = "\ufffd"
"""What bytes become that are no character, or not yet: a character may lie across tokens."""
CHARACTER_BYTES = 4
"""Of UTF-8, at most: a character that is not complete lies in fewer tokens."""
MOST_INCOMPLETE = 16
"""Tokens that are decoded again and again because their text may change; it hardly does so behind four."""


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer (data/tokenizer.py has one). `token_bytes` is for
    servers, the last three are for constrained output."""

    def encode(self, text: str) -> list[int]: ...

    @property
    def beginning(self) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def is_special(self, token: int) -> bool: ...

    def special_id(self, text: str) -> int | None: ...

    def token_bytes(self, token: int) -> bytes: ...

    def to_json(self) -> str: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


class TextStream:
    """Decodes a continuation as it grows. What may still change, or begin a stop string, is held back.

    Only the newest tokens are decoded each time: those since the last place where text was complete, behind some that
    came before, as a decoder may treat the beginning of a text in a way of its own. A token costs the same however
    many came before it, and whatever they and the stop strings are: requests share the engine's thread.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [_StopString(text) for text in stop]
        self._ids: list[int] = []  # without special tokens, which are not in the text
        self._context, self._complete = 0, 0  # decoding starts at _context; text is complete up to _complete
        self._text = ""  # complete so far
        self._given = 0  # characters of it that `take` has returned
        self.stopped = False  # a stop string was found; text ends before it

    @property
    def text(self) -> str:
        """All of it, up to what is not complete yet."""
        return self._text

    def push(self, token: int) -> None:
        """Add a token."""
        if self._tokenizer.is_special(token):
            return
        self._ids.append(token)
        before, after = self._decoded(self._complete), self._decoded(len(self._ids))
        if len(after) > len(before) and not after.endswith(REPLACEMENT):
            self._complete_to(len(self._ids), after[len(before) :])
        elif len(self._ids) - self._complete > MOST_INCOMPLETE:
            self._give_up_waiting(before, after)

    def take(self) -> str:
        """Text that is new since the last call and will not change."""
        held_back = max((stop.begun for stop in self._stop), default=0)
        end = len(self._text) - (0 if self.stopped else held_back)
        taken = self._text[self._given : end]
        self._given = max(self._given, end)
        return taken

    def finish(self) -> str:
        """`take` when no token follows: what was held back, and bytes that never became a character."""
        if not self.stopped:
            self._extend(self._decoded(len(self._ids))[len(self._decoded(self._complete)) :])
        taken, self._given = self._text[self._given :], len(self._text)
        return taken

    def _decoded(self, end: int) -> str:
        """Text of tokens from _context to end."""
        return self._tokenizer.decode(self._ids[self._context : end], skip_special_tokens=True)

    def _complete_to(self, end: int, new: str) -> None:
        self._extend(new)
        self._context, self._complete = self._complete, end

    def _give_up_waiting(self, before: str, after: str) -> None:
        """Take bytes that are no character for what they are, but for the newest, which may be the beginning of one."""
        for end in range(len(self._ids) - CHARACTER_BYTES + 1, self._complete, -1):
            settled = self._decoded(end)
            if len(settled) < len(after) and after.startswith(settled):  # else a character lies across the end
                self._complete_to(end, settled[len(before) :])
                return
        if after == before:  # tokens without text
            del self._ids[self._complete :]
        else:
            self._complete_to(len(self._ids), after[len(before) :])

    def _extend(self, new: str) -> None:
        begins = [len(self._text) + place for stop in self._stop if (place := stop.find(new)) is not None]
        self._text += new
        if begins:
            self._text, self.stopped = self._text[: min(begins)], True


class _StopString:
    """Looks for a string in text that arrives in pieces, each character once (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, text: str) -> None:
        self.begun = 0  # characters at the end of what was seen that are its beginning
        self._text, self._borders = text, _borders(text)

    def find(self, new: str) -> int | None:
        """Where in what is new the string begins, below 0 if before it; None: it does not end in it."""
        if not self.begun and self._text[0] not in new:
            return None
        for place, character in enumerate(new, start=1):
            self.begun = _longer(self._text, self._borders, self.begun, character)
            if self.begun == len(self._text):
                return place - self.begun
        return None


@lru_cache(maxsize=1024)
def _borders(text: str) -> tuple[int, ...]:
    """Of each beginning of text the length of the longest shorter beginning that it ends with."""
    found = [0]
    for character in text[1:]:
        found.append(_longer(text, found, found[-1], character))
    return tuple(found)


def _longer(text: str, borders: Sequence[int], begun: int, character: str) -> int:
    """How much of the beginning of text stands at the end, when a character comes behind `begun` of it."""
    while begun and text[begun] != character:
        begun = borders[begun - 1]
    return begun + (text[begun] == character)
