"""The engine on CUDA: paged attention's kernels under every feature, against the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from models.config import ModelConfig
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig
from tests.inference.greedy import GREEDY, prompts_of, run_preempting
from tests.models.small import random_decoder, tiny

pytestmark = pytest.mark.gpu

MODELS: dict[str, ModelConfig] = {
    "llama": tiny(),
    "masked": tiny(attention_sinks=True, sliding_window=5),
    "alibi": tiny(positions="alibi"),
    "moe": tiny(moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=16)),
    "mla": tiny(num_kv_heads=None, mla=MLAConfig(kv_rank=20, nope_dim=8, rope_dim=8, value_dim=12)),
}
SWAPPING = EngineConfig(
    block_size=4, num_blocks=14, host_blocks=20, max_sequences=4, max_batch_tokens=9, preemption="swap"
)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_in_fp32_are_those_of_the_cpu(name: str) -> None:
    """A kernel that differs from its reference inside an engine; copies to the host that overtake the computation."""
    prompts = prompts_of([1, 3, 8, 12, 23], shared=5)
    model = random_decoder(MODELS[name])
    expected = Engine(model, SWAPPING).generate(prompts, GREEDY)
    engine = Engine(model.cuda(), SWAPPING)
    found = run_preempting(engine, prompts, GREEDY)
    assert [completion.token_ids for completion in found] == [completion.token_ids for completion in expected]
    assert engine.counts.swapped > 0


def test_bf16_is_served_and_seeds_repeat() -> None:
    """A dtype that only some kernels take."""
    model = random_decoder(MODELS["llama"]).to("cuda", torch.bfloat16)
    sampling = SamplingConfig(seed=3, top_p=0.9, max_tokens=8)
    prompts = prompts_of([4, 9])
    first = Engine(model, replace(SWAPPING, max_sequences=1)).generate(prompts, sampling)
    again = Engine(model, replace(SWAPPING, max_sequences=1)).generate(prompts, sampling)
    assert [completion.token_ids for completion in first] == [completion.token_ids for completion in again]
