"""Linear layers of blocks in fp8, applied to a model from outside: their product functions are replaced.

    y = x W^T        x and W in E4M3              per micro-batch
    dx = dy W        dy in E5M2 or E4M3
    dW = dy^T x

Projections of attention and MLPs (shared experts and those of multi-token prediction among them) run like this; master
weights, activations and the residual stream, norms, attention itself, embedding, head, routers and the stacked experts
of a mixture stay what they are. Projections of one input (q, k, v; gate, up) are one layer, whose weight has one scale;
where ranks of tp share key/value heads they are layers that have one scale all the same. Layers of one input quantize
it once. Backward keeps x^T in fp8 and the weight as it came, in bf16 or fp8 (models/fp8_gather.py): fully_shard
frees that one and gathers it anew, and quantizing it twice costs less than keeping both.

**What the numbers depend on.** A scale reaches over some of a tensor, and a tensor is what one rank has of one
micro-batch. Parameters and their scales are the same on every rank of dp and cp and in every stage of a pipeline. Then

                    y, dx                               dW                         over tp
    tensorwise      of the micro-batch's tokens here    the same                   one scale, agreed on
    delayed         of all ranks' last steps            the same                   the same
    rowwise         of each token alone                 of the micro-batch's       each rank its part of a row
    block128        of each token alone                 of runs of 128 tokens      the same where parts divide by 128

so a layout that leaves a micro-batch whole (dp, pp, ZeRO, and tp of tensorwise scales) quantizes the very numbers that
one process does, and one that divides its tokens (cp, another micro_batch_size) differs by rounding to fp8, with
delayed scaling in the first step of a run only. A rank of tp with a part of a row scales that part by itself under
rowwise, which is finer than the whole row's scale.

Over tp tensorwise_dynamic agrees on the largest magnitudes of what is cut: one small all-reduce per branch's beginning
(weights) and end (weight and input) in forward and one per beginning in backward (gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.fp8 import (
    E4M3,
    GRADIENT,
    INPUT,
    WEIGHT,
    DelayedScaling,
    LayerScaling,
    Quantized,
    ScalingRecipe,
    fp8_matmul,
    scale_from_amax,
)
from models.fp8_gather import GatheredWeights, gather_in_fp8
from models.fp8_gradients import Plan, arrived, quantized, start_gradients
from parallel.collectives import maximum
from parallel.fused import is_part, name_in_every_layout
from parallel.tensor import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    local_shard,
    whole_input,
)


class Prepared(NamedTuple):
    """The input of layers as its producer has quantized it (models/fp8_producers.py)."""

    stand_in: Tensor  # [..., K] without memory of its own, not to be read: what the gradient belongs to
    quantized: Quantized  # of all rows
    amax: Tensor | None  # fp32 []; None by row


class Operands(NamedTuple):
    """Of products, quantized."""

    source: Tensor  # the input, or what stands for it: its gradient belongs there
    shape: torch.Size  # of what is multiplied, [..., K]
    x: Quantized
    weights: list[Quantized]
    gathered: tuple[bool, ...]  # weights that came in fp8, so that backward has them as they are (models/fp8_gather.py)
    carriers: list[Tensor | None]  # of largest magnitudes of gradients, see LayerScaling
    gradient_scales: list[Tensor | None]  # None: found in backward

    @property
    def other_scale(self) -> Tensor | None:
        """That of the transposed copy, unless both have one: a compiled graph takes no tensor twice."""
        return None if self.x.transposed_scale is self.x.scale else self.x.transposed_scale


class Fp8Linears:
    """What the fp8 layers of a model share: recipe, and with delayed scaling its state.

    `names` of all ranks' layers number the rows of that state, so it does not depend on which rank has which stage. The
    first step of a run, which has no past, finds its scales as tensorwise_dynamic does.
    """

    def __init__(
        self,
        recipe: ScalingRecipe,
        *,
        names: Sequence[str],
        history_length: int,
        device: torch.device | str | None = None,
    ) -> None:
        self.recipe = recipe
        self.names = list(names)
        self.started = False  # there are scales of earlier steps
        self.producers = "quantized by the layers"  # what writes inputs in fp8, for run.json; models/fp8_producers.py
        self.gathered: GatheredWeights | None = None  # weights that ranks gather in fp8
        self.scaling: DelayedScaling | None = None
        if recipe.kind == "tensorwise_delayed":
            self.scaling = DelayedScaling(len(names), recipe=recipe, history_length=history_length, device=device)

    def gather(self, blocks: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Let fully_shard gather weights of these layers in fp8. Once their memory is there. dtype: of compute."""
        power_of_two, num_layers = self.recipe.power_of_two, len(self.names)
        self.gathered = gather_in_fp8(
            blocks, num_layers=num_layers, dtype=dtype, power_of_two=power_of_two, device=device
        )

    def begin_step(self, *, first: bool) -> None:
        """first: of the run, not of this start. Collective where weights are gathered in fp8."""
        self.started = not first
        self.begin()

    def begin(self) -> None:
        """Before forwards outside of a step. Collective as above, if weights have changed since."""
        if self.gathered is not None:
            known = self.scaling is not None and self.started
            self.gathered.set_scales(self.scaling.scale[:, WEIGHT] if known and self.scaling is not None else None)

    def weights_changed(self) -> None:
        """After an update or a load; forwards then need `begin`."""
        if self.gathered is not None:
            self.gathered.changed()

    def end_step(self) -> None:
        """After a step's last backward: the scales of the next. With delayed scaling collective over all ranks."""
        if self.scaling is not None:
            amax = self.scaling.amax()
            if self.gathered is not None:
                amax[:, WEIGHT] = torch.maximum(amax[:, WEIGHT], self.gathered.amax)
            dist.all_reduce(amax, op=dist.ReduceOp.MAX)
            self.scaling.update(amax)

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds; between steps nothing else is kept. The same on every rank."""
        return {} if self.scaling is None else {"history": self.scaling.history, "scale": self.scaling.scale}

    # ---- the layers' product functions

    def _plain(self, x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
        return self._products(x, layers, [y.weight for y in layers], [y.bias for y in layers], Plan(self.recipe))

    def _columns(
        self, x: Tensor | Prepared, layers: Sequence[ColumnParallelLinear], *, entered: bool = False
    ) -> tuple[Any, ...]:
        return self._products(x, layers, *local_parameters(layers), self.plan_of(layers, entered=entered))

    def plan_of(self, layers: Sequence[Any], *, entered: bool = False) -> Plan:
        """Of the first layers of a branch; entered: their input has passed the branch's beginning already."""
        first = layers[0]
        if not isinstance(first, ColumnParallelLinear):
            return Plan(self.recipe)
        slices = first.sequence_parallel and not entered
        return Plan(
            self.recipe,
            first.axis,
            gathers=slices,
            sums=not slices and not entered,
            cut=(False, True, True),
            as_one=len(layers) > 1 and all(is_part(layer) for layer in layers),
        )

    def _replicated(self, x: Tensor, layer: ReplicatedLinear) -> Tensor:
        tokens = layer.grad == "partial"  # each rank has its own
        return self._products(
            x, [layer], *local_parameters([layer]), Plan(self.recipe, layer.axis, cut=(tokens, False, tokens))
        )[0]

    def _summand(self, x: Tensor, layer: RowParallelLinear) -> Tensor:
        weight = local_shard(layer.weight, grad="sharded")
        plan = Plan(self.recipe, layer.axis, cut=(True, True, False))
        return self._products(x, [layer], [weight], [None], plan)[0]

    def together(self, x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """`parallel.tensor.project` of layers of which some may be left out of fp8."""
        plain = not isinstance(layers[0], ColumnParallelLinear)
        ours: list[Any] = [layer for layer in layers if layer.in_fp8]
        others: list[Any] = [layer for layer in layers if not layer.in_fp8]
        results = list((self._plain if plain else self._columns)(x, ours)) if ours else []
        rest: list[Tensor] = []
        if others:
            rest = [y(x) for y in others] if plain else list(ColumnParallelLinear.together(others[0], x, others))
        return tuple(results.pop(0) if layer.in_fp8 else rest.pop(0) for layer in layers)

    # ---- products

    @property
    def knows_scales(self) -> bool:
        """Whether one pass over a tensor can quantize it: by scales of the past, or of each row."""
        return self.recipe.kind == "rowwise" or (self.scaling is not None and self.started)

    def _products(
        self,
        x: Tensor | Prepared,
        layers: Sequence[nn.Module],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        plan: Plan,
    ) -> tuple[Tensor, ...]:
        """y_i = x W_i^T + b_i: x [..., K], weights [N_i, K], to [..., N_i]."""
        made = self.operands(x, layers, weights, plan)
        ys = _Products.apply(
            made.source, plan, made.gathered, made.x.data, made.x.scale, made.x.transposed, made.other_scale,
            *weights, *biases, *made.carriers, *(w.data for w in made.weights), *(w.scale for w in made.weights),
            *made.gradient_scales,
        )  # fmt: skip
        return tuple(y.view(*made.shape[:-1], y.shape[-1]) for y in ys)

    def operands(
        self, x: Tensor | Prepared, layers: Sequence[nn.Module], weights: Sequence[Tensor], plan: Plan
    ) -> Operands:
        """Of the products of x [..., K], or what its producer has quantized already, with weights [N_i, K]."""
        recorded = torch.is_grad_enabled()
        source = x.stand_in if isinstance(x, Prepared) else x
        whole = source.detach()
        if plan.gathers:
            assert plan.axis is not None
            whole = whole_input(whole, plan.axis, sequence_parallel=True)
        num, scaling = len(layers), self.scaling
        states: list[LayerScaling] = [] if scaling is None else [layer.fp8_scaling for layer in layers]  # type: ignore[misc]
        scales: list[Tensor | None]
        gradient_scales: list[Tensor | None] = [None] * num
        rows = whole.reshape(-1, whole.shape[-1])
        if scaling is not None and self.started:
            scales = [states[0].scale[INPUT], *(state.scale[WEIGHT] for state in states)]
            gradient_scales = [state.scale[GRADIENT] for state in states]
        else:
            cut = [plan.agrees_on(INPUT), *[plan.agrees_on(WEIGHT)] * num]
            scales = _agreed_scales([rows, *weights], cut, E4M3, plan)
        if isinstance(x, Prepared):
            assert self.knows_scales
            x_q, x_amax = x.quantized, x.amax
        else:
            x_q, x_amax = quantized(rows, plan, E4M3, scales[0], transpose=recorded)
        came: list[Any] = [layer.fp8_gathered for layer in layers]
        weights_q = [
            quantized(w, plan, E4M3, s, square=True) if own is None else (own.quantized, None)
            for w, s, own in zip(weights, scales[1:], came, strict=True)
        ]
        carriers: list[Tensor | None] = [None] * num
        if scaling is not None and recorded:
            assert x_amax is not None
            for state, (_, amax) in zip(states, weights_q, strict=True):
                state.record(INPUT, x_amax)
                if amax is not None:  # else it is known of the whole weight
                    state.record(WEIGHT, amax)
            # Of layers with one scale the first one's brings the largest magnitude of all gradients.
            carriers = [None if plan.as_one and n else state.carrier for n, state in enumerate(states)]
        gathered = tuple(own is not None for own in came)
        return Operands(source, whole.shape, x_q, [q for q, _ in weights_q], gathered, carriers, gradient_scales)


class _Products(torch.autograd.Function):
    """Of matrices that are quantized already. x, neither read nor kept, stands for what its gradient belongs to."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: Plan,
        gathered: tuple[bool, ...],
        x_data: Tensor,
        x_scale: Tensor,
        x_transposed: Tensor | None,
        x_transposed_scale: Tensor | None,
        *layers: Any,
    ) -> tuple[Tensor, ...]:
        num = len(layers) // 6
        weights, biases, carriers, data, scales, gradient_scales = (layers[i * num : (i + 1) * num] for i in range(6))
        ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
        ctx.biased = [bias is not None for bias in biases]
        ctx.recorded = [carrier is not None for carrier in carriers]
        transposed_scale = x_scale if x_transposed_scale is None else x_transposed_scale
        ctx.weight_dtype = weights[0].dtype
        kept = [d if is_fp8 else weight for d, weight, is_fp8 in zip(data, weights, gathered, strict=True)]
        ctx.save_for_backward(x_transposed, transposed_scale, *kept, *scales, *gradient_scales)
        return tuple(
            fp8_matmul(
                x_data,
                x_scale,
                w,
                w_scale,
                bias=bias,
                out_dtype=x.dtype,
                fast_accumulation=plan.recipe.fast_accumulation[0],
            )
            for w, w_scale, bias in zip(data, scales, biases, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        plan, num = ctx.plan, len(grads)
        x_t, x_t_scale, *saved = ctx.saved_tensors
        weights, weight_scales, scales = (saved[i * num : (i + 1) * num] for i in range(3))
        gradient = plan.recipe.gradient
        if scales[0] is None:
            scales = _agreed_scales(grads, [plan.agrees_on(GRADIENT)] * num, gradient, plan)
        d_ys = [quantized(d, plan, gradient, s, transpose=True) for d, s in zip(grads, scales, strict=True)]
        d_x, d_weights = start_gradients(
            plan,
            ctx.shape,
            (ctx.dtype, ctx.weight_dtype),
            [d_y for d_y, _ in d_ys],
            weights,
            weight_scales,
            x_t,
            x_t_scale,
        )
        d_biases = [
            d.sum(0, dtype=torch.float32).to(d.dtype) if b else None for d, b in zip(grads, ctx.biased, strict=True)
        ]
        found = [amax for _, amax in d_ys]
        if plan.as_one and ctx.recorded[0]:
            found = [torch.stack([amax for amax in found if amax is not None]).amax(0)] * num
        amaxes = [amax if wanted else None for amax, wanted in zip(found, ctx.recorded, strict=True)]
        return arrived(d_x, plan), *[None] * 6, *d_weights, *d_biases, *amaxes, *[None] * (3 * num)


def local_parameters(
    layers: Sequence[ColumnParallelLinear | ReplicatedLinear],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases as this rank multiplies with them."""
    return [y.local(y.weight) for y in layers], [None if y.bias is None else y.local(y.bias) for y in layers]


def _agreed_scales(
    tensors: Sequence[Tensor], cut: Sequence[bool], dtype: torch.dtype, plan: Plan
) -> list[Tensor | None]:
    """Tensorwise scales of the tensors of which ranks have parts, found in one collective; None for the others."""
    parts = [tensor.detach() for tensor, is_cut in zip(tensors, cut, strict=True) if is_cut]
    if not parts:
        return [None] * len(tensors)
    assert plan.axis is not None
    largest = torch.stack([torch.linalg.vector_norm(part, ord=torch.inf).float() for part in parts])
    if plan.as_one:
        largest = largest.amax().expand(len(parts)).contiguous()
    scales = list(scale_from_amax(maximum(largest, plan.axis), dtype, power_of_two=plan.recipe.power_of_two).unbind())
    return [scales.pop(0) if is_cut else None for is_cut in cut]


def linears_in_fp8(blocks: nn.Module, *, skip: Sequence[str]) -> list[str]:
    """Names in the model, which has these as its `blocks`, of the layers that `apply_fp8` changes; the same in every
    layout, so that layers which others have fused are called by one name."""
    linears = {name: module for name, module in blocks.named_modules() if _is_linear(module)}
    names = [name_in_every_layout(module, f"blocks.{name}") for name, module in linears.items()]
    return [name for name in dict.fromkeys(names) if not any(fragment in name for fragment in skip)]


def apply_fp8(blocks: nn.Module, linears: Fp8Linears) -> None:
    """Make the layers of `linears.names` multiply in fp8, in place. Before compilation and data parallelism."""
    numbers = {name: number for number, name in enumerate(linears.names)}
    for name, module in blocks.named_modules():
        if not _is_linear(module):
            continue
        layer: Any = module
        number = numbers.get(name_in_every_layout(module, f"blocks.{name}"))
        layer.fp8, layer.in_fp8 = linears, number is not None
        if isinstance(module, ColumnParallelLinear | nn.Linear):
            layer.together = MethodType(_together, layer)
        if number is None:
            continue
        layer.fp8_number, layer.fp8_gathered = number, None
        if linears.scaling is not None:
            layer.fp8_scaling = linears.scaling.layers[number]
        replaced, function = next(_REPLACED[kind] for kind in _REPLACED if isinstance(module, kind))
        setattr(layer, replaced, MethodType(function, layer))


# Methods of the layers, which compiled blocks of one kind can share a graph of; that of a partial would be one layer's.


def _together(layer: Any, x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    return layer.fp8.together(x, layers)


_REPLACED: dict[type[nn.Module], tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    nn.Linear: ("forward", lambda layer, x: layer.fp8._plain(x, [layer])[0]),
    ReplicatedLinear: ("forward", lambda layer, x: layer.fp8._replicated(x, layer)),
    RowParallelLinear: ("summand", lambda layer, x: layer.fp8._summand(x, layer)),
    ColumnParallelLinear: ("inside", lambda layer, x: layer.fp8._columns(x, [layer], entered=True)[0]),
}


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, ColumnParallelLinear | ReplicatedLinear | RowParallelLinear)
