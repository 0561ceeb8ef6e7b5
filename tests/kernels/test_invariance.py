"""Ops that promise the same bits for a row whatever lies beside it, where tests of single ops cannot say it: a query in
chunks of any size over pages of any size, and a row among any number of its group.

In Triton's interpreter in fp32, or on a GPU in bf16; and by the references.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.backend import interpreted
from kernels.cross_entropy import cross_entropy, invariant_cross_entropy
from kernels.grouped_linear import grouped_linear
from kernels.paged_attention import paged_attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LENGTH = 37


def ordered_product(a: Any, b: Any, dtype: Any = None) -> Any:
    """a [M, K] b [K, N] as tensor cores sum it: each element by itself, along K. numpy's own is a library's, whose bits
    depend on a row's place."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype)
    for k in range(a.shape[1]):
        total = total + a[:, k, None].astype(dtype) * b[None, k].astype(dtype)
    return total


@pytest.fixture(params=["kernel", "reference"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """Ops run their kernels or their references while this lasts."""
    reference = request.param == "reference"
    if not CUDA and not reference:
        monkeypatch.setattr(np, "matmul", ordered_product)
    if reference and CUDA:
        pytest.skip("references run on the CPU")
    with nullcontext() if CUDA or reference else interpreted():
        yield torch.float32 if not CUDA and not reference else torch.bfloat16


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, counts: list[int], *, page_size: int, together: int = 1, window: int | None
) -> Tensor:
    """Queries of one sequence in chunks of `counts`, each in a launch with `together` - 1 other sequences before it."""
    num_pages = -(-LENGTH // page_size)
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(page_size)).to(DEVICE)
    pages = []
    for x in (k, v):
        whole = x.new_zeros(num_pages * page_size, *x.shape[1:])
        whole[:LENGTH] = x
        pages.append(whole.view(num_pages, page_size, *x.shape[1:])[order])
    table = torch.argsort(order).to(torch.int32)
    found, end = [], LENGTH - sum(counts)
    for count in counts:
        first, end = end, end + count
        others = q[:3].repeat(together - 1, 1, 1)  # three queries each, of sequences that have as many tokens
        starts = [*range(0, 3 * together, 3), 3 * (together - 1) + count]
        result = paged_attention(
            torch.cat([others, q[first:end]]),
            *pages,
            table.repeat(together, 1),
            torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            torch.tensor([3] * (together - 1) + [end], dtype=torch.int32, device=DEVICE),
            window=window,
            batch_invariant=True,
        )
        found.append(result[3 * (together - 1) :])
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 20])
def test_attention_is_the_same_in_any_chunks_pages_and_company(dtype: torch.dtype, window: int | None) -> None:
    """A block of queries by their number, or tiles of keys that begin where a chunk does."""
    q, k, v = (normal(LENGTH, heads, 20, dtype=dtype, seed=heads) for heads in (3, 1, 1))
    expected = attend(q, k, v, [LENGTH], page_size=16, window=window)
    for counts, page_size, together in (([35, 1, 1], 1, 1), ([2, 23, 12], 5, 2)):
        assert torch.equal(attend(q, k, v, counts, page_size=page_size, together=together, window=window), expected)


@pytest.mark.parametrize("shape", [(24, 40), (9, 7)])
def test_rows_of_experts_are_the_same_in_any_number(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """A tile, or a product of a library, by the number of rows."""
    features, width = shape
    x, weight = normal(300, features, dtype=dtype), normal(3, width, features, dtype=dtype, seed=1)
    expected = [x @ weight[1].T]
    for begin, end in ((0, 300), (1, 2), (5, 70)):
        others = x[:begin]
        ends = torch.tensor([begin, end, end], dtype=torch.int32, device=DEVICE)
        rows = torch.cat([others, x[begin:end]])
        found = grouped_linear(rows, weight, ends, implementation="invariant")[begin:end]
        expected.append(expected[-1].clone())
        if len(expected) == 2:
            torch.testing.assert_close(found, expected[0], rtol=2e-2, atol=2e-2 * features)
            expected[-1][begin:end] = found
        assert torch.equal(found, expected[-1][begin:end])


def test_losses_are_the_same_in_any_number(dtype: torch.dtype) -> None:
    """Rows that begin at other places of memory, of a width that no vector divides."""
    logits = normal(6, 1237, dtype=dtype)
    labels = torch.arange(6, device=DEVICE)
    expected = invariant_cross_entropy(logits, labels)
    torch.testing.assert_close(expected, cross_entropy(logits, labels))
    for rows in (slice(0, 1), slice(3, 4), slice(1, 6)):
        assert torch.equal(invariant_cross_entropy(logits[rows].clone(), labels[rows]), expected[rows])
