"""Attention sinks under tensor and context parallelism against one process, through the real trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.layers.attention import Attention
from models.mla_config import MLAConfig
from tests.parity.harness import (
    Outcome,
    changed,
    gradient_deviation,
    loss_deviation,
    run_here,
    run_on,
    text_corpus,
    tiny_config,
)
from tests.pool import RankPool
from trainer.config import TrainConfig

VARIANTS: dict[str, dict[str, Any]] = {
    # As in gpt-oss: every other layer has a window.
    "window": {
        "model__num_kv_heads": 2,
        "model__head_dim": 6,
        "model__sliding_window": 7,
        "model__sliding_window_layers": [0],
        "data__mask_documents": True,
    },
    "dropout": {
        "model__num_kv_heads": 1,
        "model__head_dim": 6,
        "model__attention": "reference",
        "model__attention_dropout": 0.1,
    },
    "latent": {
        "model__num_kv_heads": None,
        "model__mla": MLAConfig(kv_rank=10, q_rank=9, nope_dim=5, rope_dim=6, value_dim=7),
    },
}


def _cp(cp: int, method: str, *, tp: int = 1, zero: int = 0, ulysses: int = 1) -> dict[str, Any]:
    return {
        "parallel__cp": cp,
        "parallel__cp_method": method,
        "parallel__cp_ulysses": ulysses,
        "parallel__tp": tp,
        "parallel__zero_stage": zero,
    }


SP = {"parallel__sequence_parallel": True}
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("window", 4, {"parallel__tp": 2, "parallel__zero_stage": 3, **SP}),
    ("window", 4, {"parallel__tp": 2, "parallel__zero_stage": 1, **SP, "model__activation_checkpoint": "full"}),
    ("window", 2, _cp(2, "ring")),
    ("window", 2, _cp(2, "ulysses", zero=1)),
    ("window", 2, _cp(2, "allgather", zero=3)),
    ("window", 4, _cp(2, "ulysses", tp=2)),
    ("dropout", 4, _cp(4, "ring", zero=2, ulysses=2)),
    ("dropout", 4, _cp(2, "ring", tp=2, zero=1)),
    ("latent", 4, _cp(2, "ring", tp=2) | SP),
    ("latent", 2, _cp(2, "ulysses")),
]


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TrainConfig, Outcome]]:
    folder = tmp_path_factory.mktemp("sinks")
    corpus = text_corpus(folder)
    made = {}
    for name, changes in VARIANTS.items():
        config = tiny_config(
            folder / name,
            corpus,
            train__steps=2,
            schedule__warmup_steps=1,
            train__micro_batch_size=2,
            model__attention_sinks=True,
            model__num_heads=4,
            model__intermediate_size=52,
            **changes,
        )
        made[name] = (config, run_on(ranks, 1, config))
    return made


@pytest.mark.some(2)
@pytest.mark.parametrize(("variant", "world_size", "changes"), LAYOUTS)
def test_every_layout_trains_the_same_sinks(
    ranks: RankPool,
    one_process: dict[str, tuple[TrainConfig, Outcome]],
    tmp_path: Path,
    variant: str,
    world_size: int,
    changes: dict[str, Any],
) -> None:
    """A sink of another rank's head, one that is in the softmax once per rank, a gradient of one rank's tokens."""
    config, reference = one_process[variant]
    outcome = run_on(ranks, world_size, changed(config, tmp_path / "run", **changes))
    assert sum(name.endswith("attention.sinks") for name in outcome.first_gradients) == config.model.num_layers
    assert loss_deviation(outcome, reference) <= 1e-6
    assert gradient_deviation(outcome, reference) <= 1e-5
    assert json.loads((tmp_path / "run" / "run.json").read_text())["kernels"]["attention"].split()[0] == "reference"


def _with_the_sinks_of_the_first_heads(config: TrainConfig) -> Outcome | None:
    def first(self: Attention, first_head: int, num_heads: int) -> Tensor | None:
        assert isinstance(self.sinks, Tensor)
        return self.sinks[:num_heads]

    true, Attention._sinks_of = Attention._sinks_of, first  # type: ignore[method-assign]
    try:
        return run_here(config)
    finally:
        Attention._sinks_of = true  # type: ignore[method-assign]


def test_sinks_of_other_heads_are_noticed(
    ranks: RankPool, one_process: dict[str, tuple[TrainConfig, Outcome]], tmp_path: Path
) -> None:
    """Negative control: sinks start alike, so only their gradients can tell in the first step."""
    config, reference = one_process["window"]
    outcome = ranks.run(2, _with_the_sinks_of_the_first_heads, changed(config, tmp_path / "run", **_cp(2, "ulysses")))[
        0
    ]
    assert outcome is not None
    assert gradient_deviation(outcome, reference) > 1e-3


def test_sinks_start_at_zero_and_are_not_decayed(one_process: dict[str, tuple[TrainConfig, Outcome]]) -> None:
    """An uninitialised parameter; a logit that weight decay pulls towards the score of nothing."""
    from models.init import initialize
    from models.registry import build_model
    from trainer.optim import decay_of

    config, _ = one_process["window"]
    model = build_model(config.model)
    parameters = model.state_dict()
    initialize(parameters, model.initializers(), seed=1)
    name = "blocks.1.attention.sinks"
    assert torch.equal(parameters[name], torch.zeros(4))
    assert decay_of(name, parameters[name], config.optim) == 0
