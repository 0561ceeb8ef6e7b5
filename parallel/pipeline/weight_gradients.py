"""Split backward: linear layers that put their weight gradient off (2401.10241, section 2).

A backward pass that only hands gradients on to the previous stage shortens the pipeline's critical path; the weight
gradients, half of the work, fill what would be idle time. In a deferring layer autograd computes the gradient of the
input alone, and (input, gradient of the output) are kept until `WeightGradients.run`. Norm weights and tables, whose
gradients cost next to nothing, are not put off. No graph is walked twice and nothing is recomputed.

The store is a side effect of backward, which a graph of torch.compile cannot have, nor could what it keeps outlive the
graph: its memory plan would write the next result there. So these layers stay outside of graphs, which they part; what
lies between them is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.collectives import wait
from parallel.tensor import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    local_shard,
    start_input_gradient,
    whole_input,
)

Key = tuple[int, int]
"""Stage and micro-batch."""

Deliver = Callable[[str, Tensor], None]
"""Takes a finished gradient of what this rank computes with of a parameter, by name, to be added to what it has."""

Compute = Callable[[], Iterator[tuple[str, Tensor]]]
"""Names of parameters and their gradients, each computed when it is asked for, so that not all are held at once."""


OUTSIDE = "weight gradients are put off"


class WeightGradients:
    """Weight gradients of deferring layers: computed at once, or kept by stage and micro-batch until `run`."""

    def __init__(self) -> None:
        self.deliver: Deliver | None = None  # filled by trainer/pipelined.py
        self._collecting: Key | None = None
        self._waiting: dict[Key, list[Compute]] = {}

    @contextmanager
    def collect(self, key: Key) -> Iterator[None]:
        """Backward passes put weight gradients off while this lasts; otherwise they compute them."""
        self._collecting, self._waiting[key] = key, []
        try:
            yield
        finally:
            self._collecting = None

    def add(self, compute: Compute) -> None:
        if self._collecting is None:
            self._deliver(compute)
        else:
            self._waiting[self._collecting].append(compute)

    def run(self, key: Key) -> None:
        """Compute what was put off under this key, and free what it needed."""
        for compute in self._waiting.pop(key):
            self._deliver(compute)

    @torch.no_grad()
    def _deliver(self, compute: Compute) -> None:
        assert self.deliver is not None
        for name, grad in compute():
            self.deliver(name, grad)


class Deferring(nn.Module):
    """A layer of another kind that can put its weight gradients off: its backward adds them to the store."""

    weight_gradients: WeightGradients | None = None  # filled by defer_weight_gradients; None: autograd computes them
    layer_name: str  # in the model; filled likewise


Linear = nn.Linear | RowParallelLinear | ColumnParallelLinear | ReplicatedLinear


def _operands(layer: Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as this rank multiplies with them. A row-parallel layer adds its bias itself, after its sum."""
    if isinstance(layer, RowParallelLinear):
        return local_shard(layer.weight, grad="sharded"), None
    if isinstance(layer, ColumnParallelLinear | ReplicatedLinear):
        return layer.local(layer.weight), None if layer.bias is None else layer.local(layer.bias)
    return layer.weight, layer.bias


class _DeferringLinear(torch.autograd.Function):
    """y = x W^T + b, of which autograd sees x alone: weight and bias get their gradients from the store."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Linear, name: str, store: WeightGradients) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.layer, ctx.name, ctx.store = layer, name, store
        return F.linear(inputs, *_operands(layer))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        weight, _ = _operands(ctx.layer)  # what the layer has now: fully_shard gathers it for backward
        ctx.store.add(partial(_linear_gradients, ctx.layer, ctx.name, inputs, grad_output))
        return grad_output @ weight, None, None, None


def _linear_gradients(layer: Linear, name: str, inputs: Tensor, grad_output: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Of weight [out, in] and bias [out]; inputs [..., in], grad_output [..., out]."""
    if isinstance(layer, ColumnParallelLinear | ReplicatedLinear):
        yield from _shared_gradients([layer], [name], inputs, [grad_output])
        return
    flat = grad_output.flatten(0, -2)
    if layer.weight.requires_grad:
        yield f"{name}.weight", flat.T @ inputs.flatten(0, -2)
    if isinstance(layer, nn.Linear) and layer.bias is not None and layer.bias.requires_grad:
        yield f"{name}.bias", flat.sum(0)


class _DeferringColumns(torch.autograd.Function):
    """`parallel.tensor.project` of column-parallel layers, of which autograd sees x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[ColumnParallelLinear], names: Sequence[str], store: Any) -> Any:
        first = layers[0]
        whole = whole_input(x, first.axis, sequence_parallel=first.sequence_parallel)
        ctx.save_for_backward(whole)
        ctx.layers, ctx.names, ctx.store = layers, names, store
        return tuple(
            F.linear(whole, layer.local(layer.weight), None if layer.bias is None else layer.local(layer.bias))
            for layer in layers
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (whole,) = ctx.saved_tensors
        first = ctx.layers[0]
        weights = [layer.local(layer.weight) for layer in ctx.layers]
        pending = start_input_gradient(grads, weights, first.axis, sequence_parallel=first.sequence_parallel)
        ctx.store.add(partial(_shared_gradients, ctx.layers, ctx.names, whole, grads))
        return wait(pending), None, None, None


def _shared_gradients(
    layers: Sequence[ColumnParallelLinear | ReplicatedLinear],
    names: Sequence[str],
    inputs: Tensor,
    grads: Sequence[Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Collective over tp where its ranks share weights; they run the same schedule."""
    rows = inputs.flatten(0, -2)
    for layer, name, grad in zip(layers, names, grads, strict=True):
        flat = grad.flatten(0, -2)
        if layer.weight.requires_grad:
            yield f"{name}.weight", layer.gradient(flat.T @ rows)
        if layer.bias is not None and layer.bias.requires_grad:
            yield f"{name}.bias", layer.gradient(flat.sum(0))


def defer_weight_gradients(blocks: nn.Module, *, at_once: tuple[type[nn.Module], ...] = ()) -> WeightGradients:
    """Make every linear layer in `blocks` put its weight gradient off on demand, in place; the store they share.

    The store names parameters as a model does that has these as its `blocks`. Inputs must need a gradient, as those
    inside a block do. at_once: small layers that may compute their weight gradients with those of their inputs. Raises
    TypeError for a weight matrix in another kind of layer, which would do so unnoticed and make the schedule's plan
    wrong.
    """
    store = WeightGradients()
    names = {module: f"blocks.{name}" for name, module in blocks.named_modules()}

    @torch.compiler.disable(reason=OUTSIDE)
    def linear(x: Tensor, *, layer: Linear) -> Tensor:
        return _DeferringLinear.apply(x, layer, names[layer], store)

    @torch.compiler.disable(reason=OUTSIDE)
    def columns(x: Tensor, layers: Sequence[ColumnParallelLinear]) -> tuple[Tensor, ...]:
        return _DeferringColumns.apply(x, layers, [names[layer] for layer in layers], store)

    for module, name in names.items():
        if type(module) is nn.Linear or isinstance(module, ReplicatedLinear):
            module.forward = partial(linear, layer=module)  # type: ignore[method-assign]
        elif isinstance(module, RowParallelLinear):
            module.summand = partial(linear, layer=module)  # type: ignore[method-assign]
        elif isinstance(module, ColumnParallelLinear):
            module.together = columns  # type: ignore[method-assign]
            module.inside = partial(linear, layer=module)  # type: ignore[method-assign]
        elif isinstance(module, Deferring):
            module.weight_gradients, module.layer_name = store, name
        elif isinstance(module, at_once):
            continue
        elif any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
            raise TypeError(f"{name} ({type(module).__name__}) has weights whose gradient cannot be put off")
    return store
