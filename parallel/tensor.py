"""Tensor and sequence parallelism (Megatron-LM: Shoeybi et al., 1909.08053; Korthikanti et al., 2205.05198).

A branch of a block is Y = f(X A) B with f elementwise (an MLP) or by heads (attention). Cut A by columns and B by rows,
A = [A_1 ... A_R] and B = [B_1; ...; B_R], one of each per rank of the tp axis. Then

    f(X A) = [f(X A_1) ... f(X A_R)]          because f never mixes the columns of different ranks
    Y      = sum_r f(X A_r) B_r               a row of blocks times a column of blocks

so a rank that has the whole X computes its summand alone, and the only communication is the sum at the end. That is
the column -> row pairing: `project` (A), f, then `RowParallelLinear` (B). In backward the gradient of Y is the same on
all ranks, those of A_r and B_r stay where they are, and with H_r = X A_r

    dX = sum_r dH_r A_r^T                     one sum, at the beginning of the branch

Per branch: one all-reduce forward (of Y), one backward (of dX), so 2 + 2 per block.

Sequence parallelism splits what lies between the branches (norms, dropout, residual stream) along the sequence. An
all-reduce is a reduce-scatter followed by an all-gather; the two halves move to the two ends of the branch:

    forward    X = all-gather(X_r) before A        Y_r = reduce-scatter(f(X A_r) B_r) after B
    backward   dX_r = reduce-scatter(dH_r A_r^T)   dY = all-gather(dY_r)

The bytes are the same, and activations between the branches shrink by R. The parameters there (norm weights, the bias
of a row-parallel layer) see only their rank's tokens: their gradient on a rank is a summand, "partial", and has to be
summed over tp. `local_shard` makes every use of a parameter say which it is.

Letters: B batch, T tokens, I features in, O features out, R ranks of the axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from parallel.collectives import (
    Axis,
    _gather,
    all_gather,
    all_reduce,
    reduce_scatter,
    start_all_reduce,
    start_reduce_scatter,
    sum_of_gradients,
    wait,
)
from parallel.groups import ModelParallel
from parallel.sequence_chunks import SEQUENCE_DIM, products_while_gathering, scattered_product

Gradient = Literal["sharded", "replicated", "partial"]


def local_shard(parameter: Tensor, *, grad: Gradient) -> Tensor:
    """What this rank computes with: the local tensor of a DTensor, or a plain parameter itself.

    A DTensor lies on one axis, or is sharded over all of several. grad states what backward arrives with on each rank:
        sharded      the whole gradient of this rank's shard; the parameter is sharded
        replicated   the whole gradient, the same on every rank; the parameter is replicated
        partial      a summand of it, which is then summed over the axis; the parameter is replicated
    A wrong answer is a wrong model that trains: a norm weight under sequence parallelism, taken as replicated, learns
    from the tokens of one rank. Raises ValueError where the statement and the placement exclude each other.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    if parameter.device_mesh.ndim != 1 and grad != "sharded":
        raise ValueError(f"a parameter whose gradient is {grad} lies on one axis, not on {parameter.device_mesh}")
    for placement in parameter.placements:
        if isinstance(placement, Shard) != (grad == "sharded") or placement.is_partial():
            raise ValueError(
                f"a parameter with placement {placement} cannot have a gradient that is {grad} over its axis"
            )
    local = parameter.to_local(grad_placements=parameter.placements)
    return sum_of_gradients(local, Axis.of(parameter.device_mesh)) if grad == "partial" else local


def empty_parameter(*shape: int, mesh: DeviceMesh, placement: Placement | Sequence[Placement]) -> nn.Parameter:
    """A parameter of this global shape, sharded (unevenly, as torch.chunk does) or replicated over each axis of mesh.

    On the default device, values unspecified. No communication.
    """
    placements = [placement] if isinstance(placement, Placement) else list(placement)
    sizes = list(shape)
    for axis, cut in enumerate(placements):
        if isinstance(cut, Shard):
            first, last = chunk_bounds(sizes[cut.dim], mesh.size(axis), mesh.get_local_rank(axis))
            sizes[cut.dim] = last - first
    stride = torch.empty(shape, device="meta").stride()
    local = torch.empty(sizes)
    return nn.Parameter(
        DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    )


def chunk_bounds(length: int, parts: int, index: int) -> tuple[int, int]:
    """First and last + 1 of the index-th of `parts` pieces as torch.chunk and Shard cut them: ceil(length / parts)."""
    step = -(-length // parts)
    first = min(index * step, length)
    return first, min(first + step, length)


class ColumnParallelLinear(nn.Module):
    """Parameters of y = x W^T + b with W [O, I] cut by output features over tp; evaluated by `project`.

    shared_by > 1: every run of this many ranks uses the same features (KV heads fewer than ranks). The parameters are
    then replicated, each rank reads the rows of its run, and their gradient is summed over tp.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, groups: ModelParallel, shared_by: int = 1
    ) -> None:
        super().__init__()
        assert groups.tp is not None
        self.axis = Axis.of(groups.tp)
        self.sequence_parallel, self.sp_chunks = groups.sequence_parallel, groups.sp_chunks
        self.shared = shared_by > 1
        pieces = self.axis.size // shared_by
        self.rows = chunk_bounds(out_features, pieces, self.axis.rank // shared_by)
        placement = Replicate() if self.shared else Shard(0)
        self.weight = empty_parameter(out_features, in_features, mesh=groups.tp, placement=placement)
        self.bias = empty_parameter(out_features, mesh=groups.tp, placement=placement) if bias else None

    def local(self, parameter: Tensor) -> Tensor:
        """The rows of weight or bias that this rank computes with."""
        if not self.shared:
            return local_shard(parameter, grad="sharded")
        return local_shard(parameter, grad="partial")[self.rows[0] : self.rows[1]]

    def gradient(self, of_rows: Tensor) -> Tensor:
        """The gradient of what this rank holds of a parameter, from that of its `local` rows: what autograd makes of
        it by itself. Shared parameters: the sum over the axis."""
        if not self.shared:
            return of_rows
        summand = of_rows.new_zeros(self.weight.shape[0], *of_rows.shape[1:])
        summand[self.rows[0] : self.rows[1]] = of_rows
        return wait(start_all_reduce(summand, self.axis))

    def together(self, x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """`project`; replaced by split backward (parallel/pipeline/weight_gradients.py) and fp8 (models/fp8.py)."""
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        for layer in layers:
            assert isinstance(layer, ColumnParallelLinear)
            weights.append(layer.local(layer.weight))
            biases.append(None if layer.bias is None else layer.local(layer.bias))
        return _Columns.apply(x, self.axis, self.sequence_parallel, self.sp_chunks, *weights, *biases)

    def inside(self, x: Tensor) -> Tensor:
        """y [B, T, O/R] for an x [B, T, I] that has entered the branch already, with `enter`.

        Split backward replaces it (parallel/pipeline/weight_gradients.py).
        """
        return F.linear(x, self.local(self.weight), None if self.bias is None else self.local(self.bias))


def project(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """What several layers make of one input: column-parallel ones with one collective for all, or plain ones.

    x [B, T, I], or [B, T/R, I] with sequence parallelism, to [B, T, O/R] per layer.
    """
    together = getattr(layers[0], "together", None)  # plain layers have one if they share work (models/fp8.py)
    return tuple(layer(x) for layer in layers) if together is None else together(x, layers)


def whole_input(x: Tensor, axis: Axis, *, sequence_parallel: bool) -> Tensor:
    """What column-parallel layers multiply: x, or with sequence parallelism the slices [B, T/R, I] of all ranks."""
    return _gather(x, axis, SEQUENCE_DIM) if sequence_parallel else x


def start_input_gradient(
    grads: Sequence[Tensor], weights: Sequence[Tensor], axis: Axis, *, sequence_parallel: bool
) -> Tensor:
    """The gradient of x by the outputs y_i = x W_i^T of all ranks, on its way; take it with `wait`."""
    d_x = grads[0] @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        d_x = d_x + grad @ weight
    return start_reduce_scatter(d_x, axis, dim=SEQUENCE_DIM) if sequence_parallel else start_all_reduce(d_x, axis)


def project_entered(x: Tensor, layer: nn.Module) -> Tensor:
    """What a column-parallel layer, or a plain one, makes of x [B, T, I] that `enter` has brought: [B, T, O/R]."""
    return layer.inside(x) if isinstance(layer, ColumnParallelLinear) else layer(x)


class _Columns(torch.autograd.Function):
    """y_i = x W_i^T + b_i. In backward the sum of dx over the axis travels while the weight gradients are computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        # Not one name for each: where no gradient is wanted, dynamo (torch 2.13) drops ctx if the arguments happen to
        # be as many as the names with it.
        axis, sequence_parallel, sp_chunks, *parameters = rest
        num = len(parameters) // 2  # weights, then a bias or None for each
        weights, biases = parameters[:num], parameters[num:]
        if sp_chunks > 1:
            whole, products = products_while_gathering(x, axis, sp_chunks, weights, biases)
        else:
            whole = whole_input(x, axis, sequence_parallel=sequence_parallel)
            products = [F.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        ctx.axis, ctx.sequence_parallel = axis, sequence_parallel
        ctx.has_bias = [bias is not None for bias in biases]
        ctx.save_for_backward(whole, *weights)
        return tuple(products)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        whole, *weights = ctx.saved_tensors
        pending = start_input_gradient(grads, weights, ctx.axis, sequence_parallel=ctx.sequence_parallel)
        rows = whole.flatten(0, -2)
        flat = [grad.flatten(0, -2) for grad in grads]
        d_weights = [grad.t() @ rows for grad in flat]
        d_biases = [grad.sum(0) if has else None for grad, has in zip(flat, ctx.has_bias, strict=True)]
        return wait(pending), None, None, None, *d_weights, *d_biases


class ReplicatedLinear(nn.Module):
    """y = x W^T + b, W [O, I] whole on every rank. With sequence parallelism each rank maps its own tokens."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, groups: ModelParallel) -> None:
        super().__init__()
        assert groups.tp is not None
        self.axis = Axis.of(groups.tp)
        self.grad: Gradient = "partial" if groups.sequence_parallel else "replicated"
        self.weight = empty_parameter(out_features, in_features, mesh=groups.tp, placement=Replicate())
        self.bias = empty_parameter(out_features, mesh=groups.tp, placement=Replicate()) if bias else None

    def local(self, parameter: Tensor) -> Tensor:
        """Weight or bias as this rank computes with it."""
        return local_shard(parameter, grad=self.grad)

    def gradient(self, of_tokens: Tensor) -> Tensor:
        """The gradient of weight or bias, from that of the tokens this rank maps: what autograd makes of it."""
        return wait(start_all_reduce(of_tokens, self.axis)) if self.grad == "partial" else of_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Split backward replaces it (parallel/pipeline/weight_gradients.py)."""
        return F.linear(x, self.local(self.weight), None if self.bias is None else self.local(self.bias))


class RowParallelLinear(nn.Module):
    """y = x W^T + b with W [O, I] cut by input features over tp.

    x [B, T, I/R] to [B, T, O], or [B, T/R, O] with sequence parallelism. The bias is whole on every rank and is added
    once, after the sum.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, groups: ModelParallel) -> None:
        super().__init__()
        assert groups.tp is not None
        self.axis = Axis.of(groups.tp)
        self.sequence_parallel, self.sp_chunks = groups.sequence_parallel, groups.sp_chunks
        self.weight = empty_parameter(out_features, in_features, mesh=groups.tp, placement=Shard(1))
        self.bias = empty_parameter(out_features, mesh=groups.tp, placement=Replicate()) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.sp_chunks > 1:
            weight = local_shard(self.weight, grad="sharded")
            return self.add_bias(scattered_product(x, weight, self.axis, self.sp_chunks))
        return self.add_bias(leave(self.summand(x), self.axis, sequence_parallel=self.sequence_parallel))

    def summand(self, x: Tensor) -> Tensor:
        """This rank's part of x W^T, [B, T, O], before the sum; split backward replaces it
        (parallel/pipeline/weight_gradients.py).
        """
        return F.linear(x, local_shard(self.weight, grad="sharded"))

    def add_bias(self, y: Tensor) -> Tensor:
        """After that sum, once."""
        if self.bias is None:
            return y
        return y + local_shard(self.bias, grad="partial" if self.sequence_parallel else "replicated")


class VocabParallelEmbedding(nn.Module):
    """A table [V, D] cut by rows over tp, unevenly where R does not divide V. Token numbers [B, T] to [B, T, D], or
    [B, T/R, D] with sequence parallelism: each rank looks up the tokens it has, and the sum puts them together."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, groups: ModelParallel) -> None:
        super().__init__()
        assert groups.tp is not None
        self.axis = Axis.of(groups.tp)
        self.sequence_parallel = groups.sequence_parallel
        self.num_embeddings = num_embeddings
        self.first, self.last = chunk_bounds(num_embeddings, self.axis.size, self.axis.rank)
        self.weight = empty_parameter(num_embeddings, embedding_dim, mesh=groups.tp, placement=Shard(0))

    def forward(self, tokens: Tensor) -> Tensor:
        mine = (tokens >= self.first) & (tokens < self.last)
        rows = F.embedding(torch.where(mine, tokens - self.first, 0), local_shard(self.weight, grad="sharded"))
        return leave(rows * mine[..., None], self.axis, sequence_parallel=self.sequence_parallel)


def enter(x: Tensor, axis: Axis, *, sequence_parallel: bool) -> Tensor:
    """The beginning of a branch: the whole x [B, T, I] on every rank, its gradient summed over the ranks' shards."""
    return all_gather(x, axis, dim=SEQUENCE_DIM) if sequence_parallel else sum_of_gradients(x, axis)


def leave(summand: Tensor, axis: Axis, *, sequence_parallel: bool) -> Tensor:
    """The end of a branch: the sum over ranks of [B, T, O], whole or this rank's tokens of it [B, T/R, O]."""
    return reduce_scatter(summand, axis, dim=SEQUENCE_DIM) if sequence_parallel else all_reduce(summand, axis)
