"""The permutation by expert: its order, its padding, and a mixture of experts made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from kernels.backend import interpreted
from kernels.moe_permute import permute, sort_by_expert, unpermute

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(autouse=True, params=["kernel", "reference"])
def _both(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "reference" and CUDA:
        pytest.skip("the kernel is what runs on CUDA")
    with interpreted() if request.param == "kernel" and not CUDA else nullcontext():
        yield


@pytest.mark.parametrize(("num_experts", "tokens", "multiple"), [(3, 40, 1), (200, 60, 1), (5, 37, 16), (700, 9, 8)])
def test_the_order_is_stable_and_complete(num_experts: int, tokens: int, multiple: int) -> None:
    """A choice lost or doubled between blocks; tokens of an expert out of order; a group that is not padded."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(-1, num_experts + 1, (tokens, 4), generator=generator)
    order = sort_by_expert(experts.to(DEVICE), num_experts, multiple=multiple)
    choice_of_row, row_of_choice, ends = (x.tolist() for x in (order.choice_of_row, order.row_of_choice, order.ends))
    flat, start = experts.flatten().tolist(), 0
    for expert, end in enumerate(ends):
        expected = [n for n, chosen in enumerate(flat) if chosen == expert]
        padding = -len(expected) % multiple
        assert choice_of_row[start:end] == expected + [-1] * padding
        start = end
    assert set(choice_of_row[start:]) <= {-1}
    assert len(choice_of_row) % multiple == 0
    for n, row in enumerate(row_of_choice):
        assert (row == -1) == (flat[n] not in range(num_experts))
        assert row == -1 or choice_of_row[row] == n


def test_a_mixture_of_linear_experts_is_the_sum_over_choices() -> None:
    """A row weighted with another choice's probability; a gradient of a weight from another token."""
    generator = torch.Generator().manual_seed(0)
    tokens, k, features, num_experts = 9, 2, 5, 4
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64).to(DEVICE)
    scales = torch.randn(num_experts, features, generator=generator, dtype=torch.float64).to(DEVICE)
    weights = torch.rand(tokens, k, generator=generator, dtype=torch.float64).to(DEVICE)
    experts = torch.randint(num_experts, (tokens, k), generator=generator).to(DEVICE)
    direction = torch.randn(tokens, features, generator=generator, dtype=torch.float64).to(DEVICE)
    results = []
    for sparse in (True, False):
        leaves = [t.to(torch.float32 if sparse else torch.float64).requires_grad_() for t in (x, weights, scales)]
        if sparse:
            order = sort_by_expert(experts, num_experts, multiple=4)
            rows = permute(leaves[0], order)
            # Rows beyond the last end take any expert: nobody sees them.
            of_row = torch.searchsorted(order.ends, torch.arange(len(rows), device=DEVICE).int(), right=True)
            y = unpermute(rows * leaves[2][of_row.clamp(max=num_experts - 1)], leaves[1], order)
        else:
            y = (leaves[1][..., None] * leaves[0][:, None] * leaves[2][experts]).sum(1)
        results.append((y, *torch.autograd.grad(y, leaves, direction.to(y.dtype))))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)


def test_what_cannot_work_is_refused() -> None:
    """Numbers of another width read as int64."""
    experts = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    order = sort_by_expert(experts, 4)
    with pytest.raises(TypeError, match=r"torch\.int32"):
        sort_by_expert(experts.int(), 4)
    with pytest.raises(ValueError, match="multiple=0"):
        sort_by_expert(experts, 4, multiple=0)
    with pytest.raises(ValueError, match=r"want \[T, D\]"):
        permute(torch.zeros(4, 5, device=DEVICE), order)
    with pytest.raises(ValueError, match=r"\[6, D\] and \[3, 2\]"):
        unpermute(torch.zeros(6, 5, device=DEVICE), torch.zeros(2, 3, device=DEVICE), order)
