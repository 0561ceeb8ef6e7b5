"""RMSNorm that quantizes what it makes, as ops that compiled graphs keep whole: it writes what a product in fp8 reads.

Bytes, scales and largest magnitudes are those that kernels.fp8.quantize makes of a norm rounded to the dtype of its
input, to the bit. By one scale that is known before (delayed scaling) the norm writes all there is by rows, and the
transposed copy is one of bytes. By rows, the norm has the row; a transposed copy has scales of columns, which are known
at the end: the norm finds their largest magnitudes, and a second pass normalises again by what is known of each row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import runs_triton
from kernels.fp8.formats import E4M3, padded
from kernels.fp8.quantize import transpose_quantized
from kernels.fp8.quantize.reference import quantize_rowwise_reference
from kernels.rms_norm.op import check_norm, check_scale
from kernels.rms_norm.reference import add_rms_norm_reference, inverse_rms, quantize_reference, rms_norm_reference


class NormFp8(NamedTuple):
    """What a linear layer in fp8 needs of its normalised input, and what `rms_norm_backward` needs."""

    y: Tensor  # [..., D], float8_e4m3fn: the normalised x is y * scale
    scale: Tensor  # fp32: a copy of the one that was given, [], or [..., 1], one of each row
    amax: Tensor | None  # fp32 []: max |normalised x|, for the scales of steps to come; None with scales by row
    stream: Tensor  # [..., D]: what was normalised, x or x + residual
    rstd: Tensor  # [...], fp32: 1 / sqrt(mean(stream^2) + eps)
    transposed: Tensor | None  # [D, rows padded to 16], as kernels.fp8.Quantized has it; None unless asked for
    transposed_scale: Tensor | None  # fp32: `scale`, or [D, 1], of each column


def rms_norm_fp8(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    transpose: bool = False,
) -> NormFp8:
    """RMSNorm of x [..., D] (of x + residual) in fp8, without a pass of its own for the cast.

    scale: fp32, one element, that of delayed scaling per tensor: y is the norm divided by it, saturated at 448. None:
    each row has its own, max |row| / 448, or 1 if all is 0. NaN stays NaN. Rounded to the dtype of x before the cast.
    transpose: with the copy that a weight gradient multiplies.

    Not differentiable, because the gradient of an fp8 tensor would be cast to fp8: the autograd function of the layer
    that multiplies y calls `rms_norm_backward` with the gradient of y * scale. Errors as in `rms_norm`.
    """
    check_norm(x, weight=weight, residual=residual)
    check_scale(scale)
    by_columns = transpose and scale is None
    x, weight, residual, scale = (None if t is None else t.detach() for t in (x, weight, residual, scale))  # type: ignore[assignment]
    y, extra, stream, rstd, used, columns = _rms_norm_fp8(x, weight, residual, scale, eps, by_columns)
    stream = x if residual is None else stream
    transposed = transposed_scale = None
    if by_columns:
        transposed, transposed_scale = _rms_norm_columns(stream, weight, rstd, columns, eps)
    elif transpose:
        transposed, transposed_scale = transpose_quantized(y.view(-1, y.shape[-1])), used
    amax = None if scale is None else extra
    return NormFp8(y, extra if scale is None else used, amax, stream, rstd, transposed, transposed_scale)


@torch.library.custom_op("lattice::rms_norm_fp8", mutates_args=())
def _rms_norm_fp8(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, scale: Tensor | None, eps: float, by_columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, max |y| or the scales of the rows, the stream (empty without a residual), 1 / rms, the scale in memory of its
    own (empty by rows), the largest magnitudes of columns [D] (empty unless by_columns)."""
    D = x.shape[-1]
    columns = x.new_zeros(D if by_columns else 0, dtype=torch.float32)
    used = x.new_empty(0 if scale is None else (), dtype=torch.float32)
    if not runs_triton(x):
        stream = x if residual is None else add_rms_norm_reference(x, residual, weight, eps)[1]
        normed = rms_norm_reference(stream, weight, eps)
        y, extra = quantize_reference(normed, scale)
        if by_columns and x.numel():
            columns = normed.float().abs().reshape(-1, D).amax(0)
        used = used if scale is None else scale.reshape(()).clone()
        kept = x.new_empty(0) if residual is None else stream.contiguous()
        return y.contiguous(), extra.contiguous(), kept, inverse_rms(stream, eps).contiguous(), used, columns
    from kernels.rms_norm.kernel import norm_forward

    if scale is not None and not x.numel():
        used.copy_(scale.reshape(()))
    y, stream, _, rstd, extra = norm_forward(
        x, weight, eps=eps, residual=residual, fp8=True, scale=scale, used=None if scale is None else used,
        column_amax=columns if by_columns else None,
    )  # fmt: skip
    return y, extra, stream, rstd, used, columns


@_rms_norm_fp8.register_fake
def _(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, scale: Tensor | None, eps: float, by_columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    extra = x.new_empty((*x.shape[:-1], 1) if scale is None else (), dtype=torch.float32)
    stream = x.new_empty(0 if residual is None else x.shape)
    y = x.new_empty(x.shape, dtype=E4M3)
    used = x.new_empty(0 if scale is None else (), dtype=torch.float32)
    columns = x.new_empty(x.shape[-1] if by_columns else 0, dtype=torch.float32)
    return y, extra, stream, x.new_empty(x.shape[:-1], dtype=torch.float32), used, columns


@torch.library.custom_op("lattice::rms_norm_columns", mutates_args=())
def _rms_norm_columns(
    stream: Tensor, weight: Tensor | None, rstd: Tensor, amax: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm's transposed copy [D, rows padded to 16] and its scales [D, 1], from the largest magnitudes [D] of its
    columns. eps: of the reference, which keeps no rstd."""
    if not runs_triton(stream) or not stream.numel():
        normed = rms_norm_reference(stream, weight, eps)
        made = quantize_rowwise_reference(normed.reshape(-1, stream.shape[-1]), E4M3, False, True)
        assert made.transposed is not None
        assert made.transposed_scale is not None
        return made.transposed, made.transposed_scale
    from kernels.rms_norm.columns_kernel import norm_columns

    return norm_columns(stream, weight, rstd, amax)


@_rms_norm_columns.register_fake
def _(stream: Tensor, weight: Tensor | None, rstd: Tensor, amax: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    D = stream.shape[-1]
    transposed = stream.new_empty(D, padded(rstd.numel()), dtype=E4M3)
    return transposed, stream.new_empty(D, 1, dtype=torch.float32)
