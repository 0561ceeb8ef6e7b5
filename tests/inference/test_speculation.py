"""Engines that speculate give what they give without, whoever drafts and whatever else they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from data.tokenizer import train_bpe
from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.sequence import Completion
from inference.speculation.config import SpeculationConfig, speculation_problems
from inference.speculation.ngram import NGramDrafter
from inference.speculation.runner import SpeculativeRunner
from models.decoder import Decoder
from models.invariant import make_batch_invariant
from tests.inference.greedy import GREEDY, prompts_of, run_preempting
from tests.inference.speculating import Scripted, speculating
from tests.inference.test_features import LENGTHS, MODELS, SHARED, combination, expected, served
from tests.models.small import random_decoder, tiny

PROMPTS = prompts_of(LENGTHS, shared=SHARED)
SMALL = EngineConfig(block_size=4, max_batch_tokens=24, max_sequences=4)
SAMPLED = [
    SamplingConfig(temperature=0.8, seed=4, max_tokens=7, top_logprobs=2),
    SamplingConfig(temperature=1.3, seed=2**32 - 1, max_tokens=9, top_k=9, top_p=0.9, min_p=0.02),
    SamplingConfig(temperature=0.6, seed=1, max_tokens=8, repetition_penalty=1.5, frequency_penalty=0.4),
    SamplingConfig(temperature=0.0, max_tokens=6, presence_penalty=2.0, frequency_penalty=1.0),
    SamplingConfig(temperature=0.9, seed=9, max_tokens=5, speculate=False),
]


@cache
def other() -> Decoder:
    """The served model with one of its layers disturbed: right at times."""
    model = random_decoder(MODELS["llama"]()).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.blocks[1].parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def texts(name: str) -> list[list[int]]:
    return [prompt + tokens for prompt, tokens in zip(PROMPTS, expected(name), strict=True)]


def counts(engine: Engine) -> list[int]:
    assert isinstance(engine.runner, SpeculativeRunner)
    return engine.runner.policy.counts.accepted


DRAFTERS: list[Callable[[str, EngineConfig, int], Engine]] = [
    lambda name, config, seed: speculating(
        served(name), config, drafter=Scripted(texts(name), right=0.7, seed=seed), num_tokens=2 + seed % 5
    ),
    lambda name, config, seed: speculating(served(name), config, draft_model=served(name), flipping=seed),
    lambda name, config, seed: speculating(served(name), config, method="ngram", ngram_max=2, flipping=seed),
    lambda name, config, seed: speculating(served(name), config, draft_model=other(), num_tokens=3),
]


@pytest.mark.parametrize("seed", range(1, 17))
def test_drafts_do_not_change_the_tokens(seed: int) -> None:
    """A rejected token's key that is read or shared, a place off by one, drafts that outlive a preemption, blocks that
    nobody has. Every drafter under every feature; twice, so that the second time finds prefixes."""
    name = list(MODELS)[seed % len(MODELS)]
    config = combination(seed)
    config.max_batch_tokens += 24 if seed % 3 else 0
    engine = DRAFTERS[seed % len(DRAFTERS)](name, config, seed)
    for trial in range(2):
        completions = run_preempting(engine, PROMPTS, GREEDY, seed=seed + trial, late=3)
        assert [completion.token_ids for completion in completions] == expected(name)
        assert engine.blocks.num_free == engine.blocks.num_blocks
    assert sum(counts(engine)) > (5 if seed % len(DRAFTERS) < 2 and seed % 3 else -1)  # else nothing was tested


def test_a_key_of_a_rejected_draft_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one draft too many taken for accepted."""
    accepted = SpeculativeRunner._results_of_rows

    def wrong(self: SpeculativeRunner, launched: object) -> object:
        return accepted(self, launched._replace(drafts=torch.where(launched.drafts >= 0, launched.sampled.tokens, -1)))  # type: ignore[attr-defined]

    monkeypatch.setattr(SpeculativeRunner, "_results_of_rows", wrong)
    engine = speculating(served("llama"), SMALL, drafter=Scripted(texts("llama"), right=0.7))
    assert [c.token_ids for c in engine.generate(PROMPTS, GREEDY)] != expected("llama")


@pytest.mark.parametrize("drafter", ["scripted", "same", "other"])
def test_sampled_tokens_and_log_probabilities_are_those_without_speculation(drafter: str) -> None:
    """Penalties that do not see drafts, random numbers of the wrong place, the drafter's log-probabilities; requests
    that speculate beside some that do not."""
    model = served("llama")
    each = [SAMPLED[number % len(SAMPLED)] for number in range(len(PROMPTS))]
    plain = Engine(model, SMALL).generate(PROMPTS, each)
    known = [prompt + completion.token_ids for prompt, completion in zip(PROMPTS, plain, strict=True)]
    engine = {
        "scripted": lambda: speculating(model, SMALL, drafter=Scripted(known, right=0.8)),
        "same": lambda: speculating(model, SMALL, draft_model=model),
        "other": lambda: speculating(model, SMALL, draft_model=other(), flipping=1),
    }[drafter]()
    for one, found in zip(plain, engine.generate(PROMPTS, each), strict=True):
        assert found.token_ids == one.token_ids
        torch.testing.assert_close(found.logprobs, one.logprobs, rtol=0, atol=1e-10)
        assert [list(top) for top in found.top_logprobs] == [list(top) for top in one.top_logprobs]
    if drafter == "scripted":
        assert sum(counts(engine)) > 15


def test_what_is_sampled_does_not_depend_on_the_batch() -> None:
    """Drafts drawn in the order of a batch, or random numbers used for two purposes."""
    sampling = [SamplingConfig(temperature=1.0, seed=seed, max_tokens=8, top_p=0.95) for seed in range(len(PROMPTS))]
    config = replace(SMALL, max_batch_tokens=200, max_sequences=8)
    together = speculating(served("llama"), config, draft_model=other(), drafts="sampled").generate(PROMPTS, sampling)
    for prompt, one, completion in zip(PROMPTS, sampling, together, strict=True):
        (alone,) = speculating(served("llama"), config, draft_model=other(), drafts="sampled").generate([prompt], one)
        assert alone.token_ids == completion.token_ids


def test_steps_padded_for_a_graph_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences and tokens that only fill up a graph of a larger size, and write somewhere or are taken for real."""

    def larger(self: SpeculativeRunner, rows: Any, *, drafted: bool) -> tuple[int, int]:
        padded = len(rows.chunks) + 2
        return padded, padded * 4 if drafted else padded

    monkeypatch.setattr(SpeculativeRunner, "_size_of_graph", larger)
    for name in ("sinks_and_windows", "alibi"):
        engine = speculating(served(name), SMALL, draft_model=served(name), flipping=3, num_tokens=3)
        engine.runner.drafter.follows = True  # type: ignore[attr-defined]
        engine.runner.drafter.follow = lambda seen: None  # type: ignore[attr-defined]
        assert [c.token_ids for c in engine.generate(PROMPTS, GREEDY)] == expected(name)


def test_a_draft_model_that_is_the_model_is_always_right() -> None:
    """A drafter whose cache is off: nothing would be wrong but the speed."""
    engine = speculating(served("llama"), replace(SMALL, num_blocks=40), draft_model=served("llama"), num_tokens=3)
    sampling = replace(GREEDY, max_tokens=9)
    completions = engine.generate(PROMPTS, sampling)
    for completion in completions:
        found = completion.speculation
        assert found is not None
        assert found.accepted == found.drafted
        assert (found.mean_length, found.steps) == (4.0, 2)  # 1 by the prompt, 2 x 4
    sampled = speculating(served("llama"), SMALL, draft_model=served("llama"), drafts="sampled")
    sampled.generate(PROMPTS, replace(sampling, temperature=1.0))
    assert isinstance(sampled.runner, SpeculativeRunner)
    assert set(sampled.runner.policy.counts.acceptance) == {1.0}  # p = q


def test_an_end_inside_accepted_tokens_ends_the_request_there() -> None:
    """Tokens or text behind the end of a document, a stop string or max_tokens given out."""
    tokenizer = train_bpe(iter(["one two three two one " * 9]), 290)
    writer = random_decoder(tiny(vocab_size=tokenizer.vocab_size)).double()
    free = SamplingConfig(temperature=0.0, max_tokens=12)
    prompt = tokenizer.encode("one two")
    (whole,) = Engine(writer, SMALL, tokenizer=tokenizer).generate([prompt], free)
    assert whole.text is not None

    def both(sampling: SamplingConfig, eos_ids: list[int]) -> tuple[Completion, Completion]:
        plain = Engine(writer, SMALL, tokenizer=tokenizer, eos_ids=eos_ids).generate([prompt] * 2, sampling)
        drafter = Scripted([prompt + whole.token_ids], right=1.0)
        drafter.wanted = lambda sequence, most: most  # type: ignore[method-assign]
        engine = speculating(writer, SMALL, drafter=drafter, tokenizer=tokenizer, eos_ids=eos_ids, num_tokens=5)
        deltas: dict[int, list[int]] = {}
        found: list[Completion] = []
        for _ in range(2):
            engine.add(prompt, sampling)
        while engine.num_unfinished:
            for delta in engine.step():
                deltas.setdefault(delta.request, []).extend(delta.token_ids)
                found += [delta.completion] if delta.completion is not None else []
        assert engine.blocks.num_free == engine.blocks.num_blocks
        assert all(one.token_ids == deltas[number] for number, one in enumerate(found))
        assert len(found[0].logprobs) == len(found[0].token_ids)
        assert found[0].speculation is not None
        return plain[0], found[0]

    for sampling, eos_ids in (
        (free, [whole.token_ids[4]]),
        (replace(free, stop_token_ids=[whole.token_ids[7]]), []),
        (replace(free, stop=[whole.text[5:8]]), []),
        (replace(free, max_tokens=4), []),
        (free, []),
    ):
        plain, found = both(sampling, eos_ids)
        assert replace(found, logprobs=[], speculation=None) == replace(plain, logprobs=[], speculation=None)


def test_prompt_lookup_proposes_what_followed_the_longest_run_last() -> None:
    """Runs that end at the end themselves, an older occurrence, a period that is not continued."""
    drafter = NGramDrafter(SpeculationConfig(method="ngram", ngram_max=3), torch.device("cpu"))
    model = served("llama")
    engine = Engine(model, SMALL)
    for tokens, found in (
        ([1, 2, 3, 9, 9, 1, 2, 3], [9, 9, 1, 2]),
        ([1, 2, 5, 3, 2, 6, 1, 2], [5, 3, 2, 6]),  # two tokens before one
        ([4, 2, 7, 5, 2, 8, 3, 2], [8, 3, 2, 8]),  # the newest; then on with its period
        ([7, 7, 7], [7, 7, 7, 7]),
        ([1, 2, 3], []),
    ):
        engine.add(tokens)
        sequence = engine.scheduler.waiting.pop()
        assert drafter.wanted(sequence, 4) == len(found)
        assert drafter._found[sequence] == found
    sequence.tokens += [1]
    assert drafter.wanted(sequence, 2) == 2  # it has grown: 1 was followed by 2, 3
    assert drafter._found[sequence] == [2, 3]


def test_drafts_do_not_keep_others_waiting() -> None:
    """A sequence whose drafts take all tokens of a step: one after the other would be served."""
    engine = speculating(
        served("llama"),
        EngineConfig(block_size=4, max_batch_tokens=6, max_sequences=4),
        drafter=Scripted(texts("llama"), right=1.0),
        num_tokens=5,
    )
    requests = [engine.add(prompt, replace(GREEDY, max_tokens=8)) for prompt in PROMPTS[:3]]
    seen = [delta.request for _ in range(4) for delta in engine.step()]
    assert requests[1] in seen


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "magic"}, "speculation.method=magic is unknown; use none, ngram"),
        ({"method": "draft"}, "needs speculation.draft_path=DIR"),
        ({"method": "ngram", "draft_path": "x"}, "draft_path=x has no effect with speculation.method=ngram"),
        ({"num_tokens": 0}, "speculation.num_tokens=0 must be 1 to 64"),
        ({"ngram_max": 1, "ngram_min": 2}, "speculation.ngram_max=1 is below speculation.ngram_min; use at least 2"),
        ({"drafts": "best"}, "speculation.drafts=best is unknown; use greedy or sampled"),
        ({"max_batch": 0}, "speculation.max_batch=0 must be at least 1, or null"),
        ({"step_ms": {1: 2.0, 8: 1.0}}, "speculation.step_ms={1: 2.0, 8: 1.0} must map"),
        ({"draft_ms": 1.0}, "speculation.draft_ms=1.0 has no effect without speculation.step_ms"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], says: str) -> None:
    """One line each, with what would do."""
    (problem,) = speculation_problems(SpeculationConfig(**changes))  # type: ignore[arg-type]
    assert says in problem
    assert "\n" not in problem


def test_a_draft_model_of_another_vocabulary_is_refused() -> None:
    """Token ids that mean something else: every draft would be wrong, and nothing would say so."""
    with pytest.raises(ValueError, match="draft_path=DIR has a vocabulary of 60 tokens and the model one of 61"):
        speculating(served("llama"), SMALL, draft_model=random_decoder(tiny(vocab_size=60)).double())


def test_a_batch_invariant_model_gives_the_same_bits_with_drafts() -> None:
    """Verification as several tokens at once, rounded in another way than one by one: bf16 on purpose."""
    model = random_decoder(tiny()).to(torch.bfloat16)
    make_batch_invariant(model)
    config = replace(SMALL, deterministic=True)
    plain = Engine(model, config).generate(PROMPTS[:4], GREEDY)
    known = [prompt + completion.token_ids for prompt, completion in zip(PROMPTS, plain, strict=False)]
    engine = speculating(model, config, drafter=Scripted(known, right=0.8))
    found = engine.generate(PROMPTS[:4], GREEDY)
    assert [c.token_ids for c in found] == [c.token_ids for c in plain]
    assert [c.logprobs for c in found] == [c.logprobs for c in plain]
    assert sum(counts(engine)) > 3
