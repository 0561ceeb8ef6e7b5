"""Linear layers of a block: plain ones, or cut over the tp axis."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from parallel.fused import Parts, parts_by_kind
from parallel.groups import ModelParallel
from parallel.tensor import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear


def column_linear(
    in_features: int, out_features: int, *, bias: bool, groups: ModelParallel, shared_by: int = 1
) -> nn.Module:
    """The first layer of a branch, to be evaluated by parallel.tensor.project; arguments of ColumnParallelLinear."""
    if groups.tp is None:
        return nn.Linear(in_features, out_features, bias=bias)
    return ColumnParallelLinear(in_features, out_features, bias=bias, groups=groups, shared_by=shared_by)


def fused_column_linear(
    branch: nn.Module, name: str, in_features: int, rows: Mapping[str, int], *, bias: bool, groups: ModelParallel
) -> nn.Module:
    """One `column_linear` for several of one input (parallel/fused.py), to be the attribute `name` of branch.

    rows: features out of each by name; tp divides all of them. State dicts of branch hold the parameters of separate
    layers by these names, as views, so that nobody has to know which of both a model has.
    """
    layer: Any = column_linear(in_features, sum(rows.values()), bias=bias, groups=groups)
    layer.parts = Parts(dict(rows), 1 if groups.tp is None else groups.tp.size())
    branch.register_state_dict_post_hook(partial(_take_apart, name=name))
    branch.register_load_state_dict_pre_hook(partial(_put_together, name=name))
    return layer


def _take_apart(branch: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, *, name: str) -> None:
    """A state dict of `branch` with the parts of its fused layer in place of it."""
    layer: Any = getattr(branch, name)
    for kind, parts in parts_by_kind(layer).items():
        if (tensor := state.pop(f"{prefix}{name}.{kind}", None)) is not None:
            state.update({f"{prefix}{part}.{kind}": rows for part, rows in parts.separate(tensor).items()})


def _put_together(branch: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any, name: str) -> None:
    """The reverse, before it is loaded; what is missing is reported as missing in the fused layer."""
    layer: Any = getattr(branch, name)
    for kind, parts in parts_by_kind(layer).items():
        names = [f"{prefix}{part}.{kind}" for part in parts.rows]
        if parts.ranks == 1 and all(part in state for part in names):
            state[f"{prefix}{name}.{kind}"] = torch.cat([state.pop(part) for part in names])


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
