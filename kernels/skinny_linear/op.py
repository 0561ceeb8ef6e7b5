"""Linear layers of a few rows as an op that compiled graphs keep whole.

M rows, I features in, O features out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import refuse_dtensors, runs_triton
from kernels.skinny_linear.reference import add_skinny_linear_reference, skinny_linear_reference

MAX_ROWS = 4
MIN_FEATURES = 64  # of a row of the weight, which 16 bytes at a time must divide


def obstacle(num_rows: int, weight: Tensor) -> str | None:
    """Why a layer is not for `skinny_linear`, in a few words; None: it is."""
    if not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16):
        return "for 16-bit weights on CUDA"
    if num_rows > MAX_ROWS:
        return f"for at most {MAX_ROWS} rows"
    if weight.shape[1] % 8 or weight.shape[1] < MIN_FEATURES or weight.stride(1) != 1:
        return f"for rows of a multiple of 8 features, {MIN_FEATURES} or more"
    return None


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """x [M, I] times weight [O, I], transposed: [M, O], M <= MAX_ROWS. Without a gradient.

    With norm_weight [I], of RMSNorm(x, norm_weight, eps). gated: weight is gate beside up, [2 O, I], and the result
    silu(gate) * up. residual [M, O] is added. All in fp32 (fp64 for fp64 off the GPU), rounded once at the end. The
    same bits in every call; those of a row depend on whether it is the only one, not on what is in others.

    On Hopper the launch begins while the one before ends, and fetches weights meanwhile: they must not be what that one
    writes. Raises TypeError for DTensors and for two dtypes, ValueError for shapes.
    """
    refuse_dtensors(residual=residual)
    _check(x, weight, norm_weight=norm_weight, gated=gated)
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    if residual is not None and residual.shape != (x.shape[0], outputs):
        raise ValueError(f"residual has shape {list(residual.shape)}; use {[x.shape[0], outputs]}")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"x has dtype {x.dtype}, residual {residual.dtype}; use one dtype for x, weight and residual")
    return _skinny_linear(x, weight, norm_weight, eps, residual, gated)


def add_skinny_linear(
    x: Tensor, residual: Tensor, weight: Tensor, *, norm_weight: Tensor, eps: float, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """(skinny_linear(r, weight, ...), r) with r = x + residual, both [M, I] of one dtype, rounded before it is
    normalised: what a branch is when it was summed over ranks, where no product could add the stream.

    In the same launch: programs read x and the residual, and one writes r. Guarantees and errors as in `skinny_linear`.
    """
    refuse_dtensors(residual=residual)
    _check(x, weight, norm_weight=norm_weight, gated=gated)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual has shape {list(residual.shape)} and dtype {residual.dtype}; use those of x")
    return _add_skinny_linear(x, residual, weight, norm_weight, eps, gated)


def _check(x: Tensor, weight: Tensor, *, norm_weight: Tensor | None, gated: bool) -> None:
    refuse_dtensors(x=x, weight=weight, norm_weight=norm_weight)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.shape[0] > MAX_ROWS:
        raise ValueError(
            f"x has shape {list(x.shape)}, weight {list(weight.shape)}; use [M, I], M <= {MAX_ROWS}, and [O, I]"
        )
    if gated and weight.shape[0] % 2:
        raise ValueError(f"weight has {weight.shape[0]} rows; gate beside up are an even number")
    if norm_weight is not None and norm_weight.shape != x.shape[1:]:
        raise ValueError(f"norm_weight has shape {list(norm_weight.shape)}; use {list(x.shape[1:])}")
    if weight.dtype != x.dtype:
        raise TypeError(f"x has dtype {x.dtype}, weight {weight.dtype}; use one dtype for x, weight and residual")


@torch.library.custom_op("lattice::skinny_linear", mutates_args=())
def _skinny_linear(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float, residual: Tensor | None, gated: bool
) -> Tensor:
    if not runs_triton(x) or x.dtype == torch.float64:
        return skinny_linear_reference(x, weight, norm_weight, eps, residual, gated)
    from kernels.skinny_linear.kernel import skinny

    return skinny(x, weight, norm_weight, eps, residual, gated)


@_skinny_linear.register_fake
def _(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float, residual: Tensor | None, gated: bool
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0])


@torch.library.custom_op("lattice::add_skinny_linear", mutates_args=())
def _add_skinny_linear(
    x: Tensor, residual: Tensor, weight: Tensor, norm_weight: Tensor, eps: float, gated: bool
) -> tuple[Tensor, Tensor]:
    if not runs_triton(x) or x.dtype == torch.float64:
        return add_skinny_linear_reference(x, residual, weight, norm_weight, eps, gated)
    from kernels.skinny_linear.kernel import skinny

    stream = x.new_empty(x.shape)
    return skinny(x, weight, norm_weight, eps, None, gated, residual, stream), stream


@_add_skinny_linear.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, norm_weight: Tensor, eps: float, gated: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0]), x.new_empty(x.shape)
