"""Which parameters a rank of a pipeline has, and what tensor and expert parallelism leave of each.

The rules are those of the layers (parallel/tensor.py, models/layers/moe.py), by the name of the layer: whole on every
rank of tp; cut by features in at the end of a branch; cut by features out otherwise. tests/planner/test_state.py holds
them against the real layers.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from models.adapter_config import AdapterConfig
from models.config import ModelConfig
from models.decoder import Decoder
from models.layers.moe import GroupedLinear
from models.lora import A, B, M, apply_adapters
from models.quantized import NF4
from parallel.fused import fused_parameters
from parallel.pipeline.stages import Stage
from parallel.precision import PrecisionConfig
from parallel.tensor import chunk_bounds

WHOLE = ("q_a", "kv_a", "project", "router", "positions")
CUT_BY_INPUT = ("o", "down")
SHARED = re.compile(r"attention\.[kv]\.")
"""Keys and values, which are whole on every rank where there are fewer heads of them than ranks."""
TABLES = ("embedding.", "positions.", "head.")
NO_ADAPTERS = AdapterConfig()


@dataclass(frozen=True)
class Parameter:
    """A parameter with all that its cost depends on; layers of one kind have equal ones."""

    name: str  # without the number of its layer: blocks.attention.o.weight
    shape: torch.Size  # whole
    tp_dim: int | None  # that tensor parallelism cuts; None: whole on every rank of it
    is_expert: bool  # a stack of matrices, one for each expert
    is_trained: bool = True  # others keep neither gradients nor moments, and nobody updates them

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether Muon is for it (trainer/optim.py)."""
        return len(self.shape) == 2 and not self.name.startswith(TABLES)

    @property
    def is_shared_head(self) -> bool:
        """Whether it makes keys or values that ranks of tp share, each computing with the rows of its own head."""
        return self.tp_dim is None and SHARED.search(self.name) is not None

    @property
    def sees_own_heads(self) -> bool:
        """Whether each rank of tp has a summand of its gradient though it is whole on all: each has other heads or
        experts' features behind it (parallel.tensor.local_shard: partial)."""
        of_heads = self.name.startswith("blocks.attention.") and self.name.split(".")[2] in ("q_norm", "k_norm")
        return self.is_shared_head or of_heads or ".router." in self.name

    def travels_in_fp8(self, precision: PrecisionConfig, num_shards: int) -> bool:
        """Whether ranks gather it in fp8 (models/fp8_gather.py)."""
        return precision.fp8_all_gather and self.multiplies_in_fp8(precision) and self.shape[0] % num_shards == 0

    def multiplies_in_fp8(self, precision: PrecisionConfig) -> bool:
        """Whether it is the weight of a layer that does (models/fp8.py)."""
        linear = self.name.startswith("blocks.") and self.name.endswith(".weight") and len(self.shape) == 2
        skipped = any(fragment in self.name for fragment in (".router.", *precision.fp8_skip))
        return precision.fp8 and linear and not skipped

    def local(self, *, tp: tuple[int, int], ep: tuple[int, int]) -> torch.Size:
        """Shape on one rank. tp, ep: number of ranks, and which of them."""
        shape = list(self.shape)
        if self.tp_dim is not None:
            shape[self.tp_dim] = _share(shape[self.tp_dim], *tp)
        if self.is_expert:
            shape[0] = _share(shape[0], *ep)
        return torch.Size(shape)


def parameters_of(
    model: ModelConfig,
    stages: Sequence[Stage] | None,
    *,
    tp: int,
    adapter: AdapterConfig = NO_ADAPTERS,
    dtype: torch.dtype = torch.float32,
) -> Counter[Parameter]:
    """The parameters of these stages (None: of the whole model), and how many there are of each. model: resolved.

    adapter: what is trained beside a model that is not; of a matrix in NF4 (`adapter.quantize`) the elements are
    numbers of `dtype`, that of computation, which hold its bytes.
    """
    assert model.num_kv_heads is not None  # resolved
    shared = tp > model.num_kv_heads  # ranks share keys and values, which are then layers of their own, whole
    quantized = adapter.name != "none" and adapter.quantize != "none"
    which = (repr(model), shared, repr(adapter), (tp, dtype) if quantized else None)
    key = (*which, None if stages is None else tuple(stages))
    if key not in _KNOWN:
        if len(_KNOWN) > 4096:
            _KNOWN.clear()
            _PLACES.clear()
        if which not in _PLACES:
            _PLACES[which] = _by_place(model, adapter, dtype, shared=shared, tp=tp)
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


_PLACES: dict[object, Mapping[str | int, Counter[Parameter]]] = {}
_KNOWN: dict[object, Counter[Parameter]] = {}
"""Building even on meta takes a while, and a search asks for many stages."""


def _by_place(
    model: ModelConfig, adapter: AdapterConfig, dtype: torch.dtype, *, shared: bool, tp: int
) -> defaultdict[str | int, Counter[Parameter]]:
    """Those of each layer, and of what is outside of layers by its name."""
    found: defaultdict[str | int, Counter[Parameter]] = defaultdict(Counter)
    with torch.device("meta"):
        decoder = Decoder(model)
        if adapter.name != "none":
            apply_adapters(decoder, adapter, dtype)
    for name, parameter in _parameters(decoder, dtype, shared=shared, tp=tp):
        first, second, *_ = name.split(".")
        found[int(second) if first == "blocks" else first][parameter] += 1
    return found


def _parameters(decoder: Decoder, dtype: torch.dtype, *, shared: bool, tp: int) -> Iterator[tuple[str, Parameter]]:
    parts = fused_parameters(decoder)
    for name, tensor in decoder.named_parameters():
        trained = tensor.requires_grad
        if name.endswith(f".{NF4}"):
            yield from _in_nf4(decoder, name, dtype, shared=shared, tp=tp)
        elif shared and ".attention.qkv." in name:
            for part, its_name in parts[name].names(name).items():
                shape = torch.Size((parts[name].rows[part], *tensor.shape[1:]))
                yield its_name, _parameter(its_name, shape, whole=part != "q", trained=trained)
        else:
            whole = shared and SHARED.search(name) is not None
            whole |= decoder.config.score and name == "head.weight"  # a reward's
            yield name, _parameter(name, tensor.shape, whole=whole, trained=trained)


def _in_nf4(
    decoder: Decoder, name: str, dtype: torch.dtype, *, shared: bool, tp: int
) -> Iterator[tuple[str, Parameter]]:
    """A matrix in 4 bits, or one for each part of a fused layer whose parts tp cuts in different ways: on each rank a
    flat tensor of the same length (models/quantized.py), which is no share of the whole one."""
    layer = name.removesuffix(f".{NF4}")
    module: Any = decoder.get_submodule(layer)
    fused = shared and layer.endswith(".attention.qkv")
    above = layer.rpartition(".")[0]
    names = [f"{above}.{part}.{NF4}" for part in module.parts.rows] if fused else [name]
    pieces = [replace(module.piece, rows=(rows,)) for rows in module.piece.rows] if fused else [module.piece]
    for its_name, piece in zip(names, pieces, strict=True):
        kind = its_name.split(".")[-2]
        cut = tp > 1 and kind not in WHOLE
        if cut and kind in CUT_BY_INPUT:
            piece = replace(piece, columns=piece.columns // tp)
        elif cut:
            over = decoder.config.num_kv_heads if shared and kind in ("k", "v") else tp
            piece = replace(piece, rows=tuple(rows._replace(num=rows.num // over) for rows in piece.rows))
        length = piece.num_bytes // dtype.itemsize * (tp if cut else 1)
        plain = _without_numbers(its_name)
        experts = isinstance(module, GroupedLinear)
        shape = torch.Size((decoder.config.moe.num_experts, length) if experts else (length,))
        yield its_name, Parameter(plain, shape, len(shape) - 1 if cut else None, experts, False)


def _parameter(name: str, shape: torch.Size, *, whole: bool, trained: bool) -> Parameter:
    plain = _without_numbers(name)
    layer, kind = plain.split(".")[-2:]
    is_expert = ".experts." in plain
    by_input = layer in CUT_BY_INPUT
    tp_dim: int | None
    if kind == "sinks":
        tp_dim = 0
    elif whole or layer in WHOLE or layer.endswith("norm"):
        tp_dim = None
    elif kind in (A, B, M):  # of an adapter (models/lora.py): A is cut by features in, B and M by features out
        tp_dim = (len(shape) - 1 if kind == A else None) if by_input else {A: None, B: len(shape) - 2, M: 0}[kind]
    elif kind == "bias":
        tp_dim = None if by_input else 0
    else:
        tp_dim = len(shape) - (1 if by_input else 2)
    return Parameter(plain, shape, tp_dim, is_expert, trained)


def _without_numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _share(length: int, num_ranks: int, rank: int) -> int:
    first, last = chunk_bounds(length, num_ranks, rank)
    return last - first
