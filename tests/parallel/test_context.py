"""Attention over the parts of a sequence against attention over all of it, in fp64, on gloo ranks."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from kernels.attention.blockwise import BlockAttention
from kernels.attention.fused_blockwise import FusedBlockAttention
from kernels.backend import interpreted
from models.layers.context_attention import ContextAttention
from parallel import context
from parallel.context import pairs, rectangles, repeat_kv_heads, to_parts, to_sequence
from parallel.cut import Cut, balanced, zigzag, zigzag_indices
from parallel.dims import ParallelDims
from parallel.groups import ModelParallel
from parallel.mesh import build_mesh
from tests.parity.harness import largest
from tests.pool import RankPool

B, S, H, G, K = 2, 48, 12, 2, 5
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 1 + [2] * 23 + [3] * 17, [0] * 47 + [1]], dtype=torch.int32)
SLOPES = torch.tensor([0.5 / (h + 1) for h in range(H)], dtype=torch.float64)
SINKS = torch.linspace(-2.0, 3.0, H, dtype=torch.float64)
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 5},
    "wide_window": {"window": 19},
    "documents": {"documents": DOCUMENTS},
    "all": {"window": 11, "documents": DOCUMENTS, "slopes": SLOPES},
}

INNER = {"ring": 1, "allgather": 1, "ulysses": 0, "ring_ulysses": 2, "allgather_ulysses": 2}  # cp_ulysses; 0: all of cp


def whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Any = None,
    documents: Any = None,
    slopes: Any = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition, on all tokens at once: softmax of the scores that may be seen."""
    heads, tokens = q.shape[2], torch.arange(q.shape[1])
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) / math.sqrt(q.shape[3])
    distance = tokens[:, None] - tokens
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance
    seen = (distance >= 0) & (distance < (window or q.shape[1]))
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])[:, None]
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([sinks[:, None, None].expand(*scores.shape[:3], 1), scores], dim=-1)
    return torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1)[..., -k.shape[1] :], v)


def inputs(kv_heads: int = G, value_dim: int = K) -> tuple[list[Tensor], Tensor]:
    """q, k, v of whole sequences, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, S, H, K), (B, S, kv_heads, K), (B, S, kv_heads, value_dim), (B, S, H, value_dim)]
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [q, k, v], grad


def expected(mask: dict[str, Any], kv_heads: int = G, value_dim: int = K) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    qkv, grad = inputs(kv_heads, value_dim)
    qkv = [x.requires_grad_() for x in qkv]
    output = whole(*qkv, **mask)
    return [output.detach(), *torch.autograd.grad(output, qkv, grad)]


def attend(
    method: str,
    mask: dict[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """Attention of this rank's part, as a layer does it."""
    size, name = dist.get_world_size(), method.split("_")[0]
    dims = ParallelDims(dp_replicate=1, dp_shard=1, world_size=size, cp=size, cp_ulysses=INNER[method] or size)
    mesh = build_mesh(dims, "cpu").context
    assert mesh is not None
    ring, ulysses = (mesh[axis] if mesh[axis].size() > 1 else None for axis in ("cp_ring", "cp_ulysses"))
    across = ContextAttention(ModelParallel(cp_ring=ring, cp_ulysses=ulysses, cp_method=name))

    def local(q: Tensor, k: Tensor, v: Tensor, first_head: int) -> Tensor:
        mine = dict(mask)
        if "slopes" in mine:
            mine["slopes"] = mine["slopes"][first_head : first_head + q.shape[2]]
        mine_of_sinks = None if sinks is None else sinks[first_head : first_head + q.shape[2]]
        if ring is None:
            return whole(q, k, v, **mine, sinks=mine_of_sinks)
        return across.by_tokens(q, k, v, BlockAttention(**mine), mine_of_sinks, cut)

    return across.by_heads(q, k, v, local)


def on_parts(method: str, mask: dict[str, Any], kv_heads: int = G, value_dim: int = K) -> list[Tensor]:
    """Output and gradients of this rank's tokens."""
    here = zigzag_indices(S, rank=dist.get_rank(), size=dist.get_world_size())
    qkv, grad = inputs(kv_heads, value_dim)
    qkv = [x[:, here].requires_grad_() for x in qkv]
    output = attend(method, mask, *qkv)
    return [output.detach(), *torch.autograd.grad(output, qkv, grad[:, here])]


def worst(results: list[list[Tensor]], reference: list[Tensor]) -> float:
    """Largest difference of any rank's output or gradient from its part of the whole, relative to the maximum."""
    size = len(results)
    deviation = 0.0
    for rank, result in enumerate(results):
        here = zigzag_indices(S, rank=rank, size=size)
        for ours, theirs in zip(result, reference, strict=True):
            deviation = largest((deviation, ((ours - theirs[:, here]).abs().max() / theirs.abs().max()).item()))
    return deviation


@pytest.mark.some(14)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("method", "size", "kv_heads"),
    [
        *((m, size, kv) for m in ("ring", "ulysses", "allgather") for size, kv in [(2, 2), (4, 2), (4, 12), (3, 4)]),
        *((m, 4, kv) for m in ("ring_ulysses", "allgather_ulysses") for kv in (1, 4)),
    ],
)
def test_attention_on_parts_is_attention_on_the_whole(
    ranks: RankPool, mask: str, method: str, size: int, kv_heads: int
) -> None:
    """A block skipped, masked by its place on the rank or weighted twice; a gradient that does not come home."""
    results = ranks.run(size, on_parts, method, MASKS[mask], kv_heads)
    assert worst(results, expected(MASKS[mask], kv_heads)) < 1e-13


UNEVEN = Cut([[(8, 24)], [(0, 4), (4, 4), (32, 16)]], {(8, 24): 8, (32, 16): 30})
"""Two parts of 24 tokens in runs of any lengths, the keys that DOCUMENTS hides left out."""
HIDING = torch.tensor([[0] * 8 + [1] * 23 + [2] * 17, [0] * 8 + [1] * 22 + [2] * 18], dtype=torch.int32)
BALANCED = balanced(HIDING, 4, {None: 1})


def on_cut(method: str, cut: Cut) -> tuple[Tensor, list[Tensor]]:
    """Indices of this rank's tokens; their output and gradients."""
    size, inner = dist.get_world_size(), INNER[method] or 1
    group, rank = divmod(dist.get_rank(), inner)
    assert len(cut.runs) * inner == size
    here = cut.indices(group)
    here = here[zigzag_indices(len(here), rank=rank, size=inner)] if inner > 1 else here
    qkv, grad = inputs()
    qkv = [x[:, here].requires_grad_() for x in qkv]
    output = attend(method, {"documents": HIDING, "window": 21}, *qkv, cut=cut)
    return here, [output.detach(), *torch.autograd.grad(output, qkv, grad[:, here])]


@pytest.mark.parametrize(
    ("method", "cut"),
    [
        *((m, UNEVEN) for m in ("ring", "allgather", "ring_ulysses", "allgather_ulysses")),
        *((m, BALANCED) for m in ("ring", "allgather")),
    ],
)
def test_attention_on_any_cut_is_attention_on_the_whole(ranks: RankPool, method: str, cut: Cut) -> None:
    """A run taken for another of its rank, keys skipped that are seen, parts of parts put together in another order."""
    reference = expected({"documents": HIDING, "window": 21})
    found = ranks.run(len(cut.runs) * (INNER[method] or 1), on_cut, method, cut)
    assert torch.equal(torch.cat([here for here, _ in found]).sort().values, torch.arange(S))
    for here, results in found:
        for ours, theirs in zip(results, reference, strict=True):
            assert (ours - theirs[:, here]).abs().max() < 1e-13 * theirs.abs().max()


def sinks_on_parts(method: str) -> list[Tensor]:
    """This rank's gradient of the sinks; the product with it is that of its own tokens."""
    here = zigzag_indices(S, rank=dist.get_rank(), size=dist.get_world_size())
    qkv, grad = inputs()
    sinks = SINKS.clone().requires_grad_()
    output = attend(method, MASKS["all"], *(x[:, here] for x in qkv), sinks=sinks)
    return list(torch.autograd.grad(output, sinks, grad[:, here]))


@pytest.mark.parametrize("method", ["ring", "allgather", "ring_ulysses", "allgather_ulysses"])
def test_gradients_of_sinks_add_up_over_the_parts(ranks: RankPool, method: str) -> None:
    """A sink that is in the sum once per rank or per block; attention with it is held by the parity tests too."""
    qkv, grad = inputs()
    sinks = SINKS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(whole(*qkv, **MASKS["all"], sinks=sinks), sinks, grad)
    found = sum(gradient for (gradient,) in ranks.run(4, sinks_on_parts, method))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("value_dim", [3, 9])
@pytest.mark.parametrize("method", INNER)
def test_values_may_have_another_size_than_keys(ranks: RankPool, method: str, value_dim: int) -> None:
    """Values cut or padded to the size of keys when both travel in one message (latent attention)."""
    results = ranks.run(4, on_parts, method, MASKS["all"], G, value_dim)
    assert worst(results, expected(MASKS["all"], G, value_dim)) < 1e-13


def in_bf16(method: str) -> tuple[float, set[torch.dtype]]:
    """Largest deviation of this rank's output and gradients from those of fp64, and their types."""
    here = zigzag_indices(S, rank=dist.get_rank(), size=dist.get_world_size())
    qkv, grad = ([x.bfloat16() for x in inputs()[0]], inputs()[1].bfloat16())
    of_whole = [x.double().requires_grad_() for x in qkv]
    output = whole(*of_whole)
    reference = [output.detach(), *torch.autograd.grad(output, of_whole, grad.double())]
    qkv = [x[:, here].requires_grad_() for x in qkv]
    output = attend(method, {}, *qkv)
    results = [output.detach(), *torch.autograd.grad(output, qkv, grad[:, here])]
    pairs_ = zip(results, reference, strict=True)
    return largest(((a - b[:, here]).abs().max() / b.abs().max()).item() for a, b in pairs_), {x.dtype for x in results}


@pytest.mark.parametrize("method", ["ring", "allgather"])
def test_blocks_of_bf16_are_merged_in_fp32(ranks: RankPool, method: str) -> None:
    """A sum over blocks that is rounded at each, or a gradient in another type than its tensor."""
    for deviation, dtypes in ranks.run(4, in_bf16, method):
        assert deviation < 2**-8  # of inputs and results to bf16, once
        assert dtypes == {torch.bfloat16}


ON_KERNELS: dict[str, dict[str, Any]] = {"causal": {}, "masked": {"window": 11, "documents": DOCUMENTS}}
ON_KERNELS["slopes"] = ON_KERNELS["masked"] | {"slopes": SLOPES[:2]}


def on_kernels(method: str, mask: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of this rank's tokens, by the Triton kernels in fp32 and by the reference in fp64."""
    here = zigzag_indices(S, rank=dist.get_rank(), size=dist.get_world_size())
    heads, narrow = slice(0, 2), slice(0, 1)
    (q, k, v), grad = inputs()
    leaves = [q[:, here, heads], k[:, here, narrow], v[:, here, narrow], SINKS[heads]]
    results = []
    for kind, dtype in ((FusedBlockAttention, torch.float32), (BlockAttention, torch.float64)):
        of_kind = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
        across = ContextAttention(ModelParallel(cp_ring=_ring(), cp_method=method))
        with interpreted():
            output = across.by_tokens(*of_kind[:3], kind(**mask), of_kind[3])
            results.append([output, *torch.autograd.grad(output, of_kind, grad[:, here, heads].to(dtype))])
    first, second = ([x.detach() for x in result] for result in results)
    return first, second


def _ring() -> Any:
    size = dist.get_world_size()
    mesh = build_mesh(ParallelDims(dp_replicate=1, dp_shard=1, world_size=size, cp=size, cp_ulysses=1), "cpu").context
    assert mesh is not None
    return mesh["cp_ring"]


@pytest.mark.interpreter
@pytest.mark.parametrize("mask", ON_KERNELS)
@pytest.mark.parametrize("method", ["ring", "allgather"])
def test_blocks_by_the_triton_kernels_are_those_of_the_reference(ranks: RankPool, method: str, mask: str) -> None:
    """What runs on CUDA: a log-sum-exp, a delta or a gradient that does not fit the merging. In the interpreter."""
    for ours, theirs in ranks.run(2, on_kernels, method, ON_KERNELS[mask]):
        for x, truth, bound in zip(
            ours, theirs, (1e-5, 1e-5, 1e-5, 1e-5, 3e-5), strict=True
        ):  # sinks: a sum that cancels
            assert x.dtype == torch.float32
            assert (x - truth).abs().max() < bound * truth.abs().max()


def _a_chunk_off(scores: Any) -> Any:
    return lambda blocks, q, k, queries, keys: scores(blocks, q, k, queries, [(i - S // 8, n) for i, n in keys])


def _faulty(where: str, method: str) -> list[Tensor]:
    scores, wait = BlockAttention._scores, context._Hop.wait
    faults: dict[str, tuple[Any, str, Any]] = {
        "mask a chunk off": (BlockAttention, "_scores", _a_chunk_off(scores)),
        "keys permuted": (context._Hop, "wait", lambda hop: wait(hop).flip(2)),
        "nothing received": (context._Hop, "wait", lambda hop: (wait(hop), hop.sent)[1]),
    }
    with mock.patch.object(*faults[where]):
        return on_parts(method, {"window": 19})


@pytest.mark.parametrize("fault", ["mask a chunk off", "keys permuted", "nothing received"])
def test_a_fault_in_the_ring_is_noticed(ranks: RankPool, fault: str) -> None:
    """Negative control of the comparison above."""
    results = ranks.run(4, _faulty, fault, "ring")
    assert worst(results, expected({"window": 19})) > 1e-3


def count_messages(method: str) -> tuple[int, int]:
    """How many collectives one forward and one backward are; a hop of a ring is one."""
    here = zigzag_indices(S, rank=dist.get_rank(), size=dist.get_world_size())
    qkv, grad = inputs()
    qkv = [x[:, here].requires_grad_() for x in qkv]
    with CommDebugMode() as forward:
        output = attend(method, {}, *qkv)
    with CommDebugMode() as backward:
        torch.autograd.grad(output, qkv, grad[:, here])
    return forward.get_total_counts(), backward.get_total_counts()


@pytest.mark.parametrize(
    ("method", "size", "messages"),
    [
        *(("ring", size, (size - 1, 2 * size - 1)) for size in (2, 4)),
        *((method, size, count) for method, count in (("allgather", (1, 1)), ("ulysses", (4, 4))) for size in (2, 4)),
        ("ring_ulysses", 4, (5, 7)),
    ],
)
def test_each_method_sends_what_it_promises(ranks: RankPool, method: str, size: int, messages: tuple[int, int]) -> None:
    """A gather for k and another for v, keys sent once more than needed, a hidden synchronisation."""
    assert ranks.run(size, count_messages, method) == [messages] * size


class _Recorded:
    """A message's work, whose wait is written down."""

    def __init__(self, work: dist.Work, kind: str, events: list[str]) -> None:
        self.work, self.kind, self.events = work, kind, events

    def wait(self) -> None:
        self.events.append(f"{self.kind} awaited")
        self.work.wait()


def _order_of_a_ring(late: bool) -> list[str]:
    """What this rank does in one forward and one backward, in order. Keys travel in bf16, their gradients in fp32."""
    events: list[str] = []
    send, forward, backward = context.pass_on, BlockAttention.forward, BlockAttention.backward

    def sent(x: Tensor, *, group: dist.ProcessGroup) -> tuple[Tensor, _Recorded]:
        kind = {torch.bfloat16: "keys", torch.float32: "gradients"}[x.dtype]
        events.append(f"{kind} posted")
        received, work = send(x, group=group)
        return received, _Recorded(work, kind, events)

    def computed(true: Any) -> Any:
        return lambda *args, **kwargs: (events.append("block"), true(*args, **kwargs))[1]

    post, wait = context._Hop.__init__, context._Hop.wait

    def wait_late(hop: Any) -> Tensor:
        post(hop, *hop.later)
        return wait(hop)

    here = zigzag_indices(S, rank=dist.get_rank(), size=dist.get_world_size())
    qkv, grad = ([x[:, here].bfloat16().requires_grad_() for x in inputs()[0]], inputs()[1][:, here].bfloat16())
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(context, "pass_on", sent))
        stack.enter_context(mock.patch.object(BlockAttention, "forward", computed(forward)))
        stack.enter_context(mock.patch.object(BlockAttention, "backward", computed(backward)))
        if late:  # posted when they are needed
            stack.enter_context(mock.patch.object(context._Hop, "__init__", lambda hop, *a: setattr(hop, "later", a)))
            stack.enter_context(mock.patch.object(context._Hop, "wait", wait_late))
        output = attend("ring", {}, *qkv)
        events.append("backward")
        torch.autograd.grad(output, qkv, grad)
    return events


def _in_flight_while_computing(events: list[str], size: int) -> tuple[bool, bool]:
    """Whether the blocks are computed between a message's departure and the wait for it, forward and backward."""
    blocks = "(block )+"
    sent = "keys posted " + blocks
    forward = (sent + "keys awaited ") * (size - 1) + blocks
    # The first step has no gradients to wait for; those of the last go home, and nothing is left to compute meanwhile.
    backward = sent + "gradients posted keys awaited "
    backward += (sent + "gradients awaited gradients posted keys awaited ") * (size - 2)
    backward += blocks + "gradients awaited gradients posted gradients awaited "
    done = " ".join([*events, ""]).split("backward ")
    return re.fullmatch(forward, done[0]) is not None, re.fullmatch(backward, done[1]) is not None


@pytest.mark.parametrize("size", [2, 4])
def test_the_next_keys_are_in_flight_while_a_block_is_computed(ranks: RankPool, size: int) -> None:
    """A message posted after the block, or awaited before it: correct numbers, and every transfer stands alone."""
    for events in ranks.run(size, _order_of_a_ring, False):
        assert _in_flight_while_computing(events, size) == (True, True), events
    for events in ranks.run(size, _order_of_a_ring, True):  # control
        assert _in_flight_while_computing(events, size) == (False, False), events


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_zigzag_gives_every_rank_the_same_work(size: int) -> None:
    """Contiguous parts, where the last rank sees twice as much as the average one."""
    length = 16
    index = torch.arange(2 * size * length)

    def visible(parts: list[Tensor], window: int | None = None) -> list[int]:
        distance = [part[:, None] - index for part in parts]
        return [int(((d >= 0) & (d < (window or len(index)))).sum()) for d in distance]

    zigzags = visible([zigzag_indices(len(index), rank=rank, size=size) for rank in range(size)])
    assert max(zigzags) == min(zigzags)
    contiguous = visible(list(index.chunk(size)))
    assert max(contiguous) > 1.4 * min(contiguous)
    windowed = visible([zigzag_indices(len(index), rank=r, size=size) for r in range(size)], window=length // 4)
    assert max(windowed) <= 1.1 * sum(windowed) / size
    blocks = BlockAttention()
    done = [
        sum(len(pairs(rank, source, cut=zigzag(len(index), size), blocks=blocks)) for source in range(size))
        for rank in range(size)
    ]
    assert done == [2 * size + 1] * size


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_step_of_a_zigzag_ring_is_one_product_without_a_mask(size: int) -> None:
    """Launches for each pair of chunks, or keys that are loaded and masked away."""
    cut, whole, lengths = zigzag(8 * size, size), slice(0, 8), {"earlier": (8, 4), "later": (4, 8)}
    for rank in range(size):
        for source in range(size):
            (piece,) = rectangles(rank, source, cut=cut, blocks=BlockAttention())
            if rank == source:
                assert (piece.own, piece.other, piece.queries, piece.keys) == (whole, whole, *[cut.runs[rank]] * 2)
                continue
            found = tuple(sum(length for _, length in runs) for runs in piece[2:])
            assert found == lengths["earlier" if source < rank else "later"]
            assert sum(piece.keys[-1]) <= piece.queries[0][0]


def test_a_window_skips_the_pairs_of_chunks_it_hides() -> None:
    """Work that grows with the sequence where the window does not."""
    for window, count in [(1, 2), (2, 4), (17, 4), (18, 5)]:
        blocks = BlockAttention(window=window)
        found = [p for source in range(4) for p in pairs(1, source, cut=zigzag(128, 4), blocks=blocks)]
        assert len(found) == count, window


def test_documents_skip_the_pairs_of_runs_they_hide() -> None:
    """Blocks of keys of other documents, computed and masked away."""
    cut = balanced(torch.arange(64)[None] // 16, 2, {None: 1})
    counts = [sum(len(pairs(r, s, cut=cut, blocks=BlockAttention())) for s in range(2)) for r in range(2)]
    assert counts == [2, 2]  # four documents in four chunks


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_put_together_are_the_sequence(size: int) -> None:
    """Chunks of a rank in the order of another."""
    sequence = torch.arange(5 * 12 * size).view(5, 12 * size)
    parts = to_parts(sequence, dim=1, size=size)
    for rank in range(size):
        assert torch.equal(parts[rank], sequence[:, zigzag_indices(12 * size, rank=rank, size=size)])
    assert torch.equal(to_sequence(parts, dim=1), sequence)
    with pytest.raises(ValueError, match="does not divide"):
        zigzag_indices(12 * size + 1, rank=0, size=size)


@pytest.mark.parametrize(("num_heads", "kv_heads", "size"), [(12, 6, 4), (8, 2, 4), (8, 8, 4), (12, 4, 6), (6, 1, 3)])
def test_a_ranks_query_heads_find_the_keys_they_had(num_heads: int, kv_heads: int, size: int) -> None:
    """Repeated key heads in the wrong order, which pairs queries with the keys of another group."""
    original = torch.arange(num_heads) // (num_heads // kv_heads)
    repeated = repeat_kv_heads(torch.arange(kv_heads).view(1, 1, -1, 1), size).flatten()
    per_rank = repeated.chunk(size)
    for rank, queries in enumerate(original.chunk(size)):
        own = per_rank[rank].repeat_interleave(len(queries) // len(per_rank[rank]))
        assert torch.equal(own, queries)
