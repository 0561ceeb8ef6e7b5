"""The sampler against transformers' processors and against probabilities; the same request in any batch."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import generation

from inference.config import SamplingConfig
from inference.sampling import SHIFT, Sampled, draw, penalized, probabilities, sample, settings_of
from inference.sequence import Sequence
from kernels.backend import interpreted
from kernels.sampling import uniform_48
from kernels.sampling.reference import STREAMS, sample_reference

V = 23
CPU = torch.device("cpu")
CUDA = torch.cuda.is_available()


def row(tokens: list[int], *, num_prompt: int = 1, seed: int = 0, **sampling: object) -> Sequence:
    """A sequence about to get its next token."""
    config = SamplingConfig(**sampling)  # type: ignore[arg-type]
    return Sequence(0, tokens, num_prompt, config, seed=seed, max_tokens=9, text=None)


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return 3.0 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theirs(logits: Tensor, tokens: list[int], sampling: SamplingConfig) -> Tensor:
    """Probabilities by transformers."""
    steps: list[object] = []
    if sampling.repetition_penalty != 1:
        steps.append(generation.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(generation.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(generation.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(generation.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(generation.MinPLogitsWarper(sampling.min_p))
    for step in steps:
        logits = step(torch.tensor([tokens]), logits)  # type: ignore[operator]
    return logits.softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
        {"repetition_penalty": 1.9, "temperature": 0.8, "top_p": 0.9},
        {"top_k": 1},
        {"top_k": 500, "top_p": 0.999},
    ],
    ids=str,
)
def test_probabilities_are_those_of_transformers(settings: dict[str, float]) -> None:
    """Another order of the steps, a filter that keeps one token too few, probabilities of the wrong temperature."""
    tokens = [1, 5, 7, 7, 2]
    for seed in range(6):
        logits = logits_of(1, seed)
        sequence = row(tokens, **settings)
        made = settings_of([sequence], vocab_size=V, device=CPU)
        ours = logits if made.penalties is None else penalized(logits, made.penalties)
        ours = probabilities(ours, made)
        ours = ours / ours.sum(-1, keepdim=True)
        torch.testing.assert_close(ours, theirs(logits, tokens, sequence.sampling), atol=1e-7, rtol=1e-6)


def test_presence_and_frequency_count_the_continuation_alone() -> None:
    """The prompt's tokens penalised as well, which repetition_penalty does."""
    logits = torch.zeros(1, V, dtype=torch.float64)
    sequence = row([3, 4, 5, 5, 4, 5], num_prompt=3, presence_penalty=0.5, frequency_penalty=0.25)
    made = settings_of([sequence], vocab_size=V, device=CPU).penalties
    assert made is not None
    found = penalized(logits, made)[0]
    expected = torch.zeros(V, dtype=torch.float64)
    expected[4], expected[5] = -0.5 - 0.25, -0.5 - 0.25 * 2
    torch.testing.assert_close(found, expected)


def various() -> list[Sequence]:
    """Requests of every kind, each with its seed and position."""
    return [
        row([1], temperature=0.0),
        row([1, 2], seed=1),
        row([1, 2], seed=1, top_p=0.5),
        row([4, 4, 4], seed=2**32 - 1, temperature=2.0),
        row([4, 4, 9], seed=7, repetition_penalty=1.3, frequency_penalty=0.4),
        row([9] * 11, seed=7, top_k=3, min_p=0.01, top_logprobs=4),
    ]


def test_a_row_does_not_depend_on_the_others() -> None:
    """Random numbers drawn from a stream of the batch, or a filter that changes the order of tokens for all rows."""
    logits = logits_of(6)
    together = sample(logits, settings_of(various(), vocab_size=V, device=CPU))
    for number, sequence in enumerate(various()):
        alone = sample(logits[number : number + 1], settings_of([sequence], vocab_size=V, device=CPU))
        assert alone.tokens[0] == together.tokens[number]
        assert alone.logprobs[0] == together.logprobs[number]


@cache
def rounded() -> tuple[Tensor, list[int]]:
    """Logits [1, V], and 23 seeds whose random numbers lie where the last bits of fp32 sums decide the token."""
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0))
    together = logits[0].double().softmax(-1).cumsum(0)
    share = uniform_48(STREAMS, (torch.arange(200_000) << SHIFT) + 1)
    below, above = (torch.searchsorted(together, share * (1 + error), right=True) for error in (-1e-7, 1e-7))
    return logits, (below != above).nonzero()[:23, 0].tolist()


@pytest.mark.parametrize("other", [{"top_p": 0.9}, {"presence_penalty": 0.5}, {"top_logprobs": 2}], ids=str)
def test_a_row_is_computed_by_the_same_kernel_whatever_the_others_ask(other: dict[str, float]) -> None:
    """A neighbour with a filter, a penalty or log-probabilities that sends all rows through sums that round otherwise:
    the random number is the same, and one token in thousands is another.

    Negative control: these random numbers lie where torch and the kernel do disagree.
    """
    one, seeds = rounded()
    logits = one.expand(24, -1).contiguous()
    rows = [row([1], seed=seed) for seed in seeds]
    neighbour = row([1], seed=5, **other)
    with nullcontext() if CUDA else interpreted():
        plain = sample_on_device(logits[: len(rows)], rows)
        mixed = sample_on_device(logits[: len(rows) + 1], [*rows[:7], neighbour, *rows[7:]])
        alone = sample_on_device(logits[:1], [neighbour])
    kept = [number for number in range(len(rows) + 1) if number != 7]
    assert torch.equal(mixed.tokens[kept], plain.tokens)
    assert torch.equal(mixed.logprobs[kept], plain.logprobs)
    assert (mixed.tokens[7], mixed.logprobs[7]) == (alone.tokens[0], alone.logprobs[0])
    by_torch = sample_reference(logits[: len(rows)], torch.ones(len(rows)), (torch.tensor(seeds) << SHIFT) + 1)[0]
    assert (by_torch != plain.tokens.cpu()).any()


def sample_on_device(logits: Tensor, rows: list[Sequence]) -> Sampled:
    device = torch.device("cuda" if CUDA else "cpu")
    return sample(logits.to(device), settings_of(rows, vocab_size=logits.shape[1], device=device))


def test_what_a_row_asks_to_know_does_not_change_its_token() -> None:
    """A token drawn another way where its log-probabilities are wanted as well."""
    one, seeds = rounded()
    logits = one.expand(len(seeds), -1).contiguous()
    with nullcontext() if CUDA else interpreted():
        plain, told = (
            sample_on_device(logits, [row([1], seed=seed, top_logprobs=tops) for seed in seeds]) for tops in (0, 3)
        )
    assert torch.equal(plain.tokens, told.tokens)
    assert told.top_tokens is not None
    assert (told.top_tokens.cpu() == logits[0].topk(3).indices).all()


def test_seed_and_position_both_matter() -> None:
    """The same token at every place, or for every seed."""
    logits = torch.zeros(1, V, dtype=torch.float64)

    def token(seed: int, length: int) -> int:
        sequence = row([1] * length, seed=seed)
        return int(sample(logits, settings_of([sequence], vocab_size=V, device=CPU)).tokens)

    assert token(3, 5) == token(3, 5)
    assert len({token(3, length) for length in range(1, 40)}) > 10
    assert len({token(seed, 5) for seed in range(40)}) > 10


def chi_square(counts: Tensor, p: Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected)[p > 0].sum())


def test_draws_have_the_distribution_they_are_of() -> None:
    """Shares that are off by a token, or uniform numbers that are not. Chi-square with 7 degrees: 99.99% is 29.9.

    Negative control: the same draws do not fit a distribution that differs by a twentieth in two places.
    """
    p = torch.tensor([0.3, 0.0, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02], dtype=torch.float64)
    drawn = draw(p.expand(40_000, -1), torch.arange(40_000) << 31)
    counts = drawn.bincount(minlength=9).double()
    assert counts[1] == 0
    assert chi_square(counts, p) < 29.9
    wrong = p.clone()
    wrong[0], wrong[2] = 0.285, 0.215
    assert chi_square(counts, wrong) > 29.9


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-39, 9e-7])
@pytest.mark.parametrize("top_k", [0, 5])
def test_a_temperature_close_to_0_is_greedy(temperature: float, top_k: int) -> None:
    """Logits over such a temperature are infinite, their softmax NaN, and the token the last of the vocabulary."""
    logits = 9.0 * logits_of(3).float()
    rows = [row([1], temperature=temperature, top_k=top_k), row([1], temperature=1.0), row([1], temperature=0.0)]
    found = sample(logits, settings_of(rows, vocab_size=logits.shape[1], device=logits.device))
    greedy = logits.argmax(-1)
    assert found.tokens[[0, 2]].tolist() == greedy[[0, 2]].tolist()
    alone = sample(logits[:1], settings_of(rows[:1], vocab_size=logits.shape[1], device=logits.device))
    assert alone.tokens.tolist() == greedy[:1].tolist()


def test_log_probabilities_are_the_models_own() -> None:
    """Those of the filtered distribution: a trainer would compute others for the same tokens."""
    logits = logits_of(6)
    found = sample(logits, settings_of(various(), vocab_size=V, device=CPU))
    exact = logits.log_softmax(-1)
    assert torch.equal(found.logprobs, exact.gather(-1, found.tokens[:, None])[:, 0])
    assert found.top_tokens is not None
    assert torch.equal(found.top_tokens[-1], exact[-1].topk(4).indices)  # the others did not ask


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tempered_log_probabilities_are_those_of_each_rows_temperature(filtered: bool, dtype: torch.dtype) -> None:
    """One temperature for all rows; a greedy row that is divided by 0; a row that did not ask for it."""
    more: dict[str, object] = {"top_k": 9} if filtered else {}
    temperatures, asked = [0.7, 1.7, 0.0, 0.7], [True, True, True, False]
    rows = [
        row([1, 2], seed=n, temperature=t, tempered_logprobs=a, **more)
        for n, (t, a) in enumerate(zip(temperatures, asked, strict=True))
    ]
    logits = logits_of(4).to(dtype)
    found = sample(logits, settings_of(rows, vocab_size=V, device=CPU))
    alike = sample(logits[:1], settings_of(rows[:1], vocab_size=V, device=CPU))
    assert found.tokens[0] == alike.tokens[0]
    assert found.logprobs[0] == alike.logprobs[0]
    divisors = torch.tensor([0.7, 1.7, 1.0, 1.0], dtype=torch.float64)[:, None]
    expected = (logits.double() / divisors).log_softmax(-1)[torch.arange(4), found.tokens]
    torch.testing.assert_close(found.logprobs.double(), expected, rtol=1e-5, atol=1e-6)
