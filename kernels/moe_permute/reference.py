"""Permutation by expert in plain PyTorch. T tokens, k choices each, N = T k, E experts, M rows, D features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def num_rows(num_choices: int, num_experts: int, multiple: int) -> int:
    """M: rows that suffice however the choices fall, a multiple of `multiple`."""
    return -(-(num_choices + num_experts * (multiple - 1)) // multiple) * multiple


def sort_by_expert_reference(experts: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """(choice_of_row [M], row_of_choice [N], ends [E]), all int32, of experts [N]; see op.py."""
    flat = torch.where((experts >= 0) & (experts < num_experts), experts, num_experts)
    order = flat.argsort(stable=True)
    sorted_experts = flat[order]
    bounds = torch.searchsorted(sorted_experts, torch.arange(num_experts + 1, device=flat.device))
    padded = -(-bounds.diff() // multiple) * multiple
    ends = padded.cumsum(0)
    # Rows before this one that belong to other experts, as they are here less as they are without padding.
    shift = F.pad(ends - padded - bounds[:-1], (0, 1))
    place = torch.arange(flat.numel(), device=flat.device)
    rows = torch.where(sorted_experts < num_experts, place + shift[sorted_experts], -1)
    row_of_choice = torch.empty_like(flat).scatter_(0, order, rows)
    size = num_rows(flat.numel(), num_experts, multiple)
    choice_of_row = flat.new_full((size + 1,), -1).scatter_(0, torch.where(rows < 0, size, rows), order)[:size]
    return choice_of_row.int(), row_of_choice.int(), ends.int()


def permute_reference(x: Tensor, choice_of_row: Tensor, k: int) -> Tensor:
    """x [T, D] to rows [M, D], 0 where there is no choice."""
    return _rows_or_zero(x, torch.where(choice_of_row < 0, -1, choice_of_row // k))


def unpermute_reference(rows: Tensor, weights: Tensor, row_of_choice: Tensor) -> Tensor:
    """rows [M, D] to sums [T, D] over a token's choices, with weights [T, k]; a choice without a row counts as 0."""
    chosen = _rows_or_zero(rows, row_of_choice).unflatten(0, weights.shape)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (chosen.to(wide) * weights[..., None].to(wide)).sum(1).to(rows.dtype)


def _rows_or_zero(x: Tensor, index: Tensor) -> Tensor:
    """x[index], 0 where index is -1."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[index]
