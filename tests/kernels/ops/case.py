"""What the generic tests of an op need to know about it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.backend import Tuned

Shape = tuple[int, ...]
Inputs = tuple[Any, ...]
MakeInputs = Callable[[Shape, torch.dtype, torch.Generator], Inputs]


@dataclass(frozen=True)
class Case:
    """One op in one use. Its function and its reference take the same arguments."""

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: MakeInputs  # on the CPU, from a generator; the tests move them
    shapes: Sequence[Shape]  # small and odd: the interpreter runs a program at a time
    differentiable: Sequence[int]  # numbers of the arguments that get a gradient
    checks: Callable[[Inputs], list[tuple[Any, tuple[Any, ...]]]] | None = None  # custom ops and arguments, for opcheck
    tuned: str | None = None  # "module:NAME" of a kernels.backend.Tuned, all of whose configurations are tested
    tuned_dtype: torch.dtype = torch.float32  # of that test on a GPU: one that all configurations are meant for
    batch_dim: int | None = 0  # output rows [:k] depend on input rows [:k] alone, to the bit; None: not promised
    batched: Sequence[int] = (0,)  # the arguments that have this dimension
    stride_bits: bool = True  # of inputs in other strides the results have the same bits; False: some sums are torch's
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)
    extremes: Sequence[float] = (0.0, 1e4, -1e4)  # values every element takes at once; results must be the reference's
    extreme_arguments: Sequence[int] = ()  # whose elements: numbers; (): those that get a gradient
    error_factor: float = 2.0  # error against fp64 at most this times that of the reference in the op's dtype
    tolerance: dict[torch.dtype, float] = field(  # ... or this times the largest element, if that is more
        default_factory=lambda: {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    )

    def extreme(self, value: float, inputs: Sequence[Any]) -> list[Any]:
        """The inputs, some of them full of the value. Raises ValueError where none would be."""
        filled = self.extreme_arguments or self.differentiable
        if not filled:
            raise ValueError(
                f"{self.name} names no extreme_arguments and has no differentiable ones: nothing would differ"
            )
        return [torch.full_like(x, value) if number in filled else x for number, x in enumerate(inputs)]

    def table(self) -> Tuned[Any] | None:
        """Imported late: kernel modules import triton."""
        if self.tuned is None:
            return None
        module, name = self.tuned.split(":")
        return getattr(importlib.import_module(module), name)


def normal(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, *, scale: float = 1.0) -> Tensor:
    """Standard normal numbers times scale."""
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def detached(*inputs: Any) -> Inputs:
    """For a backward op, which has no backward itself."""
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
