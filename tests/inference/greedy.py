"""Greedy continuations by the whole model, without a cache, and an engine that is made to preempt."""

from __future__ import annotations

import random

import torch

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.sequence import Completion
from models.decoder import Decoder

GREEDY = SamplingConfig(temperature=0.0, max_tokens=6)


def prompts_of(lengths: list[int], *, shared: int = 0, seed: int = 1) -> list[list[int]]:
    """Random prompts below the vocabulary of the small models; all begin with the same `shared` tokens."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 61, (shared,), generator=generator).tolist()
    return [(start + torch.randint(0, 61, (n,), generator=generator).tolist())[: max(n, 1)] for n in lengths]


@torch.no_grad()
def by_the_whole_model(model: Decoder, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities, the model run over everything for each."""
    tokens, logprobs = list(prompt), []
    for _ in range(num_tokens):
        last = model(torch.tensor([tokens]))[0, -1].log_softmax(-1)
        tokens.append(int(last.argmax()))
        logprobs.append(float(last.max()))
    return tokens[len(prompt) :], logprobs


def combination(seed: int) -> EngineConfig:
    """Any legal settings, for sequences of 32 tokens at most."""
    chance = random.Random(seed)
    block_size = chance.choice([1, 2, 3, 4, 8, 16])
    chunked = chance.random() < 0.5
    max_sequences = chance.randint(1, 8)
    return EngineConfig(
        block_size=block_size,
        num_blocks=-(-32 // block_size) + chance.choice([0, 1, 5, 40]),
        host_blocks=chance.choice([4, 64]),
        max_sequences=max_sequences,
        max_batch_tokens=max_sequences + chance.choice([0, 3, 11]) if chunked else 32 + chance.choice([0, 40]),
        chunked_prefill=chunked,
        prefix_cache=chance.random() < 0.5,
        preemption=chance.choice(["recompute", "swap"]),
        overlap=chance.random() < 0.6,
    )


def run_preempting(
    engine: Engine,
    prompts: list[list[int]],
    sampling: SamplingConfig | list[SamplingConfig],
    *,
    seed: int = 0,
    late: int = 0,
) -> list[Completion]:
    """All prompts, the last `late` of them added as others run; before each step a random sequence may be preempted.

    sampling: of all, or of each.
    """
    chance = random.Random(seed)
    each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    waiting = list(zip(prompts, each, strict=True))
    requests: list[int] = []
    completions: dict[int, Completion] = {}
    while waiting or engine.num_unfinished:
        while waiting and (len(waiting) > late or chance.random() < 0.4 or not engine.num_unfinished):
            requests.append(engine.add(*waiting.pop(0)))
        running = engine.scheduler.running
        if running and chance.random() < 0.5:
            engine.preempt(chance.choice(running))
        completions |= {d.request: d.completion for d in engine.step() if d.completion is not None}
    return [completions[request] for request in requests]
