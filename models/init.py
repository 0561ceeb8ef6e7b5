"""Initial weights that do not depend on the layout.

An element's value is a function of (seed, parameter name, its index in the whole parameter), drawn from a
counter-based generator. Each rank computes its own shard without communication, and the shards of any layout make the
same parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kernels.philox import normal
from models.initializers import Constant, Initializer
from parallel.regions import Located, local_region, local_tensor

# Elements computed at a time. About ten int64 temporaries of this size are alive: 5 MiB stay in the cache of a core,
# 350 MiB are little for a GPU and enough to keep it busy.
CPU_CHUNK = 1 << 16
DEVICE_CHUNK = 1 << 22


@torch.no_grad()
def initialize(parameters: Mapping[str, Located], initializers: Mapping[str, Initializer], seed: int) -> None:
    """Fill every parameter in place, on each rank its local shard; values are computed in fp32, then cast.

    A DTensor may be replicated or sharded over any of its dims by any number of mesh axes, evenly or not. Raises
    ValueError for a parameter without an initializer, an initializer without a parameter, a parameter on the meta
    device and a partial placement, before anything is written.
    """
    _check(parameters, initializers)
    for name, parameter in parameters.items():
        initializer = initializers[name]
        local = local_tensor(parameter)
        if isinstance(initializer, Constant):
            local.fill_(initializer.value)
            continue
        for place, index in _chunks(parameter, local):
            # The prefix keeps weights apart from other draws under this seed, such as the dropout of a layer.
            local[place] = (normal(seed, f"init.{name}", index) * initializer.std).to(local.dtype)


SCORE_HEAD = "head.weight"
"""The head of a reward model."""


def start_score(weights: Mapping[str, Located], initializers: Mapping[str, Initializer], seed: int) -> None:
    """Fill the head of a reward model, where it is here: a folder of a language model has none for it."""
    if SCORE_HEAD in weights:
        initialize({SCORE_HEAD: weights[SCORE_HEAD]}, {SCORE_HEAD: initializers[SCORE_HEAD]}, seed)


def _check(parameters: Mapping[str, Located], initializers: Mapping[str, Initializer]) -> None:
    found = []
    if missing := sorted(parameters.keys() - initializers.keys()):
        found.append(f"no initializer for {', '.join(missing)}; add each to the model family's initializers")
    if unknown := sorted(initializers.keys() - parameters.keys()):
        found.append(f"initializers for {', '.join(unknown)}, which are not parameters of the model; remove them")
    if meta := [name for name, parameter in parameters.items() if parameter.is_meta]:
        found.append(f"{', '.join(meta)} on the meta device; give the model memory with to_empty(device=...) first")
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor) and any(placement.is_partial() for placement in parameter.placements):
            found.append(f"{name} has placements {parameter.placements}; a parameter is replicated or sharded")
    if found:
        raise ValueError("cannot initialize the model: " + "; ".join(found))


def _chunks(parameter: Located, local: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Pieces of the local shard: (place, index), its elements as local[place] and their indices in the whole parameter.

    place holds one int64 tensor [chunk] per dim, index is int64 [chunk] and counts in row-major order.
    """
    if local.numel() == 0:  # an empty shard, or a rank outside the mesh
        return
    first = [part.start for part in local_region(parameter)]
    chunk = CPU_CHUNK if local.device.type == "cpu" else DEVICE_CHUNK
    for start in range(0, local.numel(), chunk):
        rest = torch.arange(start, min(start + chunk, local.numel()), device=local.device)
        place: list[Tensor] = []
        index = torch.zeros_like(rest)
        stride = 1
        for dim in reversed(range(parameter.ndim)):
            coordinate = rest % local.shape[dim]
            rest = rest // local.shape[dim]
            place.insert(0, coordinate)
            index += (coordinate + first[dim]) * stride
            stride *= parameter.shape[dim]
        yield tuple(place), index
