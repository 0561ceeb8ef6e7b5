"""Features of the engine on CUDA with kernels or graphs of their own: against the CPU, or the engine without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.speculation.runner import SpeculativeRunner
from launch.open_model import LabModelConfig, open_model
from models.invariant import make_batch_invariant
from tests.gpu.test_engine_cuda import MODELS
from tests.inference.adapters import CHOICES, PROMPTS, by_peft, make_adapters
from tests.inference.adapters import GREEDY as LONGER
from tests.inference.greedy import GREEDY, prompts_of, run_preempting
from tests.inference.serving import serving, text_tokenizer
from tests.inference.speculating import Scripted, speculating
from tests.inference.test_constraints import check, samplings
from tests.launch.conftest import small_llama
from tests.models.small import random_decoder, tiny

pytestmark = pytest.mark.gpu

SWAPPING = EngineConfig(block_size=4, num_blocks=14, host_blocks=20, max_sequences=4, preemption="swap")
LENGTHS, SHARED = [1, 3, 8, 12, 23], 5
EIGHT_BITS = ("fp8", "int8")
SCORED = SamplingConfig(temperature=0, max_tokens=1, prompt_logprobs=True)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("name", ["llama", "masked", "mla"])
def test_caches_in_8_bits_give_the_cpus_log_probabilities(name: str, dtype: str) -> None:
    """Codes that the hardware rounds otherwise, scales that a kernel reads from another row."""
    config = EngineConfig(block_size=4, num_blocks=64, cache_dtype=dtype, max_sequences=4, max_batch_tokens=9)
    prompts, model = prompts_of(LENGTHS, shared=SHARED), random_decoder(MODELS[name])

    def logprobs(chosen: EngineConfig) -> torch.Tensor:
        done = Engine(model, chosen).generate(prompts, SCORED)
        return torch.tensor([x for one in done for x in (one.prompt_logprobs or [])[1:]])

    expected = logprobs(config)
    model.cuda()
    found, exact = logprobs(config), logprobs(replace(config, cache_dtype="auto"))
    # A code on the edge between two may fall to either side; that changes much less than the codes do.
    assert (found - expected).abs().max() < 0.2 * (expected - exact).abs().max()
    assert (found - expected).abs().mean() < 0.02 * (expected - exact).abs().mean()


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_caches_in_8_bits_survive_swapping_in_bf16(dtype: str) -> None:
    """Copies of codes without their scales."""
    model = random_decoder(MODELS["llama"]).to("cuda", torch.bfloat16)
    prompts = prompts_of(LENGTHS, shared=SHARED)
    quiet = replace(SWAPPING, num_blocks=64, cache_dtype=dtype, max_sequences=1)
    expected = Engine(model, quiet).generate(prompts, GREEDY)
    engine = Engine(model, replace(quiet, num_blocks=14))
    found = run_preempting(engine, prompts, GREEDY)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert engine.counts.swapped > 0


@pytest.mark.parametrize("drafter", ["scripted", "ngram", "draft"])
@pytest.mark.parametrize("name", ["llama", "masked", "moe", "mla"])
def test_speculation_in_fp32_gives_the_cpus_tokens(name: str, drafter: str) -> None:
    """Graphs of several rows a sequence; keys of rejected drafts; a drafter whose graph reads another's buffers."""
    prompts, model = prompts_of(LENGTHS, shared=SHARED), random_decoder(MODELS[name])
    expected = [one.token_ids for one in Engine(model, SWAPPING).generate(prompts, GREEDY)]
    model.cuda()
    texts = [prompt + tokens for prompt, tokens in zip(prompts, expected, strict=True)]
    ways = {
        "scripted": {"drafter": Scripted(texts, right=0.7), "num_tokens": 3},
        "ngram": {"method": "ngram", "ngram_max": 2},
        "draft": {"draft_model": model, "num_tokens": 3},
    }
    engine = speculating(model, replace(SWAPPING, num_blocks=40), **ways[drafter])  # type: ignore[arg-type]
    assert [one.token_ids for one in run_preempting(engine, prompts, GREEDY)] == expected
    assert isinstance(engine.runner, SpeculativeRunner)
    assert drafter == "ngram" or sum(engine.runner.policy.counts.accepted) > 0


@pytest.mark.parametrize("graphs", [True, False])
def test_several_adapters_give_the_tokens_of_peft(graphs: bool, tmp_path: Path) -> None:
    """A captured graph that keeps the adapters of the batch it was captured with."""
    folder = small_llama(tmp_path / "model", heads=4, inner=36)
    adapters = make_adapters(folder, tmp_path)
    opened = open_model(LabModelConfig(path=str(folder), dtype="fp32", adapters=adapters), torch.device("cuda"))
    config = EngineConfig(block_size=2, num_blocks=64, max_sequences=4, max_batch_tokens=7, cuda_graphs=graphs)
    engine = Engine(opened.model, config, adapters=opened.adapters)
    wanted = by_peft(folder, adapters, PROMPTS, CHOICES)
    for _ in range(2):
        assert [one.token_ids for one in engine.generate(PROMPTS, LONGER, CHOICES)] == wanted
    turned = CHOICES[1:] + CHOICES[:1]  # the same sizes, so the same graphs, with others' adapters
    found = [one.token_ids for one in engine.generate(PROMPTS, LONGER, turned)]
    assert found == by_peft(folder, adapters, PROMPTS, turned)


def test_a_warmed_up_engine_answers_over_http() -> None:
    """A graph that is captured beside the thread that serves."""
    tokenizer = text_tokenizer()
    model = random_decoder(tiny(vocab_size=tokenizer.vocab_size + 3, max_seq_len=96)).to("cuda", torch.bfloat16)
    config = EngineConfig(block_size=4, num_blocks=200, max_batch_tokens=64, max_sequences=8, warmup=True)
    engine = Engine(model, config, tokenizer=tokenizer, eos_ids=[tokenizer.eos_id])
    with serving(engine) as server:
        for number in range(12):
            body = {"model": "tiny", "prompt": "one two", "max_tokens": 8, "seed": number}
            answer = server.post("/v1/completions", body | {"extra": 1} if number == 5 else body)
            assert answer.status_code == (400 if number == 5 else 200), answer.text
        assert engine.blocks.num_free == engine.blocks.num_blocks


def test_constrained_output_is_valid_and_does_not_depend_on_preemption() -> None:
    """Bits of allowed tokens that come late to the device, or to another row; a state advanced twice."""
    pytest.importorskip("llguidance")
    tokenizer, each = text_tokenizer(), samplings(seeds=6, max_tokens=40)
    model = random_decoder(tiny(vocab_size=tokenizer.vocab_size + 3, max_seq_len=96)).to("cuda", torch.bfloat16)
    make_batch_invariant(model)
    config = EngineConfig(block_size=4, num_blocks=256, max_sequences=1, deterministic=True)
    engine = Engine(model, config, tokenizer=tokenizer, eos_ids=[tokenizer.eos_id])
    alone = engine.generate(["one two"] * len(each), each)
    assert check(alone, each) > 10
    scarce = replace(config, num_blocks=40, host_blocks=40, max_sequences=8, preemption="swap")
    engine = Engine(model, scarce, tokenizer=tokenizer, eos_ids=[tokenizer.eos_id])
    found = engine.generate(["one two"] * len(each), each)
    assert [one.token_ids for one in found] == [one.token_ids for one in alone]
    assert engine.counts.swapped > 0
