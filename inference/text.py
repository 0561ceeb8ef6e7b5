"""Text of tokens that arrive one by one, and stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
"""What bytes become that are no character, or not yet: a character may lie across tokens."""


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer (data/tokenizer.py has one). `token_bytes` is for
    servers, the last three are for constrained output."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def token_bytes(self, token: int) -> bytes: ...

    def to_json(self) -> str: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


class TextStream:
    """Decodes a continuation as it grows. What may still change, or begin a stop string, is held back.

    Only the newest tokens are decoded each time: those since the last place where text was complete, behind some that
    came before, as a decoder may treat the beginning of a text in a way of its own.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
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
        self._ids.append(token)
        before, after = self._decode()
        if len(after) > len(before) and not after.endswith(REPLACEMENT):
            self._extend(after[len(before) :])
            self._context, self._complete = self._complete, len(self._ids)

    def take(self) -> str:
        """Text that is new since the last call and will not change."""
        end = len(self._text) - (0 if self.stopped else self._held_back())
        taken = self._text[self._given : end]
        self._given = max(self._given, end)
        return taken

    def finish(self) -> str:
        """`take` when no token follows: what was held back, and bytes that never became a character."""
        if not self.stopped:
            before, after = self._decode()
            self._extend(after[len(before) :])
        taken, self._given = self._text[self._given :], len(self._text)
        return taken

    def _decode(self) -> tuple[str, str]:
        """Text from _context on: up to _complete, and to the end."""

        def decoded(ids: Sequence[int]) -> str:
            return self._tokenizer.decode(ids, skip_special_tokens=True)

        return decoded(self._ids[self._context : self._complete]), decoded(self._ids[self._context :])

    def _extend(self, new: str) -> None:
        longest = max(map(len, self._stop), default=1)
        searched = max(0, len(self._text) - longest + 1)
        self._text += new
        found = [place for stop in self._stop if (place := self._text.find(stop, searched)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _held_back(self) -> int:
        """Characters at the end that are the beginning of a stop string."""
        return max(
            (n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])),
            default=0,
        )
