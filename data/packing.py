"""From tokens to samples to batches.

A sample is seq_len + 1 consecutive tokens; which ones is a function of its number in the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np
import torch

from data.batch import IGNORE_INDEX, Batch
from data.config import DataError
from data.corpus import Corpus
from data.order import EpochOrder, permutation


class Sample(NamedTuple):
    """One sequence and the token after it."""

    tokens: np.ndarray  # [T + 1] int64
    starts: np.ndarray  # int64, ascending: the indices in tokens at which a document begins
    learned: np.ndarray | None = None  # [T + 1] bool: which tokens carry a loss where they are labels; None: all
    columns: Mapping[str, np.ndarray] | None = None  # [T + 1] int64 or fp32: of tokens where they are labels
    # [T + 1] int64: index of each token in the array that its source keeps, -1 for filling; None: not known
    places: np.ndarray | None = None


class Samples(Protocol):
    """Samples by number, epoch after epoch without end."""

    def __getitem__(self, number: int) -> Sample: ...

    def available(self, wanted: int) -> int:
        """How many of the first `wanted` samples are there before one repeats."""
        ...


class PackedDocuments:
    """A corpus as samples: an epoch is its documents in a new order, joined; sample i begins at token i * seq_len.

    Consecutive samples share one token, the last label of one and the first token of the next, so every token but the
    epoch's first is predicted once. What is left after the last whole sample of an epoch is dropped: fewer than
    seq_len + 1 tokens, others each epoch when shuffled.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, key: tuple[int, ...] | None, what: str) -> None:
        """key: of the permutations, (seed, ...), or None for documents in order. what: names the data in errors."""
        self._corpus = corpus
        self._lengths = np.asarray(corpus.ends - corpus.starts)
        self._seq_len = seq_len
        self._key = key
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.samples_per_epoch = _samples_per_epoch(
            int(self._lengths.sum()), seq_len, what, documents=len(self._lengths)
        )

    def available(self, wanted: int) -> int:
        return min(wanted, self.samples_per_epoch)

    def __getitem__(self, number: int) -> Sample:
        epoch, index = divmod(number, self.samples_per_epoch)
        order, begins = self._epoch(epoch)
        begin = index * self._seq_len
        tokens, places = np.empty((2, self._seq_len + 1), dtype=np.int64)
        starts, filled = [], 0
        place = int(np.searchsorted(begins, begin, side="right")) - 1
        while filled < len(tokens):
            document = order[place]
            skip = begin + filled - int(begins[place])
            if skip == 0:
                starts.append(filled)
            take = min(len(tokens) - filled, int(self._lengths[document]) - skip)
            source = int(self._corpus.starts[document]) + skip
            tokens[filled : filled + take] = self._corpus.tokens[source : source + take]
            places[filled : filled + take] = np.arange(source, source + take)
            filled += take
            place += 1
        return Sample(tokens, np.asarray(starts, dtype=np.int64), places=places)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in order, and where in its token stream each begins. Two epochs are kept:
        prefetching reaches into the next one."""
        if epoch not in self._epochs:
            count = len(self._lengths)
            order = np.arange(count) if self._key is None else permutation(count, *self._key, epoch)
            ends = np.cumsum(self._lengths[order])
            while len(self._epochs) >= 2:
                del self._epochs[max(self._epochs, key=lambda kept: abs(kept - epoch))]
            self._epochs[epoch] = (order, ends - self._lengths[order])
        return self._epochs[epoch]


class FlatTokens:
    """A token array as samples: sample i is tokens[i * seq_len : (i + 1) * seq_len + 1].

    Shuffled, the samples of each epoch come in a new order.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        seq_len: int,
        key: tuple[int, ...] | None,
        what: str,
        eos_id: int | None,
        first: int = 0,
    ) -> None:
        """eos_id: a document begins after each; None: there are no boundaries. first: of tokens, in the whole array."""
        self._tokens = tokens
        self._first = first
        self._seq_len = seq_len
        self._eos_id = eos_id
        self.samples_per_epoch = _samples_per_epoch(len(tokens), seq_len, what)
        self._order = EpochOrder(self.samples_per_epoch, key)

    def available(self, wanted: int) -> int:
        return min(wanted, self.samples_per_epoch)

    def __getitem__(self, number: int) -> Sample:
        begin = self._order[number] * self._seq_len
        tokens = np.asarray(self._tokens[begin : begin + self._seq_len + 1], dtype=np.int64)
        starts = np.empty(0, np.int64) if self._eos_id is None else np.flatnonzero(tokens[:-1] == self._eos_id) + 1
        return Sample(tokens, starts, places=np.arange(len(tokens)) + self._first + begin)


def split_tokens(tokens: np.ndarray, seq_len: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation): the last `fraction` of the samples is held out, at least one; 0: none.

    The two share one token, the last label of the one and the first token of the other.
    """
    samples = max(0, len(tokens) - 1) // seq_len
    if fraction == 0.0 or samples < 2:
        return tokens, tokens[:0]
    cut = (samples - min(samples - 1, max(1, round(fraction * samples)))) * seq_len
    return tokens[: cut + 1], tokens[cut:]


def _samples_per_epoch(num_tokens: int, seq_len: int, what: str, documents: int | None = None) -> int:
    count = (num_tokens - 1) // seq_len
    if count < 1:
        held = "" if documents is None else f" in {documents} documents"
        raise DataError(
            f"{what} holds {num_tokens} tokens{held}, fewer than one sample of train.seq_len + 1 = {seq_len + 1}; "
            "use more data, or a smaller train.seq_len"
        )
    return count


class Proportions:
    """Whose sample is the n-th of several sources: of the first n, source k of K has weight_k * n, to within K / 2.

    A chain of two-way splits: of the n samples that reach source k, round(n * p) go to it, with p its weight over that
    of itself and all after it; the others go on. So number -> (source, number there) is a closed form in exact
    integers: nothing to store, nothing to replay on resuming.
    """

    def __init__(self, weights: list[float]) -> None:
        exact = [
            Fraction(str(weight)) for weight in weights
        ]  # the decimal number that was written, not its binary neighbour
        self.shares = [weight / sum(exact) for weight in exact]
        self._splits = [weight / sum(exact[k:]) for k, weight in enumerate(exact)]

    def locate(self, number: int) -> tuple[int, int]:
        """(source, number of the sample there)."""
        for k, split in enumerate(self._splits):
            taken = _rounded(number, split)
            if _rounded(number + 1, split) > taken:
                return k, taken
            number -= taken
        raise AssertionError("the last source takes all that reach it")


class Blend:
    """Samples of several sources in exact proportion."""

    def __init__(self, sources: list[Samples], weights: list[float]) -> None:
        self._sources = sources
        self._proportions = Proportions(weights)

    def available(self, wanted: int) -> int:
        """At least one sample of each source is seen as if it were there."""
        shares = self._proportions.shares
        enough = [int(s.available(wanted) / share) for s, share in zip(self._sources, shares, strict=True)]
        return max(1, min(wanted, *enough))

    def __getitem__(self, number: int) -> Sample:
        source, index = self._proportions.locate(number)
        return self._sources[source][index]


def _rounded(n: int, share: Fraction) -> int:
    """n * share to the nearest integer, halves up."""
    return (2 * n * share.numerator + share.denominator) // (2 * share.denominator)


def make_batch(samples: list[Sample], numbers: list[int], *, mask_documents: bool, places: bool = False) -> Batch:
    """Stack samples of T + 1 tokens into a Batch of B rows of T.

    With mask_documents, a document begun in an earlier sample counts as beginning with the row: what came before is not
    visible from here, so its positions start at 0 too. The first token of a document is then nobody's label, as
    nothing before it may be seen. Columns are the same of all samples; places: with a column `place` of their places.
    """
    rows = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    tokens, labels = rows[:, :-1].clone(), rows[:, 1:].clone()  # of one row, contiguous() would share memory
    for row, sample in zip(labels, samples, strict=True):
        if sample.learned is not None:
            row[torch.from_numpy(~sample.learned[1:])] = IGNORE_INDEX
    index = torch.arange(tokens.shape[1])
    positions, documents = index.repeat(len(tokens), 1), None
    if mask_documents:
        begins = torch.zeros(rows.shape, dtype=torch.bool)
        for row, sample in zip(begins, samples, strict=True):
            row[torch.from_numpy(sample.starts)] = True
        labels[begins[:, 1:]] = IGNORE_INDEX
        begins = begins[:, :-1]
        begins[:, 0] = False
        documents = begins.cumsum(dim=1, dtype=torch.int32)
        positions = index - torch.where(begins, index, 0).cummax(dim=1).values
    columns = {
        name: torch.from_numpy(np.stack([_column(sample, name) for sample in samples]))
        for name in samples[0].columns or ()
    }
    if places:
        columns["place"] = torch.from_numpy(np.stack([_places(sample) for sample in samples]))
    numbered = torch.tensor(numbers, dtype=torch.int64)
    return Batch(tokens, labels, positions, documents, numbered, columns=columns)


def _places(sample: Sample) -> np.ndarray:
    if sample.places is None:
        raise DataError("samples of this data.source have no places that another run finds again")
    return sample.places[1:]


def _column(sample: Sample, name: str) -> np.ndarray:
    assert sample.columns is not None
    return sample.columns[name][1:]
