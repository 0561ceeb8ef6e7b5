"""Preferences: two answers to one prompt, of which one was chosen. Rows as TRL writes them, pairs, and sequences.

A row has prompt, chosen and rejected, all text or all lists of messages; without a prompt it is what both answers
begin with. A pair is two examples, prompt and answer each, and both lie in one sequence as documents of their own: no
micro-batch ever holds half of one. What is known of a pair stands in columns (data/batch.py), where -1, in those of
numbers, says that nothing does:

    completion   2 p at the labels of the chosen answer of the sequence's pair p, 2 p + 1 at those of the rejected one
    last_input   the same at the position whose input is the last token of the answer
    pair         p at the last label of the rejected answer: once for each pair
    margin       fp32 at the same label: by how much it was preferred (the row's column margin, 0 without)
    reference    fp32 at the last label of each answer: log-probability of the answer under the reference model, in nats
                 (columns ref_chosen_logps and ref_rejected_logps); only where rows are read with them
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import digest
from data.config import BlendPart, ConversationsConfig, DataError
from data.conversations import (
    Conversation,
    MarkedText,
    RowAt,
    UnusableRow,
    marked_text,
    messages_of,
    row_of,
    with_system,
)
from data.examples import Examples, ExampleWriter, make_examples, pack
from data.order import EpochOrder
from data.packing import Sample
from data.tokenizer import Tokenizer

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def pair_of(row: Any, *, system: str | None) -> tuple[Conversation, Conversation]:
    """(chosen, rejected) of a row. Raises UnusableRow."""
    row, variables = row_of(row)
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing:
        raise UnusableRow(
            "columns",
            f"it has the columns {', '.join(row) or 'none'} and not {' or '.join(missing)}; give prompt, chosen and "
            "rejected",
        )
    kinds = {name: isinstance(row[name], str) for name in ("prompt", "chosen", "rejected") if name in row}
    if len(set(kinds.values())) > 1:
        text = " and ".join(name for name, is_text in kinds.items() if is_text)
        others = " and ".join(name for name, is_text in kinds.items() if not is_text)
        raise UnusableRow("malformed", f"{text} is text and {others} is not; give all alike")
    if kinds["chosen"]:
        return _pair_of_text(row)
    chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
    if "prompt" in row:
        prompt = messages_of(row, "prompt")
    else:
        count = _common(chosen, rejected)
        prompt, chosen, rejected = chosen[:count], chosen[count:], rejected[count:]
    if not (chosen and rejected):
        raise UnusableRow("empty", f"nothing of its {'rejected' if chosen else 'chosen'} differs from the other")
    _refuse_equal(chosen, rejected)
    return with_system(prompt, chosen, system, variables), with_system(prompt, rejected, system, variables)


def _pair_of_text(row: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
    chosen, rejected = row["chosen"], row["rejected"]
    _refuse_equal(chosen, rejected)
    prompt = row.get("prompt")
    if prompt is None:
        count = _common(chosen, rejected)
        count -= count > 0 and chosen[count - 1] == " "  # a word is one token with the space before it
        prompt, chosen, rejected = chosen[:count], chosen[count:], rejected[count:]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise UnusableRow("empty", f"its {name} answer is empty")
    return Conversation(prompt, chosen, {}), Conversation(prompt, rejected, {})


def _refuse_equal(chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        raise UnusableRow("alike", "its chosen and rejected answers are the same, and teach nothing")


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of what both begin with."""
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


def _number(row: Mapping[str, Any], name: str) -> float:
    """A column's number; NaN without it."""
    value = row.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UnusableRow("malformed", f"its {name}={value!r} is no finite number")
    return float(value)


class PairWriter(ExampleWriter):
    """Each pair a document: the chosen example, then the rejected one."""

    kind = "pairs"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._halves: list[tuple[int, int, int]] = []  # length of the chosen example, first token learned in each
        self._numbers: list[tuple[float, ...]] = []  # margin, log-probabilities
        self._waiting: list[tuple[float, ...]] = []  # of pairs that are still to be encoded

    def write(self, folder: Path) -> None:
        super().write(folder)
        np.save(folder / "halves.npy", np.asarray(self._halves, dtype=np.int64).reshape(-1, 3))
        np.save(folder / "numbers.npy", np.asarray(self._numbers, dtype=np.float64).reshape(-1, 3))

    def _texts_of(self, row: Any) -> list[MarkedText]:
        pair = pair_of(row, system=self._config.system)
        texts = [marked_text(answer, self._template, loss_on="completion") for answer in pair]
        self._waiting.append(tuple(_number(row, name) for name in ("margin", *REFERENCE_COLUMNS)))
        return texts

    def _encoded(self) -> Iterator[tuple[RowAt, list[int], np.ndarray]]:
        halves = super()._encoded()
        for (where, ids, learned), (_, other_ids, other_learned) in zip(halves, halves, strict=True):
            numbers = self._waiting.pop(0)
            if not (learned.any() and other_learned.any()):
                which = "rejected" if learned.any() else "chosen"
                self._leave_out(where, UnusableRow("unlearned", f"no token of its {which} answer carries a loss"))
                continue
            self._halves.append((len(ids), int(learned.argmax()), int(other_learned.argmax())))
            self._numbers.append(numbers)
            yield where, [*ids, *other_ids], np.concatenate([learned, other_learned])


@dataclass(frozen=True)
class Pairs:
    """Pairs as ranges of a token array, in the order of their rows."""

    examples: Examples  # chosen and rejected example of each, joined
    halves: np.ndarray  # [N, 3] int64: tokens of the chosen example; first one learned in the chosen, in the rejected
    numbers: np.ndarray  # [N, 3] fp64: margin, log-probabilities of both answers under the reference; NaN: not given

    @property
    def content(self) -> str:
        """Hash of all of them."""
        return digest(self.examples.corpus.content, self.halves.tolist(), str(self.numbers.tolist()))

    def split(self, fraction: float) -> tuple[Pairs, Pairs]:
        """(training, validation), as `Examples.split`."""
        training, validation = (self._with(examples) for examples in self.examples.split(fraction))
        return training, validation

    def _with(self, examples: Examples) -> Pairs:
        rows = np.searchsorted(self.examples.corpus.starts, examples.corpus.starts)
        return Pairs(examples, self.halves[rows], self.numbers[rows])


def open_pairs(
    part: BlendPart,
    config: ConversationsConfig,
    tokenizer: Tokenizer,
    cache_dir: str,
    *,
    writer: type[PairWriter] = PairWriter,
) -> Pairs:
    """The pairs in the files of part.path, as that class makes them; as `open_examples`, with its errors."""
    examples, folder = make_examples(part, config, tokenizer, cache_dir, kind=writer.kind, writer=writer)
    halves, numbers = np.load(folder / "halves.npy"), np.load(folder / "numbers.npy")
    if not len(halves) == len(numbers) == len(examples.corpus.starts):
        raise DataError(f"data.cache_dir: {folder} is damaged; delete that folder and start again")
    return Pairs(examples, halves, numbers)


class PairSamples:
    """Pairs as samples of seq_len + 1 tokens: several in each, or one, and what is left filled up without loss.

    An example has at most seq_len // 2 tokens, so that every pair fits. Which pairs share a sample depends on them and
    seq_len alone, as of `ExampleSamples`; each example begins a document, and so does the filling.
    """

    def __init__(
        self,
        pairs: Pairs,
        config: ConversationsConfig,
        *,
        seq_len: int,
        key: tuple[int, ...] | None,
        fill: int,
        what: str,
    ) -> None:
        """key, fill: as of `ExampleSamples`, whose errors it raises."""
        self._pairs, self._seq_len, self._fill = pairs, seq_len, fill
        self.left_out = list(pairs.examples.why.values())
        limit = seq_len // 2
        corpus, halves = pairs.examples.corpus, pairs.halves
        lengths = np.stack([halves[:, 0], corpus.ends - corpus.starts - halves[:, 0]], 1)
        long = np.asarray((lengths > limit).any(1))
        unlearned = np.asarray((halves[:, 1:] >= limit).any(1))
        kept = ~long if config.too_long == "skip" else ~unlearned
        self.counts = {
            "pairs": int(kept.sum()),
            "too_long": int(long.sum()),
            "cut_before_any_loss": 0 if config.too_long == "skip" else int(unlearned.sum()),
        }
        if config.too_long == "error" and long.any():
            raise DataError(
                f"{what}: {long.sum()} of {len(long)} pairs have an example of more than train.seq_len // 2 = {limit} "
                f"tokens, the longest {lengths.max()}; raise train.seq_len, or use "
                "data.conversations.too_long=truncate or skip"
            )
        if config.unusable == "error" and self.counts["cut_before_any_loss"]:
            raise DataError(
                f"{what}: {self.counts['cut_before_any_loss']} of {len(long)} pairs have an answer that begins behind "
                f"token train.seq_len // 2 = {limit}; raise train.seq_len, or leave them out by "
                "data.conversations.unusable=skip"
            )
        if not kept.any():
            raise DataError(f"{what} holds no pair that fits train.seq_len={seq_len}: {self.counts}")
        chosen = np.flatnonzero(kept)
        self._lengths = np.minimum(lengths, limit)
        both = self._lengths.sum(1)
        rows = pack(both[chosen], seq_len) if config.packing else [[i] for i in range(len(chosen))]
        self._members = [chosen[row].tolist() for row in rows]
        self.samples_per_epoch = len(rows)
        self._order = EpochOrder(len(rows), key)
        self.counts |= {"samples": len(rows), "tokens": int(both[chosen].sum())}
        self.counts |= {f"unusable_{kind}": count for kind, count in pairs.examples.unusable.items()}
        cut = config.too_long == "truncate" and bool(long[chosen].any())
        # Whether every pair says what a reference model makes of its answers, and none of these was cut.
        self.with_reference = not (cut or np.isnan(pairs.numbers[chosen][:, 1:]).any())
        self.counts["with_reference"] = int(kept.sum()) if self.with_reference else 0

    def available(self, wanted: int) -> int:
        return min(wanted, self.samples_per_epoch)

    def __getitem__(self, number: int) -> Sample:
        row = _Row(self._seq_len, self._fill)
        for pair, member in enumerate(self._members[self._order[number]]):
            begin = int(self._pairs.examples.corpus.starts[member])
            margin, *reference = self._pairs.numbers[member].tolist()
            for half, length in enumerate(self._lengths[member].tolist()):
                source = slice(begin, begin + length)
                begin += int(self._pairs.halves[member, 0])
                row.add(
                    self._pairs.examples.corpus.tokens[source],
                    self._pairs.examples.learned[source].astype(bool),
                    segment=2 * pair + half,
                    reference=reference[half] if self.with_reference else 0.0,
                )
            row.end_pair(pair, 0.0 if math.isnan(margin) else margin)
        return row.sample(with_reference=self.with_reference)


class _Row:
    """A sample that is being filled."""

    def __init__(self, seq_len: int, fill: int) -> None:
        size = seq_len + 1
        self.tokens = np.full(size, fill, dtype=np.int64)
        self.learned = np.zeros(size, dtype=bool)
        self.starts: list[int] = []
        self.numbers = {name: np.full(size, -1, dtype=np.int64) for name in ("completion", "last_input", "pair")}
        self.values = {name: np.zeros(size, dtype=np.float32) for name in ("margin", "reference")}
        self.filled = 0

    def add(self, tokens: np.ndarray, learned: np.ndarray, *, segment: int, reference: float) -> None:
        here = slice(self.filled, self.filled + len(tokens))
        self.tokens[here], self.learned[here] = tokens, learned
        self.numbers["completion"][here][learned] = segment
        self.numbers["last_input"][here.stop] = segment  # beside the label that follows it
        self.last = here.start + int(np.flatnonzero(learned)[-1])
        self.values["reference"][self.last] = reference
        self.starts.append(here.start)
        self.filled = here.stop

    def end_pair(self, pair: int, margin: float) -> None:
        self.numbers["pair"][self.last], self.values["margin"][self.last] = pair, margin

    def sample(self, *, with_reference: bool) -> Sample:
        values = self.values if with_reference else {"margin": self.values["margin"]}
        starts = np.asarray([*self.starts, self.filled], dtype=np.int64)
        return Sample(self.tokens, starts, self.learned, self.numbers | values)
