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
    Slots    where an expert takes at most a given number of a rank's rows, so many slots of each expert, filled with
             rows or zeros (GShard's own way). Sizes are constants and the host waits for nothing; the price is slots
             that stay empty.

Over tp every rank sends the whole rows of its own ep group: their features are cut inside the experts.

E experts, R ranks of the axis, N rows of this rank, M rows that arrive, L slots of an expert for one rank's rows.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Slots:
    """The same with L slots of each expert for each rank. Filled by `plan_slots`."""

    axis: Axis
    per_expert: int  # L
    row_of_slot: Tensor  # [E L] int64
    filled: Tensor  # [E L] bool: whether a slot has a row
    slot_of_row: Tensor  # [N] int64
    travels: Tensor  # [N] bool: whether a row has a slot
    ends: Tensor  # [E/R] int32, of M = E L rows

    def to_experts(self, rows: Tensor) -> Tensor:
        """rows [N, D], sorted by expert, to the slots [M, D] of the experts here; empty ones are 0."""
        slots = _Place.apply(rows, self.row_of_slot, self.filled, self.slot_of_row, self.travels)
        equal = [slots.shape[0] // self.axis.size] * self.axis.size
        arrived = all_to_all(slots, self.axis, sent=equal, received=equal)  # by source, then by expert
        return self._swap(arrived, self.axis.size)

    def from_experts(self, rows: Tensor, *, num_rows: int) -> Tensor:
        """The inverse: slots [M, D] to [num_rows, D] in the order of before, 0 for rows without a slot."""
        equal = [rows.shape[0] // self.axis.size] * self.axis.size
        arrived = self._swap(rows, rows.shape[0] // (self.axis.size * self.per_expert))
        slots = all_to_all(arrived, self.axis, sent=equal, received=equal)
        return _Place.apply(slots, self.slot_of_row, self.travels, self.row_of_slot, self.filled)

    def _swap(self, rows: Tensor, outer: int) -> Tensor:
        """[outer, inner, L] rows to [inner, outer, L]."""
        return rows.unflatten(0, (outer, -1, self.per_expert)).transpose(0, 1).flatten(0, 2)


@torch.no_grad()
def plan_slots(counts: Tensor, axis: Axis, *, per_expert: int, num_rows: int) -> Slots:
    """Slots for num_rows rows sorted by expert, counts [E] int64 of each, none above per_expert, then rows of none."""
    num_experts = counts.shape[0]
    ends = counts.cumsum(0)
    starts = ends - counts
    place = torch.arange(per_expert, device=counts.device)
    row = torch.arange(num_rows, device=counts.device)
    expert = torch.searchsorted(ends, row, right=True).clamp(max=num_experts - 1)
    return Slots(
        axis=axis,
        per_expert=per_expert,
        row_of_slot=(starts[:, None] + place).clamp(max=num_rows - 1).flatten(),
        filled=(place < counts[:, None]).flatten(),
        slot_of_row=(expert * per_expert + row - starts[expert]).clamp(max=num_experts * per_expert - 1),
        travels=row < ends[-1],
        ends=torch.arange(1, num_experts // axis.size + 1, dtype=torch.int32, device=counts.device)
        * (axis.size * per_expert),
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
