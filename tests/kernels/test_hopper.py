"""Kernels compiled for Hopper in bf16, on shapes of real models; needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.kernels.hopper import Compiled

Launches = Iterator[tuple[str, Callable[[], Any]]]
ROWS = 64  # of 8192 where the choice of a configuration does not depend on it
SCALAR_KERNELS = ("_global_norm_total", "_moe_count", "_moe_place")
"""What they read is small: single numbers are no loss."""
NARROW = ("int4 16", "nf4")
"""Launches whose packed numbers come 8 and 4 bytes at a time."""
SPILLS = {"_attention_backward_keys": 48}
"""Bytes of a thread that the fastest configuration may spill: 8 with Triton 3.7.1, 48 with 3.6.0, under documents."""
PRODUCTS = {
    **dict.fromkeys(("grouped_linear", "grouped input gradient", "grouped weight gradient"), 1),
    "grouped input gradient of a pair": 1,
    **dict.fromkeys(("int8 16", "int8 4096", "int4 16", "int4 4096", "matmul", "fp8 product"), 1),
    "attention": 3,
    "paged prefill": 1,  # single tokens and latents have 16 or 32 rows at a time: too few for wgmma
}
"""Launches of kernels that multiply matrices, and how many of these."""


def bf16(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def norm_launches() -> Launches:
    from kernels.layer_norm.op import _layer_norm, _layer_norm_backward
    from kernels.rms_norm import rms_norm_fp8
    from kernels.rms_norm.kernel import BACKWARD
    from kernels.rms_norm.op import _rms_norm, _rms_norm_backward

    x, weight, rstd, scale = bf16(ROWS, 4096), bf16(4096), torch.empty(ROWS), torch.empty(())
    yield "rms_norm", lambda: _rms_norm(x, weight, x, 1e-5)
    for config in BACKWARD.configs[:2]:  # one that is chosen, and one of fewer programs
        with BACKWARD.forced(config):
            yield f"rms_norm backward {config}", lambda: _rms_norm_backward(x, x, weight, rstd, x, 1e-5)
    yield "rms_norm fp8", lambda: (rms_norm_fp8(x, weight, 1e-5), rms_norm_fp8(x, weight, 1e-5, scale=scale))
    yield (
        "rms_norm fp8 transposed",
        lambda: (
            rms_norm_fp8(x, weight, 1e-5, residual=x, transpose=True),
            rms_norm_fp8(x, weight, 1e-5, scale=scale, transpose=True),
        ),
    )
    yield "layer_norm", lambda: _layer_norm(x, weight, weight, None, 1e-5)
    yield "layer_norm backward", lambda: _layer_norm_backward(x, x, weight, weight, rstd, rstd, None, 1e-5)


def rope_launches() -> Launches:
    from kernels.rope import rope, rope_qkv

    q, k, qkv = (bf16(1, ROWS, heads, 128) for heads in (32, 8, 48))
    table = torch.empty(1, ROWS, 1, 64)
    yield "rope", lambda: rope(q, k, table, table)
    yield "rope of queries", lambda: rope(q, None, table, table)
    yield "rope_qkv", lambda: rope_qkv(qkv, table, table, num_heads=32, num_kv_heads=8)


def activation_launches() -> Launches:
    from kernels.fp8 import E4M3, E5M2
    from kernels.geglu import geglu_fused
    from kernels.softmax.op import _softmax, _softmax_backward
    from kernels.swiglu import (
        swiglu_backward_quantized,
        swiglu_fused,
        swiglu_fused_backward,
        swiglu_quantized,
    )
    from kernels.swiglu.quantized_kernel import BACKWARD, FORWARD

    gate_up, d_y, scale = bf16(8192, 2 * 14336), bf16(8192, 14336), torch.empty(())
    few = bf16(ROWS, 2 * 14336)
    yield "swiglu", lambda: (swiglu_fused(gate_up), swiglu_fused(few))
    yield "swiglu backward", lambda: swiglu_fused_backward(d_y, gate_up)
    for tile in FORWARD.configs:
        with FORWARD.forced(tile):
            yield f"swiglu quantized {tile}", lambda: swiglu_quantized(gate_up, scale, transpose=True)
    for tile in BACKWARD.configs:
        for dtype in (E4M3, E5M2):
            with BACKWARD.forced(tile):
                yield (
                    f"swiglu backward quantized {dtype} {tile}",
                    lambda dtype=dtype: swiglu_backward_quantized(d_y, gate_up, scale, dtype=dtype),
                )
    yield "geglu", lambda: (geglu_fused(gate_up), geglu_fused(gate_up, "none"))
    for width in (4096, 32768, 131072):
        scores = bf16(ROWS, width)
        yield f"softmax {width}", lambda scores=scores: _softmax(scores)  # type: ignore[misc]
        yield f"softmax backward {width}", lambda scores=scores: _softmax_backward(scores, scores)  # type: ignore[misc]


def optimizer_launches() -> Launches:
    from kernels.adamw import AdamWUpdate, ElementIndex, QuantizedMoment
    from kernels.global_norm import global_norm

    settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "step": torch.ones(())}
    master, half, n = torch.empty(64, 128), bf16(64, 128), 64 * 128
    eight_bit = [[QuantizedMoment.zeros(n, signed=signed)] for signed in (True, False)]
    fp32 = AdamWUpdate([master], [master], [master], decay=[0.1], copies=[half])
    yield "adamw", lambda: fp32.update([master], **settings)
    small = AdamWUpdate([half], *eight_bit, decay=[0.1], rounding=[ElementIndex("w")])
    yield "adamw 8-bit, stochastic", lambda: small.update([half], **settings)
    cut = AdamWUpdate([half], [half], [half], decay=[0.1], rounding=[ElementIndex("w", 0, (1, 128), (256, 0))])
    yield "adamw stochastic, cut columns", lambda: cut.update([half], **settings)
    yield "global_norm", lambda: global_norm([half])


def loss_launches() -> Launches:
    from kernels.cross_entropy import loss_and_gradient_, shard_gradient_, shard_statistics
    from kernels.cross_entropy.op import _cross_entropy

    logits, labels, scale = bf16(16, 131072), torch.zeros(16, dtype=torch.int64), torch.ones(())
    yield "cross_entropy", lambda: _cross_entropy(logits, labels, -100, 0.1, 1e-4)
    yield "cross_entropy in place", lambda: loss_and_gradient_(logits, labels, scale=scale)
    yield "shard statistics", lambda: shard_statistics(logits, labels, first=0)
    yield "shard gradient", lambda: shard_gradient_(logits, labels, torch.empty(16), first=16, scale=scale)


def expert_launches() -> Launches:
    from kernels.grouped_linear import grouped_linear, input_gradient, pair_input_gradient, weight_gradient
    from kernels.moe_permute.op import _permute, _sort_by_expert, _unpermute, _unpermute_backward

    order = [torch.zeros(128, dtype=torch.int32) for _ in range(2)]
    x, rows, weights = bf16(16, 2048), bf16(128, 2048), torch.empty(16, 8)
    yield "sort", lambda: _sort_by_expert(torch.zeros(128, dtype=torch.int64), 128, 8)
    yield "permute", lambda: _permute(x, *order, 8)
    yield "unpermute", lambda: _unpermute(rows, weights, *order)
    yield "unpermute backward", lambda: _unpermute_backward(x, rows, weights, *order)
    many, weight, ends = bf16(2048, 256), bf16(8, 512, 256), torch.zeros(8, dtype=torch.int32)
    grad = bf16(2048, 512)
    yield "grouped_linear", lambda: grouped_linear(many, weight, ends, implementation="triton")
    yield "grouped input gradient", lambda: input_gradient(grad, weight, ends, "triton")
    yield "grouped input gradient of a pair", lambda: pair_input_gradient(grad, weight, grad, weight, ends, "triton")
    yield "grouped weight gradient", lambda: weight_gradient(grad, many, ends, "triton")


def fp8_launches() -> Launches:
    import kernels.fp8.quantize.kernel as quantize_kernel
    from kernels.fp8 import E4M3, E5M2, fp8_matmul, quantize_blocks, quantize_rowwise, quantize_tensorwise

    x, scale = bf16(8192, 4096), torch.empty(())
    yield "fp8 scaled", lambda: quantize_tensorwise(x, scale, dtype=E5M2)
    with patch.object(quantize_kernel, "num_multiprocessors", lambda device: 132):  # they decide how much is reduced
        for y in (x, torch.empty(x.shape)):
            yield f"fp8 of {y.dtype}", lambda y=y: quantize_tensorwise(y, transpose=True)  # type: ignore[misc]
    yield "fp8 rowwise", lambda: quantize_rowwise(x, transpose=True)
    yield "fp8 1x128", lambda: quantize_blocks(x, square=False, transpose=True)
    yield "fp8 128x128", lambda: quantize_blocks(x, square=True, transpose=True)
    a, bias = torch.empty(8192, 8192, dtype=E4M3), bf16(8192)
    a_scale, b_scale = torch.empty(8192, 64), torch.empty(64, 64)
    yield "fp8 product", lambda: fp8_matmul(a, a_scale, a, b_scale, bias=bias)


def product_launches() -> Launches:
    from kernels.int4_linear import int4_linear
    from kernels.int8_linear import int8_linear
    from kernels.matmul import matmul
    from kernels.nf4 import NF4, dequantize_nf4

    data, scale, bias = torch.empty(8192, 8192, dtype=torch.int8), torch.empty(8192), bf16(8192)
    packed, scale_zero, wide_bias = torch.empty(28672, 4096, dtype=torch.uint8), bf16(64, 28672, 2), bf16(28672)
    for rows in (16, 4096):
        x = bf16(rows, 8192)
        yield f"int8 {rows}", lambda x=x: int8_linear(x, data, scale, bias)  # type: ignore[misc]
        yield f"int4 {rows}", lambda x=x: int4_linear(x, packed, scale_zero, wide_bias)  # type: ignore[misc]
    nf4 = NF4(*(torch.empty(n, dtype=torch.uint8) for n in (1 << 25, 1 << 20)), torch.empty(1 << 12), torch.empty(()))
    yield "nf4", lambda: dequantize_nf4(nf4, (1 << 26,))
    square = bf16(8192, 8192)
    yield "matmul", lambda: matmul(square, square)


def attention_launches() -> Launches:
    from kernels.attention import fused
    from kernels.attention.mask import run_mask

    T, device = 8192, torch.device("cpu")
    q, k, v = (bf16(1, T, heads, 128).requires_grad_() for heads in (8, 2, 2))
    documents = torch.zeros(1, T, dtype=torch.int32)
    mask = run_mask(T, T, device, query_documents=documents, key_documents=documents)

    def forward_and_backward() -> None:
        output, _ = fused.attention(q, k, v, mask, sinks=torch.zeros(8))
        torch.autograd.grad(output, (q, k, v), output)

    yield "attention", forward_and_backward


def serving_launches() -> Launches:
    from kernels.paged_attention import paged_attention, rotate_and_write, write_pages
    from kernels.sampling import sample_tokens
    from kernels.skinny_linear import add_skinny_linear, skinny_linear

    def table(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    pages = bf16(64, 16, 8, 128)
    for name, queries in (("decode", 128), ("prefill", 4096)):
        q = bf16(queries, 32, 128)
        yield (
            f"paged {name}",
            lambda q=q, decodes=name == "decode": paged_attention(  # type: ignore[misc]
                q,
                pages,
                pages,
                table(128, 512),
                table(129),
                table(128),
                window=1024,
                sinks=torch.zeros(32),
                decodes=decodes,
                splits=4 if decodes else 1,
            ),
        )
    latents = bf16(64, 16, 1, 576)
    yield (
        "paged latent",
        lambda: paged_attention(
            bf16(128, 128, 576), latents, latents[..., :512], table(128, 512), table(129), table(128)
        ),
    )
    token = bf16(128, 8, 128)
    slots = torch.zeros(128, dtype=torch.int64)
    yield "write pages", lambda: write_pages(pages, pages, token, token, slots)
    turns = torch.empty(1, 128, 1, 64)
    norm = bf16(128)
    yield (
        "rotate and write",
        lambda: rotate_and_write(
            bf16(128, 48, 128), pages, pages, slots, cos=turns, sin=turns, q_weight=norm, k_weight=norm, eps=1e-6
        ),
    )
    for rows in (1, 3):
        x, h, inner = bf16(rows, 4096), bf16(rows, 14336), bf16(2 * 14336, 4096)
        yield f"skinny linear {rows}", lambda x=x: skinny_linear(x, bf16(6144, 4096), norm_weight=bf16(4096), eps=1e-5)  # type: ignore[misc]
        yield (
            f"skinny gated {rows}",
            lambda x=x, w=inner: skinny_linear(x, w, norm_weight=bf16(4096), eps=1e-5, gated=True),  # type: ignore[misc]
        )
        yield f"skinny residual {rows}", lambda x=x, h=h: skinny_linear(h, bf16(4096, 14336), residual=x)  # type: ignore[misc]
        wide, both = bf16(rows, 8192), bf16(1024, 8192)
        yield (
            f"skinny added {rows}",
            lambda x=wide, w=both: add_skinny_linear(x, x, w, norm_weight=bf16(8192), eps=1e-5, gated=True),  # type: ignore[misc]
        )
    yield "sample", lambda: sample_tokens(bf16(128, 128256), torch.ones(128), slots)


def launches() -> Launches:
    """Calls of what training and inference call, each with a name: for tests.kernels.hopper.compile_launches."""
    return chain(
        norm_launches(),
        rope_launches(),
        activation_launches(),
        optimizer_launches(),
        loss_launches(),
        expert_launches(),
        fp8_launches(),
        product_launches(),
        attention_launches(),
        serving_launches(),
    )


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[Compiled]]:
    from tests.kernels.hopper import compile_launches

    return compile_launches("tests.kernels.test_hopper")


@pytest.mark.thorough
def test_kernels_compile_for_hopper_and_fit_without_spills(compiled: dict[str, list[Compiled]]) -> None:
    """What the interpreter accepts and the compiler does not; more registers or shared memory than there are; registers
    spilled to memory."""
    for name, kernels in compiled.items():
        assert kernels, name
        for kernel in kernels:
            assert kernel.stack_bytes <= SPILLS.get(kernel.kernel, 0), (name, kernel)
            assert kernel.shared_bytes <= 227 << 10, (name, kernel)
            assert kernel.registers * kernel.num_warps * 32 <= 1 << 16, (name, kernel)


@pytest.mark.thorough
def test_loads_are_wide(compiled: dict[str, list[Compiled]]) -> None:
    """Loads of single numbers, each a fraction of the bandwidth."""
    for name, kernels in compiled.items():
        for kernel in kernels:
            assert kernel.wide_loads or kernel.kernel in SCALAR_KERNELS or name in NARROW, (name, kernel)


@pytest.mark.thorough
def test_casts_to_fp8_are_used_once(compiled: dict[str, list[Compiled]]) -> None:
    """Bytes that ptxas loses."""
    for name, kernels in compiled.items():
        for kernel in kernels:
            assert kernel.casts_used_twice == 0, (name, kernel)


@pytest.mark.thorough
def test_products_run_on_the_tensor_cores(compiled: dict[str, list[Compiled]]) -> None:
    """Products of another kind, a tenth as fast."""
    found = {name: sum(kernel.wgmma for kernel in kernels) for name, kernels in compiled.items()}
    assert {name: number for name, number in found.items() if number} == PRODUCTS


@pytest.mark.thorough
def test_attention_fetches_tiles_as_its_tables_say(compiled: dict[str, list[Compiled]]) -> None:
    """A descriptor that is not made, for which pointers stand in."""
    from kernels.attention.kernel import FORWARD
    from kernels.attention.kernel_backward import BACKWARD_KEYS, BACKWARD_QUERIES

    blocks = [FORWARD(128, 2), BACKWARD_QUERIES(128, 2, True), BACKWARD_KEYS(128, 2)]
    assert [kernel.copy_engine for kernel in compiled["attention"] if kernel.wgmma] == [block.tma for block in blocks]
