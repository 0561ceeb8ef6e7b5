"""The divergence of a student from a teacher, and its gradient, against autograd on all logits and against TRL."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.linear_cross_entropy import Divergence, VocabularyShard, linear_divergence
from tests.pool import RankPool

ROWS, TOKENS, D, K, V = 2, 6, 5, 7, 23  # words are uneven on 2 ranks


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """hidden, weight, hidden and weight of the teacher, labels."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((ROWS, TOKENS, D), (V, D), (ROWS, TOKENS, K), (V, K))
    found = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    labels = torch.randint(V, (ROWS, TOKENS), generator=generator)
    labels[0, 2:4] = -100
    return [found[0].requires_grad_(), found[1].requires_grad_(), *found[2:], labels]


def by_autograd(beta: float, temperature: float) -> list[Tensor]:
    """Sum and both gradients in fp64, from the definition."""
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(torch.float64)
    s = (hidden @ weight.T / temperature).softmax(-1)
    t = (teacher_hidden @ teacher_weight.T / temperature).softmax(-1)
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
    dtype: torch.dtype, beta: float, temperature: float, chunk_tokens: int, sharded: bool = False
) -> list[float]:
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(dtype)
    rank, size, shard = 0, 1, None
    if sharded:
        rank, size = dist.get_rank(), dist.get_world_size()
        assert dist.group.WORLD is not None
        weight, teacher_weight = (w.detach().chunk(size)[rank].clone() for w in (weight, teacher_weight))
        weight.requires_grad_()
        shard = VocabularyShard(dist.group.WORLD, rank * -(-V // size))
    divergence = Divergence(beta, temperature, shard)
    total = linear_divergence(
        hidden, weight, teacher_hidden, teacher_weight, labels, divergence, chunk_tokens=chunk_tokens
    )
    d_hidden, d_weight = torch.autograd.grad(total, (hidden, weight))
    d_hidden = d_hidden.double()
    if sharded:
        dist.all_reduce(d_hidden)
    wanted = by_autograd(beta, temperature)
    wanted[2] = wanted[2].chunk(size)[rank]
    found = (total.detach(), d_hidden, d_weight)
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("temperature", "chunk_tokens"), [(1.0, 4), (2.5, 1024)])
def test_sum_and_gradients_are_those_of_the_definition(beta: float, temperature: float, chunk_tokens: int) -> None:
    """A mixture with the weights the wrong way round; a temperature missing in the gradient."""
    for dtype, tolerance in (
        (torch.float64, 1e-12),
        (torch.float32, 3e-6),
        (torch.bfloat16, 4e-2),
        (torch.float16, 5e-3),
    ):
        assert max(deviations(dtype, beta, temperature, chunk_tokens)) <= tolerance, dtype


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_words_over_ranks_change_nothing(ranks: RankPool, beta: float) -> None:
    """Divergences of the words of one rank."""
    for found in ranks.run(2, deviations, torch.float64, beta, 2.5, 4, True):
        assert max(found) <= 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_is_that_of_trl(beta: float) -> None:
    """TRL has no tau^2, and takes beta as it is here."""
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    hidden, weight, teacher_hidden, teacher_weight, labels = (x.detach() for x in inputs(torch.float64))
    student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    theirs = trainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=2.0, reduction="sum")
    ours = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, labels, Divergence(beta, 2.0))
    torch.testing.assert_close(ours, theirs * 4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(beta: float) -> None:
    hidden, weight, *_, labels = inputs(torch.float32)
    total = linear_divergence(hidden, weight, hidden, weight, labels, Divergence(beta))
    assert abs(total.item()) < 1e-5
    assert all(grad.abs().max() < 1e-5 for grad in torch.autograd.grad(total, (hidden, weight)))


def test_what_cannot_be_compared_is_refused() -> None:
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(torch.float32)
    with pytest.raises(ValueError, match="the student has 23 words and the teacher 22"):
        linear_divergence(hidden, weight, teacher_hidden, teacher_weight[1:], labels, Divergence(0.5))
    for divergence, message in ((Divergence(1.5), "beta=1.5 must lie"), (Divergence(0.5, 0.0), "temperature=0.0")):
        with pytest.raises(ValueError, match=message):
            linear_divergence(hidden, weight, teacher_hidden, teacher_weight, labels, divergence)
