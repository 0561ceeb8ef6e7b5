"""Which parameters a rank of a pipeline has, and what tensor and expert parallelism leave of each.

The rules are those of the layers (parallel/tensor.py, models/layers/moe.py), by the name of the layer: whole on every
rank of tp; cut by features in at the end of a branch; cut by features out otherwise. tests/planner/test_state.py holds
them against the real layers.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from models.config import ModelConfig
from models.decoder import Decoder
from parallel.fused import fused_parameters
from parallel.pipeline.stages import Stage
from parallel.tensor import chunk_bounds

WHOLE = ("q_a", "kv_a", "project", "router", "positions")
CUT_BY_INPUT = ("o", "down")
TABLES = ("embedding.", "positions.", "head.")


@dataclass(frozen=True)
class Parameter:
    """A parameter with all that its cost depends on; layers of one kind have equal ones."""

    name: str  # without the number of its layer: blocks.attention.o.weight
    shape: torch.Size  # whole
    tp_dim: int | None  # that tensor parallelism cuts; None: whole on every rank of it
    is_expert: bool  # a stack of matrices, one for each expert

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether Muon is for it (trainer/optim.py)."""
        return len(self.shape) == 2 and not self.name.startswith(TABLES)

    def local(self, *, tp: tuple[int, int], ep: tuple[int, int]) -> torch.Size:
        """Shape on one rank. tp, ep: number of ranks, and which of them."""
        shape = list(self.shape)
        if self.tp_dim is not None:
            shape[self.tp_dim] = _share(shape[self.tp_dim], *tp)
        if self.is_expert:
            shape[0] = _share(shape[0], *ep)
        return torch.Size(shape)


def parameters_of(model: ModelConfig, stages: Sequence[Stage] | None, *, tp: int) -> Counter[Parameter]:
    """The parameters of these stages (None: of the whole model), and how many there are of each. model: resolved."""
    assert model.num_kv_heads is not None  # resolved
    shared = tp > model.num_kv_heads  # ranks share keys and values, which are then layers of their own, whole
    which = (repr(model), shared)
    key = (*which, None if stages is None else tuple(stages))
    if key not in _KNOWN:
        if len(_KNOWN) > 4096:
            _KNOWN.clear()
            _PLACES.clear()
        if which not in _PLACES:
            _PLACES[which] = _by_place(model, shared=shared)
        _KNOWN[key] = _of_stages(model, stages, _PLACES[which])
    return _KNOWN[key]


def _of_stages(
    model: ModelConfig, stages: Sequence[Stage] | None, places: Mapping[str | int, Counter[Parameter]]
) -> Counter[Parameter]:
    """What Decoder(model, stages=stages) has."""
    if stages is None:
        return sum(places.values(), Counter())
    found: Counter[Parameter] = Counter()
    for stage in stages:
        for layer in range(stage.start, stage.stop):
            found += places[layer]
    last = any(stage.is_last for stage in stages)
    if any(stage.is_first for stage in stages):
        found += places["embedding"] + places["positions"]
    elif last and model.embeds_last:
        found += places["embedding"]
    for place in ("final_norm", "head", *range(model.num_layers, model.num_blocks)) if last else ():
        found += places[place]
    return found


_PLACES: dict[tuple[str, bool], Mapping[str | int, Counter[Parameter]]] = {}
_KNOWN: dict[tuple[str, bool, tuple[Stage, ...] | None], Counter[Parameter]] = {}
"""Building even on meta takes a while, and a search asks for many stages."""


def _by_place(model: ModelConfig, *, shared: bool) -> defaultdict[str | int, Counter[Parameter]]:
    """Those of each layer, and of what is outside of layers by its name."""
    found: defaultdict[str | int, Counter[Parameter]] = defaultdict(Counter)
    with torch.device("meta"):
        decoder = Decoder(model)
    for name, parameter in _parameters(decoder, shared=shared):
        first, second, *_ = name.split(".")
        found[int(second) if first == "blocks" else first][parameter] += 1
    return found


def _parameters(decoder: Decoder, *, shared: bool) -> Iterator[tuple[str, Parameter]]:
    parts = fused_parameters(decoder)
    for name, tensor in decoder.named_parameters():
        if shared and ".attention.qkv." in name:
            for part, its_name in parts[name].names(name).items():
                shape = torch.Size((parts[name].rows[part], *tensor.shape[1:]))
                yield its_name, _parameter(its_name, shape, whole=part != "q")
        else:
            whole = shared and re.search(r"attention\.[kv]\.", name) is not None
            yield name, _parameter(name, tensor.shape, whole=whole)


def _parameter(name: str, shape: torch.Size, *, whole: bool) -> Parameter:
    plain = ".".join(part for part in name.split(".") if not part.isdigit())
    layer, kind = plain.split(".")[-2:]
    is_expert = ".experts." in plain
    tp_dim: int | None
    if kind == "sinks":
        tp_dim = 0
    elif whole or layer in WHOLE or layer.endswith("norm") or (layer in CUT_BY_INPUT and kind == "bias"):
        tp_dim = None
    elif kind == "bias":
        tp_dim = 0
    else:
        tp_dim = len(shape) - (1 if layer in CUT_BY_INPUT else 2)
    return Parameter(plain, shape, tp_dim, is_expert)


def _share(length: int, num_ranks: int, rank: int) -> int:
    first, last = chunk_bounds(length, num_ranks, rank)
    return last - first
