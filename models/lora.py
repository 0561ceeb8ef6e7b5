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

T tokens, P adapters of a fused layer, r rank of each, I features in, O features out; on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from kernels.grouped_linear import grouped_linear
from kernels.nf4.pieces import Piece
from models.adapter_config import AdapterConfig, adapted_layers
from models.decoder import Decoder
from models.initializers import Constant, Initializer, Normal
from models.layers.moe import IN_FEATURES, GroupedLinear
from models.quantized import quantize_layer
from parallel.collectives import Axis, start_all_reduce, sum_of_gradients, wait
from parallel.fused import Parts
from parallel.regions import local_tensor
from parallel.tensor import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    empty_parameter,
    enter,
    local_shard,
)

A, B, M = "lora_a", "lora_b", "lora_m"
"""Names of the parameters, in a layer and behind the name of a separate layer; M: lengths of rows (DoRA)."""
ABSORBED = "attention.kv_b"
"""The layer that latent attention does not call where it reads from a cache (models/layers/mla.py)."""


@dataclass(frozen=True)
class Adaptation:
    """How adapters of a layer act on this rank; its attribute `adaptation`. Constants of a compiled graph."""

    rank: int
    scale: float
    rows: tuple[tuple[int, int], ...]  # first feature of y and number of features, of each of P adapters
    dora: bool = False

    def spread(self, b: Tensor, num_features: int) -> Tensor:
        """B of all adapters, one below the other, as a matrix [O, P r] for all features of y at once."""
        if len(self.rows) == 1 and self.rows[0][1] == num_features:
            return b
        spread = b.new_zeros(num_features, len(self.rows) * self.rank)
        for block, piece in zip(self._blocks(spread), self._pieces(b), strict=True):
            block.copy_(piece)
        return spread

    def collect(self, spread: Tensor) -> Tensor:
        """The reverse: the blocks of [O, P r] that B has, one below the other."""
        if len(self.rows) == 1 and self.rows[0][1] == spread.shape[0]:
            return spread
        return torch.cat(list(self._blocks(spread)))

    def lengths(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Squares of the lengths of the rows of W + s B A that have an adapter, one below the other; fp32."""
        found = []
        for number, ((begin, count), piece) in enumerate(zip(self.rows, self._pieces(b), strict=True)):
            its_a = a[number * self.rank : (number + 1) * self.rank]
            adapted = torch.addmm(weight[begin : begin + count], piece, its_a, alpha=self.scale)
            found.append(torch.linalg.vector_norm(adapted, dim=1, dtype=torch.float32).square())
        return torch.cat(found)

    def factors(self, of_rows: Tensor, num_features: int) -> Tensor:
        """What multiplies each feature of y [O]: of_rows, and 1 where there is no adapter."""
        if len(self.rows) == 1 and self.rows[0][1] == num_features:
            return of_rows
        pieces, end = [], 0
        for (begin, count), piece in zip(self.rows, self._pieces(of_rows), strict=True):
            pieces += [of_rows.new_ones(begin - end), piece]
            end = begin + count
        return torch.cat([*pieces, of_rows.new_ones(num_features - end)])

    def _blocks(self, spread: Tensor) -> Iterator[Tensor]:
        for number, (begin, count) in enumerate(self.rows):
            yield spread[begin : begin + count, number * self.rank : (number + 1) * self.rank]

    def _pieces(self, b: Tensor) -> Sequence[Tensor]:
        return b.split([count for _, count in self.rows])


def apply_adapters(model: Decoder, adapter: AdapterConfig, dtype: torch.dtype = torch.float32) -> None:
    """Freeze a model that was just built, on the meta device, and give adapters to the layers that `adapter` names.

    dtype: that is computed with, for quantized weights. In place; before compilation and data parallelism. Raises
    ValueError for a name that no layer here answers to.
    """
    model.requires_grad_(False)
    model.adapted = True
    wanted = {name for name in adapted_layers(adapter, model.config) if _is_here(model, name)}
    for name, module in model.named_modules():
        if not name.startswith("blocks."):
            continue
        layer: Any = module
        if isinstance(module, ColumnParallelLinear):
            layer.together = MethodType(_together, layer)
        if not _is_linear(module):
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
            if _is_linear(module) and not isinstance(module, GroupedLinear):
                quantize_layer(module, dtype)
                if not hasattr(module, "adaptation"):
                    _replace(module, None)
    if wanted:
        raise ValueError(f"adapter.targets names {', '.join(sorted(wanted))}, which the model does not have")


def _is_here(model: Decoder, name: str) -> bool:
    """Whether a layer belongs to the pipeline stages of this rank."""
    return name.split(".")[1] in dict(model.blocks.named_children())


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, tuple(_FUNCTIONS))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that its adapters are for, to the bit."""
    adapted = [(layer, layer.adaptation) for layer in model.modules() if getattr(layer, "adaptation", None) is not None]
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
    """Those of the adapters, by name; the only ones that are trained."""
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
    _replace(layer, Adaptation(rank, adapter.scale, tuple(rows), adapter.dora))


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
    _replace(layer, Adaptation(rank, adapter.scale, ((0, features),), adapter.dora))


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
    _replace(layer, Adaptation(rank, adapter.scale, ()))


def _mesh(weight: Tensor) -> Any:
    assert isinstance(weight, DTensor)
    return weight.device_mesh


def _replace(layer: Any, adaptation: Adaptation | None) -> None:
    """Let a layer multiply with its adapters; None: it has none, and is quantized."""
    layer.adaptation = adaptation
    replaced, function = next(_FUNCTIONS[kind] for kind in _FUNCTIONS if isinstance(layer, kind))
    setattr(layer, replaced, MethodType(function, layer))


# ---- multiplying. Methods of the layers, which compiled blocks of one kind can share a graph of (models/fp8.py).


def _together(layer: ColumnParallelLinear, x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """`parallel.tensor.project` of column-parallel layers, frozen ones among them: one collective each way."""
    whole = enter(x, layer.axis, sequence_parallel=layer.sequence_parallel)
    return tuple(each.inside(whole) for each in layers)  # type: ignore[operator]


Local = Callable[[Tensor], Tensor]
"""From a parameter to what this rank multiplies with."""


def _multiply(layer: Any, x: Tensor, weight: Local, bias: Tensor | None, a: Local, b: Local) -> Tensor:
    """x times the weight of a layer, which may be quantized, and its adapter, which it may not have."""
    how: Adaptation | None = layer.adaptation
    piece: Piece | None = getattr(layer, "piece", None)
    kept = weight(layer.weight) if piece is None else local_tensor(layer.nf4)
    product = getattr(layer, "product", F.linear)
    if how is None:
        return _Adapted.apply(x, kept, bias, None, None, None, piece, product)
    its_a, its_b = a(layer.lora_a), b(layer.lora_b)
    if not how.dora:
        return _Adapted.apply(x, kept, bias, its_a, its_b, how, piece, product)
    y = _Adapted.apply(x, kept, None, its_a, its_b, how, piece, product)
    with torch.no_grad():
        squares = how.lengths(kept if piece is None else piece.dequantize(kept, x.dtype), its_a, its_b)
        if isinstance(layer, RowParallelLinear):
            squares = wait(start_all_reduce(squares, layer.axis))
    factors = (b(layer.lora_m).float() / squares.sqrt()).to(y.dtype)
    y = y * how.factors(factors, y.shape[-1])
    return y if bias is None else y + bias


def _linear(layer: Any, x: Tensor) -> Tensor:
    return _multiply(layer, x, _itself, layer.bias, _itself, _itself)


def _columns(layer: Any, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.local(layer.bias)
    return _multiply(layer, x, layer.local, bias, _partial, layer.local)


def _replicated(layer: Any, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.local(layer.bias)
    return _multiply(layer, x, layer.local, bias, layer.local, layer.local)


def _summand(layer: Any, x: Tensor) -> Tensor:
    return _multiply(layer, x, _sharded, None, _sharded, _partial)


def _itself(parameter: Tensor) -> Tensor:
    return parameter


def _sharded(parameter: Tensor) -> Tensor:
    return local_shard(parameter, grad="sharded")


def _partial(parameter: Tensor) -> Tensor:
    return local_shard(parameter, grad="partial")


def _experts(layer: Any, rows: Tensor, ends: Tensor) -> Tensor:
    how = layer.implementation
    y = grouped_linear(rows, local_shard(layer.weight, grad="sharded"), ends, implementation=how)
    if layer.adaptation is None:  # switched off
        return y
    u = grouped_linear(rows, _of_stack(layer, A), ends, implementation=how)
    return y + grouped_linear(u, _of_stack(layer, B), ends, implementation=how) * layer.adaptation.scale


def _of_stack(layer: Any, name: str) -> Tensor:
    """A or B of the experts here, as this rank multiplies with it."""
    parameter = getattr(layer, name)
    if not isinstance(parameter, DTensor):
        return parameter
    local = parameter.to_local(grad_placements=parameter.placements)
    return sum_of_gradients(local, layer.tp) if name in layer.summed else local


_FUNCTIONS: dict[type[nn.Module], tuple[str, Callable[..., Tensor]]] = {
    ColumnParallelLinear: ("inside", _columns),
    RowParallelLinear: ("summand", _summand),
    ReplicatedLinear: ("forward", _replicated),
    GroupedLinear: ("forward", _experts),
    nn.Linear: ("forward", _linear),
}


class _Adapted(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T with gradients of x, A and B. W may be a piece of NF4, made again in backward;
    without an adapter (`how` None) there is the first summand alone. product: F.linear, or one whose rows do not
    depend on each other (models/invariant.py), of which gradients are ordinary products as well."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        how: Adaptation | None,
        piece: Piece | None,
        product: Callable[..., Tensor],
    ) -> Tensor:
        y = product(x, kept if piece is None else piece.dequantize(kept, x.dtype), bias)
        ctx.how, ctx.piece = how, piece
        if how is None:
            ctx.save_for_backward(kept)
            return y
        assert a is not None
        assert b is not None
        u = product(x, a)  # [..., P r]
        spread = how.spread(b, y.shape[-1])
        if product is F.linear:
            y.flatten(0, -2).addmm_(u.flatten(0, -2), spread.t(), alpha=how.scale)
        else:  # each operation rounds by itself, whatever number of elements it is for
            y += product(u, spread) * how.scale
        ctx.save_for_backward(kept, x, a, b, u)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, *adapter = ctx.saved_tensors
        grads = grad.flatten(0, -2)  # [T, O]
        d_x = d_u = d_a = d_b = None
        if ctx.how is not None:
            how: Adaptation = ctx.how
            x, a, b, u = adapter
            d_u = (grads @ how.spread(b, grads.shape[1])) * how.scale
            d_a = d_u.t() @ x.flatten(0, -2)
            d_b = how.collect(grads.t() @ u.flatten(0, -2)) * how.scale
        if ctx.needs_input_grad[0]:  # nothing before the first adapter wants one
            weight = kept if ctx.piece is None else ctx.piece.dequantize(kept, grad.dtype)
            d_x = grads @ weight
            if d_u is not None:
                d_x = d_x.addmm_(d_u, a)
            d_x = d_x.view(*grad.shape[:-1], -1)
        return d_x, None, None, d_a, d_b, None, None, None
