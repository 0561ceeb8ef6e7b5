"""Normalisation layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate

from models.config import ModelConfig
from parallel.groups import ModelParallel
from parallel.tensor import Gradient, empty_parameter, local_shard


class ReplicatedNorm(nn.Module):
    """RMSNorm or LayerNorm whose parameters are the same on all ranks of the tp axis.

    grad: what the gradient of the parameters is on each of them (parallel.tensor.local_shard): replicated where all
    ranks normalise the same, partial where each has its own tokens or heads.
    """

    def __init__(self, size: int, *, eps: float, kind: str, groups: ModelParallel, grad: Gradient) -> None:
        super().__init__()
        assert groups.tp is not None
        self.size, self.eps, self.grad = size, eps, grad
        self.weight = empty_parameter(size, mesh=groups.tp, placement=Replicate())
        self.bias = empty_parameter(size, mesh=groups.tp, placement=Replicate()) if kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        weight = local_shard(self.weight, grad=self.grad)
        if self.bias is None:
            return F.rms_norm(x, (self.size,), weight, self.eps)
        return F.layer_norm(x, (self.size,), weight, local_shard(self.bias, grad=self.grad), self.eps)


def make_head_norm(config: ModelConfig, groups: ModelParallel) -> nn.Module:
    """RMSNorm over head_dim of queries or keys [..., K]. Ranks of the tp axis have different heads."""
    assert config.head_dim is not None  # resolved
    if groups.tp is not None:
        return ReplicatedNorm(config.head_dim, eps=config.norm_eps, kind="rmsnorm", groups=groups, grad="partial")
    return nn.RMSNorm(config.head_dim, eps=config.norm_eps)


def make_norm(config: ModelConfig, groups: ModelParallel) -> nn.Module:
    """The norm of [..., hidden_size] that `config` names: RMSNorm (1910.07467) or LayerNorm (1607.06450).

    Both compute in fp32 inside, whatever the dtype of their input.
    """
    return make_stream_norm(config.hidden_size, eps=config.norm_eps, kind=config.norm, groups=groups)


def make_stream_norm(size: int, *, eps: float, kind: str, groups: ModelParallel) -> nn.Module:
    """A norm of [..., size] of the tokens of the residual stream: one of NORMS."""
    if groups.tp is not None:
        grad: Gradient = "partial" if groups.sequence_parallel else "replicated"
        return ReplicatedNorm(size, eps=eps, kind=kind, groups=groups, grad=grad)
    return nn.RMSNorm(size, eps=eps) if kind == "rmsnorm" else nn.LayerNorm(size, eps=eps)
