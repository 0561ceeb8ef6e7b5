"""The grouped linear layer written out; autograd gives its backward.

N rows, G groups, K features in, M features out.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def grouped_linear_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [N, K], weight [G, M, K], ends [G] ascending: row n of group g becomes x[n] weight[g]^T; rows of none are 0."""
    bounds = [0, *ends.tolist()]
    parts = [x[start:end] @ weight[g].T for g, (start, end) in enumerate(pairwise(bounds))]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - bounds[-1], weight.shape[1])])
