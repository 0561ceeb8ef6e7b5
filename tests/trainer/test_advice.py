"""What an error advises is tried: in the configuration that was refused, it mends what the error speaks of."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig, TokenizerConfig
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig, RoutingConfig
from parallel.problem import MAX_VALUES, Problem, kind_of, values, without_advice
from tests.parity.harness import tiny_config
from trainer.config import ConfigError, TrainConfig
from trainer.validate import finalize, find_problems, with_changes

CORPUS = DataConfig(source="stdlib", num_workers=0)
WORLD_SIZES = (1, 2, 4, 6, 8, 12, 16, 24)
CHOICES: dict[str, list[Any]] = {
    "train__seq_len": [24, 30, 32, 36, 48, 50, 64, 80],
    "train__global_batch_size": [3, 8, 10, 12, 24],
    "train__micro_batch_size": [1, 2, 3],
    "train__compile": [False, False, True],
    "model__num_layers": [2, 4, 5, 8],
    "model__hidden_size": [32, 36, 48, 256, 512],
    "model__num_heads": [2, 4, 6, 8, 12],
    "model__num_kv_heads": [1, 2, 3, 4, None],
    "model__intermediate_size": [48, 50, 256, 512],
    "model__vocab_size": [5, 300],
    "model__dropout": [0.0, 0.0, 0.1],
    "model__moe": [
        MoEConfig(),
        MoEConfig(),
        MoEConfig(num_experts=4, intermediate_size=24),
        MoEConfig(num_experts=6, intermediate_size=256, num_groups=4, top_groups=2),
        MoEConfig(num_experts=4),
        MoEConfig(num_experts=4, intermediate_size=24, router="switch", every=9),
        MoEConfig(num_experts=4, intermediate_size=24, top_k=3, num_groups=2, router="sigmoid"),
    ],
    "model__routing": [RoutingConfig(), RoutingConfig(), RoutingConfig(aux_weight=0.1, bias_update_rate=0.01)],
    "model__mla": [MLAConfig(), MLAConfig(), MLAConfig(kv_rank=10, nope_dim=4, rope_dim=4, value_dim=8)],
    "model__attention": ["auto", "sdpa", "reference", "flex"],
    "model__activation_checkpoint": ["none", "full", "selective", "budget"],
    "model__activation_memory_gib": [None, None, 1e-6, 1.0],
    "parallel__zero_stage": [0, 1, 2, 3, 4],
    "parallel__cpu_offload": [False, False, True],
    "parallel__dp_replicate": [1, 1, 2, 3],
    "parallel__dp_shard": [-1, -1, -1, 2, 4],
    "parallel__tp": [1, 1, 2, 3, 4, 8],
    "parallel__sequence_parallel": [False, True],
    "parallel__pp": [1, 1, 2, 3, 4],
    "parallel__pp_schedule": ["1f1b", "interleaved_1f1b", "zero_bubble", "zbv"],
    "parallel__pp_split": [None, None, None, [1, 1]],
    "parallel__cp": [1, 1, 2, 3, 4],
    "parallel__cp_method": ["ring", "ulysses", "allgather"],
    "parallel__cp_ulysses": [1, 1, 2, 3, 4],
    "parallel__ep": [1, 1, 2, 4],
    "precision__compute": ["fp32", "fp32", "bf16", "fp8"],
    "precision__master": ["fp32", "fp32", "bf16"],
    "optim__name": ["adamw", "adamw", "muon"],
    "optim__state_dtype": ["fp32", "fp32", "bf16", "int8"],
    "optim__kernel": ["auto", "auto", "torch", "cuda"],
    "optim__beta2": [0.95, 0.999, 1.0],
    "schedule__name": ["cosine", "wsd", "constant"],
    "schedule__warmup_steps": [0, 3, 19, 30],
    "schedule__decay_steps": [None, None, 0, 10],
    "data__num_workers": [0, 0, -1],
    "data__validation_fraction": [0.01, 0.01, 2.0],
}


def refused(seed: int) -> tuple[TrainConfig, int, list[str]]:
    """A configuration that differs from a good one in a few fields, its ranks, and why it is refused; maybe nothing."""
    draw = random.Random(seed)
    names = draw.sample(list(CHOICES), draw.randint(1, 6))
    changes = {name: draw.choice(CHOICES[name]) for name in names}
    config, world_size = tiny_config(Path("runs/never"), CORPUS, **changes), draw.choice(WORLD_SIZES)
    try:
        finalize(config, world_size=world_size)
    except ConfigError as error:
        return config, world_size, error.problems
    return config, world_size, []


def test_what_an_error_advises_mends_what_it_speaks_of() -> None:
    """A degree that divides the heads and not the processes, a length for cp that sequence parallelism refuses."""
    num_changes = 0
    kinds: set[str] = set()
    for seed in range(300):
        config, world_size, problems = refused(seed)
        for problem in problems:
            if not isinstance(problem, Problem):
                continue
            kinds.add(kind_of(problem))
            for advice in problem.advice:
                for change in advice.changes:
                    after = find_problems(with_changes(config, change), world_size=world_size)
                    assert kind_of(problem) not in map(kind_of, after), (problem, change)
                    assert not any(f"{field}=" in without_advice(p) for p in after for field in change), (
                        problem,
                        change,
                    )
                    num_changes += 1
    assert num_changes > 500
    assert len(kinds) > 25


def test_advice_that_other_settings_refuse_is_not_given() -> None:
    """Control: divisors of the heads that eight processes, the inner features or the pipeline do not allow."""
    changes: dict[str, Any] = {"parallel__tp": 8, "parallel__pp": 2, "model__num_heads": 12, "model__num_kv_heads": 12}
    config = tiny_config(Path("runs/never"), CORPUS, **changes, model__intermediate_size=48, model__hidden_size=48)
    untried = [p for p in find_problems(config, world_size=16) if "num_heads" in p]
    assert [change["parallel.tp"] for change in untried[0].advice[0].changes] == [4, 2, 1]  # type: ignore[attr-defined]
    config = with_changes(config, {"parallel.dp_shard": 1, "parallel.dp_replicate": 1})
    with pytest.raises(ConfigError) as error:
        finalize(config, world_size=16)
    assert error.value.problems
    for line in error.value.problems:
        assert line.endswith("no other parallel.tp alone is legal beside the other settings")


EXPERTS: dict[str, Any] = {"num_experts": 6, "intermediate_size": 24}
ADVISED: list[tuple[dict[str, Any], str]] = [
    ({"model__moe": MoEConfig(num_experts=4)}, "model.moe.intermediate_size=16, 25, 32 or 50"),
    (
        {"model__moe": MoEConfig(num_experts=4), "parallel__tp": 2, "parallel__sequence_parallel": True},
        "model.moe.intermediate_size=16, 32, 48 or 50",
    ),
    (
        {"model__moe": MoEConfig(**EXPERTS, top_k=3, num_groups=3)},
        "model.moe.top_k=1 or 2, or model.moe.top_groups=2 or 3",
    ),
    ({"model__moe": MoEConfig(**EXPERTS, num_groups=3, top_groups=4)}, "model.moe.top_groups=1, 2 or 3"),
    (
        {"model__moe": MoEConfig(**EXPERTS, router="switch", normalize=False)},
        "model.moe.top_k=1, or model.moe.router=softmax or sigmoid",
    ),
    (
        {"model__moe": MoEConfig(**EXPERTS, router="sigmoid", num_groups=6, top_groups=3)},
        "model.moe.num_groups=3",  # top_groups=3 of 1 or 2 there are not
    ),
    ({"model__moe": MoEConfig(**EXPERTS, dense_layers=[0, 2])}, "model.moe.dense_layers=[0]"),
    ({"model__moe": MoEConfig(**EXPERTS, every=9)}, "model.moe.every=1 or 2, or model.moe.num_experts=0"),
    (
        {"model__moe": MoEConfig(**EXPERTS), "model__routing": RoutingConfig(bias_update_rate=0.1)},
        "model.routing.bias_update_rate=0.0, or model.moe.router=sigmoid",
    ),
    (
        {"model__routing": RoutingConfig(aux_weight=0.1)},
        "model.routing.aux_weight=0.0, or set model.moe.num_experts",
    ),
    (
        {"schedule__name": "wsd", "schedule__warmup_steps": 30, "schedule__decay_steps": 5},
        "schedule.warmup_steps=0 or 15, or train.steps=35",
    ),
    ({"schedule__name": "wsd", "schedule__decay_steps": 18}, "schedule.warmup_steps=2, or schedule.decay_steps=17"),
    ({"schedule__decay_steps": 3}, "schedule.decay_steps=null, or schedule.name=wsd"),
    ({"optim__beta2": 1.0}, "optim.beta2=0.95"),
    (
        # int8 has no whole blocks in rows of 36.
        {"optim__state_dtype": "bf16", "optim__beta2": 0.999},
        "optim.beta2=0.996, or optim.state_dtype=fp32",
    ),
    (
        {"optim__state_dtype": "bf16", "optim__kernel": "torch"},
        "optim.kernel=auto or triton, or optim.state_dtype=fp32",
    ),
    (
        {"data__source": "hub", "data__path": "a/name", "data__num_workers": 2},
        "data.num_workers=0 or 1, or data.streaming=false",
    ),
    ({"data__tokenizer": TokenizerConfig(vocab_size=9)}, "data.tokenizer.vocab_size=257 or 8192"),
]


@pytest.mark.parametrize(("changes", "advice"), ADVISED, ids=[advice for _, advice in ADVISED])
def test_what_is_wrong_in_one_group_has_values_that_mend_it(changes: dict[str, Any], advice: str) -> None:
    """Advice that says what is wrong again, or gives a number that the layout does not divide."""
    with pytest.raises(ConfigError) as error:
        finalize(tiny_config(Path("runs/never"), CORPUS, **changes), world_size=4)
    (line,) = error.value.problems
    assert line.endswith(f"; use {advice}")


def test_a_problem_is_its_line_and_offers_the_nearest_values_in_order() -> None:
    """A list of all divisors of 4096, or one that leaves out the nearest."""
    problem = Problem("a.b=7 is odd", values("a.b", range(0, 40, 2), near=7), None, words="drop it")
    assert problem == "a.b=7 is odd; use a.b=4, 6, 8 or 10, or drop it"
    assert without_advice(problem) == "a.b=7 is odd"
    legal = problem.with_legal_advice(lambda change: change["a.b"] % 4 == 0)
    assert [change["a.b"] for change in legal.advice[0].changes] == [8, 4, 12, 0]
    assert len(legal.advice[0].changes) == MAX_VALUES
    assert kind_of(problem) == kind_of("a.b=9 is odd")
    nothing = Problem("a.b=7 is odd", values("a.b", [2, 4])).with_legal_advice(lambda change: False)
    assert nothing == "a.b=7 is odd; no other a.b alone is legal beside the other settings"
