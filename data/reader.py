"""Readers: make one rank's micro-batches, in whichever process they find themselves."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.utils.data import Dataset, IterableDataset, Sampler

from data.batch import Batch
from data.config import DataError
from data.packing import Sample, Samples, make_batch
from data.streams import RankStreams, SampleStream

Annotate = Callable[[Batch], Batch]
"""What else is known of a batch, whose column `place` says where its labels lie in the data."""

Cursors = dict[str, list[int]]
"""Position of each stream, by its number, in JSON values."""


@dataclass(frozen=True)
class Slice:
    """Which samples of a global batch are whose. The last micro-batch of a rank holds what is left."""

    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.global_batch_size % self.world_size or self.global_batch_size < 1:
            raise DataError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of {self.world_size} "
                f"data-parallel ranks; use a multiple of {self.world_size}"
            )
        if self.micro_batch_size < 1:
            raise DataError(f"train.micro_batch_size={self.micro_batch_size} must be at least 1")

    @property
    def begin(self) -> int:
        """First position of this rank in the global batch."""
        return self.rank * (self.global_batch_size // self.world_size)

    @property
    def end(self) -> int:
        return self.begin + self.global_batch_size // self.world_size

    @property
    def num_micro_batches(self) -> int:
        return -(-(self.end - self.begin) // self.micro_batch_size)

    def numbers(self, first: int) -> list[list[int]]:
        """The sample numbers of each micro-batch of the step whose first sample is `first`."""
        mine = list(range(first + self.begin, first + self.end))
        return [mine[low : low + self.micro_batch_size] for low in range(0, len(mine), self.micro_batch_size)]


class Reader(ABC):
    """Makes micro-batches, in whichever process it finds itself. What goes wrong there comes back as a Failure."""

    def __init__(self, part: Slice, *, mask_documents: bool, vocab_size: int) -> None:
        self.part = part
        self.counts: Counter[str] = Counter()  # of examples, where the data has any; filled by open_reader
        self.left_out: list[str] = []  # the first row of each kind that is no example, and why; filled by open_reader
        self.annotate: Annotate | None = None  # called with every batch; filled by open_reader
        self._mask_documents = mask_documents
        self._vocab_size = vocab_size

    def batch(self, samples: list[Sample], numbers: list[int]) -> Batch:
        """Samples stacked; raises DataError for an id the model has no embedding for."""
        batch = make_batch(samples, numbers, mask_documents=self._mask_documents, places=self.annotate is not None)
        for sample, number in zip(samples, numbers, strict=True):
            low, high = int(sample.tokens.min()), int(sample.tokens.max())
            if low < 0 or high >= self._vocab_size:
                raise DataError(
                    f"sample {number} holds the token id {low if low < 0 else high}, outside model.vocab_size="
                    f"{self._vocab_size}; "
                    + ("token ids are never negative" if low < 0 else f"set model.vocab_size to at least {high + 1}")
                    + ", or use the tokenizer the model was made for"
                )
        return batch if self.annotate is None else self.annotate(batch)

    @abstractmethod
    def dataset(self, consumed: int, cursors: Cursors | None) -> tuple[Dataset, Sampler | None]:
        """What torch's DataLoader reads from, starting at a position: its items are Item or Failure."""


Item = tuple[Batch, Cursors | None]


@dataclass
class Failure:
    """An exception on its way from a worker: message for people, traceback for the rest."""

    message: str
    known: bool  # the data is wrong, and the message says all there is to say
    trace: str


def _failure(error: Exception) -> Failure:
    return Failure(f"{error}", isinstance(error, DataError), traceback.format_exc())


class RandomAccessReader(Reader):
    """Over samples that can be asked for by number."""

    def __init__(self, samples: Samples, part: Slice, *, mask_documents: bool, vocab_size: int) -> None:
        super().__init__(part, mask_documents=mask_documents, vocab_size=vocab_size)
        self.samples = samples

    def dataset(self, consumed: int, cursors: Cursors | None) -> tuple[Dataset, Sampler | None]:
        return _ByNumbers(self), _Numbers(self.part, consumed)

    def read(self, numbers: list[int]) -> Batch:
        return self.batch([self.samples[number] for number in numbers], numbers)


class _ByNumbers(Dataset):
    def __init__(self, reader: RandomAccessReader) -> None:
        self._reader = reader

    def __getitem__(self, numbers: list[int]) -> Item | Failure:
        try:
            return self._reader.read(numbers), None
        except Exception as error:
            return _failure(error)


class _Numbers(Sampler):
    """The sample numbers of one micro-batch after another, without end."""

    def __init__(self, part: Slice, first: int) -> None:
        self._part = part
        self._first = first

    def __iter__(self) -> Iterator[list[int]]:
        first = self._first
        while True:
            yield from self._part.numbers(first)
            first += self._part.global_batch_size


class StreamReader(Reader):
    """Over streams; open_stream(index, cursor) opens one, at its beginning without a cursor. The item that completes a
    step carries the cursors after it."""

    def __init__(
        self,
        open_stream: Callable[[int, list[int] | None], SampleStream],
        num_streams: int,
        part: Slice,
        *,
        mask_documents: bool,
        vocab_size: int,
    ) -> None:
        super().__init__(part, mask_documents=mask_documents, vocab_size=vocab_size)
        if part.global_batch_size % num_streams:
            divisors = [n for n in range(1, part.global_batch_size + 1) if part.global_batch_size % n == 0]
            raise DataError(
                f"data.stream_shards={num_streams} does not divide train.global_batch_size={part.global_batch_size}; "
                f"use {', '.join(map(str, divisors))}"
            )
        self._open = open_stream
        self._per_stream = part.global_batch_size // num_streams
        self.needed = RankStreams.needed(part.begin, part.end, self._per_stream)

    def dataset(self, consumed: int, cursors: Cursors | None) -> tuple[Dataset, Sampler | None]:
        return _FromStreams(self, consumed, cursors or {}), None

    def items(self, first: int, cursors: Cursors) -> Iterator[Item]:
        """Micro-batches from the step whose first sample is `first`, without end."""
        opened = {index: self._open(index, cursors.get(str(index))) for index in self.needed}
        streams = RankStreams(opened, begin=self.part.begin, end=self.part.end, per_stream=self._per_stream)
        while True:
            samples = streams.step()
            micro_batches = self.part.numbers(first)
            for m, numbers in enumerate(micro_batches):
                low = m * self.part.micro_batch_size
                batch = self.batch(samples[low : low + self.part.micro_batch_size], numbers)
                yield batch, streams.cursors() if m == len(micro_batches) - 1 else None
            first += self.part.global_batch_size


class _FromStreams(IterableDataset):
    def __init__(self, reader: StreamReader, first: int, cursors: Cursors) -> None:
        self._reader = reader
        self._first = first
        self._cursors = cursors

    def __iter__(self) -> Iterator[Item | Failure]:
        try:
            yield from self._reader.items(self._first, self._cursors)
        except Exception as error:
            yield _failure(error)
