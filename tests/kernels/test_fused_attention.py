"""The Triton attention against torch's scaled_dot_product_attention in fp64, under a mask made by loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import fused
from kernels.attention.blockwise import BlockAttention, Run
from kernels.attention.fused_blockwise import FusedBlockAttention
from kernels.attention.mask import Mask, piece_mask, run_mask
from kernels.backend import Tuned, interpreted

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FP32 = 2e-5 if CUDA else 3e-6  # its exp2 is an approximation


@pytest.fixture(autouse=True)
def _kernels_run() -> Iterator[None]:
    """Not the reference."""
    with nullcontext() if CUDA else interpreted():
        yield


@dataclass(frozen=True)
class Problem:
    """Queries and keys at places of a sequence, and who sees whom there."""

    queries: list[int]
    keys: list[int]
    batch: int = 1
    heads: tuple[int, int] = (1, 1)  # query, key/value
    features: tuple[int, int] = (16, 16)  # query and key, value
    causal: bool = True
    window: int | None = None
    documents: list[int] | None = None  # first tokens of documents of the sequence
    slopes: list[float] | None = None
    sinks: list[float] | None = None
    scale: float | None = None
    size: float = 1.0  # of queries
    pieces: bool = False  # whether the mask is made from positions

    def document(self, token: int) -> int:
        return 0 if self.documents is None else sum(token >= start for start in self.documents)

    def sees(self, query: int, key: int) -> bool:
        near = self.window is None or query - key < self.window
        return (not self.causal or key <= query) and near and self.document(query) == self.document(key)

    def seen(self) -> Tensor:
        return torch.tensor([[self.sees(query, key) for key in self.keys] for query in self.queries])

    def mask(self, shift: int = 0) -> Mask:
        """As the op takes it; shift: queries are taken for so many places later ones."""
        queries = [query + shift for query in self.queries]
        options: dict[str, Any] = {"causal": self.causal, "window": self.window}
        if self.documents is not None:
            for name, tokens in {"query_documents": queries, "key_documents": self.keys}.items():
                options[name] = torch.tensor([[self.document(token) for token in tokens]], device=DEVICE)
        if self.pieces:
            return piece_mask(*(torch.tensor(x, device=DEVICE) for x in (queries, self.keys)), **options)
        starts = {"first_query": queries[0], "first_key": self.keys[0]}
        return run_mask(len(queries), len(self.keys), DEVICE, **starts, **options)


def run(first: int, length: int) -> list[int]:
    return list(range(first, first + length))


PROBLEMS: dict[str, Problem] = {
    "causal": Problem(run(0, 70), run(0, 70)),
    "no mask": Problem(run(0, 37), run(0, 45), causal=False),
    "window": Problem(run(0, 100), run(0, 100), window=40),
    "window of one": Problem(run(0, 35), run(0, 35), window=1),
    "documents": Problem(run(0, 100), run(0, 100), documents=[1, 31, 64, 65, 96]),
    "documents and window": Problem(run(0, 70), run(0, 70), batch=2, documents=[33], window=20),
    "documents, both ways": Problem(run(0, 70), run(0, 70), documents=[33, 50], causal=False),
    "groups": Problem(run(0, 20), run(0, 20), batch=2, heads=(6, 2)),
    "odd features, other values": Problem(run(0, 35), run(0, 35), features=(5, 3)),
    "features of latent attention": Problem(run(0, 35), run(0, 35), features=(24, 16), scale=0.4),
    "features of 80": Problem(run(0, 20), run(0, 20), features=(80, 80)),
    "features of 256": Problem(run(0, 20), run(0, 20), features=(256, 200)),
    "large scores": Problem(run(0, 40), run(0, 40), size=40.0),
    "slopes": Problem(run(0, 40), run(0, 40), heads=(2, 1), slopes=[0.5, 0.1]),
    "sinks": Problem(run(0, 70), run(0, 70), window=33, heads=(2, 1), sinks=[-1.0, 3.0]),
    "sinks and keys unseen": Problem(run(20, 30), run(30, 30), heads=(2, 1), sinks=[-1.0, 3.0], slopes=[0.5, 0.1]),
    "later queries": Problem(run(64, 40), run(0, 40)),
    "later queries, window": Problem(run(64, 40), run(20, 60), window=30),
    "later keys": Problem(run(0, 70), run(40, 50)),
    "no key seen": Problem(run(0, 20), run(40, 20)),
    "other documents": Problem(run(30, 40), run(10, 35), documents=[15, 40], window=12),
    "zigzag": Problem([*run(10, 25), *run(85, 25)], [*run(25, 20), *run(70, 30)], pieces=True),
    "zigzag, documents, window": Problem(
        [*run(10, 25), *run(85, 25)], [*run(5, 20), *run(70, 30)], pieces=True, documents=[17, 80, 81], window=31
    ),
}


def tensors(problem: Problem, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v (and sinks), and gradients of output and log-sum-exp."""
    generator = torch.Generator().manual_seed(0)
    T, S, (H, G), (K, V) = len(problem.queries), len(problem.keys), problem.heads, problem.features
    B = problem.batch
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, V), (B, T, H, V), (B, H, T)]
    q, k, v, grad, d_lse = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)
    leaves = [q * problem.size, k, v]
    if problem.sinks is not None:
        leaves.append(torch.tensor(problem.sinks, device=DEVICE, dtype=dtype))
    # What sees nothing has a log-sum-exp of -inf, which has no gradient.
    nothing = ~problem.seen().any(dim=1).to(DEVICE)
    return leaves, grad, d_lse.masked_fill(nothing, 0.0) if problem.sinks is None else d_lse


def by_torch(problem: Problem, leaves: list[Tensor], grad: Tensor, d_lse: Tensor) -> list[Tensor]:
    """Output, log-sum-exp and gradients in fp64: torch's attention, with one more key for the sink."""
    leaves = [x.detach().double().requires_grad_() for x in leaves]
    q, k, v = (x.transpose(1, 2) for x in leaves[:3])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    seen = problem.seen().to(DEVICE)
    scale = problem.features[0] ** -0.5 if problem.scale is None else problem.scale
    places = [torch.tensor(x, device=DEVICE) for x in (problem.queries, problem.keys)]
    bias = torch.zeros(q.shape[1], *seen.shape, dtype=torch.float64, device=DEVICE)
    if problem.slopes is not None:
        slopes = torch.tensor(problem.slopes, device=DEVICE, dtype=torch.float64)
        bias = bias - slopes[:, None, None] * (places[0][:, None] - places[1])
    bias = bias.masked_fill(~seen, -math.inf)
    if problem.sinks is not None:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        bias = torch.cat([bias, leaves[3][:, None, None].expand(-1, bias.shape[1], 1)], dim=-1)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(q.shape[0], -1, -1, -1), scale=scale)
    scores = q @ k.transpose(2, 3) * scale + bias
    some = torch.isfinite(scores).any(dim=-1)
    lse = torch.logsumexp(scores.masked_fill(~some[..., None], 0.0), dim=-1).masked_fill(~some, -math.inf)
    output = output.transpose(1, 2).masked_fill(~some.transpose(1, 2)[..., None], 0.0)
    return [output, lse, *torch.autograd.grad([output, lse], leaves, [grad.double(), d_lse.double()])]


def by_kernel(problem: Problem, leaves: list[Tensor], grad: Tensor, d_lse: Tensor, shift: int = 0) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    options: dict[str, Any] = {"scale": problem.scale}
    if problem.slopes is not None:
        options["slopes"] = torch.tensor(problem.slopes, device=DEVICE)
    if problem.sinks is not None:
        options["sinks"] = leaves[3]
    output, lse = fused.attention(*leaves[:3], problem.mask(shift), **options)
    return [output, lse, *torch.autograd.grad([output, lse], leaves, [grad, d_lse.to(lse)])]


def deviation(ours: list[Tensor], truth: list[Tensor]) -> float:
    """Largest, relative to the maximum of its tensor (or 1). Infinite where one is finite alone."""
    worst = 0.0
    for a, b in zip((x.detach().double() for x in ours), (x.detach() for x in truth), strict=True):
        if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return math.inf
        finite = torch.isfinite(b)
        if finite.any():
            worst = max(worst, float((a - b)[finite].abs().max() / b[finite].abs().max().clamp(min=1.0)))
    return worst


@pytest.mark.parametrize("name", PROBLEMS)
def test_outputs_and_gradients_are_those_of_torch(name: str) -> None:
    """A mask edge, a tile skipped or seen whole that is neither, a scale, a head of another group, a lost gradient."""
    data = tensors(PROBLEMS[name])
    expected = by_torch(PROBLEMS[name], *data)
    assert deviation(by_kernel(PROBLEMS[name], *data), expected) < (1e-4 if name == "large scores" else FP32)


@pytest.mark.parametrize(
    "name", ["causal", "window", "documents and window", "later keys", "zigzag", "zigzag, documents, window"]
)
def test_a_mask_shifted_by_one_is_noticed(name: str) -> None:
    """Negative control of the comparison above."""
    data = tensors(PROBLEMS[name])
    assert deviation(by_kernel(PROBLEMS[name], *data, shift=1), by_torch(PROBLEMS[name], *data)) > 1e-2


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_mask_written_out_is_its_definition(name: str) -> None:
    """A reference, which CPU tensors take, that shares the mistake of the kernel."""
    problem = PROBLEMS[name]
    dense = problem.mask().dense(len(problem.queries), len(problem.keys), DEVICE)
    assert torch.equal(dense[0, 0].cpu(), problem.seen())


def test_fp16_rounds_once() -> None:
    """Sums in half precision."""
    problem = PROBLEMS["documents and window"]
    data = tensors(problem, torch.float16)
    ours = by_kernel(problem, *data)
    assert [x.dtype for x in ours] == [torch.float16, torch.float32] + [torch.float16] * 3
    assert deviation(ours, by_torch(problem, *data)) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [(64, 64), (128, 128), (192, 128), (256, 256), (96, 96), (80, 40)])
@pytest.mark.parametrize("mask", ["causal", "window", "documents", "everything"])
def test_on_a_gpu_in_half_precision(mask: str, features: tuple[int, int], dtype: torch.dtype) -> None:
    """What the interpreter does not have: tensor cores, pipelined loads, bf16."""
    tokens, documents = run(0, 700), [1, 130, 256, 511, 640]
    options: dict[str, dict[str, Any]] = {
        "causal": {},
        "window": {"window": 200},
        "documents": {"documents": documents},
        "everything": {"documents": documents, "window": 200, "sinks": [0.5 * i for i in range(8)], "scale": 0.2},
    }
    problem = Problem(tokens, tokens, batch=2, heads=(8, 2), features=features, **options[mask])
    data = tensors(problem, dtype)
    ours = by_kernel(problem, *data)
    assert deviation(ours, by_torch(problem, *data)) < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    assert all(torch.equal(a, b) for a, b in zip(ours, by_kernel(problem, *data), strict=True))


def _configurations() -> list[tuple[str, Any]]:
    from kernels.attention import kernel, kernel_backward

    tables = {"kernel.FORWARD": kernel.FORWARD}
    tables |= {f"kernel_backward.{n}": getattr(kernel_backward, n) for n in ("BACKWARD_QUERIES", "BACKWARD_KEYS")}
    return [(name, config) for name, table in tables.items() for config in table.configs]


def _table(name: str) -> Tuned[Any]:
    from kernels.attention import kernel, kernel_backward

    module, attribute = name.split(".")
    return getattr({"kernel": kernel, "kernel_backward": kernel_backward}[module], attribute)


@pytest.mark.parametrize(("table", "config"), _configurations(), ids=str)
def test_every_configuration_is_right(table: str, config: Any) -> None:
    """A block size that only another size of heads would pick; queries and keys of a block taken for one another."""
    problem = Problem(run(0, 150), run(0, 150), heads=(1, 1), documents=[20, 21], window=90)
    if min(config.queries, config.keys) < 32:
        problem = Problem(run(0, 35), run(0, 35), heads=(1, 1), documents=[3], window=20)
    data = tensors(problem, torch.float16 if CUDA else torch.float32)  # of fp32, a GPU would compile for minutes
    with _table(table).forced(config):
        assert deviation(by_kernel(problem, *data), by_torch(problem, *data)) < (3e-3 if CUDA else FP32)


def test_the_copy_engine_brings_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile from another head or row, or what lies behind the last, in the place of zeros."""
    from kernels.attention import kernel, kernel_backward

    used: list[bool] = []
    true = kernel.described

    def noted(*arguments: Any) -> Any:
        tensors, tma = true(*arguments)
        used.append(tma)
        return tensors, tma

    for module in (kernel, kernel_backward):
        monkeypatch.setattr(module, "described", noted)
    problem = Problem(run(0, 70), run(0, 70), heads=(2, 2), features=(20, 12), documents=[33])
    data = tensors(problem)
    results = []
    for tma in (True, False):
        block = kernel.Block(32, 32, 4, 2, tma=tma)
        tables = (kernel.FORWARD, kernel_backward.BACKWARD_QUERIES, kernel_backward.BACKWARD_KEYS)
        with tables[0].forced(block), tables[1].forced(block), tables[2].forced(block):
            results.append(by_kernel(problem, *data))
    assert used == [True] * 3 + [False] * 3
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("heads", [(4, 1), (4, 4)])
def test_how_heads_are_shared_out_changes_rounding_alone(heads: tuple[int, int], monkeypatch: Any) -> None:
    """Gradients of keys that lose the heads of another program."""
    from kernels.attention import kernel_backward

    problem = Problem(run(0, 20), run(0, 20), heads=heads)
    data = tensors(problem)
    expected = by_torch(problem, *data)
    for wanted in (1, 8, 10**6):
        monkeypatch.setattr(kernel_backward, "PROGRAMS_WANTED", wanted)
        assert deviation(by_kernel(problem, *data), expected) < FP32
    monkeypatch.setattr(kernel_backward, "PROGRAMS_WANTED", 256)
    assert kernel_backward.heads_of_a_program(64 * 2, 8, 4) == 4
    assert [kernel_backward.heads_of_a_program(n, 1, 32) for n in (1, 32, 64, 128, 512)] == [1, 4, 8, 16, 32]


def test_tiles_that_nobody_sees_are_not_read() -> None:
    """Masks that only hide what was computed all the same: a NaN in a value would come through with weight 0."""
    for name, problem, hidden in [  # in blocks of 32, those of fp32
        ("causal", Problem(run(0, 32), run(0, 96)), slice(32, 96)),
        ("window", Problem(run(64, 32), run(0, 96), window=16), slice(0, 32)),
        ("documents", Problem(run(64, 32), run(0, 128), documents=[64, 96], causal=False), slice(0, 64)),
        ("documents", Problem(run(64, 32), run(0, 128), documents=[64, 96], causal=False), slice(96, 128)),
    ]:
        (q, k, v), grad, d_lse = tensors(problem)
        v[:, hidden] = math.nan
        k[:, hidden] = math.nan
        output, lse, d_q, d_k, d_v = by_kernel(problem, [q, k, v], grad, d_lse)
        assert all(torch.isfinite(x).all() for x in (output, lse, d_q)), name
        assert (d_k[:, hidden] == 0).all()
        assert (d_v[:, hidden] == 0).all()


def test_two_sets_of_keys_merge_into_one_with_gradients() -> None:
    """A log-sum-exp of another base or scale, or without gradient: what ring attention lives on."""
    problem = Problem(run(0, 50), run(0, 50), documents=[18])
    leaves, grad, _ = tensors(problem)
    expected = by_torch(problem, leaves, grad, torch.zeros(1, 1, 50, device=DEVICE))
    leaves = [x.requires_grad_() for x in leaves]
    q, k, v = leaves
    halves = []
    for keys in (run(0, 20), run(20, 30)):
        part = Problem(problem.queries, keys, documents=problem.documents)
        halves.append(fused.attention(q, k[:, keys], v[:, keys], part.mask(), wide=True))
    # Some queries see nothing of the one half, some nothing of the other: only their finite weights count.
    lses = torch.stack([lse for _, lse in halves])
    weights = torch.softmax(lses, dim=0).transpose(2, 3)[..., None]
    output = sum(w * y for w, (y, _) in zip(weights, halves, strict=True))
    found = [output, *torch.autograd.grad(output, leaves, grad)]
    assert deviation(found, [expected[0], *expected[2:]]) < FP32


RUNS: list[tuple[list[Run], list[Run]]] = [
    *(([(query, 24)], [(key, 24)]) for query, key in [(0, 0), (24, 0), (24, 24), (0, 24), (24, 18)]),
    ([(4, 10), (24, 14)], [(4, 10), (24, 14)]),  # as a rank sees itself
    ([(24, 12), (36, 12)], [(0, 24)]),
    ([(24, 24)], [(0, 12), (12, 12)]),
    ([(0, 12), (36, 12)], [(12, 20), (44, 4)]),
]


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        *((name, runs) for name in ("causal", "window", "documents") for runs in RUNS),
        *(("all", runs) for runs in RUNS if len(runs[0]) == len(runs[1]) == 1),  # distances need pairs of runs
    ],
)
def test_blocks_of_a_ring_are_those_of_the_reference(name: str, runs: tuple[list[Run], list[Run]]) -> None:
    """A block whose masks, log-sum-exp, delta or gradients a ring could not put together."""
    documents = torch.tensor([[0] * 7 + [1] * 21 + [2] * 20, [0] * 47 + [1]], dtype=torch.int32, device=DEVICE)
    slopes = torch.tensor([0.5, 0.2], device=DEVICE)
    options: dict[str, dict[str, Any]] = {
        "causal": {},
        "window": {"window": 9},
        "documents": {"window": 20, "documents": documents},
        "all": {"window": 20, "documents": documents, "slopes": slopes},
    }
    problem = Problem(run(0, 24), run(0, 24), features=(10, 6), batch=2, heads=(2, 1))
    (q, k, v), grad, _ = tensors(problem)
    plain, ours = BlockAttention(**options[name]), FusedBlockAttention(**options[name])
    expected = [x.double() for x in plain.forward(q.double(), k.double(), v.double(), *runs)]
    found = list(ours.forward(q, k, v, *runs))
    assert {x.dtype for x in found} == {torch.float32}
    assert deviation(found, expected) < FP32
    # Into a part of a tensor, after keys that every query has seen.
    so_far = [torch.randn(2, 40, 2, 6).to(DEVICE), torch.randn(2, 2, 40).to(DEVICE)]
    both = [[x.to(dtype, copy=True) for x in so_far] for dtype in (torch.float32, torch.float64)]
    for blocks, into, (of_block, lse_of_block) in zip((ours, plain), both, (found, expected), strict=True):
        blocks.merge_(into[0][:, 9:33], into[1][..., 9:33], of_block, lse_of_block)
    assert deviation(*both) < FP32
    # Of all keys, of which these are some.
    lse, output = expected[1].clamp(min=-1.0) + 0.5, torch.randn_like(grad)
    delta = plain.delta(grad.double(), output.double())
    torch.testing.assert_close(ours.delta(grad, output).double(), delta, rtol=1e-5, atol=1e-5)
    where = {"queries": runs[0], "keys": runs[1]}
    truth = plain.backward(*(x.double() for x in (grad, q, k, v)), lse=lse, delta=delta, **where)
    mine = ours.backward(grad, q, k, v, lse=lse.float(), delta=delta.float(), **where)
    assert deviation(list(mine), list(truth)) < FP32
    assert {x.dtype for x in mine} == {torch.float32}


def test_keys_of_another_type_are_cast_and_get_their_gradient_in_it() -> None:
    """Gradients of gathered keys rounded before they are added up over ranks."""
    problem = Problem(run(0, 20), run(0, 20))
    (q, k, v), grad, d_lse = tensors(problem, torch.float16)
    leaves = [q, k.float(), v.float()]
    ours = by_kernel(problem, leaves, grad, d_lse)
    assert [x.dtype for x in ours[2:]] == [torch.float16, torch.float32, torch.float32]
    assert deviation(ours, by_torch(problem, leaves, grad, d_lse)) < 2e-3


def test_what_the_op_cannot_do_is_refused() -> None:
    """Nonsense in place of an error: every one of these would run into memory that is something else's."""
    (q, k, v), *_ = tensors(Problem(run(0, 6), run(0, 6)))
    plain = run_mask(6, 6, DEVICE)
    pieces = Problem(run(0, 6), run(0, 6), pieces=True).mask()
    refused: list[tuple[str, Any]] = [
        ("no multiple", lambda: fused.attention(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1), plain)),
        ("are not", lambda: fused.attention(q, k[:, :5], v, plain)),
        ("positive", lambda: fused.attention(q, k, v, plain, scale=-1.0)),
        ("one for each", lambda: fused.attention(q, k, v, plain, sinks=torch.ones(3, device=DEVICE))),
        ("not pieces", lambda: fused.attention(q, k, v, pieces, slopes=torch.ones(1, device=DEVICE))),
        ("6 queries", lambda: fused.attention(q[:, :5], k, v, pieces)),
        ("more than 256", lambda: fused.attention(q.repeat(1, 1, 1, 20), k.repeat(1, 1, 1, 20), v, plain)),
        ("float64", lambda: fused.attention(q.double(), k, v, plain)),
        ("window=0", lambda: run_mask(6, 6, DEVICE, window=0)),
        ("causal=False", lambda: run_mask(6, 6, DEVICE, window=3, causal=False)),
        ("alone", lambda: run_mask(6, 6, DEVICE, query_documents=torch.zeros(1, 6, device=DEVICE))),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="dropout"):
        FusedBlockAttention(dropout=lambda p, **_: p)


@pytest.mark.skipif(CUDA, reason="the assertion of a CUDA device ends its process")
def test_documents_that_do_not_ascend_are_noticed() -> None:
    """A range of keys that leaves out half of a document."""
    documents = torch.tensor([[0, 0, 1, 1, 0]])
    with pytest.raises(RuntimeError, match="ascend"):
        run_mask(5, 5, DEVICE, query_documents=documents, key_documents=documents)
