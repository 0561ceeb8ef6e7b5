"""The addition of a low-rank product as an op that compiled graphs keep whole."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import refuse_dtensors
from kernels.rows import has_kernel

MAX_RANK = 128
"""Of the kernel, which holds all of u's and v's inner dimension at a time; larger products are torch's."""


def add_low_rank_(y: Tensor, u: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """y += scale u v, in place: y [N, O] contiguous, u [N, R], v [R, O], of one floating dtype. Returns y.

    For an R so small that y's way from memory and back is all the time there is. v may be a transposed view. Summed in
    fp32 (fp64 for fp64) and rounded once together with y; the same bits in every call. Not differentiable. Raises
    TypeError for DTensors and two dtypes, ValueError for shapes.
    """
    refuse_dtensors(y=y, u=u, v=v)
    if len({t.dtype for t in (y, u, v)}) > 1 or not y.is_floating_point():
        raise TypeError(f"dtypes of y, u and v are {y.dtype}, {u.dtype} and {v.dtype}; use one floating dtype for all")
    if not y.ndim == u.ndim == v.ndim == 2 or u.shape[1] != v.shape[0] or y.shape != (u.shape[0], v.shape[1]):
        raise ValueError(
            f"shapes y {list(y.shape)}, u {list(u.shape)}, v {list(v.shape)} are not [N, O], [N, R], [R, O]"
        )
    if not y.is_contiguous():
        raise ValueError(f"y has strides {y.stride()}; it is changed in place and must be contiguous")
    _add(y, u, v, scale)
    return y


def has_low_rank_kernel(y: Tensor, rank: int) -> bool:
    """Whether a kernel adds products of this inner dimension to y, and not torch."""
    return has_kernel(y) and 0 < rank <= MAX_RANK and y.numel() > 0


@torch.library.custom_op("lattice::add_low_rank_", mutates_args=("y",))
def _add(y: Tensor, u: Tensor, v: Tensor, scale: float) -> None:
    if not has_low_rank_kernel(y, u.shape[1]):
        y.addmm_(u, v, alpha=scale)
        return
    from kernels.low_rank.kernel import add_product

    add_product(y, u, v, scale)


@_add.register_fake
def _(y: Tensor, u: Tensor, v: Tensor, scale: float) -> None:
    return None
