"""Collectives, under the names of the torch version at hand.

Two kinds. `*_rows` and `*_together` work in place on the raw buffers of data parallelism. The others are out of place
and differentiable: layers call them on activations, eagerly or inside a compiled graph. Over all ranks of an axis
together a collective is a linear map, and its backward the transpose of it. How each rank uses the result decides which
map that is, so the name says it and the docstring states the backward:

    function             forward           backward          the value before -> after
    sum_of_gradients     identity          all-reduce        the same on all ranks -> used differently by each
    all_reduce           all-reduce        identity          a summand per rank -> the same on all, used alike
    all_gather           all-gather        reduce-scatter    a slice per rank -> whole, used differently by each
    reduce_scatter       reduce-scatter    all-gather        a summand per rank -> a slice per rank
    all_gather_alike     all-gather        own slice         a slice per rank -> whole, used alike
    all_to_all           all-to-all        all-to-all        rows for each rank -> rows from each rank
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# torch 2.13 renames these two and warns about the old names; 2.11 has only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_to_all = dist.all_to_all_single


def all_gather_rows(
    out: torch.Tensor, row: torch.Tensor, *, group: dist.ProcessGroup, async_op: bool
) -> dist.Work | None:
    """out [N, S] := every rank's row [S], in rank order."""
    return _all_gather(out.view(-1), row, group=group, async_op=async_op)


def reduce_scatter_rows(
    buffer: torch.Tensor, *, rank: int, group: dist.ProcessGroup, async_op: bool
) -> dist.Work | None:
    """buffer[rank] := sum over ranks of their buffer[rank], in place; the other rows [N, S] are left undefined."""
    return _reduce_scatter(buffer[rank], buffer.view(-1), group=group, async_op=async_op)


def all_to_all_rows(buffer: torch.Tensor, *, group: dist.ProcessGroup) -> torch.Tensor:
    """Row i of the result is row `rank` of rank i's buffer [N, ...]. Out of place."""
    buffer = buffer.contiguous()
    received = torch.empty_like(buffer)
    _all_to_all(received, buffer, group=group)
    return received


def pass_on(x: torch.Tensor, *, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """What the rank before this one in a ring passes on, there once the work is done; x goes to the rank behind.

    x is contiguous, alike on all ranks, and stays as it is until then. NCCL makes one send and one receive of it, as of
    two messages, whose launch takes the host four times as long.
    """
    rank, size = group.rank(), group.size()
    received = torch.empty_like(x)
    to, came = [0] * size, [0] * size
    to[(rank + 1) % size] = came[(rank - 1) % size] = x.numel()
    work = _all_to_all(received.view(-1), x.view(-1), came, to, group=group, async_op=True)
    return received, work


# ---- of several tensors of one dtype at once. NCCL takes them in one launch, each in place. On gloo a message costs
# more than its bytes, and coalesced tensors are sent one by one: there they are packed. When these return they are
# done, on CUDA in the order of the current stream.


def _packs(tensor: Tensor) -> bool:
    return not tensor.is_cuda


def reduce_scatter_together(shards: Sequence[Tensor], wholes: Sequence[Tensor], *, group: dist.ProcessGroup) -> None:
    """shards[i] [length_i] := this rank's row of the sum over ranks of wholes[i] [N, length_i].

    A shard may be that very row of its whole; the other rows are then left undefined.
    """
    if not _packs(wholes[0]):
        with dist._coalescing_manager(group=group):
            for shard, whole in zip(shards, wholes, strict=True):
                _reduce_scatter(shard, whole.view(-1), group=group)
        return
    packed = torch.cat(list(wholes), dim=1)
    received = packed.new_empty(packed.shape[1])
    _reduce_scatter(received, packed.view(-1), group=group)
    torch._foreach_copy_(list(shards), list(received.split([shard.numel() for shard in shards])))


def all_gather_together(wholes: Sequence[Tensor], *, rank: int, group: dist.ProcessGroup) -> None:
    """wholes[i] [N, length_i] := row n of rank n, in place; this rank gives its own."""
    if not _packs(wholes[0]):
        with dist._coalescing_manager(group=group):
            for whole in wholes:
                _all_gather(whole.view(-1), whole[rank], group=group)
        return
    mine = torch.cat([whole[rank] for whole in wholes])
    packed = mine.new_empty(len(wholes[0]), len(mine))
    _all_gather(packed.view(-1), mine, group=group)
    torch._foreach_copy_(list(wholes), list(packed.split([whole.shape[1] for whole in wholes], dim=1)))


def all_reduce_together(tensors: Sequence[Tensor], *, group: dist.ProcessGroup) -> None:
    """Each := its sum over ranks, in place."""
    if len(tensors) == 1:
        dist.all_reduce(tensors[0], group=group)
        return
    if not _packs(tensors[0]):
        with dist._coalescing_manager(group=group):
            for tensor in tensors:
                dist.all_reduce(tensor, group=group)
        return
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(packed, group=group)
    parts = packed.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])


@dataclass(frozen=True)
class Axis:
    """A mesh axis as a compiled graph can hold it: constants, no process group object."""

    name: str  # of the process group, for torch's functional collectives
    size: int
    rank: int  # of this process along the axis

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Axis:
        """The axis of a one-dimensional mesh."""
        return cls(name=mesh.get_group().group_name, size=mesh.size(), rank=mesh.get_local_rank())


# ---- started now, waited for later: what runs in between overlaps with the transfer


def start_all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis, on its way; take it with `wait`. x is left as it is."""
    return torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", axis.name)


def start_all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Every rank's x [N, ...], all of one shape, stacked in rank order [R N, ...], on its way."""
    return torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), axis.size, axis.name)


def start_reduce_scatter(x: Tensor, axis: Axis, *, dim: int) -> Tensor:
    """This rank's slice along dim of the sum over the axis, on its way. The size of dim is a multiple of the axis's."""
    # The collective splits dim 0 of contiguous memory: bring the slices there.
    slices = x.unflatten(dim, (axis.size, -1)).movedim(dim, 0).contiguous().flatten(0, 1)
    return torch.ops._c10d_functional.reduce_scatter_tensor(slices, "sum", axis.size, axis.name)


def maximum(x: Tensor, axis: Axis) -> Tensor:
    """The largest of each element over the axis. Without a gradient; NaN may give way to a number."""
    return wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), "max", axis.name))


def wait(pending: Tensor) -> Tensor:
    """The result of a collective that was started."""
    return torch.ops._c10d_functional.wait_tensor(pending)


def _gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The equal slices of all ranks put together along dim, in rank order."""
    return wait(start_all_gather(x, axis)).unflatten(0, (axis.size, -1)).movedim(0, dim).flatten(dim, dim + 1)


# ---- differentiable


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        # A view that leaves a compiled graph is made again from x behind it, and its gradient would pass by the sum.
        return x.clone() if torch.compiler.is_compiling() else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_reduce(grad, ctx.axis)), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return wait(start_all_reduce(x, axis))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return wait(start_reduce_scatter(grad, ctx.axis, dim=ctx.dim)), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return wait(start_reduce_scatter(x, axis, dim=dim))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.axis, ctx.dim), None, None


class _AllGatherAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.chunk(ctx.axis.size, dim=ctx.dim)[ctx.axis.rank], None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return _exchange(x, axis, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.axis, ctx.received, ctx.sent), None, None, None


def _exchange(x: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
    return wait(torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, axis.name))


def sum_of_gradients(x: Tensor, axis: Axis) -> Tensor:
    """x, the same on all ranks of the axis, each of which uses it for something else. Backward: all-reduce."""
    return _SumOfGradients.apply(x, axis)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis of a summand per rank, to be used alike by all. Backward: identity."""
    return _AllReduce.apply(x, axis)


def all_gather(x: Tensor, axis: Axis, *, dim: int) -> Tensor:
    """Equal slices put together along dim, to be used differently by each rank. Backward: reduce-scatter."""
    return _AllGather.apply(x, axis, dim)


def reduce_scatter(x: Tensor, axis: Axis, *, dim: int) -> Tensor:
    """This rank's slice along dim of the sum over the axis of a summand per rank. Backward: all-gather."""
    return _ReduceScatter.apply(x, axis, dim)


def all_gather_alike(x: Tensor, axis: Axis, *, dim: int) -> Tensor:
    """Equal slices put together along dim, to be used alike by all ranks. Backward: this rank's slice."""
    return _AllGatherAlike.apply(x, axis, dim)


def all_to_all(x: Tensor, axis: Axis, *, sent: list[int], received: list[int]) -> Tensor:
    """x [sum(sent), ...], whose first sent[0] rows are for rank 0 and so on, to the rows from each rank in rank order.

    received[i] is what rank i's `sent` has for this rank; any number may be 0. Backward: the way back.
    """
    return _AllToAll.apply(x, axis, sent, received)
