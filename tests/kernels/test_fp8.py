"""fp8: numbers, copies, the linear layer, delayed scaling. The kernels run, on a CPU in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels.backend import interpreted
from kernels.fp8 import (
    E4M3,
    E5M2,
    GRADIENT,
    INPUT,
    WEIGHT,
    DelayedScaling,
    ScalingRecipe,
    dequantize,
    fp8_linear,
    fp8_matmul,
    quantize_blocks,
    quantize_rowwise,
    quantize_tensorwise,
)
from kernels.fp8.formats import LARGEST, scale_from_amax
from kernels.fp8.matmul.op import _fp8_matmul
from tests.kernels.ops.fp8 import Emulated

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
each_format = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])


@pytest.fixture(autouse=True)
def _kernels_run() -> Iterator[None]:
    """Not the references."""
    with nullcontext() if CUDA else interpreted():
        yield


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def bits(x: Tensor) -> Tensor:
    return x.cpu().view(torch.uint8)


@each_format
def test_every_half_is_cast_as_torch_casts_it(dtype: torch.dtype) -> None:
    """Rounding, subnormals, the sign of zero, saturation and NaN, over all fp16 numbers. The truth is torch's cast, on
    the CPU, which rounds to nearest even; beyond the range it does not saturate."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16).view(256, 256)
    q, amax = quantize_tensorwise(x.to(DEVICE), torch.ones((), device=DEVICE), dtype=dtype)
    largest = LARGEST[dtype]
    expected = x.float().clamp(-largest, largest).to(dtype)
    real = ~x.isnan()
    assert torch.equal(bits(q.data)[real], expected.view(torch.uint8)[real])
    assert q.data.cpu().float()[~real].isnan().all()
    assert amax.isnan()


@each_format
def test_numbers_between_two_of_the_format_go_to_the_even_one(dtype: torch.dtype) -> None:
    """Ties, and fp32 numbers next to ties, which a cast by way of fp16 or bf16 rounds twice."""
    finite = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = finite[finite.isfinite()].unique()
    ties = (finite[1:] + finite[:-1]) / 2
    up, down = torch.full_like(ties, math.inf), torch.full_like(ties, -math.inf)
    x = torch.stack([ties, ties.nextafter(up), ties.nextafter(down)])
    q, _ = quantize_tensorwise(x.to(DEVICE), torch.ones((), device=DEVICE), dtype=dtype)
    assert torch.equal(bits(q.data), x.to(dtype).view(torch.uint8))


@each_format
def test_scales_map_the_largest_onto_the_largest(dtype: torch.dtype) -> None:
    """Half of the range unused, or an overflow; a power of two below the scale instead of above."""
    x = randn(40, 256).mul_(10.0 ** torch.arange(-30, 10, device=DEVICE)[:, None])
    q = quantize_rowwise(x, dtype=dtype)
    assert (q.data.float().abs().amax(dim=1) == LARGEST[dtype]).all()
    p = quantize_rowwise(x, dtype=dtype, power_of_two=True)
    for exact, power in zip(q.scale.flatten().tolist(), p.scale.flatten().tolist(), strict=True):
        assert math.frexp(power)[0] == 0.5
        assert power / 2 < exact <= power


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scales_are_rounded_as_ieee_says(dtype: torch.dtype) -> None:
    """A quotient off in its last bit; its remainder, which is NaN for inf and lost for the smallest numbers."""
    some = torch.randint(0x00000000, 0x7F800000, (1 << 16 if CUDA else 1 << 10,), dtype=torch.int32)
    edges = torch.tensor([0, 1, 0x7FFFFF, 0x800000, 0x04600000, 0x7F7FFFFF, 0x7F800000], dtype=torch.int32)
    amax = torch.cat([some, edges]).view(torch.float32).to(DEVICE)
    x = torch.zeros(len(amax), 16, device=DEVICE)
    x[:, 3] = amax
    scale = quantize_blocks(x, square=False, dtype=dtype).scale
    assert torch.equal(scale[:, 0], scale_from_amax(amax, dtype))


def test_powers_of_two_are_their_own_scale() -> None:
    """One step too far where nothing is to be rounded."""
    powers = 2.0 ** torch.arange(-100, 100, dtype=torch.float32)
    assert torch.equal(scale_from_amax(powers * 448.0, E4M3, power_of_two=True), powers)


def test_zeros_have_scale_1_and_nan_is_not_lost() -> None:
    """A division by zero; a maximum that ignores NaN, so that a diverged run goes on."""
    x = randn(130, 256)
    x[:128, :128] = 0.0
    x[129, 200] = math.nan
    x[1, 130] = math.inf
    q = quantize_blocks(x, square=True)
    values = dequantize(q.data, q.scale)
    assert q.scale[0, 0] == 1.0
    assert (values[:128, :128] == 0.0).all()
    assert values[128:, 128:].isnan().all()
    assert values[:128, 128:].isnan().all()
    assert values[128:, :128].isfinite().all()
    assert quantize_tensorwise(x)[1].isnan()


def test_errors_are_those_of_the_mantissa() -> None:
    """A scale applied twice or to the wrong block. E4M3 has 3 bits: at most 2^-4 of a normal number."""
    x = randn(40, 300) * torch.logspace(-3, 3, 40, device=DEVICE)[:, None]
    for q in (quantize_rowwise(x), quantize_blocks(x, square=False)):
        error = (dequantize(q.data, q.scale) - x).abs()
        floor = x.abs().amax(dim=1, keepdim=True) * 2.0**-10 / 448 * 1.01
        assert (error <= torch.maximum(x.abs() * 2.0**-4, floor)).all()


@pytest.mark.parametrize("rows", [48, 130])
def test_the_transposed_copy_is_the_quantized_transpose(rows: int) -> None:
    """Scales of rows for a product that sums over rows; garbage in the padding."""
    x = randn(rows, 80)
    padding = -rows % 16
    for quantize in (
        lambda x, **kw: quantize_tensorwise(x, **kw)[0],
        quantize_rowwise,
        lambda x, **kw: quantize_blocks(x, square=False, **kw),
        lambda x, **kw: quantize_blocks(x, square=True, **kw),
    ):
        q, expected = quantize(x, transpose=True), quantize(x.t())
        assert q.transposed.shape == (80, rows + padding)
        assert torch.equal(bits(q.transposed)[:, :rows], bits(expected.data))
        assert not bits(q.transposed)[:, rows:].any()
        assert torch.equal(q.transposed_scale, expected.scale)
        assert torch.equal(bits(q.data), bits(quantize(x).data))


def test_a_given_scale_is_copied_to_memory_of_its_own() -> None:
    """cuBLASLt, which takes scales at multiples of 16 bytes only: the state of delayed scaling holds them side by
    side."""
    scales = torch.tensor([0.5, 0.25], device=DEVICE)
    for transpose in (False, True):
        q, _ = quantize_tensorwise(randn(20, 16), scales[1], transpose=transpose)
        assert torch.equal(q.scale, scales[1])
        assert q.scale.data_ptr() % 16 == 0
        assert q.transposed_scale is (q.scale if transpose else None)


def test_long_rows_are_read_in_parts() -> None:
    """Rows beyond 16384 elements."""
    x = randn(2, 20001)
    q = quantize_rowwise(x)
    assert torch.equal(q.scale.flatten().cpu(), x.cpu().abs().amax(dim=1) / 448.0)  # CUDA multiplies by 1 / 448
    assert torch.equal(bits(q.data), bits((x.cpu() * (1.0 / q.scale.cpu())).to(E4M3)))


def test_products_are_those_of_fp64() -> None:
    """A scale of the wrong block or side; sums of the tensor core that are not promoted. All kinds of scales."""
    x, w, bias = randn(20, 272), randn(144, 272, seed=1), randn(144, seed=2)
    kinds = [
        (quantize_tensorwise(x)[0], quantize_tensorwise(w)[0]),
        (quantize_rowwise(x), quantize_rowwise(w)),
        (quantize_blocks(x, square=False), quantize_blocks(w, square=True)),
        (quantize_blocks(x, square=False), quantize_blocks(w, square=False)),
    ]
    for a, b in kinds:
        exact = dequantize(a.data, a.scale).double() @ dequantize(b.data, b.scale).double().t() + bias.double()
        y = fp8_matmul(a.data, a.scale, b.data, b.scale, bias=bias, out_dtype=torch.float32)
        assert (y - exact).abs().max() <= (2e-3 if CUDA else 1e-6) * exact.abs().max()


def test_the_product_is_a_proper_op() -> None:
    """opcheck's comparison of schemas does not know fp8."""
    a, b = quantize_blocks(randn(5, 48), square=False), quantize_blocks(randn(32, 48), square=True)
    arguments = (a.data, a.scale, b.data, b.scale, None, torch.float32, False)
    torch.library.opcheck(_fp8_matmul, arguments, test_utils=["test_faketensor", "test_autograd_registration"])


def run(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """y and the gradients by backward()."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = layer(*leaves)
    y.backward(randn(*y.shape, seed=9))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("gradient", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("kind", ["tensorwise_delayed", "tensorwise_dynamic", "rowwise", "block128"])
def test_the_layer_is_near_the_linear_layer(kind: str, gradient: torch.dtype) -> None:
    """A wrong scale, transpose or operand in one of the three products."""
    recipe = ScalingRecipe(kind, gradient=gradient)
    scaling = DelayedScaling(1, recipe=recipe, device=DEVICE) if kind == "tensorwise_delayed" else None
    x, weight, bias = randn(2, 9, 48), randn(32, 48, seed=1, scale=0.1), randn(32, seed=2)

    def layer(*inputs: Tensor) -> Tensor:
        return fp8_linear(*inputs, recipe=recipe, scaling=None if scaling is None else scaling.layers[0])

    if scaling is not None:
        run(layer, x, weight, bias)
        scaling.update()
    results, truth = run(layer, x, weight, bias), run(F.linear, x, weight, bias)
    allowed = (0.05, 0.08 if gradient == E5M2 else 0.05, 0.08 if gradient == E5M2 else 0.05, 1e-6)
    for y, exact, limit in zip(results, truth, allowed, strict=True):
        assert y.shape == exact.shape
        assert 0 <= (y - exact).norm() <= limit * exact.norm()
    assert not torch.equal(results[0], truth[0])  # nothing was quantized


def test_backward_keeps_fp8_only() -> None:
    """The bf16 input kept beside the fp8 one: the memory that fp8 is to save."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, weight = randn(64, 48).requires_grad_(), randn(32, 48).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fp8_linear(x, weight, recipe=ScalingRecipe("tensorwise_dynamic"))
    assert sum(t.numel() for t in kept if t.dtype == E4M3) == 64 * 48 + 32 * 48
    assert all(t.dtype == E4M3 or t.numel() == 1 for t in kept)


def test_only_wanted_copies_are_made() -> None:
    """A frozen weight, as in LoRA, whose gradient's copies and product are not needed."""
    kept: list[Tensor] = []
    x, weight = randn(64, 48).requires_grad_(), randn(32, 48)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = fp8_linear(x, weight, recipe=ScalingRecipe("block128"))
    assert sum(t.numel() for t in kept if t.dtype == E4M3) == 32 * 48
    y.sum().backward()
    assert x.grad is not None


def test_ranks_that_agree_on_amax_quantize_as_one() -> None:
    """Rows over two ranks: with the maximum of both passed, their parts are the whole, to the bit."""
    x, weight = randn(32, 48), randn(32, 48, seed=1)
    recipe, amax = ScalingRecipe("tensorwise_dynamic"), x.abs().amax()
    whole = fp8_linear(x, weight, recipe=recipe)
    parts = [fp8_linear(part, weight, recipe=recipe, x_amax=amax) for part in x.chunk(2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    small = x.chunk(2)[int(x[:16].abs().amax() > x[16:].abs().amax())]
    other = fp8_linear(small, weight, recipe=recipe)
    assert not torch.allclose(other, fp8_linear(small, weight, recipe=recipe, x_amax=amax), rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_delayed_scaling_takes_the_largest_of_its_history(backend: str) -> None:
    """Scales of the wrong step or tensor; amax of one micro-batch of several; gradients that compiled graphs lose. Two
    forwards before two backwards, as a pipeline runs them."""
    recipe = ScalingRecipe("tensorwise_delayed")
    scaling = DelayedScaling(2, recipe=recipe, history_length=2, device=DEVICE)
    weight = randn(32, 48, seed=1).requires_grad_()

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return fp8_linear(x, weight, recipe=recipe, scaling=scaling.layers[1])

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    seen = []
    for step in range(4):
        xs = [randn(16, 48, seed=step * 2 + i, scale=10.0 ** (1 - step)) for i in range(2)]
        grads = [randn(16, 32, seed=50 + step * 2 + i, scale=1e-3) for i in range(2)]
        ys = [compiled(x, weight) for x in xs]
        for y, grad in zip(ys, grads, strict=True):
            y.backward(grad)
        largest = [max(float(t.detach().abs().max()) for t in ts) for ts in (xs, [weight], grads)]
        assert torch.equal(scaling.amax()[1].cpu(), torch.tensor(largest))
        assert not scaling.amax()[0].any()
        seen.append(largest)
        scaling.update()
        for tensor, limit in ((INPUT, 448.0), (WEIGHT, 448.0), (GRADIENT, 57344.0)):
            recent = max(amax[tensor] for amax in seen[-2:])
            assert float(scaling.scale[1, tensor]) == pytest.approx(recent / limit, rel=1e-6)
        assert (scaling.scale[0] == 1.0).all()
        assert not scaling.amax().any()


def test_an_overflow_does_not_spoil_later_scales() -> None:
    """inf in the history, which makes everything NaN for H steps."""
    scaling = DelayedScaling(1, recipe=ScalingRecipe("tensorwise_delayed"), history_length=4)
    for amax in (2.0, math.inf, math.nan):
        scaling.layers[0].amax.fill_(amax)
        scaling.update()
        assert scaling.scale[0].tolist() == pytest.approx([2 / 448, 2 / 448, 2 / 57344])


def test_delayed_scaling_is_saved_and_moved_in_fp32() -> None:
    """A model cast to bf16 takes its scales along; a resumed run starts with scales of 1."""
    recipe = ScalingRecipe("tensorwise_delayed", power_of_two=True)
    scaling = DelayedScaling(1, recipe=recipe)
    scaling.layers[0].amax.fill_(3.0)
    scaling.update()
    again = DelayedScaling(1, recipe=recipe).bfloat16()
    again.load_state_dict(scaling.state_dict())
    assert again.scale.dtype == torch.float32
    assert torch.equal(again.scale, scaling.scale)
    assert again.scale[0, 0] == 2.0**-7


def test_a_rank_without_rows_takes_part() -> None:
    """Experts that nobody chose: zero gradients of the right shape, no launch of an empty grid."""
    for kind in ("tensorwise_dynamic", "rowwise", "block128"):
        y, d_x, d_weight, d_bias = run(
            lambda *inputs, kind=kind: fp8_linear(*inputs, recipe=ScalingRecipe(kind)),
            randn(0, 48),
            randn(32, 48),
            randn(32),
        )
        assert y.shape == (0, 32)
        assert d_x.shape == (0, 48)
        assert not d_weight.any()
        assert not d_bias.any()


def test_flops_are_counted() -> None:
    """MFU of zero."""
    x, weight = randn(16, 48).requires_grad_(), randn(32, 48).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        fp8_linear(x, weight, recipe=ScalingRecipe("rowwise")).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 16 * 48 * 32


def test_the_emulation_is_the_kernels() -> None:
    """A layout tested on the CPU that trains other numbers on the GPU: outside of the interpreter's kernels the results
    are those of the written-out layer as well."""
    x, weight = randn(18, 48), randn(32, 48, seed=1)
    for kind in ("tensorwise_dynamic", "rowwise", "block128"):
        recipe = ScalingRecipe(kind, gradient=E4M3)
        ours = run(lambda *inputs, recipe=recipe: fp8_linear(*inputs, recipe=recipe), x, weight)
        for y, exact in zip(ours, run(lambda *i, recipe=recipe: Emulated.apply(*i, recipe), x, weight), strict=True):
            assert (y - exact).norm() <= (2e-3 if CUDA else 1e-6) * exact.norm()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_rowwise(torch.ones(2, 2), dtype=torch.int8), "torch.float8_e4m3fn"),
        (lambda: quantize_rowwise(torch.ones(2)), r"\[rows, columns\]"),
        (lambda: quantize_tensorwise(torch.ones(2, 2), torch.ones(1)), "no dimensions"),
        (lambda: fp8_linear(torch.ones(2, 17), torch.ones(16, 17), recipe=ScalingRecipe()), "multiples of 16"),
        (
            lambda: fp8_linear(torch.ones(2, 16), torch.ones(16, 16), recipe=ScalingRecipe("tensorwise_delayed")),
            "pass it for",
        ),
        (lambda: ScalingRecipe("blockwise"), "tensorwise_delayed, tensorwise_dynamic, rowwise, block128"),
        (lambda: fp8_matmul(*2 * (torch.ones(16, 16).to(E5M2), torch.ones(()))), "one of two must be E4M3"),
        (lambda: fp8_matmul(*2 * (torch.ones(16, 16).to(E4M3), torch.ones(2))), "float32"),
    ],
)
def test_wrong_arguments_are_refused(call: Any, message: str) -> None:
    """An error of a library, deep inside."""
    with pytest.raises((TypeError, ValueError), match=message):
        call()
