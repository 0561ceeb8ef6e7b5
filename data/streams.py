"""Samples from streams: no random access, yet a cursor that is exact.

A dataset is cut into V streams, a number of its own (data.stream_shards), whatever the number of ranks. A global batch
of G samples takes c = G / V from each: position j of the batch is sample j % c of those from stream j // c. A rank
reads the streams that its slice of the batch touches, so with V a multiple of the ranks each stream is read by one.
Each stream has a cursor of a few integers; together they are the position of the run, on any number of ranks.

In a blend the same V streams each take from all sources: from the V parts of one that streams, and by number from one
that does not.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

from data.config import DataError
from data.order import permutation
from data.packing import Proportions, Sample, Samples
from data.sources import HubStream
from data.tokenizer import Tokenizer


class Cursor(NamedTuple):
    """Where the next sample of a stream begins."""

    epoch: int = 0
    document: int = 0  # how many documents of this epoch's order lie before the one it begins in
    token: int = 0  # index in that document


class SampleStream(Protocol):
    """Samples one after the other."""

    @property
    def cursor(self) -> tuple[int, ...]:
        """Where the sample that `next` gives next begins; a stream opened there goes on with it."""
        ...

    def next(self) -> Sample: ...


class _Document(NamedTuple):
    cursor: Cursor  # of its first token
    ids: list[int]


def held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: decided by its text, so that copies of it do too."""
    raw = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=7, person=b"validation").digest()
    return int.from_bytes(raw) / 2**56 < fraction


class Stream:
    """One endless stream of samples. Documents are shuffled inside blocks of `block`, anew each epoch: a block can be
    read again on resuming, where the state of a shuffle buffer would have to be stored with the texts in it."""

    def __init__(
        self,
        source: HubStream,
        index: int,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        seed: int | None,
        block: int,
        validation_fraction: float,
        cursor: Cursor,
    ) -> None:
        """index: which of the source's streams. seed: of the shuffling, None: in order."""
        self._source = source
        self._index = index
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._seed = seed
        self._block = block
        self._validation_fraction = validation_fraction
        self._offset = cursor.token
        self._pending: deque[_Document] = deque()
        self._documents = self._read(cursor)
        self._cursor = cursor

    @property
    def cursor(self) -> Cursor:
        """Where the sample that `next` gives next begins."""
        return self._cursor

    def next(self) -> Sample:
        """The next seq_len + 1 tokens; the last of them begins the sample after this one."""
        ids: list[int] = []
        starts = []
        place = 0
        while len(ids) <= self._seq_len:
            if place == len(self._pending):
                self._pending.append(next(self._documents))
            begin = self._offset if place == 0 else 0
            if begin == 0:
                starts.append(len(ids))
            ids += self._pending[place].ids[begin : begin + self._seq_len + 1 - len(ids)]
            place += 1
        self._advance(self._seq_len)
        return Sample(np.asarray(ids, dtype=np.int64), np.asarray(starts, dtype=np.int64))

    def _advance(self, tokens: int) -> None:
        self._offset += tokens
        while self._offset >= len(self._pending[0].ids):
            self._offset -= len(self._pending.popleft().ids)
        self._cursor = self._pending[0].cursor._replace(token=self._offset)

    def _read(self, cursor: Cursor) -> Iterator[_Document]:
        """Training documents from cursor's on, epoch after epoch."""
        epoch, first = cursor.epoch, cursor.document
        while True:
            block = first // self._block
            texts = self._source.stream(self._index, skip=block * self._block)
            empty = True
            while chunk := list(islice(texts, self._block)):
                for place in range(first - block * self._block, len(chunk)):
                    text = chunk[self._order(len(chunk), epoch, block)[place]]
                    if text and not held_out(text, self._validation_fraction):
                        empty = False
                        ids = [*self._tokenizer.encode(text), self._tokenizer.eos_id]
                        yield _Document(Cursor(epoch, block * self._block + place), ids)
                block += 1
                first = block * self._block
            if empty and cursor.epoch != epoch:
                raise DataError(
                    f"data.path={self._source.name}: stream {self._index} holds no document to train on; "
                    "lower data.stream_shards or data.validation_fraction"
                )
            epoch, first = epoch + 1, 0

    def _order(self, count: int, epoch: int, block: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(count)
        return permutation(count, self._seed, self._index, epoch, block)


class BlendedStream:
    """Stream `index` of a blend. Every num_streams consecutive samples of the blend are dealt to its streams in an
    order drawn anew, so that each stream sees all sources, and each global batch their proportions.

    The cursor is how many samples were taken, then the cursors of the parts that stream.
    """

    def __init__(
        self,
        parts: list[Stream | Samples],
        proportions: Proportions,
        *,
        index: int,
        num_streams: int,
        seed: int,
        taken: int,
    ) -> None:
        self._parts = parts
        self._proportions = proportions
        self._index = index
        self._num_streams = num_streams
        self._seed = seed
        self._taken = taken

    @property
    def cursor(self) -> tuple[int, ...]:
        of_parts = (part.cursor for part in self._parts if isinstance(part, Stream))
        return (self._taken, *(value for cursor in of_parts for value in cursor))

    def next(self) -> Sample:
        """Of the source whose turn it is."""
        place = int(permutation(self._num_streams, self._seed, self._taken)[self._index])
        source, number = self._proportions.locate(self._taken * self._num_streams + place)
        self._taken += 1
        part = self._parts[source]
        return part.next() if isinstance(part, Stream) else part[number]


class RankStreams:
    """The streams that one rank reads, step by step."""

    def __init__(self, streams: Mapping[int, SampleStream], *, begin: int, end: int, per_stream: int) -> None:
        """begin, end: the rank's positions in the global batch. per_stream: samples of a step from each stream."""
        self._streams = streams
        self._begin = begin
        self._end = end
        self._per_stream = per_stream

    @staticmethod
    def needed(begin: int, end: int, per_stream: int) -> range:
        """The streams that positions begin .. end-1 touch."""
        return range(begin // per_stream, (end - 1) // per_stream + 1)

    def step(self) -> list[Sample]:
        """The rank's samples of the next step, in order. What other ranks take of its streams is read and dropped."""
        samples = {}
        for index, stream in self._streams.items():
            for nth in range(self._per_stream):
                samples[index * self._per_stream + nth] = stream.next()
        return [samples[position] for position in range(self._begin, self._end)]

    def cursors(self) -> dict[str, list[int]]:
        """By stream number; lists and strings, as JSON gives them back."""
        return {str(index): list(stream.cursor) for index, stream in self._streams.items()}


class StreamValidation:
    """The held-out documents of a stream, in the dataset's order, packed; read as far as asked for, then kept."""

    def __init__(self, source: HubStream, tokenizer: Tokenizer, *, seq_len: int, fraction: float) -> None:
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._texts = (text for text in source.documents() if text and held_out(text, fraction))
        self._ids: list[int] = []
        self._starts: list[int] = []

    def available(self, wanted: int) -> int:
        while len(self._ids) <= wanted * self._seq_len and (text := next(self._texts, None)) is not None:
            self._starts.append(len(self._ids))
            self._ids += [*self._tokenizer.encode(text), self._tokenizer.eos_id]
        return min(wanted, (len(self._ids) - 1) // self._seq_len)

    def __getitem__(self, number: int) -> Sample:
        if self.available(number + 1) <= number:
            raise IndexError(f"the validation stream ends before sample {number}")
        begin = number * self._seq_len
        end = begin + self._seq_len + 1
        low, high = np.searchsorted(self._starts, [begin, end])
        return Sample(np.asarray(self._ids[begin:end], np.int64), np.asarray(self._starts[low:high], np.int64) - begin)
