"""Linear layers of a block: plain ones, or cut over the tp axis."""

from __future__ import annotations

from torch import nn

from parallel.groups import ModelParallel
from parallel.tensor import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear


def column_linear(
    in_features: int, out_features: int, *, bias: bool, groups: ModelParallel, shared_by: int = 1
) -> nn.Module:
    """The first layer of a branch, to be evaluated by parallel.tensor.project; arguments of ColumnParallelLinear."""
    if groups.tp is None:
        return nn.Linear(in_features, out_features, bias=bias)
    return ColumnParallelLinear(in_features, out_features, bias=bias, groups=groups, shared_by=shared_by)


def replicated_linear(in_features: int, out_features: int, *, bias: bool, groups: ModelParallel) -> nn.Module:
    """A layer of the residual stream, whole on every rank of the tp axis."""
    if groups.tp is None:
        return nn.Linear(in_features, out_features, bias=bias)
    return ReplicatedLinear(in_features, out_features, bias=bias, groups=groups)


def row_linear(in_features: int, out_features: int, *, bias: bool, groups: ModelParallel) -> nn.Module:
    """The last layer of a branch."""
    if groups.tp is None:
        return nn.Linear(in_features, out_features, bias=bias)
    return RowParallelLinear(in_features, out_features, bias=bias, groups=groups)
