"""Gradients of master parameters: the local shards of them, their global norm, the clipping coefficient.

A master parameter is a plain tensor, which every rank holds whole, or a DTensor; its gradient lies as it does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from kernels.global_norm import sum_of_squares


def local_shard_of(t: Tensor) -> Tensor:
    """What this rank holds of t: the shard of a DTensor (writing to it writes to t), or t itself."""
    return t.to_local() if isinstance(t, DTensor) else t


def sharded_axes(t: Tensor) -> list[int]:
    """Axes of t's mesh, by number, over which its elements are split. Empty: every rank holds all of t.

    An axis of one rank splits nothing and is left out. Raises ValueError for a pending sum (Partial).
    """
    if not isinstance(t, DTensor):
        return []
    if any(placement.is_partial() for placement in t.placements):
        raise ValueError(f"placements {t.placements} hold a sum that was not reduced; redistribute the tensor first")
    return [
        axis
        for axis, placement in enumerate(t.placements)
        if not placement.is_replicate() and t.device_mesh.size(axis) > 1
    ]


def local_gradient(name: str, parameter: Tensor) -> Tensor:
    """The local shard of parameter.grad, contiguous.

    Raises RuntimeError if there is none, or if it differs from the parameter in dtype, shape or placements: an update
    from it would be wrong, or would hang the ranks that do have one.
    """
    grad = parameter.grad
    if grad is None:
        raise RuntimeError(
            f"parameter {name} has no gradient; use it in the loss, or leave it out of the parameters to be optimized"
        )
    for what in ("dtype", "shape", "device"):
        if getattr(grad, what) != getattr(parameter, what):
            raise RuntimeError(
                f"the gradient of {name} has {what} {getattr(grad, what)}, the parameter {getattr(parameter, what)}; "
                "they must agree"
            )
    if isinstance(parameter, DTensor) != isinstance(grad, DTensor) or (
        isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements
    ):
        raise RuntimeError(
            f"the gradient of {name} has placements {getattr(grad, 'placements', 'none')}, the parameter "
            f"{getattr(parameter, 'placements', 'none')}; reduce and redistribute the gradient before the step"
        )
    return local_shard_of(grad).contiguous()


@torch.no_grad()
def global_grad_norm(
    parameters: Iterable[Tensor], *, stages: dist.ProcessGroup | None = None, kernel: str = "torch"
) -> Tensor:
    """L2 norm over all elements of all gradients (`p.grad`), each counted once wherever it lies.

    stages: ranks that hold the model's other parameters, those of other pipeline stages. kernel: torch, or triton
    (kernels/global_norm), which sums a rank's squares.

    Returns a 0-d fp32 tensor on the device that communicates (of the mesh; without one, of the gradients), with the
    same bits on every rank: partial sums are gathered and added in rank order, which an all-reduce does not promise
    between HSDP replicas. No host synchronisation for gradients on that device. Not finite if any gradient is not: what
    then happens is the caller's business. Collective over the meshes of the parameters. Raises ValueError without
    parameters, RuntimeError for a parameter without a gradient.
    """
    groups: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    for index, parameter in enumerate(parameters):
        axes = tuple(sharded_axes(parameter))
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        name = f"number {index} (shape {tuple(parameter.shape)})"
        groups.setdefault((mesh, axes), []).append(local_gradient(name, parameter))
    if not groups:
        raise ValueError("the global gradient norm of no parameters is not defined; pass at least one")
    squares = []
    for (mesh, axes), gradients in groups.items():
        square = sum_of_squares(gradients) if kernel == "triton" else _sum_of_squares(gradients)
        if mesh is not None:
            square = square.to(mesh.device_type)
            for axis in axes:
                square = _sum_in_rank_order(square, mesh.get_group(axis))
        squares.append(square)
    device = squares[0].device
    total = torch.stack([square.to(device) for square in squares]).sum()
    if stages is not None:
        total = _sum_in_rank_order(total, stages)
    return total.sqrt().float()


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements, a 0-d fp64 tensor."""
    # torch's CPU norm adds fp32 squares one after the other: 3e-4 off for 10 M elements. On CUDA it adds in a tree.
    dtype = torch.float64 if gradients[0].device.type == "cpu" else torch.float32
    norms = torch._foreach_norm(gradients, 2, dtype=dtype)
    # In fp32, squares overflow from norms of 1.8e19 on, which a loss scale can reach; there are few, so fp64 is free.
    return torch.stack(norms).double().square().sum()


def _sum_in_rank_order(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group of a 0-d tensor, with the same bits on every rank and in every group with the same values."""
    parts = value.new_empty(group.size())
    dist.all_gather_into_tensor(parts, value.reshape(1), group=group)
    return parts.sum()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), a 0-d tensor like norm; max_norm=0: 1, no clipping (Pascanu et al., 1211.5063).

    A coefficient of an infinite norm is 0 and of NaN is NaN: such a step should be skipped.
    """
    if max_norm == 0:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
