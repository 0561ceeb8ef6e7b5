"""Which scales an fp8 linear layer uses, and the state of delayed scaling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.fp8.formats import E4M3, E5M2, require_fp8, scale_from_amax

KINDS = ("tensorwise_delayed", "tensorwise_dynamic", "rowwise", "block128")
INPUT, WEIGHT, GRADIENT = 0, 1, 2  # the three tensors that a layer quantizes


@dataclass(frozen=True)
class ScalingRecipe:
    """How a layer's input, weight and output gradient become fp8. The first two are E4M3.

    tensorwise_delayed: one scale, from the largest magnitudes of past steps (DelayedScaling); reads each tensor once.
    tensorwise_dynamic: one scale, from the tensor itself.
    rowwise: a scale per row of either operand of each product.
    block128: 1x128 for input and gradient, 128x128 for the weight (2412.19437, 3.3.2).
    """

    kind: str = "tensorwise_dynamic"
    gradient: torch.dtype = E5M2
    power_of_two: bool = False  # scales
    fast_accumulation: tuple[bool, bool] = (True, False)  # in the forward, in the backward; blocks have their own way

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}; use one of {', '.join(KINDS)}")
        require_fp8(self.gradient, name="gradient")


class LayerScaling:
    """What one layer reads and writes of `DelayedScaling`, in tensors of its own: compiled code takes them as inputs,
    so that layers of one kind share it, and what it writes to lies in no memory that another input has."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale  # fp32 [3], of INPUT, WEIGHT, GRADIENT; read only
        self.amax = torch.zeros_like(scale)  # the largest magnitudes of this step
        self.carrier = _carrier(self)

    def record(self, which: int, amax: Tensor) -> None:
        """A largest magnitude [] in this step, of the INPUT, WEIGHT or GRADIENT."""
        with torch.no_grad():
            held = self.amax[which]
            held.copy_(torch.maximum(held, amax))


class DelayedScaling(nn.Module):
    """Scales of num_linears layers, from the largest magnitudes of the last H steps (2209.05433, section 5).

    A step: forward and backward of all micro-batches, which raise the `amax` of `layers`; then, after the last
    backward, `update()`, to which a caller whose ranks share tensors passes the maximum over them, one all-reduce for
    all layers. Nothing waits for the device. Before the first update all scales are 1, under which gradients below
    2^-17 (E5M2) vanish: run one step whose gradients are thrown away. Gradients are recorded by `backward()`, not by
    torch.autograd.grad().

    Buffers, fp32, saved with the module: `history` [H, L, 3], newest first, `scale` [L, 3]; the last dimension is
    INPUT, WEIGHT, GRADIENT. A layer's scale is a view of its row.
    """

    history: Tensor
    scale: Tensor

    def __init__(
        self,
        num_linears: int,
        *,
        recipe: ScalingRecipe,
        history_length: int = 16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_linears < 1 or history_length < 1:
            raise ValueError(f"num_linears={num_linears}, history_length={history_length}; both must be at least 1")
        if recipe.kind != "tensorwise_delayed":
            raise ValueError(f"recipe.kind={recipe.kind}; delayed scaling is for tensorwise_delayed")
        self.recipe = recipe
        self.register_buffer("history", torch.zeros(history_length, num_linears, 3, device=device))
        self.register_buffer("scale", torch.ones(num_linears, 3, device=device))
        self.layers = [LayerScaling(row) for row in self.scale]

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> DelayedScaling:
        """Moved, but always in fp32; between steps, and before layers have been handed out."""
        super()._apply(lambda tensor: fn(tensor).float(), *args, **kwargs)
        self.layers = [LayerScaling(row) for row in self.scale]
        return self

    def amax(self) -> Tensor:
        """A copy [L, 3] of the layers' largest magnitudes in this step."""
        return torch.stack([layer.amax for layer in self.layers])

    @torch.no_grad()
    def update(self, amax: Tensor | None = None) -> None:
        """End a step: its amax [L, 3], by default the layers', enter the history, scales follow from the largest in it,
        the layers' start anew.

        Layers that saw nothing but zeros in H steps keep their scale, as do those whose only amax were inf or NaN,
        which are left out of the history: one overflow does not spoil the scales of H steps.
        """
        amax = self.amax() if amax is None else amax
        seen = torch.where(amax.isfinite(), amax, 0.0)
        self.history.copy_(torch.cat([seen[None], self.history[:-1]]))
        largest = self.history.amax(dim=0)
        power_of_two = self.recipe.power_of_two
        scales = [
            scale_from_amax(largest[:, i], dtype, power_of_two=power_of_two)
            for i, dtype in enumerate((E4M3, E4M3, self.recipe.gradient))
        ]
        self.scale.copy_(torch.where(largest > 0, torch.stack(scales, dim=1), self.scale))
        torch._foreach_zero_([layer.amax for layer in self.layers])


def _carrier(scaling: LayerScaling) -> Tensor:
    """A leaf whose gradient is the largest magnitude of the layer's output gradient: what backward may hand out without
    changing memory, which compiled graphs of several micro-batches forbid. It is recorded as soon as it is there."""
    leaf = torch.zeros((), device=scaling.amax.device, requires_grad=True)

    def record(leaf: Tensor) -> None:
        if leaf.grad is not None:
            scaling.record(GRADIENT, leaf.grad)
            leaf.grad = None

    leaf.register_post_accumulate_grad_hook(record)
    return leaf
