"""train.batch_invariant: what a trainer computes is what an engine that serves its live model computes, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.batch import Batch
from data.config import DataConfig
from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from models.decoder import Decoder
from models.moe_config import MoEConfig, RoutingConfig
from tests.parity.harness import run_on, text_corpus, tiny_config
from tests.pool import RankPool
from tests.trainer.test_validate import found
from trainer.config import TrainConfig
from trainer.step import train_step
from trainer.trainer import Trainer
from trainer.validate import finalize

ROWS, TOKENS = 8, 25
INVARIANT: dict[str, Any] = {"train__batch_invariant": True, "precision__compute": "bf16"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("invariant"))


def served_loss(model: Decoder, rows: list[list[int]], size: int, *, deterministic: bool) -> float:
    """Mean loss of the rows' tokens as an engine computes them that serves this model, in chunks, all mixed.

    Added up as a trainer does: over `size` rows in fp64, which is rounded to fp32.
    """
    config = EngineConfig(block_size=4, max_batch_tokens=11, max_sequences=4, deterministic=deterministic)
    sampling = SamplingConfig(temperature=0.0, max_tokens=1, prompt_logprobs=True)
    completions = Engine(model, config).generate(rows, sampling)
    losses = -torch.tensor([completion.prompt_logprobs[1:] for completion in completions], dtype=torch.float64)  # type: ignore[index]
    sums = losses.view(-1, size * (TOKENS - 1)).sum(1).float().double()
    return float((sums.sum() / losses.numel()).float())


def losses_here(config: TrainConfig, size: int) -> list[tuple[float, float]]:
    """Of each step: the trainer's loss, and the engine's before it."""
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    tokens = torch.randint(300, (ROWS, TOKENS), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(TOKENS - 1).repeat(size, 1)
    batches = [
        Batch(tokens[r : r + size, :-1], tokens[r : r + size, 1:], positions, None, torch.arange(r, r + size))
        for r in range(0, ROWS, size)
    ]
    pairs = []
    try:
        for _ in range(2):
            invariant = config.train.batch_invariant
            served = served_loss(trainer.state.model, tokens.tolist(), size, deterministic=invariant)
            pairs.append((float(train_step(trainer.state, batches, lr=1e-2).loss), served))
    finally:
        trainer.close()
    return pairs


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {"parallel__zero_stage": 0}),
        (8, {"parallel__zero_stage": 2, "model__activation_checkpoint": "selective"}),
        (2, {"model__moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=20)}),
    ],
)
def test_the_loss_is_that_of_an_engine_to_the_bit(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, size: int, changes: dict[str, Any]
) -> None:
    """Rollouts whose probabilities are not those that the trainer computes for the same tokens: of both passes with a
    gradient, at any size of micro-batches, before and after an update."""
    config = tiny_config(tmp_path, corpus, **INVARIANT, **changes)
    pairs = ranks.run(1, losses_here, config, size)[0]
    assert [ours for ours, _ in pairs] == [served for _, served in pairs]
    assert pairs[0] != pairs[1]


def test_without_it_the_loss_is_another_one(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """Negative control."""
    config = tiny_config(tmp_path, corpus, precision__compute="bf16")
    pairs = ranks.run(1, losses_here, config, 8)[0]
    assert all(ours != served for ours, served in pairs)
    assert all(ours == pytest.approx(served, abs=1e-2) for ours, served in pairs)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__pp": 2, "train__micro_batch_size": 2},
        {"model__moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=20), "parallel__ep": 2},
    ],
)
def test_stages_and_experts_elsewhere_keep_the_bits(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """An axis that is allowed and changes a token's sums after all."""
    alone = {name: value for name, value in changes.items() if not name.startswith("parallel")}
    losses = [
        run_on(
            ranks,
            n,
            tiny_config(tmp_path / str(n), corpus, train__steps=1, schedule__warmup_steps=0, **INVARIANT, **settings),
        ).losses
        for n, settings in ((1, alone), (2, changes))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallel__tp": 2}, "parallel.tp=2 does not work with train.batch_invariant=true: ranks' partial sums"),
        ({"parallel__cp": 2}, "parallel.cp=2 does not work with train.batch_invariant=true: a query's keys arrive in"),
        ({"precision__compute": "fp8"}, "precision.compute=fp8 does not work with train.batch_invariant=true"),
        ({"train__compile": True}, "use train.compile=false, or train.batch_invariant=false"),
        ({"model__attention_dropout": 0.1, "model__attention": "reference"}, "model.attention_dropout=0.1 does not"),
        (
            {
                "model__moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=20),
                "model__routing": RoutingConfig(capacity_factor=1.0),
            },
            "model.routing.capacity_factor=1.0 does not work with train.batch_invariant=true",
        ),
        (
            {"model__activation_checkpoint": "budget", "model__activation_memory_gib": 1.0},
            "model.activation_checkpoint=budget does not work with train.batch_invariant=true",
        ),
        (
            {"parallel__pp": 2, "parallel__pp_schedule": "zero_bubble"},
            "parallel.pp_schedule=zero_bubble does not work with train.batch_invariant=true",
        ),
    ],
)
def test_what_cannot_keep_it_is_refused(changes: dict[str, Any], says: str) -> None:
    """A promise that is given and not kept."""
    lines = found(**INVARIANT | changes)
    assert any(says in line for line in lines), lines
