"""Adapters added to the weights they are for, and taken out again to the bit.

W + s B A is rounded to the dtype of W, and taking s B A away from that does not give W back: in bf16 most weights would
differ in their last bits, and more with every adapter that came and went. So what is merged keeps the weights as they
were, in host memory; one copy of the adapted layers, no more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.peft import LowRank
from parallel.regions import Located, local_region, local_tensor


class Merged:
    """Weights with adapters in them, until `undo`."""

    def __init__(self, weights: Mapping[str, Located], adapters: Mapping[str, LowRank], *, keep: bool = True) -> None:
        """weights: of a model, by name, as in its state dict, whole or cut in any way; each rank adds what its part
        gets, without communication. Computed in fp32 and rounded once. keep=False: for good, there is no `undo`.
        Raises ValueError, before anything is changed, for an adapter of a layer that is not there or of another shape.
        """
        self._kept: list[tuple[Tensor, Tensor]] = []  # local weight, what it was
        check_fits({name: tuple(weight.shape) for name, weight in weights.items()}, adapters)
        with torch.no_grad():
            for name, adapter in adapters.items():
                weight = weights[f"{name}.weight"]
                local, region = local_tensor(weight), local_region(weight)
                if keep:
                    kept = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
                    self._kept.append((local, kept.copy_(local)))
                if local.numel():
                    local.copy_(with_adapter(local, adapter, region))

    @torch.no_grad()
    def undo(self) -> None:
        """The weights as they were, to the bit. A second time it does nothing."""
        for weight, kept in self._kept:
            weight.copy_(kept)
        self._kept = []


def with_adapter(weight: Tensor, adapter: LowRank, region: tuple[slice, ...] | None = None) -> Tensor:
    """A weight [.., out, in], or the region of it that is here, plus s B A; in its dtype."""
    a, b = (matrix.to(weight.device, torch.float32) for matrix in (adapter.a, adapter.b))
    lengths = None if adapter.lengths is None else adapter.lengths.to(weight.device, torch.float32)
    if region is not None:
        *stack, rows, columns = region
        if lengths is not None and columns != slice(0, a.shape[-1]):
            raise ValueError("an adapter of DoRA needs whole rows, and tp cuts them; export it with --merged first")
        a, b = a[(*stack, slice(None), columns)], b[(*stack, rows)]
        lengths = None if lengths is None else lengths[rows]
    adapted = weight.float() + adapter.scale * (b @ a)
    if lengths is not None:
        adapted *= (lengths / torch.linalg.vector_norm(adapted, dim=-1))[:, None]
    return adapted.to(weight.dtype)


def check_fits(shapes: Mapping[str, tuple[int, ...]], adapters: Mapping[str, LowRank]) -> None:
    """Raise ValueError unless every adapter has a weight of its shape; shapes: of whole weights by name."""
    for name, adapter in adapters.items():
        found = shapes.get(f"{name}.weight")
        wanted = (*adapter.b.shape[:-1], adapter.a.shape[-1])
        if found != wanted:
            has = "there is none" if found is None else f"it is {list(found)}"
            raise ValueError(f"the adapter of {name} is for a weight of shape {list(wanted)}, and {has} in this model")
