"""The next token, as a pure function of logits, settings, seed and position.

No row looks at another one, and random numbers are Philox of (seed, position), so a request's tokens depend neither on
what it is batched with nor on when a step happens.

R rows (sequences that get a token), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference.sequence import Sequence
from kernels.philox import uniform

STREAMS = ("inference.sampling", "inference.sampling.low")
SHIFT = 31
"""A draw's index is seed * 2^31 + position: seeds have 32 bits, positions 31."""


class Penalties(NamedTuple):
    """What earlier tokens cost; all on the device of the logits."""

    repetition: Tensor  # [R] fp32
    presence: Tensor  # [R] fp32
    frequency: Tensor  # [R] fp32
    tokens: Tensor  # [R, T] int64: prompt and continuation; V behind them
    num_prompt: Tensor  # [R] int64


class Settings(NamedTuple):
    """What rows are sampled by; tensors on the device of the logits. Made by `settings_of`."""

    temperature: Tensor  # [R] fp32; 0: greedy
    top_k: Tensor  # [R] int64; V: all
    top_p: Tensor  # [R] fp32
    min_p: Tensor  # [R] fp32
    draw: Tensor  # [R] int64: index of the random number
    random: bool  # whether any row is not greedy
    filtered: bool  # whether any row has top_k, top_p or min_p
    penalties: Penalties | None  # None: no row has any
    top_logprobs: int  # the most that a row asks for


class Sampled(NamedTuple):
    """Filled by `sample`."""

    tokens: Tensor  # [R] int64
    logprobs: Tensor  # [R], of these by the model alone
    top_tokens: Tensor | None  # [R, settings.top_logprobs] int64
    top_logprobs: Tensor | None  # the same, most probable first


def settings_of(sequences: Seq[Sequence], *, vocab_size: int, device: torch.device) -> Settings:
    """The settings of some sequences, each about to get the token behind its last."""
    each = [sequence.sampling for sequence in sequences]

    def tensor(values: object, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    penalties = None
    if any((s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1.0, 0.0, 0.0) for s in each):
        tokens = np.full((len(each), max(len(s.tokens) for s in sequences)), vocab_size)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence.tokens)] = sequence.tokens
        penalties = Penalties(
            repetition=tensor([s.repetition_penalty for s in each], torch.float32),
            presence=tensor([s.presence_penalty for s in each], torch.float32),
            frequency=tensor([s.frequency_penalty for s in each], torch.float32),
            tokens=tensor(tokens, torch.int64),
            num_prompt=tensor([s.num_prompt for s in sequences], torch.int64),
        )
    return Settings(
        temperature=tensor([s.temperature for s in each], torch.float32),
        top_k=tensor([min(s.top_k or vocab_size, vocab_size) for s in each], torch.int64),
        top_p=tensor([s.top_p for s in each], torch.float32),
        min_p=tensor([s.min_p for s in each], torch.float32),
        draw=tensor([(s.seed << SHIFT) + len(s.tokens) for s in sequences], torch.int64),
        random=any(s.temperature > 0 for s in each),
        filtered=any(s.temperature > 0 and (s.top_k, s.top_p, s.min_p) != (0, 1.0, 0.0) for s in each),
        penalties=penalties,
        top_logprobs=min(max((s.top_logprobs for s in each), default=0), vocab_size),
    )


def sample(logits: Tensor, settings: Settings) -> Sampled:
    """The next token of each row of logits [R, V] (fp32 or fp64), and its log-probability.

    Log-probabilities are the model's own, before penalties and temperature: what a trainer computes for the same
    tokens. Equal logits: the smaller token is the greedy one.
    """
    logprobs = logits.log_softmax(-1)
    if settings.penalties is not None:
        logits = penalized(logits, settings.penalties)
    tokens = logits.argmax(-1)
    if settings.random:
        tokens = torch.where(settings.temperature > 0, draw(probabilities(logits, settings), settings.draw), tokens)
    top = logprobs.topk(settings.top_logprobs, dim=-1) if settings.top_logprobs else None
    return Sampled(
        tokens=tokens,
        logprobs=logprobs.gather(-1, tokens[:, None])[:, 0],
        top_tokens=None if top is None else top.indices,
        top_logprobs=None if top is None else top.values,
    )


def penalized(logits: Tensor, penalties: Penalties) -> Tensor:
    """logits [R, V] with what tokens that occurred cost: repetition first, then presence and frequency."""
    tokens = penalties.tokens
    generated = torch.arange(tokens.shape[1], device=tokens.device) >= penalties.num_prompt[:, None]

    def count(which: Tensor) -> Tensor:
        counts = logits.new_zeros(logits.shape[0], logits.shape[1] + 1)
        return counts.scatter_add(1, tokens, which.to(logits.dtype))[:, :-1]

    repetition = penalties.repetition[:, None].to(logits.dtype)
    divided = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(count(torch.ones_like(generated)) > 0, divided, logits)
    counts = count(generated)
    return logits - penalties.frequency[:, None] * counts - penalties.presence[:, None] * (counts > 0)


def probabilities(logits: Tensor, settings: Settings) -> Tensor:
    """What tokens are drawn from: [R, V], not normalised after a filter. Of greedy rows, anything."""
    temperature = torch.where(settings.temperature > 0, settings.temperature, 1.0)
    p = (logits / temperature[:, None].to(logits.dtype)).softmax(-1)
    if not settings.filtered:
        return p
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(p.shape[1], device=p.device)
    kept = rank < settings.top_k[:, None]
    ordered = ordered * kept
    before = ordered.cumsum(-1) - ordered  # what is more probable, together
    top_p = settings.top_p[:, None]
    kept = kept & ((before < top_p * ordered.sum(-1, keepdim=True)) | (top_p >= 1))
    kept = kept & (ordered >= settings.min_p[:, None] * ordered[:, :1])
    return p * torch.zeros_like(kept).scatter(-1, order, kept)


def draw(p: Tensor, index: Tensor) -> Tensor:
    """A token of each row of p [R, V] in proportion to it: the first up to which more than a uniform share lies.

    In the order of the vocabulary whatever was filtered, in fp64, by a random number of 48 bits.
    """
    cumulative = p.to(torch.float64).cumsum(-1)
    high, low = (uniform(0, stream, index).to(torch.float64) for stream in STREAMS)
    share = (high + low * 2.0**-24)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, share, right=True)[:, 0]
