"""The next token, as a pure function of logits, settings, seed and position.

No row looks at another one, what computes a row is chosen by its own settings, and random numbers are Philox of (seed,
position), so a request's tokens depend neither on what it is batched with nor on when a step happens.

R rows (sequences that get a token), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from functools import partial
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


Rows = slice | Tensor
"""Some of the rows: int64 [r] on the device, or a slice where they lie one behind the other."""
Pick = Callable[[Tensor, Tensor, Rows], Tensor]
"""Takes tokens [r] of probabilities [r, V] by indices of random numbers [r], for some of the rows."""


class Penalties(NamedTuple):
    """What earlier tokens cost; all on the device of the logits."""

    repetition: Tensor  # [R] fp32
    presence: Tensor  # [R] fp32
    frequency: Tensor  # [R] fp32
    tokens: Tensor  # [R, T] int64: prompt and continuation; V behind them
    num_prompt: Tensor  # [R] int64


class OnHost(NamedTuple):
    """What decides, without a look at the device, how each of R rows is computed. Made by `settings_of`."""

    plain: list[bool]  # nothing but a temperature decides its token
    top_logprobs: list[int]  # how many it asks for
    tempered: list[float]  # what divides its logits before log-probabilities are taken

    @property
    def scored(self) -> list[int]:
        """Rows whose log-probabilities are not those that come with a plain row's token."""
        rows = enumerate(zip(self.plain, self.top_logprobs, self.tempered, strict=True))
        return [row for row, (plain, tops, tempered) in rows if not plain or tops or tempered != 1.0]

    def of_rows(self, numbers: Iterable[int]) -> OnHost:
        """The same of some of the rows, in their order."""
        kept = list(numbers)
        return OnHost(
            plain=[self.plain[number] for number in kept],
            top_logprobs=[self.top_logprobs[number] for number in kept],
            tempered=[self.tempered[number] for number in kept],
        )


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
    allowed: Tensor | None  # [R, W] int32, of constraints: a bit for each token; None: no row has any
    on_host: OnHost


class Sampled(NamedTuple):
    """Filled by `sample`."""

    tokens: Tensor  # [R] int64
    logprobs: Tensor  # [R], of these by the model alone, or over `tempered`
    top_tokens: Tensor | None  # [R, the most that a row asks for] int64; rows that ask for none have anything
    top_logprobs: Tensor | None  # the same, most probable first; None: no row asks


def settings_of(sequences: Seq[Sequence], *, vocab_size: int, device: torch.device) -> Settings:
    """The settings of some sequences, each about to get the token behind its last."""
    each = [sequence.sampling for sequence in sequences]
    tensor = partial(_tensor, device=device)
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
    filters = [t > 0 and _has_filters(s) for t, s in zip(temperatures, each, strict=True)]
    return Settings(
        temperature=shares[0],
        top_p=shares[1],
        min_p=shares[2],
        top_k=numbers[0],
        draw=numbers[1],
        random=any(temperatures),
        filtered=any(filters),
        penalties=penalties,
        allowed=None if bits is None else tensor(bits, torch.int32),
        on_host=OnHost(
            plain=[
                not (has_filters or sequence.samples_by_tokens)
                for has_filters, sequence in zip(filters, sequences, strict=True)
            ],
            top_logprobs=[min(s.top_logprobs, vocab_size) for s in each],
            tempered=[t if s.tempered_logprobs and t > 0 else 1.0 for t, s in zip(temperatures, each, strict=True)],
        ),
    )


def _has_filters(sampling: SamplingConfig) -> bool:
    return (sampling.top_k, sampling.top_p, sampling.min_p) != (0, 1.0, 0.0)


def _tensor(values: object, dtype: torch.dtype, *, device: torch.device) -> Tensor:
    """Values of the host on the device, without waiting for it."""
    made = torch.as_tensor(values, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


def over_temperatures(logits: Tensor, temperatures: Seq[float]) -> Tensor:
    """logits [R, V], wide and each row divided by its temperature; where all are 1, as they are.

    By numbers of the host, as the loss divides (kernels/linear_cross_entropy): CUDA rounds a division by one otherwise
    than one by a tensor, and both have to have the same bits.
    """
    if all(temperature == 1.0 for temperature in temperatures):
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

    pick: what takes tokens [r] of probabilities [r, V] by settings.draw [r], for the rows it is told, which are those
    that are not plain; `draw` unless given. What these take of memory is bounded (inference/memory.py): they are
    looked at some at a time.

    Log-probabilities are the model's own, before penalties and temperature: what a trainer computes for the
    same tokens; where a row asks for `tempered`, of its logits over the temperature. Equal logits: the smaller token is
    the greedy one. batch_invariant: that of `log_probabilities`.
    """
    host = settings.on_host
    warm = (settings.temperature, settings.draw) if settings.random else ()
    if any(host.plain):  # of all rows: that costs less than to gather the logits of those that are plain
        tokens, logprobs = sample_tokens(logits, *warm)
    else:
        tokens, logprobs = logits.new_empty(len(logits), dtype=torch.int64), wide(logits.new_empty(len(logits)))
    for numbers, rows in _pieces([number for number, plain in enumerate(host.plain) if not plain], logits):
        tokens[rows] = _tokens(logits[rows], _of_rows(settings, numbers, rows), rows, pick)
    most = max(host.top_logprobs, default=0)
    top_tokens = tokens.new_zeros(len(logits), most) if most else None
    top_logprobs = logprobs.new_zeros(len(logits), most) if most else None
    scored = range(len(logits)) if batch_invariant else host.scored
    for numbers, rows in _pieces(scored, logits):
        given, asked = logits[rows], tokens[rows][:, None]
        if most:
            asked = torch.cat([asked, wide(given).topk(most, dim=-1).indices], dim=1)
        given = over_temperatures(given, [host.tempered[number] for number in numbers])
        found = log_probabilities(given, asked, batch_invariant=batch_invariant)
        logprobs[rows] = found[:, 0]
        if top_tokens is not None and top_logprobs is not None:
            top_tokens[rows], top_logprobs[rows] = asked[:, 1:], found[:, 1:]
    return Sampled(tokens, logprobs, top_tokens, top_logprobs)


def _pieces(numbers: Seq[int], logits: Tensor) -> Iterator[tuple[Seq[int], Rows]]:
    """The rows of logits [R, V] with these numbers, so many at a time as may be looked at."""
    most = max(1, SAMPLED_LOGITS // logits.shape[1])
    for first in range(0, len(numbers), most):
        some = numbers[first : first + most]
        if len(numbers) == len(logits):
            yield some, slice(first, first + len(some))
        else:
            yield some, _tensor(some, torch.int64, device=logits.device)


def _tokens(logits: Tensor, settings: Settings, rows: Rows, pick: Pick | None) -> Tensor:
    """The tokens [r] of rows that are not plain, of their logits [r, V]."""
    logits = wide(logits)
    if settings.penalties is not None:
        logits = penalized(logits, settings.penalties)
    if settings.allowed is not None:
        may = allowed(settings.allowed, vocab_size=logits.shape[1])
        logits = logits.masked_fill(~may, float("-inf"))
    tokens = logits.argmax(-1)
    if not settings.random:
        return tokens
    p = probabilities(logits, settings)
    drawn = draw(p, settings.draw) if pick is None else pick(p, settings.draw, rows)
    return torch.where(settings.temperature > 0, drawn, tokens)


def _of_rows(settings: Settings, numbers: Seq[int], rows: Rows) -> Settings:
    """The settings of some of the rows."""
    penalties = settings.penalties
    return settings._replace(
        temperature=settings.temperature[rows],
        top_k=settings.top_k[rows],
        top_p=settings.top_p[rows],
        min_p=settings.min_p[rows],
        draw=settings.draw[rows],
        penalties=None if penalties is None else Penalties(*(x[rows] for x in penalties)),
        allowed=None if settings.allowed is None else settings.allowed[rows],
        on_host=settings.on_host.of_rows(numbers),
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
    """What tokens are drawn from: [R, V], in proportion to probabilities. Of greedy rows, anything.

    Sums over the vocabulary are of a row in one order or another, as a library finds fit for the shape of the batch.
    So there is none in what is drawn from, and those that a filter needs are fp64, where the order hardly matters.
    """
    temperature = torch.where(settings.temperature > 0, settings.temperature, 1.0)[:, None].to(logits.dtype)
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
    if not settings.filtered:
        return p
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(p.shape[1], device=p.device)
    kept = rank < settings.top_k[:, None]
    ordered = ordered * kept
    together = ordered.cumsum(-1, dtype=torch.float64)
    top_p = settings.top_p[:, None]
    kept = kept & ((together - ordered < top_p * together[:, -1:]) | (top_p >= 1))  # what is more probable, together
    kept = kept & (ordered >= settings.min_p[:, None] * ordered[:, :1])
    return p * torch.zeros_like(kept).scatter(-1, order, kept)
