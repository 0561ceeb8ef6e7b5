"""Every feature of the engine on and off, in random combinations: the tokens are those of the model alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from data.tokenizer import train_bpe
from inference.batch import pack, unpack
from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.graphs import StepGraphs
from inference.runner import ModelRunner
from inference.scheduler import Chunk
from kernels.backend import interpreted
from models.config import ModelConfig, RopeConfig
from models.decoder import Decoder
from models.layers.attention import build_context
from models.layers.paged_cache import Fresh
from models.moe_config import MoEConfig
from tests.inference.greedy import GREEDY, by_the_whole_model, combination, prompts_of, run_preempting
from tests.models.small import random_decoder, tiny

LENGTHS = [1, 3, 8, 8, 12, 17, 23]
SHARED = 7
MODELS: dict[str, Callable[[], ModelConfig]] = {
    "llama": lambda: tiny(),
    "sinks_and_windows": lambda: tiny(attention_sinks=True, sliding_window=5, sliding_window_layers=[1]),
    "alibi": lambda: tiny(positions="alibi"),
    "moe": lambda: tiny(moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=11)),
    "yarn": lambda: tiny(rope=RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=8)),
}


@cache
def served(name: str) -> Decoder:
    return random_decoder(MODELS[name](), seed=0).double()


@cache
def expected(name: str) -> list[list[int]]:
    assert GREEDY.max_tokens is not None
    prompts = prompts_of(LENGTHS, shared=SHARED)
    return [by_the_whole_model(served(name), prompt, GREEDY.max_tokens)[0] for prompt in prompts]


@pytest.mark.parametrize("seed", range(12))
def test_features_do_not_change_the_tokens(seed: int) -> None:
    """A block given away too early, a chunk's edge, a swapped block that comes back elsewhere, a wrong prefix."""
    name = list(MODELS)[seed % len(MODELS)]
    engine = Engine(served(name), combination(seed))
    completions = run_preempting(engine, prompts_of(LENGTHS, shared=SHARED), GREEDY, seed=seed, late=3)
    assert [completion.token_ids for completion in completions] == expected(name)
    assert engine.blocks.num_free == engine.blocks.num_blocks


def sampling_of(number: int, *, by_tokens: bool) -> SamplingConfig:
    """Of a request: any settings, and a seed of its own. by_tokens: some by which its tokens so far matter."""
    chance = random.Random(number)
    matter: dict[str, Any] = chance.choice(
        [{"repetition_penalty": 1.3}, {"frequency_penalty": 0.3}, {"choice": ["one two", "three"]}]
    )
    return SamplingConfig(
        temperature=chance.choice([0.0, 0.7, 1.3]),
        top_k=chance.choice([0, 0, 7]),
        top_p=chance.choice([1.0, 0.9]),
        min_p=chance.choice([0.0, 0.02]),
        seed=number,
        max_tokens=chance.randint(1, 7) if by_tokens else 12,
        top_logprobs=chance.choice([0, 2]),
        stop_token_ids=chance.choice([[], list(range(9))]),
        **(matter if by_tokens else {}),
    )


@pytest.mark.parametrize("seed", range(8))
def test_requests_with_settings_of_their_own_do_not_disturb_each_other(seed: int) -> None:
    """A token that is not known yet counted in another's penalties, or the random number of the row beside."""
    tokenizer = train_bpe(iter(["one two three two one " * 9]), 280)
    prompts = prompts_of(LENGTHS, shared=SHARED)
    # Those that come late, to others whose last tokens are not known yet.
    samplings = [sampling_of(100 * seed + number, by_tokens=number > 3) for number in range(len(prompts))]
    model = random_decoder(tiny(vocab_size=tokenizer.vocab_size)).double()
    alone = [
        Engine(model, EngineConfig(block_size=4), tokenizer=tokenizer).generate([prompt], sampling)[0]
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    engine = Engine(model, replace(combination(seed), overlap=seed % 4 > 0), tokenizer=tokenizer)
    together = run_preempting(engine, prompts, samplings, seed=seed, late=3)
    assert [(c.token_ids, c.finish_reason) for c in together] == [(c.token_ids, c.finish_reason) for c in alone]


def test_a_cache_with_one_wrong_value_changes_the_tokens() -> None:
    """Negative control: tokens so insensitive that a broken cache would go unnoticed."""
    engine = Engine(served("llama"), EngineConfig(block_size=4))
    requests = [engine.add(prompt, GREEDY) for prompt in prompts_of(LENGTHS, shared=SHARED)]
    engine.step()
    engine.runner._keys[:, :, 0] = 0.0  # the first token of every block
    found: dict[int, list[int]] = {}
    while engine.num_unfinished:
        found |= {d.request: d.completion.token_ids for d in engine.step() if d.completion is not None}
    assert [found[request] for request in requests] != expected("llama")


def test_no_preemption_is_needed_where_there_is_room_and_some_is_where_there_is_not() -> None:
    """A scheduler that preempts for nothing, or a test of preemption in which none happens."""
    prompts = prompts_of(LENGTHS, shared=SHARED)
    for num_blocks, preempted in ((60, False), (8, True)):
        engine = Engine(served("llama"), EngineConfig(block_size=4, num_blocks=num_blocks, prefix_cache=False))
        completions = engine.generate(prompts, GREEDY)
        assert [completion.token_ids for completion in completions] == expected("llama")
        assert (engine.counts.recomputed > 0) == preempted


def test_a_long_prompt_does_not_keep_others_from_decoding() -> None:
    """Steps that are either prompts or continuations: every decode would wait for a prompt of thousands of tokens."""
    engine = Engine(served("llama"), EngineConfig(block_size=4, max_batch_tokens=4, max_sequences=4))
    first = engine.add(prompts_of([2])[0], GREEDY)
    engine.step()
    engine.add(prompts_of([20])[0], GREEDY)
    assert [d.request for _ in range(4) for d in engine.step()] == [first] * 4


@pytest.mark.parametrize("length", [8, 9])
def test_a_prompt_that_is_cached_whole_still_computes_its_last_token(length: int) -> None:
    """A prompt of exactly k blocks, all of them found: nothing would be left to sample from."""
    (prompt,) = prompts_of([length])
    engine = Engine(served("llama"), EngineConfig(block_size=4))
    first, second = (engine.generate([prompt], GREEDY)[0].token_ids for _ in range(2))
    assert first == second
    assert engine.counts.cached_tokens == (4 if length == 8 else 8)


def test_rows_do_not_depend_on_the_batch_in_fp32() -> None:
    """Continuations that change with the load of a server. In fp32, where rounding may differ but not by a token."""
    model = random_decoder(MODELS["llama"]())
    prompts = prompts_of(LENGTHS, shared=SHARED)
    together = Engine(model, EngineConfig(block_size=4)).generate(prompts, GREEDY)
    for prompt, completion in zip(prompts, together, strict=True):
        (alone,) = Engine(model, EngineConfig(block_size=4)).generate([prompt], GREEDY)
        assert alone.token_ids == completion.token_ids
        assert torch.allclose(torch.tensor(alone.logprobs), torch.tensor(completion.logprobs), atol=1e-5)


@pytest.mark.interpreter
def test_the_kernels_give_the_tokens_of_their_references() -> None:
    """Block tables, chunks and pages as the engine makes them, which the kernels' own tests do not have."""
    model = random_decoder(MODELS["sinks_and_windows"]())
    prompts, sampling = prompts_of([2, 9]), replace(GREEDY, max_tokens=3)
    config = EngineConfig(block_size=4, max_batch_tokens=7, max_sequences=3)
    expected = Engine(model, config).generate(prompts, sampling)
    with interpreted():
        found = Engine(model, config).generate(prompts, sampling)
    assert [completion.token_ids for completion in found] == [completion.token_ids for completion in expected]


@pytest.mark.parametrize("attention", ["sdpa", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_that_begin_in_a_step_give_the_tokens_of_pages(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA they attend to themselves, one by one or as documents, and not through pages: a prompt that sees its
    neighbour, chunks that are taken for beginnings, results in another order. Here the references do the same."""
    monkeypatch.setattr("inference.runner.LONG_PROMPT", 1)
    begun: list[tuple[int, int]] = []  # sequences of a step that begin in it, and all

    def counted(self: ModelRunner, chunks: list[Chunk]) -> Fresh | None:
        fresh = given(self, chunks)
        begun.append((0 if fresh is None else len(fresh.ends), len(chunks)))
        return fresh

    given = ModelRunner._fresh
    monkeypatch.setattr(ModelRunner, "_fresh", counted)
    config = EngineConfig(block_size=4, max_batch_tokens=26, max_sequences=4, num_blocks=20, prefix_cache=False)
    engine = Engine(served(name), config)
    engine.runner._prompt_attention = attention
    completions = run_preempting(engine, prompts_of(LENGTHS, shared=SHARED), GREEDY, seed=3, late=3)
    assert [completion.token_ids for completion in completions] == expected(name)
    assert any(few > 1 for few, _ in begun)
    assert any(0 < few < all_of_them for few, all_of_them in begun)


class Uncaptured(StepGraphs):
    """Pads as graphs do, and computes without them."""

    def run(self, inputs: torch.Tensor, size: tuple[int, int], *, decodes: bool) -> Any:
        self.sizes_run = {*getattr(self, "sizes_run", ()), (decodes, *size)}
        return self._forwards[decodes](inputs, size[0])


@pytest.mark.parametrize("name", MODELS)
def test_padded_steps_give_the_tokens_of_steps_as_they_are(name: str) -> None:
    """What is captured by graphs: padding that writes into somebody's page, is attended to or takes a place among the
    results; a step with prompts whose sequences are fewer than the graph's."""
    engine = Engine(served(name), EngineConfig(block_size=4, max_batch_tokens=40, max_sequences=7))
    runner = engine.runner
    runner.graphs = Uncaptured(runner._decode, runner._mixed, 7, 40)
    completions = run_preempting(engine, prompts_of(LENGTHS, shared=SHARED), GREEDY, seed=5, late=3)
    assert [completion.token_ids for completion in completions] == expected(name)
    assert {decodes for decodes, *_ in runner.graphs.sizes_run} == {True, False}
    assert engine.blocks.num_free == engine.blocks.num_blocks


@torch.no_grad()
def test_a_block_that_is_served_compiles_into_one_graph() -> None:
    """A number read on the host inside the model: no graph of the whole, and a wait in every layer."""
    model = random_decoder(MODELS["sinks_and_windows"]())
    engine = Engine(model, EngineConfig(block_size=4))
    for prompt in prompts_of([3, 5]):
        engine.add(prompt, GREEDY)
    chunks = engine.scheduler.schedule().chunks
    rows = engine.runner._tables.rows([chunk.sequence for chunk in chunks])
    batch = unpack(pack(chunks, rows, nobody=engine.runner._tables.nobody), len(chunks))
    cache, positions = engine.runner._cache(batch), batch.positions[None]
    x = model.embedding(batch.tokens[None])  # type: ignore[misc]
    context = build_context(
        model.config,
        seq_len=cache.max_seq_len,
        device=x.device,
        dtype=x.dtype,
        positions=positions,
        documents=None,
        samples=None,
        cache=cache,
    )
    compiled = torch.compile(model.blocks[1], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, context=context), model.blocks[1](x, context=context))
