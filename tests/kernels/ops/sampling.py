"""Cases of sampling."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.sampling import sample_tokens
from kernels.sampling.op import _sample
from kernels.sampling.reference import sample_reference
from tests.kernels.ops.case import Case, Inputs, Shape, normal


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Logits, temperatures (some 0), numbers of random numbers."""
    R = shape[0]
    temperature = torch.rand(R, generator=generator) + 0.3
    temperature[::3] = 0.0
    index = torch.randint(0, 2**62, (R,), generator=generator)
    return normal(shape, dtype, generator, scale=3.0), temperature, index


def _call(function: Any, logits: Tensor, temperature: Tensor, index: Tensor, *, draws: bool) -> tuple[Tensor, Tensor]:
    """Tokens as numbers that are compared, and log-probabilities."""
    tokens, logprobs = function(logits, temperature if draws else None, index if draws else None)
    return tokens.to(logprobs.dtype), logprobs


def _checks(inputs: Inputs) -> list[tuple[Any, Inputs]]:
    return [(_sample, inputs), (_sample, (inputs[0], None, None))]


def _case(name: str, *, draws: bool, **changes: Any) -> Case:
    return Case(
        name=name,
        op=partial(_call, sample_tokens, draws=draws),
        reference=partial(_call, sample_reference, draws=draws),
        inputs=_inputs,
        shapes=[(7, 290), (3, 9001)],
        differentiable=(),
        batched=(0, 1, 2),
        dtypes=(torch.float32,),  # in less, fp64 has other tokens: logits are not rounded there
        extremes=(0.0, 1e4, -1e4),
        extreme_arguments=(0,),
        **changes,
    )


CASES = [
    _case("sample_greedy", draws=False),
    _case("sample_drawn", draws=True, checks=_checks, tuned="kernels.sampling.kernel:BLOCKS"),
]
