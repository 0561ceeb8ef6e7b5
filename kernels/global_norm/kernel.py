"""Sums of squares in Triton: a partial sum per chunk in fp32, then all of them in one program in fp64.

Both stages add in an order that depends on sizes alone, so the result has the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Tuned
from kernels.multi_tensor import CHUNK, AddressTable, chunk_table, on_device


@dataclass(frozen=True)
class Block:
    """Elements read at a time, and warps."""

    size: int
    num_warps: int


BLOCKS = Tuned(
    (Block(2048, 4), Block(4096, 4), Block(4096, 8), Block(8192, 8)),
    lambda: Block(4096, 8),
)
SECOND_STAGE = 4096
"""Partial sums that the second stage reads at a time."""


@triton.jit
def _global_norm_partial_sums(
    chunks_ptr,  # [chunks, 2] int32
    addresses_ptr,  # [tensors, 2] int64: aligned, address
    sizes_ptr,  # [tensors] int64
    partial_ptr,  # [chunks] fp32
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TYPE: tl.constexpr,
):
    row = tl.load(chunks_ptr + 2 * tl.program_id(0)).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    aligned = tl.load(addresses_ptr + row * 2) != 0
    x_ptr = tl.load(addresses_ptr + row * 2 + 1).to(tl.pointer_type(TYPE))
    size = tl.load(sizes_ptr + row)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(start, tl.minimum(start + CHUNK, size), BLOCK):
        if aligned & (first + BLOCK <= size):
            x = tl.load(tl.multiple_of(x_ptr + first, 16) + offsets).to(tl.float32)
        else:
            x = tl.load(x_ptr + first + offsets, mask=first + offsets < size, other=0.0).to(tl.float32)
        total += x * x
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _global_norm_total(partial_ptr, total_ptr, num_partials, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for first in tl.range(0, num_partials, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        # In fp64 a sum of squares that fp32 holds one by one does not overflow.
        total += tl.load(partial_ptr + offsets, mask=offsets < num_partials, other=0.0).to(tl.float64)
    tl.store(total_ptr, tl.sum(total))


class _Plan:
    """The chunks of tensors of one list of sizes and dtypes; a launch per dtype."""

    def __init__(self, sizes: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device) -> None:
        groups: dict[torch.dtype, list[int]] = {}
        for number, dtype in enumerate(dtypes):
            groups.setdefault(dtype, []).append(number)
        self._groups = [
            (
                dtype,
                numbers,
                chunk_table([sizes[number] for number in numbers], device),
                on_device([sizes[number] for number in numbers], torch.int64, device),
                AddressTable(device),
            )
            for dtype, numbers in groups.items()
        ]
        self._num_chunks = sum(group[2].shape[0] for group in self._groups)

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        partial = torch.empty(self._num_chunks, dtype=torch.float32, device=tensors[0].device)
        total = torch.empty((), dtype=torch.float64, device=tensors[0].device)
        block, done = BLOCKS(), 0
        for dtype, numbers, chunks, sizes, addresses in self._groups:
            if number := chunks.shape[0]:
                _global_norm_partial_sums[(number,)](
                    chunks,
                    addresses([tensors[i] for i in numbers]),
                    sizes,
                    partial[done : done + number],
                    CHUNK=CHUNK,
                    BLOCK=block.size,
                    TYPE=TYPES[dtype],
                    num_warps=block.num_warps,
                )
            done += number
        _global_norm_total[(1,)](partial, total, self._num_chunks, BLOCK=SECOND_STAGE, num_warps=16)
        return total


TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_plan = lru_cache(maxsize=64)(_Plan)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """0-d fp64 over contiguous tensors of one device, at least one."""
    sizes, dtypes = tuple(t.numel() for t in tensors), tuple(t.dtype for t in tensors)
    return _plan(sizes, dtypes, tensors[0].device)(tensors)
