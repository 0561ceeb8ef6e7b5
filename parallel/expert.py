"""Expert parallelism: experts are shared out over the ep axis, and tokens travel to theirs and back (2006.16668).

The ranks of ep are data-parallel for all other parameters: each has tokens of its own. Rank r of R holds experts
r E/R and on. In a layer every rank sorts its choices by expert, so that those for one rank are neighbours, and

    all-to-all    rows for each rank -> rows from each rank, sorted by expert within each source
    permute       by expert alone: what a grouped linear layer wants
    the experts
    permute, all-to-all    the same way back

Each step's backward is the opposite step. An expert has then seen the choices of all R ranks, and its gradient is
summed over the remaining data-parallel ranks only, those with the same experts (axis expert_shard, and replicas).

Two ways to travel, with the same result:

    Routes   each row that has an expert, and no other. How many a rank gets is known to the devices only, and the host,
             which has to allocate them, waits once per layer and pass: in `plan_routes`.
    Buffers  room for a constant number of rows from each rank to each, filled with rows, then with zeros. The host
             waits for nothing and a compiled graph holds it all; the price is the memory and traffic of what stays
             empty (an expert does not multiply it). Rows that find no room are counted, never forgotten: whoever
             reads the count must not use the result (trainer/step.py makes no update of it).

Where an expert takes at most so many of a rank's rows, or every pair of ranks has room for all, none is left over:
`rows_per_pair` knows both bounds.

Over tp every rank sends the whole rows of its own ep group: their features are cut inside the experts.

E experts, R ranks of the axis, N rows of this rank, M rows that arrive, C rows from one rank to another at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import Axis, all_to_all


@dataclass(frozen=True)
class Routes:
    """How the rows of one layer and micro-batch travel. Filled by `plan_routes`."""

    axis: Axis
    sent: list[int]  # rows from here to each rank
    received: list[int]  # rows from each rank to here
    by_expert: Tensor  # [M] int64: number, as they arrived, of the rows sorted by expert
    as_arrived: Tensor  # [M] int64: the inverse permutation
    ends: Tensor  # [E/R] int32: rows of local expert e, sorted, end before ends[e]

    def to_experts(self, rows: Tensor) -> Tensor:
        """rows [N, D], sorted by expert, to those [M, D] of the experts here, sorted by expert. Rows of none stay."""
        arrived = all_to_all(rows[: sum(self.sent)], self.axis, sent=self.sent, received=self.received)
        return permute(arrived, self.by_expert, self.as_arrived)

    def from_experts(self, rows: Tensor, *, num_rows: int) -> Tensor:
        """The inverse: rows [M, D] to [num_rows, D] in the order of before, 0 for those that stayed."""
        arrived = permute(rows, self.as_arrived, self.by_expert)
        back = all_to_all(arrived, self.axis, sent=self.received, received=self.sent)
        return F.pad(back, (0, 0, 0, num_rows - back.shape[0]))


@torch.no_grad()
def plan_routes(counts: Tensor, axis: Axis) -> Routes:
    """Routes of rows sorted by expert, counts [E] int64 of each. Collective; the host waits for the device."""
    by_rank = counts.view(axis.size, -1)  # [R, E/R]
    equal = [1] * axis.size
    arriving = all_to_all(by_rank, axis, sent=equal, received=equal)  # [R, E/R]: from each rank, for each expert here
    sent, received = torch.stack([by_rank.sum(1), arriving.sum(1)]).tolist()
    local = torch.arange(arriving.shape[1], device=counts.device).repeat(axis.size)
    expert = local.repeat_interleave(arriving.flatten(), output_size=sum(received))
    by_expert = expert.argsort(stable=True)
    return Routes(
        axis=axis,
        sent=sent,
        received=received,
        by_expert=by_expert,
        as_arrived=inverse_of(by_expert),
        ends=arriving.sum(0).cumsum(0).to(torch.int32),
    )


def rows_per_pair(
    num_rows: int, *, size: int, num_experts: int, top_k: int, buffer: float, limit: int | None
) -> int | None:
    """C: rows that a rank makes room for from each rank to each. None: `Routes`, for no bound is known or asked for.

    Of num_rows = top_k x tokens rows a rank gets no more of a token's than it has experts. limit: how often an expert
    is chosen at most; None: not known. buffer: room asked for, in equal shares num_rows / size; 0: enough for all,
    where limit says how much that is. Only a buffer below these bounds may leave rows over.
    """
    if buffer == 0 and limit is None:
        return None
    local = num_experts // size
    enough = num_rows // top_k * min(top_k, local)
    if limit is not None:
        enough = min(enough, local * limit)
    return enough if buffer == 0 else min(enough, math.ceil(buffer * num_rows / size))


@dataclass(frozen=True)
class Buffers:
    """The same with room for C rows from each rank to each. Filled by `plan_buffers`."""

    axis: Axis
    row_of_place: Tensor  # [R C] int64: place c of rank r is r C + c
    filled: Tensor  # [R C] bool: whether a place has a row
    place_of_row: Tensor  # [N] int64
    travels: Tensor  # [N] bool: whether a row has a place
    by_expert: Tensor  # [M] int64, as in Routes, M = R C: empty places come last
    as_arrived: Tensor  # [M] int64
    ends: Tensor  # [E/R] int32
    left_over: Tensor  # 0-d fp32: rows that have an expert and found no place

    def to_experts(self, rows: Tensor) -> Tensor:
        """rows [N, D], sorted by expert, to those [M, D] of the experts here, sorted by expert, then rows of 0."""
        places = _Place.apply(rows, self.row_of_place, self.filled, self.place_of_row, self.travels)
        return permute(self._exchange(places), self.by_expert, self.as_arrived)

    def from_experts(self, rows: Tensor, *, num_rows: int) -> Tensor:
        """The inverse: rows [M, D] to [num_rows, D] in the order of before, 0 for those that stayed."""
        places = self._exchange(permute(rows, self.as_arrived, self.by_expert))
        return _Place.apply(places, self.place_of_row, self.travels, self.row_of_place, self.filled)

    def _exchange(self, places: Tensor) -> Tensor:
        equal = [places.shape[0] // self.axis.size] * self.axis.size
        return all_to_all(places, self.axis, sent=equal, received=equal)


@torch.no_grad()
def plan_buffers(counts: Tensor, axis: Axis, *, per_pair: int, num_rows: int) -> Buffers:
    """Buffers for num_rows rows sorted by expert, counts [E] int64 of each, then rows of none. Collective."""
    by_rank = counts.view(axis.size, -1)  # [R, E/R]
    ends = by_rank.sum(1).cumsum(0)  # [R], of the rows for each rank
    starts = ends - by_rank.sum(1)
    fitting = (by_rank.cumsum(1).clamp(max=per_pair)).diff(dim=1, prepend=by_rank.new_zeros(axis.size, 1))
    equal = [1] * axis.size
    arriving = all_to_all(fitting, axis, sent=equal, received=equal)  # [R, E/R]: from each rank, for each expert here
    place = torch.arange(per_pair, device=counts.device).repeat(axis.size, 1)  # [R, C]
    row = torch.arange(num_rows, device=counts.device)
    rank = torch.searchsorted(ends, row, right=True).clamp(max=axis.size - 1)
    # Of an empty place the expert is E/R, which none has: a stable sort leaves it behind all others.
    by_expert = torch.searchsorted(arriving.cumsum(1), place, right=True).flatten().argsort(stable=True)
    return Buffers(
        axis=axis,
        row_of_place=(starts[:, None] + place).clamp(max=num_rows - 1).flatten(),
        filled=(place < fitting.sum(1, keepdim=True)).flatten(),
        place_of_row=rank * per_pair + (row - starts[rank]).clamp(max=per_pair - 1),
        travels=(row < ends[-1]) & (row - starts[rank] < per_pair),
        by_expert=by_expert,
        as_arrived=inverse_of(by_expert),
        ends=arriving.sum(0).cumsum(0).to(torch.int32),
        left_over=(by_rank.sum() - fitting.sum()).float(),
    )


def inverse_of(permutation: Tensor) -> Tensor:
    """The permutation [N] int64 that undoes another."""
    numbers = torch.arange(permutation.shape[0], device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, numbers)


def permute(rows: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
    """rows[permutation], of [N, D]. Backward gathers with the inverse: no atomic additions, one order."""
    return _Permute.apply(rows, permutation, inverse)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[permutation]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class _Place(torch.autograd.Function):
    """rows[index] where `valid`, else 0; back_index and back_valid say the same of the opposite direction."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, valid: Tensor, back_index: Tensor, back_valid: Tensor) -> Tensor:
        ctx.save_for_backward(back_index, back_valid)
        return torch.where(valid[:, None], rows[index], 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        back_index, back_valid = ctx.saved_tensors
        return torch.where(back_valid[:, None], grad[back_index], 0), None, None, None, None
