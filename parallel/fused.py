"""Projections of one input as one parameter and one product, and which of its rows are whose.

q, k and v of attention, or gate and up of an MLP, read the same input. As one matrix they are one GEMM forward and two
backward instead of three and six (or two and four), read their input once, and quantize it once in fp8. Over R ranks
of tp its rows are

    [q_0; k_0; v_0; q_1; k_1; v_1; ... ]        q_r: the r-th of R equal parts of q's rows

so that Shard(0) gives each rank its rows of all, and the product there is [q_r k_r v_r], or gate beside up. The order
of rows depends on tp for that, and nothing but this file knows it. What must not depend on a layout is said of q, k and
v: initial values, checkpoints, Hugging Face files, Muon's matrices, the bits of stochastic rounding. They get `Piece`s
or views of the parameter, under the names that separate layers have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.regions import Located, Piece, local_region, local_tensor


class PartRows(NamedTuple):
    """The rows of a part among some rows of the fused matrix."""

    begin: int  # counted from the first of these rows
    num_rows: int  # may be 0
    first: int  # number of the first one in the part


@dataclass(frozen=True)
class Parts:
    """What a fused layer is made of; the attribute `parts` of the layer."""

    rows: Mapping[str, int]  # features out of each part by name, over all ranks
    ranks: int = 1  # of tp

    def sizes(self) -> list[int]:
        """Features of each part in the product of one rank."""
        return [rows // self.ranks for rows in self.rows.values()]

    def names(self, name: str) -> dict[str, str]:
        """Names of the parameters of separate layers by part: a.qkv.weight is made of a.q.weight, ..."""
        above, _, kind = name.rpartition(".")
        prefix = above.rpartition(".")[0]
        return {part: f"{prefix}.{part}.{kind}" if prefix else f"{part}.{kind}" for part in self.rows}

    def rows_among(self, part: str, first: int, last: int) -> PartRows:
        """Of a part among the rows first to last - 1 of the fused matrix, which lie in one tp rank's.

        Raises ValueError for rows of several ranks, among which a part has several runs.
        """
        sizes = dict(zip(self.rows, self.sizes(), strict=True))
        block = sum(sizes.values())
        rank = min(first // block, self.ranks - 1)
        if last > (rank + 1) * block:
            raise ValueError(f"rows {first} to {last} of a fused parameter are those of several ranks of tp")
        begin = rank * block
        for name, size in sizes.items():
            if name == part:
                start, stop = max(first, begin), min(last, begin + size)
                count = max(stop - start, 0)
                return PartRows(start - first if count else 0, count, rank * size + (start - begin if count else 0))
            begin += size
        raise KeyError(part)

    def separate(self, tensor: Tensor) -> dict[str, Located]:
        """Each part of a tensor that is laid out as the fused parameter is, in the same memory: a view of a plain
        tensor, and what this rank has of a DTensor."""
        local, region = local_tensor(tensor.detach()), local_region(tensor)
        found: dict[str, Located] = {}
        for part, rows in self.rows.items():
            begin, count, first = self.rows_among(part, region[0].start, region[0].stop)
            view = local[begin : begin + count]
            if isinstance(tensor, DTensor):
                shape = torch.Size((rows, *tensor.shape[1:]))
                found[part] = Piece(view, shape, (slice(first, first + count), *region[1:]), tensor)
            else:
                found[part] = view
        return found


NOTHING_FUSED: Mapping[str, Parts] = MappingProxyType({})


def stands_for(layer: nn.Module, name: str) -> None:
    """Say that in other layouts a layer is a part of the fused layer `name` beside it; what is decided per layer (its
    scales in fp8, whether it is in fp8) is then decided for both alike."""
    layer.part_of = name  # type: ignore[assignment]


def is_part(layer: nn.Module) -> bool:
    """Whether a layer is a part of a fused one in other layouts."""
    return hasattr(layer, "part_of")


def name_in_every_layout(layer: nn.Module, name: str) -> str:
    """Of a layer called `name` here: that of the fused layer if it is part of one in other layouts."""
    if not is_part(layer):
        return name
    above, dot, _ = name.rpartition(".")
    return f"{above}{dot}{layer.part_of}"


def fused_parameters(model: nn.Module) -> dict[str, Parts]:
    """What the fused parameters of a model are made of, by name."""
    return {
        f"{layer}.{kind}" if layer else kind: parts
        for layer, module in model.named_modules()
        for kind, parts in parts_by_kind(module).items()
    }


def parts_by_kind(layer: nn.Module) -> dict[str, Parts]:
    """What each parameter of a fused layer is made of, by its name there; empty for other layers.

    All as the weight, but for those in its attribute `parts_of` (models/lora.py), some of which have no parts (None).
    """
    parts = getattr(layer, "parts", None)
    if not isinstance(parts, Parts):
        return {}
    others: Mapping[str, Parts | None] = getattr(layer, "parts_of", NOTHING_FUSED)
    of_kind = {kind: others.get(kind, parts) for kind, _ in layer.named_parameters(recurse=False)}
    return {kind: parts for kind, parts in of_kind.items() if parts is not None}


def separate(tensors: Mapping[str, Tensor], fused: Mapping[str, Parts]) -> dict[str, Located]:
    """tensors with the parts of fused parameters in place of these, under the names of separate layers.

    Names may begin with a kind of state, as in exp_avg/NAME, whose tensors lie as their parameters do.
    """
    return dict(_separated(tensors, fused))


def _separated(tensors: Mapping[str, Tensor], fused: Mapping[str, Parts]) -> Iterator[tuple[str, Located]]:
    for key, tensor in tensors.items():
        kind, slash, name = key.rpartition("/")
        if name not in fused:
            yield key, tensor
            continue
        parts = fused[name].separate(tensor)
        for part, its_name in fused[name].names(name).items():
            yield f"{kind}{slash}{its_name}", parts[part]
