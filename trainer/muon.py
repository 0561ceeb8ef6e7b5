"""Muon: momentum, orthogonalised, for hidden matrices, with the work divided over the ranks that share them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from parallel.fused import NOTHING_FUSED, Parts
from parallel.regions import local_region
from parallel.tensor import chunk_bounds
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


def share_of(length: int, num_ranks: int, rank: int) -> int:
    """How many of `length` indices a cut over num_ranks gives to rank: ceil(length / num_ranks), the last ones less."""
    first, last = chunk_bounds(length, num_ranks, rank)
    return last - first


Axis = tuple[DeviceMesh, int]
"""A mesh, and the number of its axis."""


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a matrix that is cut over some axes, in the order in which the cuts are to be undone."""

    dims: tuple[int, ...]  # that each axis cuts
    shapes: tuple[tuple[int, int], ...]  # of what the rank holds, before a cut is undone, after one, ...; last: whole
    parts: Parts | None = None  # what a fused matrix is made of

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        dims: Sequence[int],
        sizes: Sequence[int],
        ranks: Sequence[int],
        parts: Parts | None = None,
    ) -> Piece:
        """Of the whole matrix's shape; sizes, ranks: how many ranks each axis has, and which of them this one is."""
        shapes = [shape]
        for dim, size, rank in reversed(list(zip(dims, sizes, ranks, strict=True))):
            shapes.insert(0, _with_dim(shapes[0], dim, share_of(shapes[0][dim], size, rank)))
        return cls(tuple(dims), tuple(shapes), parts)

    def on(self, rank: int, num_ranks: int) -> tuple[int, int]:
        """Shape of the piece that a rank of the first axis holds."""
        dim, together = self.dims[0], self.shapes[1]
        return _with_dim(together, dim, share_of(together[dim], num_ranks, rank))

    def after_one(self) -> Piece:
        """When the cut of the first axis has been undone."""
        return Piece(self.dims[1:], self.shapes[1:], self.parts)


def _with_dim(shape: tuple[int, int], dim: int, length: int) -> tuple[int, int]:
    return (length, shape[1]) if dim == 0 else (shape[0], length)


def orthogonalize_parts(matrix: Tensor, parts: Parts | None, *, num_steps: int) -> Tensor:
    """`orthogonalize` of each matrix that a fused one (parallel/fused.py) is made of; None: of the matrix itself."""
    if parts is None:
        return orthogonalize(matrix, num_steps=num_steps)
    of_ranks = matrix.unflatten(0, (parts.ranks, -1)).split(parts.sizes(), dim=1)  # each [R, rows / R, cols]
    results = [orthogonalize(part.flatten(0, 1), num_steps=num_steps).reshape(part.shape) for part in of_ranks]
    return torch.cat(results, dim=1).flatten(0, 1)


def orthogonalize_pieces(
    tensors: list[Tensor], pieces: list[Piece], *, groups: Sequence[dist.ProcessGroup], num_steps: int
) -> list[Tensor]:
    """`orthogonalize_parts` of matrices that are cut over the groups, each whole matrix on one rank.

    tensors: this rank's piece of matrix 0, 1, ..., of the shapes that `pieces` say, all of one dtype, on the device of
    the groups. Returns as many tensors of the same shapes. The matrices are dealt out over the first group like cards:
    its rank r receives the pieces of matrices r, r + N, ... and puts them together, which are then dealt out over the
    next group, and so on: a rank ends with one whole matrix if there are as many as the groups have ranks together. The
    pieces of the results go back the same way: per group two all-to-alls, each moving what the rank holds once. Ranks
    that were dealt nothing only send.
    """
    if not groups:
        return [
            orthogonalize_parts(tensor, piece.parts, num_steps=num_steps)
            for tensor, piece in zip(tensors, pieces, strict=True)
        ]
    if not tensors:
        return []  # on all ranks of the groups that are left
    group = groups[0]
    num_ranks, rank = group.size(), group.rank()
    hands = [range(to, len(tensors), num_ranks) for to in range(num_ranks)]
    send = torch.cat([tensors[i].flatten() for hand in hands for i in hand])
    send_sizes = [sum(tensors[i].numel() for i in hand) for hand in hands]
    mine = [pieces[i] for i in hands[rank]]
    shapes = [[piece.on(source, num_ranks) for piece in mine] for source in range(num_ranks)]
    receive_sizes = [sum(math.prod(shape) for shape in row) for row in shapes]

    received = send.new_empty(sum(receive_sizes))
    dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=group)
    parts = [_cut(row, own) for row, own in zip(received.split(receive_sizes), shapes, strict=True)]
    together = [torch.cat(column, piece.dims[0]) for piece, column in zip(mine, zip(*parts, strict=True), strict=True)]
    together = orthogonalize_pieces(
        together, [piece.after_one() for piece in mine], groups=groups[1:], num_steps=num_steps
    )
    apart = [
        matrix.split([row[number][piece.dims[0]] for row in shapes], piece.dims[0])
        for number, (matrix, piece) in enumerate(zip(together, mine, strict=True))
    ]
    back = torch.cat([send.new_empty(0), *(part.flatten() for column in zip(*apart, strict=True) for part in column)])
    returned = torch.empty_like(send)
    dist.all_to_all_single(returned, back, send_sizes, receive_sizes, group=group)
    order = [i for hand in hands for i in hand]
    results = dict(zip(order, _cut(returned, [pieces[i].shapes[0] for i in order]), strict=True))
    return [results[i] for i in range(len(tensors))]


def _cut(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Tensors of these shapes that lie one after the other."""
    return [part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]


class Muon:
    """Muon (Jordan, 2024), scaled so that AdamW's learning rate and weight decay carry over (2502.16982, eq. 4).

        M <- m M + (1 - m) G;  D = m M + (1 - m) G with Nesterov, else M
        W <- W - lr (0.2 sqrt(max(rows, cols)) orthogonalize(D) + decay W)

    Averaging instead of summing G changes M by the factor 1 - m, which the orthogonalisation removes; it keeps M at the
    size of a gradient. Iterates in bf16 on CUDA, in fp32 on a CPU. Every operation on an element is rounded by itself,
    so the result does not depend on how matrices are cut, bit for bit.

    Who does what: a matrix is cut over `shard`, over `tp`, or both, by rows or columns. Ranks that hold different parts
    share out the matrices, in rounds of one for each (`orthogonalize_pieces`); a stage of a pipeline has its own. Ranks
    that hold the same do the same work redundantly: HSDP replicas, of matrices that tp does not cut (routers, the low
    ranks of latent attention, keys and values of fewer heads than ranks) those of tp, and at ZeRO stage 0 all of data
    parallelism. Fused matrices travel as one; their parts are orthogonalised and scaled each by itself.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decay: Mapping[str, float],
        config: OptimConfig,
        *,
        fused: Mapping[str, Parts] = NOTHING_FUSED,
    ) -> None:
        """decay: weight decay coefficient of each parameter, by name. fused: what fused ones are made of, by name.

        Raises ValueError for a parameter that is not a matrix.
        """
        self.config = config
        self.parameters = dict(parameters)
        self.decay = dict(decay)
        self.momentum = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self._places = {name: _place_of(name, p, fused.get(name)) for name, p in self.parameters.items()}
        self._rounds = _rounds(self._places)

    def state(self) -> dict[str, Tensor]:
        """momentum/NAME of every parameter."""
        return {f"momentum/{name}": t for name, t in self.momentum.items()}

    def update(self, *, lr: float, grad_scale: Tensor, skip: Tensor, num_steps: Tensor) -> None:
        """One update in place; see Optimizer.step. Collective over the mesh axes that matrices are cut over."""
        skipped = skip.bool()
        for axes, names in self._rounds:
            directions = [self._accumulate(name, grad_scale=grad_scale, skipped=skipped) for name in names]
            directions = self._orthogonalize(names, directions, axes)
            for name, direction in zip(names, directions, strict=True):
                self._apply(name, direction, lr=lr, skipped=skipped)

    def _accumulate(self, name: str, *, grad_scale: Tensor, skipped: Tensor) -> Tensor:
        """Updates the local momentum and returns the local piece of D, in the parameter's dtype."""
        m = self.config.momentum
        fresh = local_gradient(name, self.parameters[name]) * grad_scale * (1 - m)
        momentum = local_shard_of(self.momentum[name])
        momentum.copy_(torch.where(skipped, momentum, momentum * m + fresh))
        return momentum * m + fresh if self.config.nesterov else momentum

    def _orthogonalize(self, names: list[str], directions: list[Tensor], axes: Sequence[Axis]) -> list[Tensor]:
        """Local pieces of the orthogonalised directions of one round, where and in what dtype they were computed."""
        first = self.parameters[names[0]]
        # Offloaded masters are in host memory, their mesh is not: communicate and compute on the mesh's device.
        device = first.device_mesh.device_type if isinstance(first, DTensor) else first.device.type
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return orthogonalize_pieces(
            [direction.to(device=device, dtype=dtype) for direction in directions],
            [self._places[name][1] for name in names],
            groups=[mesh.get_group(axis) for mesh, axis in axes],
            num_steps=self.config.newton_schulz_steps,
        )

    def _apply(self, name: str, direction: Tensor, *, lr: float, skipped: Tensor) -> None:
        """W <- W - lr (scale direction + decay W) on the local piece."""
        parameter, parts = self.parameters[name], self._places[name][1].parts
        local = local_shard_of(parameter)
        step = direction.to(device=local.device, dtype=local.dtype)
        for rows, its_rows in _runs(parameter, parts):
            step[rows] *= lr * (0.2 * math.sqrt(max(its_rows, parameter.size(1))))
        # Not W (1 - lr decay) - ...: in bf16 that factor would round W back to itself.
        step += local * (lr * self.decay[name])
        local.copy_(torch.where(skipped, local, local - step))


def _runs(parameter: Tensor, parts: Parts | None) -> list[tuple[slice, int]]:
    """The rows here of each matrix in a parameter, and how many rows that matrix has as a whole."""
    if parts is None:
        return [(slice(None), parameter.size(0))]
    here = local_region(parameter)[0]
    found = [(parts.rows_among(part, here.start, here.stop), rows) for part, rows in parts.rows.items()]
    return [(slice(run.begin, run.begin + run.num_rows), rows) for run, rows in found]


def _place_of(name: str, parameter: Tensor, parts: Parts | None) -> tuple[tuple[Axis, ...], Piece]:
    """The axes that cut the matrix, in the order in which their cuts are undone, and what of it lies here."""
    if parameter.ndim != 2:
        raise ValueError(f"muon: {name} has shape {tuple(parameter.shape)}; it is for matrices, use adamw for others")
    shape = (parameter.size(0), parameter.size(1))
    axes = sharded_axes(parameter)
    if not axes:
        return (), Piece.of(shape, (), (), (), parts)
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    dim_of = {axis: _dim_of(placements[axis]) for axis in axes}
    if len(set(dim_of.values())) < len(axes):
        # Cuts of one dim are undone from the last one made, and a _StridedShard was made after all others
        # (parallel/regions.py). Cuts of different dims may be undone in any order: in that of the mesh, all alike.
        axes = sorted(axes, key=lambda axis: isinstance(placements[axis], _StridedShard))[::-1]
    piece = Piece.of(
        shape,
        [dim_of[axis] for axis in axes],
        [mesh.size(a) for a in axes],
        [mesh.get_local_rank(a) for a in axes],
        parts,
    )
    if tuple(parameter.to_local().shape) != piece.shapes[0]:
        raise ValueError(
            f"muon: this rank holds {tuple(parameter.to_local().shape)} of {name}, not the {piece.shapes[0]} that "
            f"placements {placements} over {tuple(mesh.shape)} ranks give it"
        )
    return tuple((mesh, axis) for axis in axes), piece


def _dim_of(placement: Placement) -> int:
    assert isinstance(placement, (Shard, _StridedShard))
    return placement.dim


def _rounds(places: Mapping[str, tuple[tuple[Axis, ...], Piece]]) -> list[tuple[tuple[Axis, ...], list[str]]]:
    """Names in rounds of as many matrices as the axes they are cut over have ranks, so that each rank gets one.

    Among those cut over the same axes, matrices of one shape follow each other: the ranks of a round then have the same
    amount of work.
    """
    by_axes: dict[tuple[Axis, ...], list[str]] = {}
    for name, (axes, _) in places.items():
        by_axes.setdefault(axes, []).append(name)
    rounds: list[tuple[tuple[Axis, ...], list[str]]] = []
    for axes, names in by_axes.items():
        whole = {name: places[name][1].shapes[-1] for name in names}
        names.sort(key=lambda name: (math.prod(whole[name]), whole[name]), reverse=True)
        size = math.prod(mesh.size(axis) for mesh, axis in axes)
        rounds += [(axes, names[start : start + size]) for start in range(0, len(names), size)]
    return rounds
