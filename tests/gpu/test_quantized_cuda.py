"""What Triton's interpreter cannot show of the quantized kernels: the hardware's casts, bf16, cuBLASLt, inductor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import kernels.int4_linear.kernel as int4_kernel
import kernels.int8_linear.kernel as int8_kernel
from kernels.fp8 import (
    E4M3,
    E5M2,
    DelayedScaling,
    LayerScaling,
    ScalingRecipe,
    dequantize,
    fp8_linear,
    fp8_matmul,
    quantize_blocks,
    quantize_rowwise,
    quantize_tensorwise,
)
from kernels.nf4 import NF4, dequantize_nf4, quantize_nf4

pytestmark = pytest.mark.gpu

Quantize = Callable[..., tuple[Tensor | None, ...]]
QUANTIZE: dict[str, Quantize] = {
    "dynamic": lambda x, **options: quantize_tensorwise(x, **options)[0],
    "scaled": lambda x, **options: quantize_tensorwise(x, torch.full((), 0.02, device=x.device), **options)[0],
    "rowwise": quantize_rowwise,
    "1x128": lambda x, **options: quantize_blocks(x, square=False, **options),
    "128x128": lambda x, **options: quantize_blocks(x, square=True, **options),
}


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("kind", QUANTIZE)
def test_fp8_bits_are_those_of_the_cpu(kind: str, dtype: torch.dtype, source: torch.dtype) -> None:
    """A cast or a division of the GPU that rounds in its own way, at sizes of many programs; bytes that the assembler
    loses, which depends on the dtype that is read."""
    x = (torch.randn(1008, 2064) * torch.randn(1008, 1).exp()).to(source)
    for power_of_two in (False, True):
        options = {"dtype": dtype, "transpose": True, "power_of_two": power_of_two}
        for ours, truth in zip(QUANTIZE[kind](x.cuda(), **options), QUANTIZE[kind](x, **options), strict=True):
            assert ours is not None
            assert truth is not None
            view = torch.uint8 if truth.element_size() == 1 else torch.int32
            assert torch.equal(ours.cpu().contiguous().view(view), truth.contiguous().view(view))


def test_all_fp32_numbers_of_a_binade_are_cast_as_on_the_cpu() -> None:
    """Rounding that differs on few numbers only: a million between 2^-10 and 2^9."""
    x = torch.rand(1024, 1024).mul_(2).sub_(1) * 2.0 ** torch.randint(-10, 10, (1024, 1024))
    one = torch.ones(())
    ours, truth = quantize_tensorwise(x.cuda(), one.cuda())[0].data, quantize_tensorwise(x, one)[0].data
    assert torch.equal(ours.cpu().view(torch.uint8), truth.view(torch.uint8))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["dynamic", "rowwise", "1x128", "128x128"])
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_products(kind: str, out_dtype: torch.dtype, biased: bool) -> None:
    """Every way through torch._scaled_mm and our kernel; E5M2 as the gradient is; a number of rows of no multiple."""
    x, w = torch.randn(1003, 1040, device="cuda"), torch.randn(528, 1040, device="cuda")
    bias = torch.randn(528, device="cuda", dtype=torch.bfloat16) if biased else None
    for dtype in (E4M3, E5M2):
        a = QUANTIZE["1x128" if kind == "128x128" else kind](x, dtype=dtype)
        b = QUANTIZE[kind](w)
        exact = dequantize(a[0], a[1]).double() @ dequantize(b[0], b[1]).double().t()
        exact = exact if bias is None else exact + bias.double()
        y = fp8_matmul(a[0], a[1], b[0], b[1], bias=bias, out_dtype=out_dtype)
        assert (y.double() - exact).norm() <= 4e-3 * exact.norm()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["dynamic", "rowwise"])
def test_scales_may_lie_anywhere(kind: str, out_dtype: torch.dtype) -> None:
    """Views into a table of scales, which cuBLASLt refuses."""
    a, b = QUANTIZE[kind](torch.randn(48, 64, device="cuda")), QUANTIZE[kind](torch.randn(32, 64, device="cuda"))

    def elsewhere(scale: Tensor) -> Tensor:
        return torch.cat([scale.new_zeros(1), scale.flatten()])[1:].view(scale.shape)

    views = elsewhere(a[1]), elsewhere(b[1])
    assert all(scale.data_ptr() % 16 for scale in views)
    expected = fp8_matmul(a[0], a[1], b[0], b[1], out_dtype=out_dtype)
    assert torch.equal(fp8_matmul(a[0], views[0], b[0], views[1], out_dtype=out_dtype), expected)


@pytest.mark.parametrize("kind", ["tensorwise_delayed", "tensorwise_dynamic", "rowwise", "block128"])
def test_the_compiled_fp8_layer_is_the_eager_one(kind: str) -> None:
    """Inductor, which fuses the scales' arithmetic and lays memory out anew; and the layer against its emulation."""
    recipe = ScalingRecipe(kind)
    results = []
    for device, compiled in (("cuda", False), ("cuda", True), ("cpu", False)):
        scaling = DelayedScaling(1, recipe=recipe, device=device) if kind == "tensorwise_delayed" else None

        its_scales = None if scaling is None else scaling.layers[0]

        def layer(x: Tensor, w: Tensor, scaling: LayerScaling | None = its_scales) -> Tensor:
            return fp8_linear(torch.nn.functional.silu(x), w, recipe=recipe, scaling=scaling)

        generator = torch.Generator().manual_seed(0)
        x, w, d_y = (torch.randn(*s, generator=generator) for s in ((3, 77, 256), (384, 256), (3, 77, 384)))
        x, w = (t.to(device, torch.bfloat16).requires_grad_() for t in (x, w))
        function = torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer
        for step in range(2):
            y = function(x, w)
            x.grad = w.grad = None
            y.backward(d_y.to(device, torch.bfloat16))
            if scaling is not None and not step:
                scaling.update()
        results.append([t.float().cpu() for t in (y.detach(), x.grad, w.grad)])
    for eager, compiled_, emulated in zip(*results, strict=True):
        # Flips of single roundings, where inductor keeps silu in fp32 and eager rounds it to bf16.
        assert (compiled_ - eager).norm() <= 0.02 * eager.norm()
        assert (emulated - eager).norm() <= 0.02 * eager.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 100, 300])
@pytest.mark.parametrize("kind", ["int8", "int4", "int4_64"])
def test_integer_linear(kind: str, rows: int, dtype: torch.dtype) -> None:
    """The bits that int4 codes become, which only the GPU forms; splits of a real size; every configuration."""
    from tests.kernels.ops.integer_linear import DEQUANTIZE, OPS, QUANTIZE

    table = (int8_kernel if kind == "int8" else int4_kernel).TILES
    x = torch.randn(rows, 4096, device="cuda", dtype=dtype)
    quantized = QUANTIZE[kind](torch.randn(1000, 4096, device="cuda") + 0.3)
    bias = torch.randn(1000, device="cuda", dtype=dtype)
    exact = x.double() @ DEQUANTIZE[kind](*quantized).double().t() + bias.double()
    for config in (None, *table.configs):
        if config is not None and dtype == torch.float32 and config.rows > 32:
            continue  # more registers than there are
        with nullcontext() if config is None else table.forced(config):
            y = OPS[kind](x, *quantized, bias)
            assert torch.equal(y, OPS[kind](x, *quantized, bias))
        assert (y.double() - exact).norm() <= {4: 1e-5, 2: 5e-3}[dtype.itemsize] * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_nf4_bits_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """A fused multiply-add, a fast division, a rounding of the GPU's own; sizes of many programs and no multiple."""
    from kernels.nf4.kernel import TILES, quantize_values
    from kernels.nf4.reference import quantize_values_reference

    for values in (64 * 5000, 64 * 4099 + 33):
        x = (torch.randn(values) * torch.rand(values).mul(4).exp()).to(dtype)
        truth = quantize_nf4(x)
        for config in TILES.configs:
            with TILES.forced(config):
                for ours, expected in zip(quantize_values(x.cuda()), quantize_values_reference(x), strict=True):
                    assert torch.equal(ours.cpu(), expected)
                parts = NF4(*(part.cuda() for part in truth))
                assert torch.equal(dequantize_nf4(parts, x.shape, dtype).cpu(), dequantize_nf4(truth, x.shape, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_teaching_product_and_its_epilogue(dtype: torch.dtype) -> None:
    """Every configuration on tensor cores, at sizes of several tiles and no multiple; transposed operands."""
    from kernels.matmul import linear_gelu, matmul
    from kernels.matmul.kernel import TILES

    x, w = torch.randn(1000, 520, device="cuda", dtype=dtype), torch.randn(777, 520, device="cuda", dtype=dtype) * 0.04
    bias, residual = torch.randn(777, device="cuda", dtype=dtype), torch.randn(1000, 777, device="cuda", dtype=dtype)
    exact = x.double() @ w.double().t()
    activated = torch.nn.functional.gelu(exact + bias.double()) + residual.double()
    for config in TILES.configs:
        with TILES.forced(config):
            assert (matmul(x, w.t()).double() - exact).norm() <= 4e-3 * exact.norm()
            assert (matmul(x.t().contiguous().t(), w.t()).double() - exact).norm() <= 4e-3 * exact.norm()
            assert (linear_gelu(x, w, bias, residual).double() - activated).norm() <= 4e-3 * activated.norm()
