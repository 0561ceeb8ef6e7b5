"""The feed-forward network of a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.geglu import geglu_fused
from kernels.swiglu import swiglu_fused
from models.config import ModelConfig
from models.layers.linear import column_linear, fused_column_linear, row_linear
from parallel.groups import NO_GROUPS, ModelParallel
from parallel.tensor import RowParallelLinear, project, project_entered

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
GATED_KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": swiglu_fused,
    "gelu": partial(geglu_fused, approximate="none"),
    "gelu_tanh": geglu_fused,
}
"""By name of the activation, the gated unit of [..., 2I], gate beside up, in one kernel each way."""
GatedKernel = Callable[[Tensor], Tensor]


def gated_kernel(activation: str, *, fused: bool, device_type: str, compiled: bool) -> GatedKernel | None:
    """What multiplies the halves of one projection's output; None: torch's operations. fused: whether it is one.

    Compilers write the gradients of two halves into one tensor by a kernel that computes everything twice (on H200 0.58
    ms where ours takes 0.28, gelu by erf 0.80 where it takes 0.32); without one, each operation rounds as it does on
    the CPU.
    """
    return GATED_KERNELS.get(activation) if fused and compiled and device_type == "cuda" else None


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) when gated (GLU variants, 2002.05202), else down(act(up(x))). Keeps [B, T, D].

    gate and up are one layer, `gate_up`, unless model.fused_projections=false.
    """

    def __init__(self, config: ModelConfig, groups: ModelParallel = NO_GROUPS) -> None:
        super().__init__()
        self.activation_name, self.activation = config.activation, ACTIVATION_FUNCTIONS[config.activation]
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gated = config.gated_mlp
        self.fused = config.gated_mlp and config.fused_projections
        if self.fused:
            rows = {"gate": inner, "up": inner}
            self.gate_up = fused_column_linear(self, "gate_up", hidden, rows, bias=bias, groups=groups)
        else:
            if self.gated:
                self.gate = column_linear(hidden, inner, bias=bias, groups=groups)
            self.up = column_linear(hidden, inner, bias=bias, groups=groups)
        self.down = row_linear(inner, hidden, bias=bias, groups=groups)

    def summand(self, x: Tensor) -> Tensor:
        """What this rank contributes to the sum over tp, for an x [B, T, D] that has entered the branch already.

        Together with other networks of one branch, whose input is gathered once and whose outputs are summed once;
        `finish` comes after that sum.
        """
        if not isinstance(self.down, RowParallelLinear):
            return self(x)
        return self.down.summand(self._activated([project_entered(x, layer) for layer in self._first_layers()]))

    def finish(self, y: Tensor) -> Tensor:
        """The sum of all summands, completed."""
        return self.down.add_bias(y) if isinstance(self.down, RowParallelLinear) else y

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self._activated(project(x, self._first_layers())))

    def _first_layers(self) -> list[nn.Module]:
        """Those that read the input."""
        if self.fused:
            return [self.gate_up]
        return [self.gate, self.up] if self.gated else [self.up]

    def _activated(self, projected: Sequence[Tensor]) -> Tensor:
        """What `down` multiplies, [B, T, I] of this rank, from the results of the first layers."""
        if not self.gated:
            return self.activation(projected[0])
        device_type, compiled = projected[0].device.type, torch.compiler.is_compiling()
        kernel = gated_kernel(self.activation_name, fused=self.fused, device_type=device_type, compiled=compiled)
        if kernel is not None:
            return kernel(projected[0])
        # Views, whose gradients are written side by side: a gated unit that reads them in place needs no copy.
        gate, up = projected[0].chunk(2, dim=-1) if self.fused else projected
        return self.activation(gate) * up
