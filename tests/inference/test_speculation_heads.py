"""Drafters with a cache of their own propose what they would if they saw the whole sequence anew."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import cache

import pytest
import torch
from torch import Tensor

from inference.engine import Engine
from inference.sequence import Sequence
from inference.speculation.drafter import Wanted
from inference.speculation.rejection import Drafts, Places
from inference.speculation.runner import SpeculativeRunner
from models.config import ModelConfig
from models.decoder import Decoder
from models.layers.attention import build_context
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig
from models.mtp_config import MTPConfig
from models.speculator import Speculator, SpeculatorConfig
from tests.inference.greedy import GREEDY, by_the_whole_model, prompts_of, run_preempting
from tests.inference.speculating import speculating
from tests.inference.test_features import LENGTHS, SHARED, combination
from tests.models.small import random_decoder, tiny

PROMPTS = prompts_of(LENGTHS, shared=SHARED)
MODELS: dict[str, Callable[[], ModelConfig]] = {
    "llama": lambda: tiny(mtp=MTPConfig(depth=1), sliding_window=5, sliding_window_layers=[1]),
    "deepseek": lambda: tiny(
        mtp=MTPConfig(depth=1),
        mla=MLAConfig(kv_rank=8, q_rank=7, nope_dim=4, rope_dim=6, value_dim=5),
        num_kv_heads=None,
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=5, first_dense=1),
    ),
}


@cache
def served(name: str) -> Decoder:
    return random_decoder(MODELS[name](), seed=0).double()


@cache
def expected(name: str) -> list[list[int]]:
    return [by_the_whole_model(served(name), prompt, 6)[0] for prompt in PROMPTS]


@cache
def heads_for(name: str, kind: str) -> Speculator:
    heads = Speculator(SpeculatorConfig(kind, num_heads=3, num_layers=2), served(name).config)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return heads.double().eval()


def states_of(model: Decoder, tokens: Seq[int]) -> Tensor:
    found: list[Tensor] = []

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        found.append(hidden)
        return hidden

    model(torch.tensor([list(tokens)]), head=head)
    return found[0]


def by_block(model: Decoder, block: Callable[..., Tensor], tokens: list[int], count: int) -> list[int]:
    """Drafts of a block that sees all anew for each."""
    hidden, later, drafts = states_of(model, tokens[:-1]), tokens[1:], []
    for _ in range(count):
        context = build_context(
            model.config,
            seq_len=hidden.shape[1],
            device=hidden.device,
            dtype=hidden.dtype,
            positions=None,
            documents=None,
            samples=None,
        )
        states = block(hidden, model.embedding(torch.tensor([later])), context=context)  # type: ignore[misc]
        drafts.append(int(model.head(states[0, -1], model.output_weight()).argmax()))  # type: ignore[misc]
        hidden, later = torch.cat([hidden, states[:, -1:]], dim=1), [*later, drafts[-1]]
    return drafts


@torch.no_grad()
def alone(name: str, method: str, tokens: list[int], count: int) -> list[int]:
    """What the drafter proposes behind tokens."""
    model = served(name)
    if method == "draft":
        return by_the_whole_model(served("llama"), tokens, count)[0]
    if method == "medusa":
        last = states_of(model, tokens[:-1])[0, -1]
        heads = list(heads_for(name, "medusa").blocks)[:count]
        return [int(head.output(head(last)).argmax()) for head in heads]  # type: ignore[operator]
    if method == "mtp":
        return by_block(model, model.blocks.get_submodule("2"), tokens, count)
    eagle = heads_for(name, "eagle")
    return by_block(model, lambda x, y, context: eagle.continue_states(x, y, context), tokens, count)


def watched(engine: Engine, name: str, method: str) -> list[int]:
    """Compares all drafts of an engine; how many, and how many beyond a first."""
    assert isinstance(engine.runner, SpeculativeRunner)
    drafter = engine.runner.drafter
    draft, seen = drafter.draft, [0, 0]

    def checking(wanted: Seq[Wanted], places: Places) -> Drafts:
        found = draft(wanted, places)
        for one, row in zip(wanted, found.tokens.tolist(), strict=True):
            sequence: Sequence = one.sequence
            assert row[: one.num_drafts] == alone(name, method, sequence.tokens, one.num_drafts)
            seen[0] += 1
            seen[1] += one.num_drafts > 1
        return found

    drafter.draft = checking  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(
    ("method", "name", "seed"),
    [
        ("draft", "llama", 4),
        ("draft", "deepseek", 7),
        ("medusa", "llama", 2),
        ("medusa", "deepseek", 7),
        ("eagle", "llama", 1),
        ("eagle", "deepseek", 2),
        ("mtp", "llama", 7),
        ("mtp", "deepseek", 1),
    ],
)
def test_drafts_are_those_of_a_drafter_without_a_cache(method: str, name: str, seed: int) -> None:
    """Keys one place off, a rejected draft's hidden state or key that stays, a state lost with a preemption or in the
    prefix cache, entries of a block made from tokens of another sequence: none of it changes the engine's tokens."""
    config = combination(seed)
    config.max_batch_tokens += 24
    engine = speculating(
        served(name),
        config,
        method=method,
        num_tokens=3,
        draft_model=served("llama") if method == "draft" else None,
        heads=heads_for(name, method) if method in ("medusa", "eagle") else None,
        flipping=seed,
    )
    seen = watched(engine, name, method)
    for trial in range(2):
        completions = run_preempting(engine, PROMPTS, GREEDY, seed=seed + trial, late=3)
        assert [completion.token_ids for completion in completions] == expected(name)
        assert engine.blocks.num_free == engine.blocks.num_blocks
    assert seen[0] > 10
    assert seen[1] > 5
