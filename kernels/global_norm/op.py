"""The global norm as an op that compiled graphs keep whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import refuse_dtensors, runs_triton
from kernels.global_norm.reference import sum_of_squares_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements of the tensors, which are on one device: 0-d fp64, there.

    On the GPU squares are added in fp32 over chunks of 16384 elements and chunks in fp64: an element above 1.8e19 makes
    the sum infinite. The same bits in every run; nothing waits for the device. Chunks are counted from each tensor's
    first element, so another cut into tensors may change the last bits. For a sum over ranks add these, in rank order.

    Raises TypeError for DTensors and for dtypes other than fp32, bf16 and fp16 (fp64 too off the GPU), ValueError for
    an empty list and for several devices.
    """
    if not tensors:
        raise ValueError("the sum of squares of no tensors; pass at least one")
    for number, tensor in enumerate(tensors):
        refuse_dtensors(**{f"tensors[{number}]": tensor})
        if tensor.dtype not in DTYPES and (tensor.dtype != torch.float64 or runs_triton(tensor)):
            raise TypeError(f"tensors[{number}] has dtype {tensor.dtype}; use one of {', '.join(map(str, DTYPES))}")
        if tensor.device != tensors[0].device:
            raise ValueError(f"tensors[{number}] is on {tensor.device}, tensors[0] on {tensors[0].device}; use one")
    return _sum_of_squares(list(tensors))


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all elements of the tensors, 0-d fp32 on their device; see `sum_of_squares`."""
    return sum_of_squares(tensors).sqrt().float()


@torch.library.custom_op("lattice::sum_of_squares", mutates_args=())
def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    if not runs_triton(tensors[0]):
        return sum_of_squares_reference(tensors)
    from kernels.global_norm.kernel import sum_of_squares

    return sum_of_squares([tensor.contiguous() for tensor in tensors])


@_sum_of_squares.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)
