"""How layers multiply with adapters (models/lora.py) and with weights in 4 bits (models/quantized.py).

T tokens, P adapters of a fused layer, r rank of each, I features in, O features out; on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kernels.grouped_linear import grouped_linear, input_gradient
from kernels.low_rank import add_low_rank_
from kernels.nf4.pieces import Piece, Rows
from models.layers.moe import GroupedLinear
from parallel.collectives import start_all_reduce, sum_of_gradients, wait
from parallel.regions import local_tensor
from parallel.tensor import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    enter,
    local_shard,
)

A, B, M = "lora_a", "lora_b", "lora_m"
"""Names of the parameters, in a layer and behind the name of a separate layer; M: lengths of rows (DoRA)."""


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


def is_linear(module: nn.Module) -> bool:
    """Whether a layer of a block multiplies by a weight that can have an adapter."""
    return type(module) is nn.Linear or isinstance(module, tuple(_FUNCTIONS))


def multiply_with(layer: Any, adaptation: Adaptation | None) -> None:
    """Let a layer multiply with its adapters; None: it has none, and is quantized."""
    layer.adaptation = adaptation
    replaced, function = next(_FUNCTIONS[kind] for kind in _FUNCTIONS if isinstance(layer, kind))
    setattr(layer, replaced, MethodType(function, layer))


def function_of(layer: nn.Module) -> str:
    """The name of the function by which a linear layer multiplies what is here of its weight."""
    return next(_FUNCTIONS[kind][0] for kind in _FUNCTIONS if isinstance(layer, kind))


# ---- methods of the layers, which compiled blocks of one kind can share a graph of (models/fp8.py)


def together(layer: ColumnParallelLinear, x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
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
        return _adapted(x, kept, bias, None, None, None, piece, product)
    its_a, its_b = a(layer.lora_a), b(layer.lora_b)
    if not how.dora:
        return _adapted(x, kept, bias, its_a, its_b, how, piece, product)
    y = _adapted(x, kept, None, its_a, its_b, how, piece, product)
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
    piece: Piece | None = getattr(layer, "piece", None)
    if piece is None:
        y = grouped_linear(rows, local_shard(layer.weight, grad="sharded"), ends, implementation=how)
    else:
        _, _, *place = _constants(None, piece)
        y = _quantized_experts(rows, local_tensor(layer.nf4), ends, *place, how)
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


def _adapted(
    x: Tensor,
    kept: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    how: Adaptation | None,
    piece: Piece | None,
    product: Callable[..., Tensor],
) -> Tensor:
    """y = x W^T + bias + s (x A^T) B^T with gradients of x, A and B. W may be a piece of NF4, made again in backward;
    without an adapter (`how` None) there is the first summand alone. product: F.linear, or one whose rows do not
    depend on each other (models/invariant.py), of which gradients are ordinary products as well.

    Compiled, it is one op. Of a Function compilers see what is inside: they take the weight that backward dequantizes
    for the one of forward and keep that, 16 bits a value, and torch 2.11 keeps what a Function in a checkpointed block
    returns (measured on an 8B model: 21 GiB of products that nobody reads).
    """
    if not torch.compiler.is_compiling():
        return _Adapted.apply(x, kept, bias, a, b, how, piece, product)
    assert product is F.linear, "batch-invariant blocks are not compiled"
    return _compiled(x, kept, bias, a, b, *_constants(how, piece))[0]


def _forward(
    x: Tensor,
    kept: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    how: Adaptation | None,
    piece: Piece | None,
    product: Callable[..., Tensor],
    *,
    in_place: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and x A^T [..., P r] where there is an adapter. in_place: the product with the weight may be overwritten.
    Selective checkpointing keeps what that operation gave, and would add the adapter to it once more."""
    y = product(x, kept if piece is None else piece.dequantize(kept, x.dtype), bias)
    if how is None:
        return y, None
    assert a is not None
    assert b is not None
    u = product(x, a)
    spread = how.spread(b, y.shape[-1])
    if product is not F.linear:  # each operation rounds by itself, whatever number of elements it is for
        y = y + product(u, spread) * how.scale
    elif in_place:
        add_low_rank_(y.flatten(0, -2), u.flatten(0, -2), spread.t(), how.scale)
    else:
        y = torch.addmm(y.flatten(0, -2), u.flatten(0, -2), spread.t(), alpha=how.scale).view(y.shape)
    return y, u


def _backward(
    grad: Tensor,
    kept: Tensor,
    adapter: Sequence[Tensor],
    how: Adaptation | None,
    piece: Piece | None,
    *,
    wants_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A and B. adapter: x, A, B and x A^T, or nothing."""
    grads = grad.flatten(0, -2)  # [T, O]
    d_x = d_u = d_a = d_b = None
    if how is not None:
        x, a, b, u = adapter
        d_u = (grads @ how.spread(b, grads.shape[1])) * how.scale
        d_a = d_u.t() @ x.flatten(0, -2)
        d_b = how.collect(grads.t() @ u.flatten(0, -2)) * how.scale
    if wants_x:  # nothing before the first adapter wants one
        weight = kept if piece is None else piece.dequantize(kept, grad.dtype)
        d_x = grads @ weight
        if d_u is not None:
            add_low_rank_(d_x, d_u, a)
        d_x = d_x.view(*grad.shape[:-1], -1)
    return d_x, d_a, d_b


class _Adapted(torch.autograd.Function):
    """`_adapted` as it is run eagerly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, *others: Any) -> Tensor:
        _, a, b, ctx.how, ctx.piece, _ = others
        y, u = _forward(x, kept, *others, in_place=False)
        ctx.save_for_backward(kept, *(() if ctx.how is None else (x, a, b, u)))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, *adapter = ctx.saved_tensors
        d_x, d_a, d_b = _backward(grad, kept, adapter, ctx.how, ctx.piece, wants_x=ctx.needs_input_grad[0])
        return d_x, None, None, d_a, d_b, None, None, None


# ---- the same as ops, whose arguments besides tensors are numbers


def _constants(how: Adaptation | None, piece: Piece | None) -> tuple[list[int], float, list[int], list[int]]:
    """What `_adaptation` and `_piece` make again."""
    adaptation = [] if how is None else [how.rank, *(number for rows in how.rows for number in rows)]
    rows = [] if piece is None else [number for rows in piece.rows for number in rows]
    columns = [] if piece is None else [piece.first_column, piece.columns, piece.of_columns]
    return adaptation, 0.0 if how is None else how.scale, rows, columns


def _adaptation(numbers: list[int], scale: float) -> Adaptation | None:
    return Adaptation(numbers[0], scale, tuple(zip(numbers[1::2], numbers[2::2], strict=True))) if numbers else None


def _piece(rows: list[int], columns: list[int]) -> Piece | None:
    return Piece(tuple(Rows(*rows[i : i + 3]) for i in range(0, len(rows), 3)), *columns) if columns else None


@torch.library.custom_op("lattice::adapted_linear", mutates_args=())
def _compiled(
    x: Tensor,
    kept: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    adaptation: list[int],
    scale: float,
    rows: list[int],
    columns: list[int],
) -> tuple[Tensor, Tensor]:
    how = _adaptation(adaptation, scale)
    y, u = _forward(x, kept, bias, a, b, how, _piece(rows, columns), F.linear, in_place=True)
    return y, y.new_empty(0) if u is None else u


@_compiled.register_fake
def _(x: Tensor, kept: Tensor, _bias: Tensor | None, a: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    *_, rows, columns = others
    features = sum(rows[1::3]) if columns else kept.shape[0]
    u = x.new_empty(0) if a is None else x.new_empty(*x.shape[:-1], a.shape[0])
    return x.new_empty(*x.shape[:-1], features), u


@torch.library.custom_op("lattice::adapted_linear_backward", mutates_args=())
def _compiled_backward(
    grad: Tensor,
    kept: Tensor,
    adapter: list[Tensor],
    adaptation: list[int],
    scale: float,
    rows: list[int],
    columns: list[int],
    wants_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    how = _adaptation(adaptation, scale)
    d_x, d_a, d_b = (
        grad.new_empty(0) if found is None else found
        for found in _backward(grad, kept, adapter, how, _piece(rows, columns), wants_x=wants_x)
    )
    return d_x, d_a, d_b


@_compiled_backward.register_fake
def _(grad: Tensor, kept: Tensor, adapter: list[Tensor], *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, columns, wants_x = others
    features = columns[1] if columns else kept.shape[1]
    d_x = grad.new_empty(*grad.shape[:-1], features) if wants_x else grad.new_empty(0)
    d_a, d_b = (grad.new_empty(adapter[i].shape if adapter else 0) for i in (1, 2))
    return d_x, d_a, d_b


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, kept, _, a, b, *ctx.constants = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(kept, *(() if a is None else (x, a, b, output[1])))


def _of_op(ctx: Any, grad: Tensor, _grad_u: Tensor | None) -> tuple[Any, ...]:
    kept, *adapter = ctx.saved_tensors
    wants_x = ctx.needs_input_grad[0]
    d_x, d_a, d_b = _compiled_backward(grad.contiguous(), kept, adapter, *ctx.constants, wants_x)
    here = bool(adapter)
    return d_x if wants_x else None, None, None, d_a if here else None, d_b if here else None, None, None, None, None


_compiled.register_autograd(_of_op, setup_context=_keep)


# ---- experts in 4 bits: backward dequantizes again what forward did, eager or compiled


@torch.library.custom_op("lattice::quantized_experts", mutates_args=())
def _quantized_experts(
    x: Tensor, kept: Tensor, ends: Tensor, rows: list[int], columns: list[int], implementation: str | None
) -> Tensor:
    return grouped_linear(x, _weights(x, kept, rows, columns), ends, implementation=implementation)


@_quantized_experts.register_fake
def _(x: Tensor, _kept: Tensor, _ends: Tensor, rows: list[int], *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], rows[1])


@torch.library.custom_op("lattice::quantized_experts_backward", mutates_args=())
def _quantized_experts_backward(
    grad: Tensor, kept: Tensor, ends: Tensor, rows: list[int], columns: list[int], implementation: str | None
) -> Tensor:
    return input_gradient(grad, _weights(grad, kept, rows, columns), ends, implementation)


@_quantized_experts_backward.register_fake
def _(grad: Tensor, _kept: Tensor, _ends: Tensor, _rows: list[int], columns: list[int], *_: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], columns[1])


def _weights(like: Tensor, kept: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """[E, out, in] of the experts here."""
    piece = _piece(rows, columns)
    assert piece is not None
    return piece.dequantize(kept, like.dtype)


def _keep_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, kept, ends, rows, columns, implementation = inputs
    ctx.constants = (rows, columns, None if implementation == "invariant" else implementation)
    ctx.save_for_backward(kept, ends)


def _of_experts(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    kept, ends = ctx.saved_tensors
    d_x = _quantized_experts_backward(grad, kept, ends, *ctx.constants) if ctx.needs_input_grad[0] else None
    return d_x, None, None, None, None, None


_quantized_experts.register_autograd(_of_experts, setup_context=_keep_experts)
