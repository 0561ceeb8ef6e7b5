"""Cuts: which runs of a sequence each of n context-parallel ranks holds.

Under a causal mask a late token has more to attend to than an early one, so contiguous parts are unequal work.

    zigzag     2 n equal chunks, of which rank r holds r and 2n-1-r: equal work for one document, of the (2n)(2n+1)/2
               pairs of chunks that see each other 2n+1 each
    balanced   for documents, packed anywhere: n m equal chunks, m for each rank, dealt out by the number of keys that
               their queries see. A short document's last token sees few, wherever in the sequence it lies. Where
               MIN_CHUNK allows two chunks per rank only, the largest work may be 1.3 to 1.6 of the mean

Every rank has the same number of tokens. A cut depends on nothing but the batch, which all ranks of the axis load
alike; it is made on the host, before the step.

S tokens of the sequence, B sequences.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Run = tuple[int, int]
"""Index in the sequence of the first token, and number of tokens."""

MIN_CHUNK = 128
"""Tokens of a chunk, at least, below which attention's blocks of queries and keys stay partly empty."""
MAX_CHUNKS = 16
"""Chunks of a rank, at most: the pairs of runs that attention is called for grow with them."""
BALANCED = 1.05
"""Largest work of a rank over the mean that is good enough: the coarsest cut that reaches it is taken."""


class Cut:
    """A cut, and what documents hide, in numbers of the host.

    Deliberately opaque: compiled graphs hand it on without looking inside, and so do not depend on its numbers.
    """

    def __init__(self, runs: Sequence[Sequence[Run]], first_keys: Mapping[Run, int] | None = None) -> None:
        """runs: of each rank, ascending. first_keys: of a run, index of the first key that its queries may see (of any
        sequence of the batch); None: 0.
        """
        self.runs = tuple(tuple(of_rank) for of_rank in runs)
        self.first_keys = dict(first_keys or {})
        self.rectangles: dict[Hashable, Any] = {}  # kept by parallel.context

    def indices(self, rank: int) -> Tensor:
        """Index in the sequence of each token of a rank, int64 [S / n], ascending. On the CPU."""
        return torch.cat([torch.arange(first, first + length) for first, length in self.runs[rank]])

    def first_key(self, run: Run) -> int:
        """Index of the first key that the queries of a run may see."""
        return self.first_keys.get(run, 0)


@lru_cache(maxsize=256)
def zigzag(seq_len: int, size: int) -> Cut:
    """Chunks r and 2 * size - 1 - r for rank r. Raises ValueError unless 2 * size divides seq_len."""
    if seq_len % (2 * size):
        raise ValueError(f"a sequence of {seq_len} tokens does not divide into 2 x {size} chunks")
    length = seq_len // (2 * size)
    return Cut([[(chunk * length, length) for chunk in (rank, 2 * size - 1 - rank)] for rank in range(size)])


def zigzag_indices(seq_len: int, *, rank: int, size: int) -> Tensor:
    """`Cut.indices` of `zigzag`."""
    return zigzag(seq_len, size).indices(rank)


def balanced(documents: Tensor, size: int, windows: Mapping[int | None, int]) -> Cut:
    """A cut whose ranks see about the same number of keys. documents [B, S], ascending along a row; on the CPU.

    windows: number of layers by their sliding window (None: without one). Of zigzag and dealt cuts of 2, 4, ... chunks
    per rank, the first within BALANCED, else the best. Raises ValueError unless 2 * size divides S.
    """
    start = document_starts(documents)
    cost = work_of_queries(start, windows)
    seq_len = documents.shape[1]
    best = zigzag(seq_len, size)
    least = imbalance(best, cost)
    per_rank = 2
    while least > BALANCED and per_rank <= MAX_CHUNKS and seq_len % (per_rank * size) == 0:
        length = seq_len // (per_rank * size)
        if per_rank > 2 and length < MIN_CHUNK:
            break
        dealt = _joined(_deal(cost.view(-1, length).sum(1).tolist(), size), length)
        if (found := imbalance(dealt, cost)) < least:
            best, least = dealt, found
        per_rank *= 2
    runs = [run for of_rank in best.runs for run in of_rank]
    first_keys = start[:, [first for first, _ in runs]].amin(0).tolist()
    return Cut(best.runs, dict(zip(runs, first_keys, strict=True)))


def document_starts(documents: Tensor) -> Tensor:
    """int64 [B, S]: index of the first token of each token's document."""
    index = torch.arange(documents.shape[1]).expand(documents.shape)
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(is_first, index, 0).cummax(1).values


def work_of_queries(start: Tensor, windows: Mapping[int | None, int]) -> Tensor:
    """int64 [S]: keys that the queries at each index see, over all sequences and layers."""
    seen = torch.arange(1, start.shape[1] + 1) - start  # [B, S]
    by_window = [seen.clamp(max=window or start.shape[1]) * layers for window, layers in windows.items()]
    return torch.stack(by_window).sum((0, 1))


def imbalance(cut: Cut, cost: Tensor) -> float:
    """Largest work of a rank over the mean, cost [S] being that of each query."""
    before = torch.cat([cost.new_zeros(1), cost.cumsum(0)])
    bounds = [torch.tensor([(first, first + length) for first, length in runs]).T for runs in cut.runs]
    work = torch.stack([(before[last] - before[first]).sum() for first, last in bounds]).double()
    return (work.max() / work.mean()).item()


def _deal(costs: Sequence[int], size: int) -> list[list[int]]:
    """Chunks of each rank, as many of each: the most expensive first, to the rank that has least and still has room."""
    room = len(costs) // size
    chunks: list[list[int]] = [[] for _ in range(size)]
    work = [0] * size
    for chunk in sorted(range(len(costs)), key=lambda chunk: (-costs[chunk], chunk)):
        rank = min((rank for rank in range(size) if len(chunks[rank]) < room), key=lambda rank: (work[rank], rank))
        chunks[rank].append(chunk)
        work[rank] += costs[chunk]
    return [sorted(of_rank) for of_rank in chunks]


def _joined(chunks: Sequence[Sequence[int]], length: int) -> Cut:
    """The cut of chunks of `length` tokens, neighbours on one rank in one run."""
    runs: list[list[Run]] = []
    for of_rank in chunks:
        joined: list[Run] = []
        for chunk in of_rank:
            first = chunk * length
            if joined and sum(joined[-1]) == first:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((first, length))
        runs.append(joined)
    return Cut(runs)
