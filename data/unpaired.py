"""Answers that are good or bad by themselves: rows with prompt, completion and label (true or false), as TRL has them.

Rows of pairs (data/preference.py) are two such answers. Each example has beside it the same prompt with an answer to
another one, the row's before it, by which a policy's distance from its reference is estimated (KTO, 2402.01306, section
4.1): the two stand where the chosen and the rejected example of a pair do, and the column margin is 1 of good answers
and -1 of bad ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from data.config import DataError
from data.conversations import Conversation, MarkedText, RowAt, UnusableRow, conversation_of, marked_text, read_rows
from data.preference import PairWriter, pair_of


def judged_of(row: Any, *, system: str | None) -> list[tuple[Conversation, bool]]:
    """The answers of a row and whether they are good. Raises UnusableRow."""
    if isinstance(row, dict) and "chosen" in row and "rejected" in row:
        chosen, rejected = pair_of(row, system=system)
        return [(chosen, True), (rejected, False)]
    if isinstance(row, dict) and not ("prompt" in row and "completion" in row and "label" in row):
        raise UnusableRow(
            "columns",
            f"it has the columns {', '.join(row) or 'none'}; give prompt, completion and label, or prompt, chosen and "
            "rejected",
        )
    conversation = conversation_of(row, text_field="text", loss_on="completion", system=system)
    if not isinstance(row["label"], bool):
        raise UnusableRow("malformed", f"its label={row['label']!r} is neither true nor false")
    return [(conversation, row["label"])]


class UnpairedWriter(PairWriter):
    kind = "unpaired"

    def _texts(self) -> Iterator[tuple[RowAt, MarkedText]]:
        # Text and messages cannot be mixed: answers to other prompts are of the same kind.
        before: dict[bool, Conversation] = {}
        first: dict[bool, tuple[RowAt, Conversation, bool]] = {}
        for where, conversation, good in self._judged():
            kind = isinstance(conversation.answer, str)
            other = before.get(kind)
            before[kind] = conversation
            if other is None:
                first[kind] = where, conversation, good
                continue
            yield from self._both(where, conversation, good, other)
            if kind in first:
                yield from self._both(*first.pop(kind), conversation)
        for where, *_ in first.values():
            self._leave_out(where, UnusableRow("alone", "no other row has an answer that could stand beside its own"))

    def _judged(self) -> Iterator[tuple[RowAt, Conversation, bool]]:
        for path in self._source.files:
            for where, row in read_rows(path):
                try:
                    judged = judged_of(row, system=self._config.system)
                except UnusableRow as unusable:
                    self._leave_out(where, unusable)
                    continue
                for conversation, good in judged:
                    yield where, conversation, good

    def _both(
        self, where: RowAt, conversation: Conversation, good: bool, other: Conversation
    ) -> Iterator[tuple[RowAt, MarkedText]]:
        mismatched = Conversation(conversation.prompt, other.answer, conversation.variables)
        try:
            texts = [marked_text(c, self._template, loss_on="completion") for c in (conversation, mismatched)]
        except UnusableRow as unusable:
            self._leave_out(where, unusable)
            return
        except DataError as error:
            raise DataError(f"{error} (seen at {where})") from None
        self._waiting.append((1.0 if good else -1.0, math.nan, math.nan))
        for text in texts:
            yield where, text
