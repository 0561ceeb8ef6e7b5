"""NF4 as ops that compiled graphs keep whole. Not differentiable: frozen weights are what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from kernels.backend import refuse_dtensors, runs_triton
from kernels.nf4.reference import (
    BLOCK,
    GROUP,
    NF4,
    dequantize_nf4_reference,
    quantize_magnitudes,
    quantize_nf4_reference,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_nf4(x: Tensor) -> NF4:
    """A tensor [...] of a floating dtype, in blocks of 64 values along its flattened memory, with double quantization.

    Byte for byte that of bitsandbytes' quantize_4bit(quant_type="nf4", compress_statistics=True); if the number of
    values is no multiple of 64, the last block is divided as the others are, as on its GPUs. Finite values only: NaN
    has no code. Raises TypeError for DTensors and integers.
    """
    refuse_dtensors(x=x)
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; quantize a floating dtype")
    return NF4(*_quantize(x.detach()))


def dequantize_nf4(quantized: NF4, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The tensor of this shape, contiguous, to the bit what bitsandbytes' dequantize_4bit gives.

    Raises TypeError for DTensors and for a dtype other than float32, bfloat16 and float16, ValueError where the parts
    are not those of a tensor of this shape.
    """
    refuse_dtensors(**quantized._asdict())
    packed, magnitudes, scales, offset = quantized
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}; use one of {', '.join(map(str, DTYPES))}")
    values = prod(shape)
    blocks = -(-values // BLOCK)
    found = (tuple(packed.shape), tuple(magnitudes.shape), tuple(scales.shape), tuple(offset.shape))
    wanted = ((-(-values // 2),), (blocks,), (-(-blocks // GROUP),), ())
    if found != wanted:
        raise ValueError(f"packed, magnitudes, scales, offset have shapes {found}; of {list(shape)} they are {wanted}")
    return _dequantize(packed, magnitudes, scales, offset, values, dtype).view(*shape)


@torch.library.custom_op("lattice::nf4_quantize", mutates_args=())
def _quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not runs_triton(x) or not x.numel():
        return quantize_nf4_reference(x)
    from kernels.nf4.kernel import quantize_values

    packed, largest = quantize_values(x.contiguous())
    return NF4(packed, *quantize_magnitudes(largest))


@torch.library.custom_op("lattice::nf4_dequantize", mutates_args=())
def _dequantize(
    packed: Tensor, magnitudes: Tensor, scales: Tensor, offset: Tensor, num_values: int, dtype: torch.dtype
) -> Tensor:
    if not runs_triton(packed) or not num_values:
        return dequantize_nf4_reference(packed, magnitudes, scales, offset, num_values, dtype)
    from kernels.nf4.kernel import dequantize

    return dequantize(packed.contiguous(), magnitudes.contiguous(), scales.contiguous(), offset, num_values, dtype)


@_quantize.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = x.numel()
    blocks = (n + BLOCK - 1) // BLOCK
    packed, magnitudes = (x.new_empty(size, dtype=torch.uint8) for size in ((n + 1) // 2, blocks))
    scales, offset = (x.new_empty(shape, dtype=torch.float32) for shape in (((blocks + GROUP - 1) // GROUP,), ()))
    return packed, magnitudes, scales, offset


@_dequantize.register_fake
def _(
    packed: Tensor, magnitudes: Tensor, scales: Tensor, offset: Tensor, num_values: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty(num_values, dtype=dtype)
