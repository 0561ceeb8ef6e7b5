"""The divergence over a teacher's likeliest words and the rest, against autograd on all logits and the whole one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.linear_cross_entropy import (
    Divergence,
    VocabularyShard,
    linear_divergence,
    linear_top_words,
    linear_top_words_divergence,
)
from tests.kernels.test_linear_divergence import V, inputs
from tests.pool import RankPool


def by_autograd(beta: float, temperature: float, k: int) -> list[Tensor]:
    """Sum and both gradients in fp64, from the definition over k + 1 outcomes, written with boolean sums of words."""
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(torch.float64)
    s = (hidden @ weight.T / temperature).softmax(-1)
    t = (teacher_hidden @ teacher_weight.T / temperature).softmax(-1)
    rank = t.argsort(-1, descending=True).argsort(-1).clamp(max=k)  # the outcome of each word
    outcomes = torch.nn.functional.one_hot(rank, V + 1).double()[..., : k + 1]
    s, t = ((each[..., None] * outcomes).sum(-2) for each in (s, t))
    if k == V:
        s, t = s[..., :-1], t[..., :-1]
    m = beta * t + (1 - beta) * s
    if beta == 0.0:
        each = (t * (t / s).log()).sum(-1)
    elif beta == 1.0:
        each = (s * (s / t).log()).sum(-1)
    else:
        each = beta * (t * (t / m).log()).sum(-1) + (1 - beta) * (s * (s / m).log()).sum(-1)
    total = each[labels != -100].sum() * temperature**2
    return [total.detach(), *torch.autograd.grad(total, (hidden, weight))]


def deviations(
    dtype: torch.dtype, beta: float, temperature: float, k: int, chunk_tokens: int, sharded: bool = False
) -> list[float]:
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(dtype)
    rank, size, shard = 0, 1, None
    if sharded:
        rank, size = dist.get_rank(), dist.get_world_size()
        assert dist.group.WORLD is not None
        weight, teacher_weight = (w.detach().chunk(size)[rank].clone() for w in (weight, teacher_weight))
        weight.requires_grad_()
        shard = VocabularyShard(dist.group.WORLD, rank * -(-V // size))
    words, logprobs = linear_top_words(
        teacher_hidden, teacher_weight, k, temperature=temperature, shard=shard, chunk_tokens=chunk_tokens
    )
    words[0, 2:4], logprobs[0, 2:4] = -1, math.nan  # tokens without a label may have anything there
    divergence = Divergence(beta, temperature, shard)
    total = linear_top_words_divergence(hidden, weight, words, logprobs, labels, divergence, chunk_tokens=chunk_tokens)
    d_hidden, d_weight = torch.autograd.grad(total, (hidden, weight))
    d_hidden = d_hidden.double()
    if sharded:
        dist.all_reduce(d_hidden)
    wanted = by_autograd(beta, temperature, k)
    wanted[2] = wanted[2].chunk(size)[rank]
    found = (total.detach(), d_hidden, d_weight)
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("temperature", "k", "chunk_tokens"), [(1.0, 1, 4), (2.5, 6, 1024), (1.0, V - 1, 4), (0.7, V, 5)]
)
def test_sum_and_gradients_are_those_of_the_definition(
    beta: float, temperature: float, k: int, chunk_tokens: int
) -> None:
    """The rest left out, or its gradient spread evenly over words; 0 log 0 where there is no rest."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6), (torch.float16, 5e-3)):
        assert max(deviations(dtype, beta, temperature, k, chunk_tokens)) <= tolerance, dtype


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [3, 15, V])
def test_words_over_ranks_change_nothing(ranks: RankPool, beta: float, k: int) -> None:
    """The likeliest words of one rank; more of them than a rank has."""
    for found in ranks.run(2, deviations, torch.float64, beta, 2.5, k, 4, True):
        assert max(found) <= 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_all_words_named_are_the_whole_divergence_and_fewer_are_less(beta: float) -> None:
    """Control: a bound that holds because nothing is compared would not meet the whole at k = V."""
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(torch.float64)
    divergence = Divergence(beta, 2.0)
    whole = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, labels, divergence)
    found = [0.0]
    for k in (1, 4, 12, V):
        words, logprobs = linear_top_words(teacher_hidden, teacher_weight, k, temperature=2.0)
        torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones_like(logprobs[..., 0]))
        found.append(linear_top_words_divergence(hidden, weight, words, logprobs, labels, divergence).item())
    assert found == sorted(found)
    assert found[1] < 0.9 * found[-1]
    assert found[-1] == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_teacher_that_is_nearly_sure_gives_no_nan(beta: float) -> None:
    """A rest of e^-200 under either of the two, which is 0 in fp32."""
    hidden = torch.tensor([[300.0, 0.0], [0.0, 300.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.3, 0.1], [0.0, 1.0], [0.0, 0.3]], requires_grad=True)
    words, logprobs = linear_top_words(hidden.detach().flip(0), weight.detach(), 2)
    labels = torch.zeros(2, dtype=torch.int64)
    total = linear_top_words_divergence(hidden, weight, words, logprobs, labels, Divergence(beta))
    assert math.isfinite(total.item())
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(total, (hidden, weight)))


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"k=24 must lie in 1 \.\. 23"):
        linear_top_words(teacher_hidden, teacher_weight, V + 1)
    words, logprobs = linear_top_words(teacher_hidden, teacher_weight, 3)
    with pytest.raises(ValueError, match="do not fit labels"):
        linear_top_words_divergence(hidden, weight, words, logprobs[..., 1:], labels, Divergence(0.5))
    with pytest.raises(ValueError, match=r"beta=1.5 must lie"):
        linear_top_words_divergence(hidden, weight, words, logprobs, labels, Divergence(1.5))
