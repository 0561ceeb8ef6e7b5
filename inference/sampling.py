"""The next token, as a pure function of logits, settings, seed and position.

No row looks at another one, and random numbers are Philox of (seed, position), so a request's tokens depend neither on
what it is batched with nor on when a step happens.

R rows (sequences that get a token), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference.config import SamplingConfig
from inference.constraints import allowed, allowed_bits
from inference.memory import SAMPLED_LOGITS
from inference.sequence import Sequence
from kernels.cross_entropy import invariant_cross_entropy
from kernels.sampling import draw, sample_tokens

GREEDY_BELOW = 1e-6
"""A temperature that is as good as 0. Logits over one that is much smaller are no numbers of fp32 any more."""
SHIFT = 31
"""A draw's index is seed * 2^31 + position: seeds have 32 bits, positions 31."""


Pick = Callable[[Tensor, Tensor, slice], Tensor]
"""Takes tokens [r] of probabilities [r, V] by indices of random numbers [r]; the slice says which of all rows."""


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
    allowed: Tensor | None  # [R, W] int32, of constraints: a bit for each token; None: no row has any
    tempered: list[float] | None = None  # [R] what divides logits before log-probabilities are taken; None: nothing


class Sampled(NamedTuple):
    """Filled by `sample`."""

    tokens: Tensor  # [R] int64
    logprobs: Tensor  # [R], of these by the model alone, or over settings.tempered
    top_tokens: Tensor | None  # [R, settings.top_logprobs] int64
    top_logprobs: Tensor | None  # the same, most probable first


def settings_of(sequences: Seq[Sequence], *, vocab_size: int, device: torch.device) -> Settings:
    """The settings of some sequences, each about to get the token behind its last."""
    each = [sequence.sampling for sequence in sequences]

    def tensor(values: object, dtype: torch.dtype) -> Tensor:
        made = torch.as_tensor(values, dtype=dtype)
        return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made

    penalties = None
    if any(s.has_penalties for s in each):
        tokens = np.full((len(each), max(len(s.tokens) for s in sequences)), vocab_size)
        for row, sequence in zip(tokens, sequences, strict=True):
            if sequence.sampling.has_penalties:  # of the others, some may be PENDING
                row[: len(sequence.tokens)] = sequence.tokens
        penalties = Penalties(
            repetition=tensor([s.repetition_penalty for s in each], torch.float32),
            presence=tensor([s.presence_penalty for s in each], torch.float32),
            frequency=tensor([s.frequency_penalty for s in each], torch.float32),
            tokens=tensor(tokens, torch.int64),
            num_prompt=tensor([s.num_prompt for s in sequences], torch.int64),
        )
    temperatures = [s.temperature if s.temperature >= GREEDY_BELOW else 0.0 for s in each]
    shares = tensor([temperatures, [s.top_p for s in each], [s.min_p for s in each]], torch.float32)
    top_k = [min(s.top_k or vocab_size, vocab_size) for s in each]
    numbers = tensor([top_k, [(s.seed << SHIFT) + len(s.tokens) for s in sequences]], torch.int64)
    bits = allowed_bits([sequence.constraint for sequence in sequences], vocab_size=vocab_size)
    return Settings(
        temperature=shares[0],
        top_p=shares[1],
        min_p=shares[2],
        top_k=numbers[0],
        draw=numbers[1],
        random=any(temperatures),
        filtered=any(s.temperature >= GREEDY_BELOW and (s.top_k, s.top_p, s.min_p) != (0, 1.0, 0.0) for s in each),
        penalties=penalties,
        top_logprobs=min(max((s.top_logprobs for s in each), default=0), vocab_size),
        allowed=None if bits is None else tensor(bits, torch.int32),
        tempered=_tempered(each),
    )


def _tempered(each: Seq[SamplingConfig]) -> list[float] | None:
    found = [s.temperature if s.tempered_logprobs and s.temperature >= GREEDY_BELOW else 1.0 for s in each]
    return None if all(value == 1.0 for value in found) else found


def over_temperatures(logits: Tensor, temperatures: Seq[float] | None) -> Tensor:
    """logits [R, V], wide and each row divided by its temperature; None: as they are.

    By numbers of the host, as the loss divides (kernels/linear_cross_entropy): CUDA rounds a division by one otherwise
    than one by a tensor, and both have to have the same bits.
    """
    if temperatures is None:
        return logits
    if len(set(temperatures)) == 1:
        return wide(logits) / temperatures[0]
    return torch.stack([row / temperature for row, temperature in zip(wide(logits), temperatures, strict=True)])


def sample(
    logits: Tensor,
    settings: Settings,
    pick: Pick | None = None,
    *,
    batch_invariant: bool = False,
) -> Sampled:
    """The next token of each row of logits [R, V], and its log-probability, in fp32 (fp64 for fp64).

    pick: what takes tokens [r] of probabilities [r, V] by settings.draw [r], for the rows it is told; `draw` unless
    given. What rows with penalties, filters or constraints take of memory is bounded (inference/memory.py): they are
    looked at some at a time.

    Log-probabilities are the model's own, before penalties and temperature: what a trainer computes for the
    same tokens; with settings.tempered, of its logits over the temperature. Equal logits: the smaller token is the
    greedy one. batch_invariant: that of `log_probabilities`.
    """
    plain = not (settings.filtered or settings.penalties or settings.top_logprobs) and settings.allowed is None
    if plain and pick is None:
        tokens, logprobs = sample_tokens(logits, *((settings.temperature, settings.draw) if settings.random else ()))
        if batch_invariant or settings.tempered is not None:
            asked_of = over_temperatures(logits, settings.tempered)
            logprobs = log_probabilities(asked_of, tokens[:, None], batch_invariant=batch_invariant)[:, 0]
        return Sampled(tokens, logprobs, None, None)
    most = max(1, SAMPLED_LOGITS // logits.shape[1])
    pieces = [slice(first, first + most) for first in range(0, max(1, len(logits)), most)]
    found = [_sample_rows(logits[rows], _of_rows(settings, rows), rows, pick, batch_invariant) for rows in pieces]
    return found[0] if len(found) == 1 else _joined(found)


def _sample_rows(logits: Tensor, settings: Settings, rows: slice, pick: Pick | None, batch_invariant: bool) -> Sampled:
    given, logits = logits, wide(logits)
    top = logits.topk(settings.top_logprobs, dim=-1).indices if settings.top_logprobs else None
    if settings.penalties is not None:
        logits = penalized(logits, settings.penalties)
    if settings.allowed is not None:
        may = allowed(settings.allowed, vocab_size=logits.shape[1])
        logits = logits.masked_fill(~may, float("-inf"))
    tokens = logits.argmax(-1)
    if settings.random:
        p = probabilities(logits, settings)
        drawn = draw(p, settings.draw) if pick is None else pick(p, settings.draw, rows)
        tokens = torch.where(settings.temperature > 0, drawn, tokens)
    asked = tokens[:, None] if top is None else torch.cat([tokens[:, None], top], dim=1)
    given = over_temperatures(given, settings.tempered)
    logprobs = log_probabilities(given, asked, batch_invariant=batch_invariant)
    return Sampled(
        tokens=tokens,
        logprobs=logprobs[:, 0],
        top_tokens=top,
        top_logprobs=None if top is None else logprobs[:, 1:],
    )


def _of_rows(settings: Settings, rows: slice) -> Settings:
    """The settings of some of the rows."""
    penalties = settings.penalties
    return settings._replace(
        temperature=settings.temperature[rows],
        top_k=settings.top_k[rows],
        top_p=settings.top_p[rows],
        min_p=settings.min_p[rows],
        draw=settings.draw[rows],
        penalties=None if penalties is None else Penalties(*(x[rows] for x in penalties)),
        tempered=None if settings.tempered is None else settings.tempered[rows],
        allowed=None if settings.allowed is None else settings.allowed[rows],
    )


def _joined(parts: Seq[Sampled]) -> Sampled:
    tops = [part.top_tokens for part in parts if part.top_tokens is not None]
    top_logprobs = [part.top_logprobs for part in parts if part.top_logprobs is not None]
    return Sampled(
        tokens=torch.cat([part.tokens for part in parts]),
        logprobs=torch.cat([part.logprobs for part in parts]),
        top_tokens=torch.cat(tops) if tops else None,
        top_logprobs=torch.cat(top_logprobs) if top_logprobs else None,
    )


def log_probabilities(logits: Tensor, tokens: Tensor, *, batch_invariant: bool = False) -> Tensor:
    """log softmax of logits [R, V] at tokens [R, n]: [R, n] in fp32 (fp64 for fp64).

    batch_invariant: a row's are a function of it alone, to the bit, and what a batch-invariant loss is computed from
    (kernels/cross_entropy).
    """
    if batch_invariant:
        return torch.stack([-invariant_cross_entropy(logits, which) for which in tokens.unbind(1)], dim=1)
    return wide(logits).log_softmax(-1).gather(-1, tokens)


def wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
