"""The collectives data and context parallelism use on raw buffers, under the names of the torch version at hand."""

from __future__ import annotations

import torch
import torch.distributed as dist

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
