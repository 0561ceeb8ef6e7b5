"""Cross entropy on vocabulary shards against the one that sees all logits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from kernels.linear_cross_entropy import VocabularyShard, linear_cross_entropy, vocab_parallel_linear_cross_entropy
from tests.pool import RankError, RankPool

ROWS, TOKENS, D, V = 3, 7, 5, 23  # words are uneven on 2 and on 4 ranks


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = (3 * torch.randn(ROWS, TOKENS, D, generator=generator)).to(dtype).requires_grad_()
    weight = (3 * torch.randn(V, D, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(V, (ROWS, TOKENS), generator=generator)
    labels[0, 2:4], labels[1] = -100, -100
    return hidden, weight, labels


def _shard(weight: torch.Tensor) -> tuple[torch.Tensor, VocabularyShard]:
    rank, size = dist.get_rank(), dist.get_world_size()
    step = -(-V // size)
    assert dist.group.WORLD is not None
    return weight.detach().chunk(size)[rank].clone().requires_grad_(), VocabularyShard(dist.group.WORLD, rank * step)


def _deviation(dtype: torch.dtype, chunk_tokens: int, compile: bool, triton: bool = False) -> list[float]:
    """On each rank: of loss, d_hidden (summed over ranks) and d_weight, relative to the maximum of each."""
    hidden, weight, labels = _inputs(dtype)
    expected = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    (expected * 0.37).backward()
    ours = hidden.detach().clone().requires_grad_()
    local, shard = _shard(weight)
    loss = vocab_parallel_linear_cross_entropy(
        ours, local, labels, shard=shard, chunk_tokens=chunk_tokens, compile=compile, triton=triton
    )
    (loss * 0.37).backward()
    assert ours.grad is not None
    assert local.grad is not None
    assert hidden.grad is not None
    assert weight.grad is not None
    d_hidden = ours.grad.double()
    dist.all_reduce(d_hidden)
    d_weight = weight.grad.chunk(dist.get_world_size())[dist.get_rank()]
    pairs = ((loss, expected), (d_hidden, hidden.grad), (local.grad, d_weight))
    return [((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in pairs]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("chunk_tokens", [4, 4096])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
def test_loss_and_gradients_are_those_of_one_process(
    ranks: RankPool, world_size: int, chunk_tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    """A maximum or sum of some words only, a label looked up on the wrong rank, a row without a label that counts."""
    for deviations in ranks.run(world_size, _deviation, dtype, chunk_tokens, False):
        assert max(deviations) <= tolerance


def test_compiled_and_eager_agree(ranks: RankPool) -> None:
    """An integer label or offset that a graph specialises or rounds."""
    (deviations,) = ranks.run(1, _deviation, torch.float32, 4, True)
    assert max(deviations) <= 2e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 3e-3)])
def test_one_gather_of_statistics_does_as_well(ranks: RankPool, dtype: torch.dtype, tolerance: float) -> None:
    """Sums of different maxima added up; logits overwritten before the label's was read."""
    for world_size in (2, 4):
        for deviations in ranks.run(world_size, _deviation, dtype, 4, False, True):
            assert max(deviations) <= tolerance


def _collectives() -> tuple[Counter[str], int]:
    """On each rank: collectives of a forward over two chunks and its backward, and the largest message in elements."""
    hidden, weight, labels = _inputs(torch.float32)
    local, shard = _shard(weight)
    largest = 0
    all_reduce = dist.all_reduce

    def watched(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = watched
    try:
        with CommDebugMode() as comm:
            vocab_parallel_linear_cross_entropy(hidden, local, labels, shard=shard, chunk_tokens=11).backward()
    finally:
        dist.all_reduce = all_reduce
    return Counter({str(op): count for op, count in comm.get_comm_counts().items()}), largest


def test_logits_never_travel(ranks: RankPool) -> None:
    """Two all-reduces per chunk, of three numbers per token at most; a gather of logits would be V per token."""
    for counts, largest in ranks.run(2, _collectives):
        assert sum(counts.values()) == 4
        assert largest == 3 * 11


def _with_an_impossible_label() -> None:
    hidden, weight, labels = _inputs(torch.float32)
    labels[0, 0] = V
    local, shard = _shard(weight)
    vocab_parallel_linear_cross_entropy(hidden, local, labels, shard=shard)


def test_a_label_that_no_rank_has_is_an_error(ranks: RankPool) -> None:
    """Each rank alone takes it for another's word: the loss would be wrong without a sign."""
    with pytest.raises(RankError, match="a label is not in the vocabulary"):
        ranks.run(2, _with_an_impossible_label)
