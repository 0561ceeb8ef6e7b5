"""Rows alone: how an op on the CPU is made to give a row the same bits whatever lies beside it.

Libraries compute an array's last elements by other instructions than the rest, and choose how to multiply by the number
of rows. So each row is handed to them alone, in memory of its own, where it is always the same problem.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.backend import runs_triton


def each_row(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function, which maps [1, K] to [1, M], of every row of x [..., K]: [..., M]. Differentiable if it is."""
    rows = x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        y = function(rows)
    else:
        # clone: the alignment of a row within x must not matter either
        y = torch.cat([function(row.clone()) for row in rows.split(1)])
    return y.view(*x.shape[:-1], y.shape[-1])


def each_row_off_gpu(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) where elements do not depend on others anyway, as on a GPU; else `each_row`. For what acts
    elementwise or within short rows."""
    return function(x) if x.is_cuda else each_row(function, x)


def has_kernel(x: Tensor) -> bool:
    """Whether a kernel computes x: they have no fp64."""
    return runs_triton(x) and x.dtype != torch.float64
