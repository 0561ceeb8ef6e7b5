"""Sampling as an op that compiled graphs keep whole. R rows, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import refuse_dtensors, runs_triton
from kernels.sampling.reference import sample_reference


def sample_tokens(
    logits: Tensor, temperature: Tensor | None = None, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(tokens [R] int64, their log-probabilities [R]) of logits [R, V], the latter by the logits alone.

    temperature [R] fp32: 0 takes the most probable token, of equal ones the first; above 0 a token is drawn from
    softmax(logits / temperature), in the order of the vocabulary, by the random number that index [R] int64 names
    (Philox; kernels/sampling/reference.py). None: every row takes the most probable. Log-probabilities are fp32 (fp64
    for fp64, which the reference computes on any device). A row depends on itself alone; the same bits in every call.
    A row with NaN has NaN for its log-probability, and any token. Raises TypeError for DTensors, ValueError for shapes.
    """
    refuse_dtensors(logits=logits)
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits have shape {list(logits.shape)}; use [R, V]")
    for name, x, dtype in (("temperature", temperature, torch.float32), ("index", index, torch.int64)):
        if (x is None) != (temperature is None) or (x is not None and (x.shape, x.dtype) != (logits.shape[:1], dtype)):
            raise ValueError(f"temperature and index are fp32 and int64 [{logits.shape[0]}], or both None; see {name}")
    tokens, logprobs = _sample(logits, temperature, index)
    return tokens, logprobs


@torch.library.custom_op("lattice::sample_tokens", mutates_args=())
def _sample(logits: Tensor, temperature: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor]:
    if not runs_triton(logits) or logits.dtype == torch.float64:
        return sample_reference(logits, temperature, index)
    from kernels.sampling.kernel import sample

    return sample(logits, temperature, index)


@_sample.register_fake
def _(logits: Tensor, temperature: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=wide)
