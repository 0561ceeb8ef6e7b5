"""Products of quantized matrices as one op. Not differentiable: kernels.fp8.linear has the gradients.

scales           on the GPU                          elsewhere
tensorwise       torch._scaled_mm (cuBLASLt)         reference
rowwise          torch._scaled_mm                    reference
blocks           our Triton kernel                   reference
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import refuse_dtensors, runs_triton
from kernels.fp8.formats import E5M2, PAD, blocks, require_fp8
from kernels.fp8.matmul.reference import matmul_reference


def fp8_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accumulation: bool = False,
) -> Tensor:
    """(a * a_scale) (b * b_scale)^T + bias: fp8 a [M, K] and b [N, K] to [M, N] of out_dtype.

    Scales, fp32, both of one kind: tensorwise, [] and []; rowwise, [M, 1] and [N, 1]; in blocks, [M, K/128] with
    [N, K/128] or [N/128, K/128], numbers of blocks rounded up. N and K are multiples of 16. Sums are in fp32;
    `fast_accumulation` lets the tensor core add with fewer bits (about 14 of the mantissa), tensorwise and rowwise,
    which is faster and what forward passes use. Raises TypeError for DTensors and for dtypes, two E5M2 matrices
    included, which the hardware's libraries do not multiply, ValueError for shapes.
    """
    refuse_dtensors(a=a, a_scale=a_scale, b=b, b_scale=b_scale, bias=bias)
    require_fp8(a.dtype, name="a.dtype")
    require_fp8(b.dtype, name="b.dtype")
    if a.dtype == b.dtype == E5M2:
        raise TypeError("a and b are both E5M2; one of two must be E4M3")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] % PAD or b.shape[0] % PAD:
        raise ValueError(
            f"a has shape {list(a.shape)} and b {list(b.shape)}; pass [M, K] and [N, K] with N and K multiples of {PAD}"
        )
    kind_of_scales(a.shape, a_scale, b.shape, b_scale)
    if bias is not None and bias.shape != b.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be [N] = [{b.shape[0]}]")
    return _fp8_matmul(a, a_scale, b, b_scale, bias, out_dtype, fast_accumulation)


def kind_of_scales(a_shape: torch.Size, a_scale: Tensor, b_shape: torch.Size, b_scale: Tensor) -> str:
    """tensorwise, rowwise or blocks; ValueError for anything else."""
    (M, K), N = a_shape, b_shape[0]
    found = (tuple(a_scale.shape), tuple(b_scale.shape))
    kinds = {
        ((), ()): "tensorwise",
        ((M, blocks(K)), (N, blocks(K))): "blocks",
        ((M, blocks(K)), (blocks(N), blocks(K))): "blocks",
        ((M, 1), (N, 1)): "rowwise",  # of K <= 128 the same as blocks
    }
    if found not in kinds or a_scale.dtype != torch.float32 or b_scale.dtype != torch.float32:
        wanted = f"[], [{M}, 1] and [{N}, 1], or [{M}, {blocks(K)}] and [{N} or {blocks(N)}, {blocks(K)}]"
        raise ValueError(
            f"scales {a_scale.dtype} {list(a_scale.shape)}, {b_scale.dtype} {list(b_scale.shape)}; float32 {wanted}"
        )
    return kinds[found]


@torch.library.custom_op("lattice::fp8_matmul", mutates_args=())
def _fp8_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accumulation: bool,
) -> Tensor:
    if not a.numel() or not b.numel():
        y = a.new_zeros(a.shape[0], b.shape[0], dtype=out_dtype)
        return y if bias is None else y + bias.to(out_dtype)
    kind = kind_of_scales(a.shape, a_scale, b.shape, b_scale)
    if kind == "blocks" and runs_triton(a):
        from kernels.fp8.matmul.kernel import matmul_blocks

        square = b_scale.shape[0] != b.shape[0]
        b_scale = b_scale.contiguous() if square else _stride_1_along_rows(b_scale)
        bias = None if bias is None else bias.contiguous()
        return matmul_blocks(a.contiguous(), _stride_1_along_rows(a_scale), b.contiguous(), b_scale, bias, out_dtype)
    if not a.is_cuda:
        return matmul_reference(a, a_scale, b, b_scale, bias, out_dtype)
    return _scaled_mm(a, a_scale, b, b_scale, bias, out_dtype, fast_accumulation)


def _scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accumulation: bool,
) -> Tensor:
    """torch's product where it has one; it rounds rowwise ones to bf16 and adds biases of out_dtype in half
    precision only, so other dtypes are formed from its product in fp32."""
    if out_dtype == torch.bfloat16 or (a_scale.ndim == 0 and (out_dtype == torch.float16 or bias is None)):
        return torch._scaled_mm(
            a.contiguous(),
            b.contiguous().t(),
            scale_a=_aligned(a_scale.contiguous()),
            scale_b=_aligned(b_scale.contiguous()).t(),
            bias=None if bias is None else bias.to(out_dtype),
            out_dtype=out_dtype,
            use_fast_accum=fast_accumulation,
        )
    one = torch.ones((), device=a.device)
    y = torch._scaled_mm(
        a.contiguous(), b.contiguous().t(), one, one, out_dtype=torch.float32, use_fast_accum=fast_accumulation
    )
    y = y * a_scale * (b_scale if b_scale.ndim == 0 else b_scale.t())
    return (y if bias is None else y + bias.float()).to(out_dtype)


def _aligned(scale: Tensor) -> Tensor:
    """cuBLASLt refuses scales whose address is not a multiple of 16 (CUBLAS_STATUS_NOT_SUPPORTED), as that of one among
    several is."""
    return scale if scale.data_ptr() % 16 == 0 else scale.clone()


def _stride_1_along_rows(scale: Tensor) -> Tensor:
    return scale.t().contiguous().t()


@_fp8_matmul.register_fake
def _(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accumulation: bool,
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


@register_flop_formula(torch.ops.lattice.fp8_matmul)
def _flops(a: torch.Size, a_scale: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """For torch's FlopCounterMode; the arguments are shapes."""
    return 2 * a[0] * a[1] * b[0]
