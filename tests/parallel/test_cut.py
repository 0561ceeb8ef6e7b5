"""Cuts of sequences of packed documents: equal work for every rank, the same on all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.cut import Cut, balanced, document_starts, imbalance, work_of_queries, zigzag


def packed(seq_len: int, *, mean: int, rows: int, seed: int) -> Tensor:
    """int32 [rows, seq_len]: documents of log-normal lengths, as those of web text are, packed one after the other."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(rows):
        lengths = torch.empty(seq_len).log_normal_(0.0, 1.2, generator=generator) * mean / 2.05 + 1
        ends = lengths.long().cumsum(0)
        found.append(torch.searchsorted(ends, torch.arange(seq_len), right=True))
    return torch.stack(found).int()


def keys_seen(documents: Tensor, window: int | None) -> Tensor:
    """int64 [S]: the definition of `work_of_queries`, of one layer."""
    index = torch.arange(documents.shape[1])
    seen = (documents[:, :, None] == documents[:, None, :]) & (index <= index[:, None])
    if window is not None:
        seen &= index > index[:, None] - window
    return seen.sum((0, 2))


@pytest.mark.parametrize("windows", [{None: 1}, {7: 1}, {None: 2, 7: 3}])
def test_work_is_the_number_of_keys_that_a_query_sees(windows: dict[int | None, int]) -> None:
    """A document's first token counted with the one before; a window that is one off, or of some layers only."""
    documents = packed(96, mean=20, rows=2, seed=0)
    expected = torch.stack([keys_seen(documents, window) * layers for window, layers in windows.items()]).sum(0)
    assert torch.equal(work_of_queries(document_starts(documents), windows), expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("size", "mean", "rows"), [(4, 600, 1), (8, 2000, 1), (8, 600, 2), (16, 2000, 1)])
def test_ranks_have_the_same_work_where_zigzag_leaves_some_idle(size: int, mean: int, rows: int, seed: int) -> None:
    """Ranks that wait for the one with the longest documents."""
    documents = packed(32768, mean=mean, rows=rows, seed=seed)
    cost = work_of_queries(document_starts(documents), {None: 1})
    cut = balanced(documents, size, {None: 1})
    assert imbalance(cut, cost) <= 1.1
    assert imbalance(zigzag(32768, size), cost) > 1.15  # up to 2.6
    parts = [cut.indices(rank) for rank in range(size)]
    assert {len(part) for part in parts} == {32768 // size}
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(32768))
    assert all((part.diff() > 0).all() for part in parts)


def test_one_document_is_cut_in_zigzag() -> None:
    """Small runs where large ones balance as well."""
    assert balanced(torch.zeros(1, 4096, dtype=torch.int32), 4, {None: 1}).runs == zigzag(4096, 4).runs


def test_the_first_key_of_a_run_is_that_of_the_longest_way_back() -> None:
    """Keys that a query of another sequence of the batch sees, skipped for all of them."""
    documents = torch.tensor([[0] * 20 + [1] * 44, [0] * 3 + [1] * 29 + [2] * 32])
    cut = balanced(documents, 2, {None: 1})
    starts = document_starts(documents)
    for runs in cut.runs:
        for run in runs:
            assert cut.first_key(run) == starts[:, run[0]].min()
    assert Cut([[(0, 8)]]).first_key((0, 8)) == 0


def test_the_same_documents_give_the_same_cut() -> None:
    """Ranks of one sequence that disagree about who holds what."""
    documents = packed(8192, mean=300, rows=2, seed=3)
    first, second = (balanced(documents.clone(), 8, {None: 1, 256: 4}) for _ in range(2))
    assert (first.runs, first.first_keys) == (second.runs, second.first_keys)
