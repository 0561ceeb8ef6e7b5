"""The feed-forward network of a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.layers.linear import column_linear, row_linear
from parallel.groups import NO_GROUPS, ModelParallel
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, project

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) when gated (GLU variants, 2002.05202), else down(act(up(x))). Keeps [B, T, D]."""

    def __init__(self, config: ModelConfig, groups: ModelParallel = NO_GROUPS) -> None:
        super().__init__()
        self.activation = ACTIVATION_FUNCTIONS[config.activation]
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = column_linear(hidden, inner, bias=bias, groups=groups) if config.gated_mlp else None
        self.up = column_linear(hidden, inner, bias=bias, groups=groups)
        self.down = row_linear(inner, hidden, bias=bias, groups=groups)

    def summand(self, x: Tensor) -> Tensor:
        """What this rank contributes to the sum over tp, for an x [B, T, D] that has entered the branch already.

        Together with other networks of one branch, whose input is gathered once and whose outputs are summed once;
        `finish` comes after that sum.
        """
        if not isinstance(self.down, RowParallelLinear):
            return self(x)
        assert isinstance(self.up, ColumnParallelLinear)
        inner = self.up.inside(x)
        if self.gate is None:
            return self.down.summand(self.activation(inner))
        assert isinstance(self.gate, ColumnParallelLinear)
        return self.down.summand(self.activation(self.gate.inside(x)) * inner)

    def finish(self, y: Tensor) -> Tensor:
        """The sum of all summands, completed."""
        return self.down.add_bias(y) if isinstance(self.down, RowParallelLinear) else y

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            (up,) = project(x, (self.up,))
            return self.down(self.activation(up))
        gate, up = project(x, (self.gate, self.up))
        return self.down(self.activation(gate) * up)
