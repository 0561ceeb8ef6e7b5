"""Linear layers whose frozen weight is in 4 bits (QLoRA, 2305.14314): a parameter `nf4` in place of `weight`.

It holds the bytes of kernels/nf4/pieces.py: on each rank of tp those of its own rows or columns, with the bits that the
whole matrix has, so that a model is the same in every layout. They are kept as numbers of the dtype that is computed
with, which nothing ever reads as such: fully_shard casts parameters to that dtype when it gathers them, and these come
through as they are. So they are sharded, gathered and offloaded like any weight, at a quarter of the traffic.

A part of a fused layer is a matrix of its own, as it is in separate layers and for bitsandbytes; so is each expert,
whose bytes are a row of the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from kernels.nf4.pieces import Piece, Rows
from models.layers.moe import IN_FEATURES, OUT_FEATURES, GroupedLinear
from parallel.fused import Parts
from parallel.regions import Located, cuts_dim, local_region, local_tensor
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, chunk_bounds, empty_parameter

NF4 = "nf4"


def quantize_layer(layer: nn.Module, dtype: torch.dtype) -> None:
    """Give a linear layer on meta, plain or cut over tp (or ep), a parameter for its weight in NF4, and take the weight
    away.

    Raises ValueError where rows of this rank are no whole blocks.
    """
    if isinstance(layer, GroupedLinear):
        _quantize_experts(layer, dtype)
        return
    module: Any = layer
    piece = Piece(*part_here(module))
    size = piece.num_bytes // dtype.itemsize
    if isinstance(module.weight, DTensor):
        mesh = module.weight.device_mesh
        cut = isinstance(layer, ColumnParallelLinear | RowParallelLinear)  # each rank has other bytes, of one length
        whole = size * mesh.size() if cut else size
        placed = empty_parameter(whole, mesh=mesh, placement=Shard(0) if cut else Replicate())
        parameter = nn.Parameter(placed.detach().to(dtype), requires_grad=False)
    else:
        parameter = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)
    del module.weight
    module.nf4, module.piece = parameter, piece
    if isinstance(getattr(module, "parts", None), Parts):
        module.parts_of = {**getattr(module, "parts_of", {}), NF4: None}


def _quantize_experts(layer: GroupedLinear, dtype: torch.dtype) -> None:
    module: Any = layer
    num_experts, out_features, in_features = layer.weight.shape
    _, rows, columns = local_region(layer.weight)
    here = Rows(rows.start, rows.stop - rows.start, out_features)
    piece = Piece((here,), columns.start, columns.stop - columns.start, in_features)
    size = piece.num_bytes // dtype.itemsize
    if isinstance(layer.weight, DTensor):
        mesh, cuts = layer.weight.device_mesh, layer.weight.placements
        # Over tp each rank has other bytes of every expert, of one length.
        over_tp = [isinstance(cut, Shard) and cut.dim in (OUT_FEATURES, IN_FEATURES) for cut in cuts]
        whole = size * math.prod(mesh.size(axis) for axis, cut in enumerate(over_tp) if cut)
        placements = [Shard(1) if tp else cut for tp, cut in zip(over_tp, cuts, strict=True)]
        placed = empty_parameter(num_experts, whole, mesh=mesh, placement=placements)
        parameter = nn.Parameter(placed.detach().to(dtype), requires_grad=False)
    else:
        parameter = nn.Parameter(torch.empty(num_experts, size, dtype=dtype, device="meta"), requires_grad=False)
    del module.weight
    module.nf4, module.piece = parameter, piece


def part_here(layer: Any) -> tuple[tuple[Rows, ...], int, int, int]:
    """Which rows of which matrices this rank multiplies with, the first and the number of their columns, and of how
    many."""
    out_features, in_features = layer.weight.shape
    parts = getattr(layer, "parts", None)
    if isinstance(parts, Parts):
        rank = layer.axis.rank if isinstance(layer, ColumnParallelLinear) else 0
        rows = tuple(Rows(rank * n, n, whole) for n, whole in zip(parts.sizes(), parts.rows.values(), strict=True))
        return rows, 0, in_features, in_features
    if isinstance(layer, ColumnParallelLinear):
        first, last = layer.rows
        return (Rows(first, last - first, out_features),), 0, in_features, in_features
    first, last = 0, in_features
    if isinstance(layer, RowParallelLinear):
        first, last = chunk_bounds(in_features, layer.axis.size, layer.axis.rank)
    return (Rows(0, out_features, out_features),), first, last - first, in_features


def separate_names(layer: nn.Module, name: str) -> list[str]:
    """Names of the layers that one called `name` is made of, as of separate layers."""
    parts = getattr(layer, "parts", None)
    if not isinstance(parts, Parts):
        return [name]
    return [weight.removesuffix(".weight") for weight in parts.names(f"{name}.weight").values()]


def quantized_layers(model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    """Layers in NF4 with the names of the weights they are made of, as of separate layers."""
    for name, module in model.named_modules():
        if hasattr(module, "piece"):
            yield module, [f"{one}.weight" for one in separate_names(module, name)]


@torch.no_grad()
def fill_quantized(model: nn.Module, read: Callable[[str, Located], None]) -> None:
    """Quantize every layer in NF4 on its device, one at a time.

    read(name, tensor): fill a tensor in host memory with a weight: a whole one, or a DTensor of the experts that this
    rank has of a stack.
    """
    for module, names in quantized_layers(model):
        layer: Any = module
        piece: Piece = layer.piece
        stored = local_tensor(layer.nf4)
        if isinstance(module, GroupedLinear):
            _fill_experts(layer, names[0], read)
            continue
        device, dtype = stored.device, stored.dtype
        weights = []
        for name, rows in zip(names, piece.rows, strict=True):
            weight = torch.empty(rows.of, piece.of_columns, dtype=dtype)
            read(name, weight)
            weights.append(weight.to(device))
        # Over data-parallel ranks the bytes of this rank of tp are cut once more.
        packed = piece.quantize(weights).view(dtype)
        region = local_region(layer.nf4)[0]
        first = region.start % len(packed)
        stored.copy_(packed[first : first + stored.numel()])


def _fill_experts(layer: Any, name: str, read: Callable[[str, Located], None]) -> None:
    piece: Piece = layer.piece
    stored, (experts, elements) = local_tensor(layer.nf4), local_region(layer.nf4)
    size = piece.num_bytes // stored.dtype.itemsize
    stack = torch.empty(experts.stop - experts.start, piece.rows[0].of, piece.of_columns, dtype=stored.dtype)
    read(name, _placed_by_experts(stack, layer.nf4))
    first = elements.start % size  # of this rank of tp, whose bytes may be cut once more
    for row, weight in zip(stored, stack, strict=True):
        packed = piece.quantize([weight.to(stored.device)]).view(stored.dtype)
        row.copy_(packed[first : first + len(row)])


def _placed_by_experts(stack: Tensor, like: Tensor) -> Tensor:
    """stack [experts here, rows, columns] as a part of that of all experts, as those of `like` lie on ranks."""
    if not isinstance(like, DTensor):
        return stack
    placements = [cut if cuts_dim(cut, 0) else Replicate() for cut in like.placements]
    shape = torch.Size([like.shape[0], *stack.shape[1:]])
    return DTensor.from_local(stack, like.device_mesh, placements, run_check=False, shape=shape, stride=stack.stride())
