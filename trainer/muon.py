"""Muon: momentum, orthogonalised, for hidden matrices, with the work divided over the ranks that share them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trainer.config import OptimConfig
from trainer.gradients import local_gradient, local_shard_of, sharded_axes

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic a x + b x^3 + c x^5 (Jordan, 2024): steep at 0; maps (0, 1] near 1 in 5 steps, not exactly."""


def orthogonalize(matrix: Tensor, *, num_steps: int) -> Tensor:
    """About U V^T of the singular value decomposition of matrix, by Newton-Schulz iteration in matrix's dtype.

    matrix and result: [rows, cols]. After 5 steps, a singular value of at least 1 % of the Frobenius norm lies within
    [0.68, 1.14], one of at least 0.15 % within [0.68, 1.21]; smaller ones end lower, 0 at 0, so a zero matrix gives
    zeros. Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    a, b, c = COEFFICIENTS
    x = matrix.mT if matrix.size(0) > matrix.size(1) else matrix  # the Gram matrix of the shorter side is smaller
    # The bound lies far below any gradient, so that scale does not matter, and above where squares underflow.
    x = x / torch.linalg.vector_norm(x, dtype=torch.float32).clamp(min=1e-15).to(x.dtype)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.size(0) > matrix.size(1) else x


def rows_of(num_rows: int, num_ranks: int, rank: int) -> int:
    """Rows that rank holds of a matrix under Shard(0): blocks of ceil(num_rows / num_ranks), the last ones short."""
    block = -(-num_rows // num_ranks)
    return max(0, min(block, num_rows - rank * block))


def orthogonalize_shards(
    shards: list[Tensor], *, num_rows: list[int], group: dist.ProcessGroup, num_steps: int
) -> list[Tensor]:
    """`orthogonalize` of at most group-size matrices split by rows over the group, one whole matrix per rank.

    shards: this rank's rows of matrix 0, 1, ..., each [rows_of(num_rows[i], N, rank), cols_i], all of one dtype, on the
    group's device. Returns as many tensors of the same shapes. Rank i receives the rows of matrix i from all ranks,
    orthogonalises it and sends the rows back: two all-to-alls, each moving the shards once. Ranks beyond the number of
    matrices only send.
    """
    num_ranks, rank = group.size(), group.rank()
    send_sizes = [shard.numel() for shard in shards] + [0] * (num_ranks - len(shards))
    owned_rows = num_rows[rank] if rank < len(shards) else 0
    cols = shards[rank].size(1) if rank < len(shards) else 0
    receive_sizes = [rows_of(owned_rows, num_ranks, source) * cols for source in range(num_ranks)]

    send = torch.cat([shard.flatten() for shard in shards])
    whole = send.new_empty(sum(receive_sizes))
    dist.all_to_all_single(whole, send, receive_sizes, send_sizes, group=group)
    if owned_rows:
        whole = orthogonalize(whole.view(owned_rows, cols), num_steps=num_steps).flatten()
    returned = torch.empty_like(send)
    dist.all_to_all_single(returned, whole, send_sizes, receive_sizes, group=group)
    pieces = returned.split(send_sizes[: len(shards)])
    return [piece.view_as(shard) for piece, shard in zip(pieces, shards, strict=True)]


Split = tuple[DeviceMesh, int]
"""Mesh, and number of its axis, that a matrix's rows are split over."""


class Muon:
    """Muon (Jordan, 2024), scaled so that AdamW's learning rate and weight decay carry over (2502.16982, eq. 4).

        M <- m M + (1 - m) G;  D = m M + (1 - m) G with Nesterov, else M
        W <- W - lr (0.2 sqrt(max(rows, cols)) orthogonalize(D) + decay W)

    Averaging instead of summing G changes M by the factor 1 - m, which the orthogonalisation removes; it keeps M at the
    size of a gradient. Iterates in bf16 on CUDA, in fp32 on a CPU. Every operation on an element is rounded by itself,
    so the result does not depend on how rows are split, bit for bit. HSDP replicas, and ranks that hold whole matrices,
    do the same work redundantly.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: Mapping[str, float], config: OptimConfig) -> None:
        """decay: weight decay coefficient of each parameter, by name.

        Raises ValueError for a parameter that is not a matrix, or not split as Shard(0) over at most one axis.
        """
        self.config = config
        self.parameters = dict(parameters)
        self.decay = dict(decay)
        self.momentum = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self._rounds = _rounds(self.parameters)

    def state(self) -> dict[str, Tensor]:
        """momentum/NAME of every parameter."""
        return {f"momentum/{name}": t for name, t in self.momentum.items()}

    def update(self, *, lr: float, grad_scale: Tensor, skip: Tensor, num_steps: Tensor) -> None:
        """One update in place; see Optimizer.step. Collective over the mesh axis that matrices are sharded over."""
        skipped = skip.bool()
        for split, names in self._rounds:
            directions = [self._accumulate(name, grad_scale=grad_scale, skipped=skipped) for name in names]
            directions = self._orthogonalize(names, directions, split)
            for name, direction in zip(names, directions, strict=True):
                self._apply(name, direction, lr=lr, skipped=skipped)

    def _accumulate(self, name: str, *, grad_scale: Tensor, skipped: Tensor) -> Tensor:
        """Updates the local momentum and returns the local rows of D, in the parameter's dtype."""
        m = self.config.momentum
        fresh = local_gradient(name, self.parameters[name]) * grad_scale * (1 - m)
        momentum = local_shard_of(self.momentum[name])
        momentum.copy_(torch.where(skipped, momentum, momentum * m + fresh))
        return momentum * m + fresh if self.config.nesterov else momentum

    def _orthogonalize(self, names: list[str], directions: list[Tensor], split: Split | None) -> list[Tensor]:
        """Local rows of the orthogonalised directions of one round, where and in what dtype they were computed."""
        first = self.parameters[names[0]]
        # Offloaded masters are in host memory, their mesh is not: communicate and compute on the mesh's device.
        device = first.device_mesh.device_type if isinstance(first, DTensor) else first.device.type
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        directions = [direction.to(device=device, dtype=dtype) for direction in directions]
        if split is None:
            return [orthogonalize(direction, num_steps=self.config.newton_schulz_steps) for direction in directions]
        mesh, axis = split
        return orthogonalize_shards(
            directions,
            num_rows=[self.parameters[name].size(0) for name in names],
            group=mesh.get_group(axis),
            num_steps=self.config.newton_schulz_steps,
        )

    def _apply(self, name: str, direction: Tensor, *, lr: float, skipped: Tensor) -> None:
        """W <- W - lr (scale direction + decay W) on the local rows."""
        parameter = self.parameters[name]
        local = local_shard_of(parameter)
        scale = 0.2 * math.sqrt(max(parameter.shape))
        step = direction.to(device=local.device, dtype=local.dtype) * (lr * scale)
        # Not W (1 - lr decay) - ...: in bf16 that factor would round W back to itself.
        step += local * (lr * self.decay[name])
        local.copy_(torch.where(skipped, local, local - step))


def _split_of(name: str, parameter: Tensor) -> Split | None:
    """Where the matrix's rows are split; None: every rank holds it whole."""
    if parameter.ndim != 2:
        raise ValueError(f"muon: {name} has shape {tuple(parameter.shape)}; it is for matrices, use adamw for others")
    axes = sharded_axes(parameter)
    if not axes:
        return None
    assert isinstance(parameter, DTensor)
    if len(axes) > 1 or parameter.placements[axes[0]] != Shard(0):
        raise ValueError(
            f"muon: {name} has placements {parameter.placements}; it needs rows split over one mesh axis (Shard(0)) "
            "and copies over all others; use optim.name=adamw with this layout"
        )
    mesh, axis = parameter.device_mesh, axes[0]
    expected = rows_of(parameter.size(0), mesh.size(axis), mesh.get_local_rank(axis))
    if parameter.to_local().size(0) != expected:
        raise ValueError(
            f"muon: this rank holds {parameter.to_local().size(0)} of the {parameter.size(0)} rows of {name}, not the "
            f"{expected} that Shard(0) over {mesh.size(axis)} ranks gives it"
        )
    return mesh, axis


def _rounds(parameters: Mapping[str, Tensor]) -> list[tuple[Split | None, list[str]]]:
    """Names in rounds of as many matrices as the axis they are split over has ranks, so that each rank gets one.

    Within a mesh axis, matrices of one shape follow each other: the ranks of a round then have the same amount of work.
    """
    splits: dict[Split | None, list[str]] = {}
    for name, parameter in parameters.items():
        splits.setdefault(_split_of(name, parameter), []).append(name)
    rounds: list[tuple[Split | None, list[str]]] = []
    for split, names in splits.items():
        names.sort(key=lambda name: (parameters[name].numel(), tuple(parameters[name].shape)), reverse=True)
        size = 1 if split is None else split[0].size(split[1])
        rounds += [(split, names[start : start + size]) for start in range(0, len(names), size)]
    return rounds
