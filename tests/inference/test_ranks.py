"""Serving over several ranks: the tokens and log-probabilities of one process, and ranks that stay together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.layout import ServingLayout
from models.config import ModelConfig
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig
from tests.inference import on_ranks
from tests.inference.greedy import GREEDY, by_the_whole_model, prompts_of
from tests.models.small import random_decoder, tiny
from tests.pool import RankPool

LENGTHS, SHARED = [1, 3, 9, 12, 17], 6
SWAPPING = EngineConfig(
    block_size=4, num_blocks=8, host_blocks=8, max_sequences=4, max_batch_tokens=7, preemption="swap"
)
RECOMPUTING = replace(SWAPPING, block_size=2, num_blocks=16, host_blocks=0, preemption="recompute")


def even(**changes: object) -> ModelConfig:
    """Four heads; 61 words, which no number of ranks divides."""
    return tiny(**({"num_heads": 4, "num_kv_heads": 2, "intermediate_size": 36, "head_dim": 6} | changes))


def experts(**changes: int) -> MoEConfig:
    return MoEConfig(num_experts=4, top_k=2, intermediate_size=12, **changes)


LATENT = MLAConfig(kv_rank=10, q_rank=9, nope_dim=4, rope_dim=6, value_dim=7)
MODELS: dict[str, Callable[[], ModelConfig]] = {
    "dense": even,
    "one_kv_head": lambda: even(num_kv_heads=1),
    "tied": lambda: even(tie_embeddings=True, qk_norm=True),
    "sinks_and_windows": lambda: even(attention_sinks=True, sliding_window=5, sliding_window_layers=[1]),
    "alibi": lambda: even(positions="alibi"),
    "learned_and_biased": lambda: even(positions="learned", attention_bias=True, qkv_bias=True, mlp_bias=True),
    "moe": lambda: even(moe=experts(num_shared=1)),
    "mla": lambda: even(num_kv_heads=None, head_dim=None, mla=LATENT),
}
CASES = [
    ("dense", ServingLayout(tp=2)),
    ("dense", ServingLayout(tp=4)),  # two ranks share a key/value head
    ("one_kv_head", ServingLayout(tp=2)),
    ("tied", ServingLayout(tp=2)),
    ("sinks_and_windows", ServingLayout(tp=4)),
    ("alibi", ServingLayout(tp=2)),
    ("learned_and_biased", ServingLayout(tp=2)),
    ("moe", ServingLayout(tp=2)),
    ("moe", ServingLayout(tp=2, ep=2)),
    ("moe", ServingLayout(tp=4, ep=2)),
    ("mla", ServingLayout(tp=2)),
    ("mla", ServingLayout(tp=4)),
]


@cache
def expected(name: str) -> list[tuple[list[int], list[float]]]:
    model = random_decoder(MODELS[name]()).double()
    return [by_the_whole_model(model, prompt, 6) for prompt in prompts_of(LENGTHS, shared=SHARED)]


@pytest.mark.some(6)
@pytest.mark.parametrize(("name", "layout"), CASES, ids=[f"{n}-tp{c.tp}-ep{c.ep}" for n, c in CASES])
def test_tokens_and_log_probabilities_are_those_of_one_process(
    ranks: RankPool, name: str, layout: ServingLayout
) -> None:
    """A head, word or expert on the wrong rank; a cache of another rank's heads; a sum that is taken twice. With
    chunks, shared prefixes and sequences that give way by both kinds."""
    config = MODELS[name]()
    exact = 1e-6 if config.moe.num_experts else 1e-10  # routers are fp32
    by_rank = ranks.run(layout.tp, on_ranks.all_ask_alike, config, layout, [SWAPPING, RECOMPUTING], LENGTHS, SHARED)
    for found in by_rank:
        for served in found:
            assert served.tokens == [tokens for tokens, _ in expected(name)]
            logprobs = [each for _, each in expected(name)]
            torch.testing.assert_close(served.logprobs, logprobs, rtol=0, atol=exact)
            heads = 1 if config.mla.kv_rank else max(1, (config.num_kv_heads or 0) // layout.tp)
            assert served.cache_heads == heads
            assert (served.blocks > 0) == (name == "mla")  # others are fused
            assert served.few == 0
        assert found[0].swapped > 0
        assert found[1].recomputed > 0
        assert found[0].cached > 0


@pytest.mark.parametrize("name", ["dense", "mla"])
def test_a_cache_in_8_bits_is_cut_with_its_scales(ranks: RankPool, name: str) -> None:
    """A scale of all heads, which would differ between ranks that have some of them."""
    settings, config = replace(SWAPPING, cache_dtype="int8"), MODELS[name]()
    alone = Engine(random_decoder(config).double(), settings).generate(prompts_of(LENGTHS, shared=SHARED), GREEDY)
    for (found,) in ranks.run(2, on_ranks.all_ask_alike, config, ServingLayout(tp=2), [settings], LENGTHS, SHARED):
        assert found.tokens == [completion.token_ids for completion in alone]


@pytest.mark.parametrize("layout", [ServingLayout(tp=4), ServingLayout(tp=4, ep=4)], ids=["tp", "ep"])
def test_a_rank_holds_its_share(ranks: RankPool, layout: ServingLayout) -> None:
    """Layers that are whole on every rank: a model that needs several GPUs would not fit."""
    config = even(vocab_size=64, num_kv_heads=4, moe=experts())
    whole = sum(parameter.numel() for parameter in random_decoder(config).parameters())
    for (found,) in ranks.run(4, on_ranks.all_ask_alike, config, layout, [SWAPPING], [3], 0):
        assert found.parameters < 0.3 * whole


def test_log_probabilities_of_prompts_are_made_of_shards(ranks: RankPool) -> None:
    """A word of another rank, or a sum over the words of this one alone."""
    config, prompts = even(), prompts_of([5, 14])
    for found in ranks.run(4, on_ranks.prompt_logprobs, config, ServingLayout(tp=4), prompts):
        for prompt, (first, *rest) in zip(prompts, found, strict=True):
            with torch.no_grad():
                exact = random_decoder(config).double()(torch.tensor([prompt]))[0].log_softmax(-1)
            assert first is None
            torch.testing.assert_close(
                rest, [float(exact[i, token]) for i, token in enumerate(prompt[1:])], rtol=0, atol=1e-10
            )


@pytest.mark.parametrize("name", ["dense", "tied", "moe"])
def test_products_of_a_few_rows_are_summands_too(ranks: RankPool, name: str) -> None:
    """A residual stream that every rank adds, so that the sum has it twice; a weight that is not this rank's."""
    found = ranks.run(
        2, on_ranks.all_ask_alike, MODELS[name](), ServingLayout(tp=2), [SWAPPING], [3, 9, 2], 2, few_rows=True
    )
    model = random_decoder(MODELS[name]()).double()
    exact = [by_the_whole_model(model, prompt, 6) for prompt in prompts_of([3, 9, 2], shared=2)]
    for (served,) in found:
        assert served.tokens == [tokens for tokens, _ in exact]
        logprobs = [each for _, each in exact]
        torch.testing.assert_close(served.logprobs, logprobs, rtol=0, atol=1e-6 if name == "moe" else 1e-10)
        assert served.blocks == 0
        assert served.few > 0


COUNTED = [  # products of a few rows, of a layer
    ("dense", 2, 4),
    ("dense", 2, 0),
    ("dense", 4, 3),  # not those of q, k and v apart
    ("moe", 2, 2),
    ("moe", 2, 0),
]


@pytest.mark.parametrize(("name", "tp", "few"), COUNTED)
def test_a_step_has_two_sums_for_each_layer_and_no_more(ranks: RankPool, name: str, tp: int, few: int) -> None:
    """Collectives that nobody counted: a gather of what every rank has, of hidden states, of all rows' logits. A layer
    of a few rows that is not taken for one."""
    layout = ServingLayout(tp=tp)
    for found, taken in ranks.run(tp, on_ranks.collectives_of_a_decode, MODELS[name](), layout, few > 0):
        sums = sum(count for op, count in found.items() if "all_reduce" in op)
        gathers = sum(count for op, count in found.items() if "all_gather" in op)
        assert (sums, gathers) == (1 + 2 * 2, 1)
        assert sum(found.values()) == sums + gathers + 1  # and the tokens
        assert taken.blocks == 0
        assert taken.few == 2 * few


SAMPLINGS = [
    SamplingConfig(temperature=0, max_tokens=9),
    SamplingConfig(temperature=1.0, max_tokens=8),
    SamplingConfig(temperature=0.7, top_p=0.9, seed=3, max_tokens=8),
    SamplingConfig(temperature=1.3, top_k=7, min_p=0.02, repetition_penalty=1.2, frequency_penalty=0.3, max_tokens=8),
    SamplingConfig(temperature=0, max_tokens=8, top_logprobs=2, stop_token_ids=list(range(20))),
]


@pytest.mark.parametrize(
    ("layout", "overlap"),
    [(ServingLayout(tp=2), False), (ServingLayout(tp=2), True), (ServingLayout(tp=4), False)],
    ids=["tp2", "tp2-overlap", "tp4"],
)
def test_ranks_follow_the_first_one(ranks: RankPool, layout: ServingLayout, overlap: bool) -> None:
    """A request, its settings, its seed, its end or its being dropped that only rank 0 knows of; tokens that a rank
    does not know yet."""
    prompts, settings = prompts_of(LENGTHS, shared=SHARED), replace(SWAPPING, overlap=overlap)
    alone = Engine(random_decoder(even()).double(), settings)
    done = on_ranks.ask(alone, prompts, SAMPLINGS)
    leader, *others = ranks.run(layout.tp, on_ranks.led, even(), layout, settings, prompts, SAMPLINGS)
    assert leader.keys() == done.keys()
    for request, completion in leader.items():
        assert completion.token_ids == done[request].token_ids
        assert completion.finish_reason == done[request].finish_reason
        for top, exact in zip(completion.top_logprobs, done[request].top_logprobs, strict=True):
            assert top == pytest.approx(exact)
    assert len(set(others)) == 1
    assert others[0] > 8


def test_a_message_is_one_broadcast_unless_it_is_long(ranks: RankPool) -> None:
    """A second wait in every step; a long prompt that is cut."""
    sizes = [0, 4000, 4090, 4096, 100_000]
    (count,), heard = ranks.run(2, on_ranks.messages, sizes)
    assert heard == sizes
    assert count == 2 + 2 * 3


def test_a_rank_that_has_gone_is_named_on_the_others(ranks: RankPool) -> None:
    """A process that waits for ever, or a traceback of the transport's."""
    assert ranks.run(2, on_ranks.is_left, 0)[1].startswith("rank 0 has ended: ")
    assert ranks.run(2, on_ranks.is_left, 1)[0].startswith("a rank that follows has ended: ")


def test_a_rank_that_went_another_way_says_so(ranks: RankPool) -> None:
    """Ranks with different batches: sums of different things, or a wait without end."""
    assert "has not computed what rank 0 has" in ranks.run(2, on_ranks.goes_another_way, even(), ServingLayout(tp=2))[1]
