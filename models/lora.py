"""Low-rank adapters (LoRA, 2106.09685): y = x W^T + s (x A^T) B^T, where W stays as it is and A, B are trained.

A [r, in] is small and random, B [out, r] begins at 0, so a model with adapters begins as the model. Applied from
outside, as fp8 is: adapted layers keep their kind and get parameters `lora_a` and `lora_b`, and the function that
multiplies is replaced. Every parameter of the model stops requiring a gradient: there is no memory for one, no
optimizer state, no wide copy, and no product that would compute it.

Of a fused layer (parallel/fused.py) the parts that have adapters share one product with [A_q; A_k; A_v] and one with
their B as a block-diagonal matrix. Checkpoints and PEFT's files see separate ones, as of weights.

Over tp (x or its features whole on a rank or cut, as the layer has them; parallel/tensor.py):

    layer            A                        B                        what is summed over tp
    column-parallel  whole, a partial         cut by rows, as W is     the gradient of A: each rank has other rows of B
                     gradient
    row-parallel     cut by columns, as W is  whole, a partial         y, as before: x_r A_r^T is a summand of x A^T and
                                              gradient                 B is linear, so it travels inside of y; and the
                                                                       gradient of B
    replicated       as W                     as W                     as of W

DoRA (2402.09353, section 4.3): y_i = m_i / |W_i + s B_i A| (x W^T + s (x A^T) B^T)_i. m is a parameter [out] and begins
as |W_i|; the length has no gradient. Row-parallel, its square is summed over tp, and m has a partial gradient.

Experts have an adapter each, stacked: A [E, r, in], B [E, out, r], cut over ep and tp as their weights are.

The products are those of models/adapted_linear.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from models.adapted_linear import A, Adaptation, B, M, is_linear, multiply_with, together
from models.adapter_config import AdapterConfig, adapted_layers
from models.decoder import Decoder
from models.initializers import Constant, Initializer, Normal
from models.layers.moe import IN_FEATURES, GroupedLinear
from models.quantized import quantize_layer
from parallel.collectives import Axis
from parallel.fused import Parts
from parallel.tensor import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    empty_parameter,
)

ABSORBED = "attention.kv_b"
"""The layer that latent attention does not call where it reads from a cache (models/layers/mla.py)."""


def apply_adapters(model: Decoder, adapter: AdapterConfig, dtype: torch.dtype = torch.float32) -> None:
    """Freeze a model that was just built, on the meta device, and give adapters to the layers that `adapter` names.

    The head of a reward model stays trained as a whole: no language model has one to begin with.
    dtype: that is computed with, for quantized weights. In place; before compilation and data parallelism. Raises
    ValueError for a name that no layer here answers to.
    """
    model.requires_grad_(False)
    model.adapted = True
    if model.config.score and model.head is not None:
        model.head.requires_grad_(True)
    wanted = {name for name in adapted_layers(adapter, model.config) if _is_here(model, name)}
    for name, module in model.named_modules():
        if not name.startswith("blocks."):
            continue
        layer: Any = module
        if isinstance(module, ColumnParallelLinear):
            layer.together = MethodType(together, layer)
        if not is_linear(module):
            continue
        parts = getattr(module, "parts", None)
        if isinstance(parts, Parts):
            names = {part: its.rpartition(".")[0] for part, its in parts.names(f"{name}.weight").items()}
            chosen = [part for part, its in names.items() if its in wanted]
            wanted -= {names[part] for part in chosen}
            if chosen:
                _adapt_parts(layer, chosen, adapter)
        elif name in wanted:
            wanted.remove(name)
            (_adapt_experts if isinstance(module, GroupedLinear) else _adapt)(layer, adapter, model)
    if adapter.quantize == "nf4":
        for module in model.blocks.modules():
            if is_linear(module):
                quantize_layer(module, dtype)
                if not hasattr(module, "adaptation"):
                    multiply_with(module, None)
    if wanted:
        raise ValueError(f"adapter.targets names {', '.join(sorted(wanted))}, which the model does not have")


def _is_here(model: Decoder, name: str) -> bool:
    """Whether a layer belongs to the pipeline stages of this rank."""
    return name.split(".")[1] in dict(model.blocks.named_children())


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that its adapters are for, to the bit."""
    layers: list[Any] = [layer for layer in model.modules() if getattr(layer, "adaptation", None) is not None]
    adapted = [(layer, layer.adaptation) for layer in layers]
    for layer, _ in adapted:
        layer.adaptation = None
    try:
        yield
    finally:
        for layer, adaptation in adapted:
            layer.adaptation = adaptation


def reads_weights(model: nn.Module) -> str | None:
    """Why a model cannot be computed through pages of a cache, in a line; None: it can.

    Latent attention takes queries through the matrix that makes keys and values, without a call of its layer.
    """
    found = [name for name, layer in model.named_modules() if name.endswith(ABSORBED) and hasattr(layer, "adaptation")]
    if not found:
        return None
    return f"{found[0]} has an adapter, or 4 bits, and attention through a cache reads its weight; merge them"


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of the adapters, by name; the only ones that are trained, but for the head of a reward model."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in (A, B, M)}


def adapter_initializers(shapes: Mapping[str, Sequence[int]]) -> dict[str, Initializer]:
    """How adapters start, by name, given their whole shapes: B is 0, A has the variance 1 / (3 in) of PEFT's.

    The lengths of rows are those of the model's weights, which is for the caller to fill in.
    """
    constants = {B: 0.0, M: 1.0}
    found: dict[str, Initializer] = {}
    for name, shape in shapes.items():
        kind = name.rpartition(".")[2]
        found[name] = Constant(constants[kind]) if kind in constants else Normal(1 / math.sqrt(3 * shape[-1]))
    return found


def learning_rates(adapter: AdapterConfig, names: Iterable[str]) -> dict[str, float]:
    """What of the parameters multiplies optim.lr, by name, where that is not 1: B learns faster than A (LoRA+)."""
    return {name: adapter.lr_ratio for name in names if name.endswith(B)} if adapter.lr_ratio != 1 else {}


# ---- giving adapters to layers


def _adapt_parts(layer: Any, chosen: Sequence[str], adapter: AdapterConfig) -> None:
    """Adapters of some of the parts of a fused layer, which is plain or column-parallel."""
    parts: Parts = layer.parts
    rows, begin = [], 0
    for part, size in zip(parts.rows, parts.sizes(), strict=True):
        if part in chosen:
            rows.append((begin, size))
        begin += size
    rank = adapter.rank
    of_b = Parts({part: parts.rows[part] for part in chosen}, parts.ranks)
    layer.parts_of = {A: Parts(dict.fromkeys(chosen, rank)), B: of_b, M: of_b}
    out = sum(of_b.rows.values())
    in_features = layer.weight.shape[1]
    if isinstance(layer, ColumnParallelLinear):
        mesh = _mesh(layer.weight)
        layer.lora_a = empty_parameter(len(chosen) * rank, in_features, mesh=mesh, placement=Replicate())
        layer.lora_b = empty_parameter(out, rank, mesh=mesh, placement=Shard(0))
        lengths = empty_parameter(out, mesh=mesh, placement=Shard(0))
    else:
        layer.lora_a = nn.Parameter(torch.empty(len(chosen) * rank, in_features, device="meta"))
        layer.lora_b = nn.Parameter(torch.empty(out, rank, device="meta"))
        lengths = nn.Parameter(torch.empty(out, device="meta"))
    if adapter.dora:
        layer.lora_m = lengths
    multiply_with(layer, Adaptation(rank, adapter.scale, tuple(rows), adapter.dora))


def _adapt(layer: Any, adapter: AdapterConfig, _model: Decoder) -> None:
    """An adapter of a separate layer."""
    (out_features, in_features), rank = layer.weight.shape, adapter.rank
    placements: tuple[Placement, Placement] | None = None  # of A and B
    features = out_features
    if isinstance(layer, ColumnParallelLinear):
        placements = (Replicate(), Replicate() if layer.shared else Shard(0))
        features = layer.rows[1] - layer.rows[0]
    elif isinstance(layer, RowParallelLinear):
        placements = (Shard(1), Replicate())
    elif isinstance(layer, ReplicatedLinear):
        placements = (Replicate(), Replicate())
    shapes = ((rank, in_features), (out_features, rank))
    if placements is None:
        layer.lora_a, layer.lora_b = (nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes)
        lengths = nn.Parameter(torch.empty(out_features, device="meta"))
    else:
        mesh = _mesh(layer.weight)
        layer.lora_a, layer.lora_b = (
            empty_parameter(*shape, mesh=mesh, placement=placement)
            for shape, placement in zip(shapes, placements, strict=True)
        )
        lengths = empty_parameter(out_features, mesh=mesh, placement=placements[1])
    if adapter.dora:
        layer.lora_m = lengths
    multiply_with(layer, Adaptation(rank, adapter.scale, ((0, features),), adapter.dora))


def _adapt_experts(layer: Any, adapter: AdapterConfig, model: Decoder) -> None:
    """An adapter for each expert."""
    (experts, out_features, in_features), rank = layer.weight.shape, adapter.rank
    shapes = ((experts, rank, in_features), (experts, out_features, rank))
    layer.tp = None if model.groups.tp is None else Axis.of(model.groups.tp)
    if not isinstance(layer.weight, DTensor):
        layer.lora_a, layer.lora_b = (nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes)
        layer.summed = ()
    else:
        mesh, axes = _mesh(layer.weight), layer.weight.placements
        # Cut over tp by features in, A is cut and B whole; by features out, the other way round. Over ep by experts.
        whole_b = Shard(IN_FEATURES) in axes
        tp_axis = dict(zip(mesh.mesh_dim_names or (), axes, strict=True)).get("tp")
        layer.summed = () if tp_axis is None else (B,) if whole_b else (A,)
        kept = {A: Shard(IN_FEATURES), B: Shard(1)}
        for name, shape in zip((A, B), shapes, strict=True):
            over_tp = Replicate() if name in layer.summed else kept[name]
            cuts = {"ep": Shard(0), "tp": over_tp}
            placement = [cuts[axis] for axis in mesh.mesh_dim_names or ()]
            setattr(layer, name, empty_parameter(*shape, mesh=mesh, placement=placement))
    multiply_with(layer, Adaptation(rank, adapter.scale, ()))


def _mesh(weight: Tensor) -> Any:
    assert isinstance(weight, DTensor)
    return weight.device_mesh
