"""Context parallelism: the tokens of a sequence live on the ranks of the cp axis, and attention brings them together.

A sequence of S tokens is cut into runs of neighbours, of which every rank holds some (parallel/cut.py): as many tokens
as any other, and about as much to attend to.

    ring        keys and values go round; each rank attends to the part it holds while the next one arrives (2310.01889)
    ulysses     all-to-all: each rank gets the whole sequence for a share of the heads, and back (2309.14509)
    allgather   each rank gathers all keys and values and attends with its own queries (Llama 3, 2407.21783, 3.3.2)
    in two dimensions (2405.07719): Ulysses inside groups of u neighbours, ring or all-gather between the n/u groups

In two dimensions the n/u groups hold the parts of a cut, and a group's ranks the zigzag parts of its tokens. Of a
zigzag cut these are the zigzag parts among all n.

Ulysses needs no balance: every rank has all tokens, for as many heads. Ring and all-gather compute with a rank's own
queries, and have that of the cut. What a rank of the ring does in one step may still be more than another does in it,
while the next keys travel: only sums over all steps are balanced.

B batch, T tokens on this rank, S = n T tokens of the sequence, H query heads, G key/value heads, K features of a head's
query and key, V of its value. What a rank holds is a shard: the gradient of what it gathered is summed over ranks on
its way back, and nothing is divided.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.collectives import all_gather_rows, all_to_all_rows, pass_on, reduce_scatter_rows
from parallel.cut import Cut, Run, zigzag


def to_sequence(parts: Tensor, *, dim: int, cut: Cut | None = None) -> Tensor:
    """The whole sequence in order from the parts of all ranks [n, ...], whose `dim` (of a part) is their tokens.

    cut: None is zigzag.
    """
    cut = zigzag(parts.shape[dim + 1] * parts.shape[0], parts.shape[0]) if cut is None else cut
    pieces: dict[Run, Tensor] = {}
    for part, runs in zip(parts.unbind(0), cut.runs, strict=True):
        pieces |= zip(runs, part.split([length for _, length in runs], dim=dim), strict=True)
    return torch.cat([pieces[run] for run in sorted(pieces)], dim=dim)


def to_parts(sequence: Tensor, *, dim: int, size: int, cut: Cut | None = None) -> Tensor:
    """The parts of all ranks [n, ...] from the whole sequence: the inverse of `to_sequence`."""
    cut = zigzag(sequence.shape[dim], size) if cut is None else cut
    parts = [torch.cat([sequence.narrow(dim, *run) for run in runs], dim=dim) for runs in cut.runs]
    return torch.stack(parts)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- all-gather


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, cut: Cut) -> Tensor:
        ctx.group, ctx.dtype, ctx.cut = group, x.dtype, cut
        gathered = x.new_empty(group.size(), *x.shape)
        all_gather_rows(gathered, x.contiguous().view(-1), group=group, async_op=False)
        return to_sequence(gathered, dim=1, cut=cut).to(_wide(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = to_parts(grad, dim=1, size=ctx.group.size(), cut=ctx.cut)
        rank = ctx.group.rank()
        reduce_scatter_rows(parts.view(parts.shape[0], -1), rank=rank, group=ctx.group, async_op=False)
        return parts[rank].to(ctx.dtype), None, None


def gather_sequence(x: Tensor, group: dist.ProcessGroup, cut: Cut) -> Tensor:
    """This rank's tokens x [B, T, ...] to all tokens in order [B, S, ...]. Backward: reduce-scatter (sum).

    The result is fp32 (fp64 for fp64), so that gradients are added up in it; what is gathered has x's type.
    """
    return _GatherSequence.apply(x, group, cut)


# ---- Ulysses


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter_heads(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather_heads(grad, ctx.group), None


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather_heads(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scatter_heads(grad, ctx.group), None


def _scatter_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T, H, K] to [B, S, H/n, K]."""
    by_rank = torch.stack(x.chunk(group.size(), dim=2))  # [n, B, T, H/n, K]: row i goes to rank i
    return to_sequence(all_to_all_rows(by_rank, group=group), dim=1)


def _gather_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S, H/n, K] to [B, T, H, K]."""
    by_rank = all_to_all_rows(to_parts(x, dim=1, size=group.size()), group=group)  # [n, B, T, H/n, K]
    return torch.cat(by_rank.unbind(0), dim=2)


def scatter_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All heads of this rank's tokens [B, T, H, K] to this rank's heads of all tokens in order [B, S, H/n, K].

    Rank r gets heads r H/n and on; n must divide H. Backward: `gather_heads`.
    """
    return _HeadsToSequence.apply(x, group)


def gather_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `scatter_heads`: [B, S, H/n, K] to [B, T, H, K]. Backward: `scatter_heads`."""
    return _SequenceToHeads.apply(x, group)


def repeat_kv_heads(x: Tensor, size: int) -> Tensor:
    """k or v [B, T, G, K] with each head repeated so often that `size` divides their number (gradients add up).

    The least number is lcm(G, size). It divides H where G and size do, so a rank's query heads find their own keys.
    """
    return x.repeat_interleave(math.lcm(x.shape[2], size) // x.shape[2], dim=2)


# ---- ring


class BlockAttention(Protocol):
    """Attention between runs of a sequence; kernels.attention.blockwise says what each method does."""

    @property
    def window(self) -> int | None: ...

    @property
    def takes_many_runs(self) -> bool: ...

    def sees(self, first_query: int, first_key: int, *, queries: int, keys: int) -> bool: ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Sequence[Run], keys: Sequence[Run]
    ) -> tuple[Tensor, Tensor]: ...

    def delta(self, grad: Tensor, output: Tensor) -> Tensor: ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        lse: Tensor,
        delta: Tensor,
        queries: Sequence[Run],
        keys: Sequence[Run],
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def merge_(self, output: Tensor, lse: Tensor, block_output: Tensor, block_lse: Tensor) -> None: ...


class _Hop:
    """A tensor on its way to the next rank while the one of the rank before arrives. One message each way."""

    def __init__(self, send: Tensor, group: dist.ProcessGroup) -> None:
        self.sent = send  # kept alive until it has left
        self.received, self.work = pass_on(send, group=group)

    def wait(self) -> Tensor:
        self.work.wait()
        return self.received


class Rectangle(NamedTuple):
    """What a rank computes at once with keys of another: where the queries and the keys lie in their parts, and which
    runs of the sequence they are."""

    own: slice
    other: slice
    queries: tuple[Run, ...]
    keys: tuple[Run, ...]


def pairs(rank: int, source: int, *, cut: Cut, blocks: BlockAttention) -> list[Rectangle]:
    """Each pair of runs that see each other.

    A run comes with itself first, so that a query has seen a key (itself) before anything is merged.
    """
    found = []
    for run, own in _places(cut.runs[rank]):
        for other_run, other in sorted(_places(cut.runs[source]), key=lambda place: place[0] != run):
            (first_query, queries), (first_key, keys) = run, other_run
            hidden = first_key + keys <= cut.first_key(run)  # by documents
            if not hidden and blocks.sees(first_query, first_key, queries=queries, keys=keys):
                found.append(Rectangle(own, other, (run,), (other_run,)))
    return found


def rectangles(rank: int, source: int, *, cut: Cut, blocks: BlockAttention) -> list[Rectangle]:
    """What rank computes with the keys of `source`, in order.

    One rectangle, from the first to the last runs that see each other, where blocks take many runs; else the pairs. Of
    a zigzag cut that is all queries and the first half of the keys of an earlier rank, or the second half of the
    queries and all keys of a later one: every query sees every key.
    """
    key = (rank, source, blocks.window, blocks.takes_many_runs)
    if key not in cut.rectangles:  # every layer asks again
        cut.rectangles[key] = _rectangles(rank, source, cut, blocks)
    return cut.rectangles[key]


def _rectangles(rank: int, source: int, cut: Cut, blocks: BlockAttention) -> list[Rectangle]:
    found = pairs(rank, source, cut=cut, blocks=blocks)
    if not found or not blocks.takes_many_runs:
        return found
    own = slice(min(pair.own.start for pair in found), max(pair.own.stop for pair in found))
    other = slice(min(pair.other.start for pair in found), max(pair.other.stop for pair in found))
    queries, keys = (
        tuple(run for run, place in _places(cut.runs[of]) if there.start <= place.start < there.stop)
        for of, there in ((rank, own), (source, other))
    )
    return [Rectangle(own, other, queries, keys)]


def at_once(runs: Sequence[Run], blocks: BlockAttention) -> list[Sequence[Run]]:
    """Runs of queries that blocks take in one call: all of them, or each by itself."""
    return [runs] if blocks.takes_many_runs else [[run] for run in runs]


def _places(runs: Sequence[Run]) -> list[tuple[Run, slice]]:
    """Each run of a rank with where its tokens lie in the rank's part."""
    ends = list(itertools.accumulate(length for _, length in runs))
    return [(run, slice(end - run[1], end)) for run, end in zip(runs, ends, strict=True)]


def _joined(k: Tensor, v: Tensor) -> Tensor:
    """[B, T, G, K + V]: one message instead of two."""
    return torch.cat((k, v), dim=-1)


def _merged(
    so_far: tuple[Tensor, Tensor] | None,
    block: tuple[Tensor, Tensor],
    where: slice,
    length: int,
    blocks: BlockAttention,
) -> tuple[Tensor, Tensor]:
    """Output [B, length, H, V] and log-sum-exp [B, H, length] with more keys of those tokens; None: none so far."""
    if so_far is None and where == slice(0, length):
        return block
    if so_far is None:
        output, lse = block
        so_far = (
            output.new_zeros(output.shape[0], length, *output.shape[2:]),
            lse.new_full((*lse.shape[:2], length), -math.inf),
        )
    blocks.merge_(so_far[0][:, where], so_far[1][..., where], *block)
    return so_far


def _added(total: Tensor | None, part: Tensor, where: slice, length: int) -> Tensor:
    """total [B, length, ...] with `part` added to those tokens; None: nothing has been found yet."""
    if total is None and where == slice(0, length):
        return part
    if total is None:
        total = part.new_zeros(part.shape[0], length, *part.shape[2:])
    total[:, where] += part
    return total


class _RingAttention(torch.autograd.Function):
    """Saves q, k, v, the output and the log-sum-exp of this rank alone; backward sends keys and values round again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        group: dist.ProcessGroup,
        cut: Cut,
        blocks: BlockAttention,
    ) -> Tensor:
        rank, size = group.rank(), group.size()
        features, found = (k.shape[3], v.shape[3]), None
        kv = _joined(k, v)
        for step in range(size):
            hop = _Hop(kv, group) if step < size - 1 else None
            for own, other, *runs in rectangles(rank, (rank - step) % size, cut=cut, blocks=blocks):
                block = blocks.forward(q[:, own], *kv[:, other].split(features, dim=-1), *runs)
                found = _merged(found, block, own, q.shape[1], blocks)
            if hop is not None:
                kv = hop.wait()
        assert found is not None  # a rank sees itself
        output, lse = found
        if sinks is not None:  # one more key, which every query sees and whose value is 0
            total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
            output *= torch.exp(lse - total).transpose(1, 2)[..., None]
            lse = total
        output = output.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, output, lse)
        ctx.group, ctx.cut, ctx.blocks = group, cut, blocks
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, output, lse = ctx.saved_tensors
        group, cut, blocks = ctx.group, ctx.cut, ctx.blocks
        rank, size = group.rank(), group.size()
        delta = blocks.delta(grad, output)  # [B, H, T]
        grad_q = None
        features = (k.shape[3], v.shape[3])
        kv = _joined(k, v)
        kv_hop: _Hop | None = None
        grad_hop: _Hop | None = None
        for step in range(size):
            kv_hop = _Hop(kv, group) if step < size - 1 else None
            grad_kv = None
            for own, other, queries, keys in rectangles(rank, (rank - step) % size, cut=cut, blocks=blocks):
                dq, dk, dv = blocks.backward(
                    grad[:, own],
                    q[:, own],
                    *kv[:, other].split(features, dim=-1),
                    lse=lse[..., own],
                    delta=delta[..., own],
                    queries=queries,
                    keys=keys,
                )
                grad_q = _added(grad_q, dq, own, q.shape[1])
                grad_kv = _added(grad_kv, _joined(dk, dv), other, k.shape[1])
            if grad_kv is None:
                grad_kv = torch.zeros(kv.shape, dtype=lse.dtype, device=q.device)
            if grad_hop is not None:
                grad_kv += grad_hop.wait()  # what the ranks before this one found for the same keys
            grad_hop = _Hop(grad_kv, group)  # after the last step: home, to the rank whose keys they are
            if kv_hop is not None:
                kv = kv_hop.wait()
        assert grad_hop is not None
        assert grad_q is not None  # a rank sees itself
        grad_k, grad_v = grad_hop.wait().split(features, dim=-1)
        grad_sinks = None
        if sinks is not None:  # dscore = P (dP - delta) of a key with dP = 0
            probabilities = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
            grad_sinks = -(probabilities * delta).sum(dim=(0, 2)).to(sinks.dtype)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_sinks, None, None, None


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup,
    cut: Cut,
    blocks: BlockAttention,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's q [B, T, H, K] over the k [B, T, G, K], v [B, T, G, V] of all ranks, cut by `cut`.

    Each rank sends n-1 messages forward (keys with values) and 2n-1 backward (those again, and n with their gradients,
    in fp32). The next message is under way while a block is computed (2310.01889). sinks [H]: logits of each softmax
    that have no value; a rank's gradient of them is that of its own queries. Returns [B, T, H, V].
    """
    return _RingAttention.apply(q, k, v, sinks, group, cut, blocks)
