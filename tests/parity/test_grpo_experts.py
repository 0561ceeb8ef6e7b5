"""recipe=grpo with a mixture of experts: what samples has all of them, wherever training keeps each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from models.config import ModelConfig
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig, RoutingConfig
from tests.parity.harness import Outcome, run_on
from tests.parity.test_grpo import same
from tests.pool import RankPool
from tests.trainer.rl.ppo_runs import proximal
from tests.trainer.rl.rolling import SEQ_LEN, rolling
from trainer.validate import find_problems

MIXTURE = {"model__moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=24, num_shared=1)}
LATENT = {
    "model__family": "deepseek_v3",
    "model__mla": MLAConfig(kv_rank=10, q_rank=9, nope_dim=5, rope_dim=6, value_dim=7),
    "model__num_kv_heads": None,
    "model__moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=24, router="sigmoid", scaling=1.5, first_dense=1),
}
EP = {"parallel__ep": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero2": {"parallel__zero_stage": 2},
    "zero3, streamed": {"parallel__zero_stage": 3, "rl__weights": "stream"},
    "tp": {"parallel__tp": 2},
    "ep": EP,
    "ep x zero3": EP | {"parallel__zero_stage": 3},
    "ep with buffers": EP | {"parallel__ep_buffer": 2.0},
    "ep, compiled": EP | {"train__compile": True, "train__compile_backend": "aot_eager"},
}
WIDER: dict[str, dict[str, Any]] = {
    "ep x tp, sp": EP | {"parallel__tp": 2, "parallel__sequence_parallel": True},
    "ep x pp": EP | {"parallel__pp": 2},
    "ep x pp x zero3": EP | {"parallel__pp": 2, "parallel__zero_stage": 3},
    "ep x cp": EP | {"parallel__cp": 2},
    "ep over cp": EP | {"parallel__cp": 4},
}


@pytest.fixture(scope="module")
def reference(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process, rows of one rollout each."""
    return run_on(ranks, 1, rolling(tmp_path_factory.mktemp("experts"), train__micro_batch_size=1, **MIXTURE))


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_one(ranks: RankPool, tmp_path: Path, reference: Outcome, layout: str) -> None:
    """Experts in another order, or those of one rank for all; auxiliary losses of rows that happened to be packed."""
    found = run_on(ranks, 2, rolling(tmp_path, **MIXTURE | LAYOUTS[layout]))
    same(found, reference)
    assert "moe_aux_loss" not in found.metrics[0]
    assert found.metrics[0]["moe_drop_rate"] == 0.0


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize("layout", WIDER)
def test_four_ranks_train_as_one(ranks: RankPool, tmp_path: Path, reference: Outcome, layout: str) -> None:
    same(run_on(ranks, 4, rolling(tmp_path, **MIXTURE | WIDER[layout])), reference)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", [EP, EP | {"parallel__pp": 2}], ids=["ep", "ep x pp"])
def test_latent_attention_with_experts_trains_as_one(ranks: RankPool, tmp_path: Path, layout: dict[str, Any]) -> None:
    """Projections of compressed keys, and biases of routers, that are another stage's."""
    one = run_on(ranks, 1, rolling(tmp_path / "one", train__micro_batch_size=1, **LATENT))
    same(run_on(ranks, 4, rolling(tmp_path / "four", **LATENT | layout)), one)


@pytest.mark.thorough
def test_a_value_model_may_have_experts(ranks: RankPool, tmp_path: Path) -> None:
    one, two = (
        run_on(ranks, size, proximal(tmp_path / str(size), **MIXTURE | layout)).metrics
        for size, layout in ((1, {}), (2, EP))
    )
    for ours, theirs in zip(two, one, strict=True):
        for name in ("loss", "grad_norm", "value_loss", "value_grad_norm", "reward"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize("compiled", [False, True])
def test_buffers_hold_shares_of_rows_that_ranks_agree_on(ranks: RankPool, tmp_path: Path, compiled: bool) -> None:
    """Messages of two sizes, where the completions of one rank end sooner: more rows, or longer ones, on the other."""
    outcomes = []
    for size, layout in ((1, {}), (2, EP | {"parallel__ep_buffer": 2.0})):
        way = {"train__compile": True, "train__compile_backend": "aot_eager"} if compiled else {}
        changes = {"train__global_batch_size": 32, "rl__max_tokens": 24, "train__micro_batch_size": 4}
        config = rolling(tmp_path / str(size), **MIXTURE | changes | way | layout)
        ends = Path(str(config.data.tokenizer.path)) / "generation_config.json"
        ends.write_text(json.dumps({"eos_token_id": list(range(0, 300, 7))}))
        outcomes.append(run_on(ranks, size, config))
    same(outcomes[1], outcomes[0])


def test_what_a_folder_says_of_experts_counts(tmp_path: Path) -> None:
    """A mixture that no field of the configuration names, with what its routers may not learn here."""
    config = rolling(tmp_path)
    shape = {"vocab_size": 300, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": SEQ_LEN}
    settings = transformers.MixtralConfig(**shape, **heads, num_local_experts=4)
    transformers.MixtralForCausalLM(settings).save_pretrained(tmp_path / "tokenizer")
    config.model = ModelConfig(family="hf", path=str(tmp_path / "tokenizer"), routing=RoutingConfig(aux_weight=0.5))
    config.data.tokenizer.path = None
    lines = find_problems(config, world_size=1)
    assert [line for line in lines if line.startswith("model.routing.aux_weight=0.5 does not work")], lines


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__routing": RoutingConfig(aux_weight=0.01)}, "model.routing.aux_weight=0.01 does not work with"),
        ({"model__routing": RoutingConfig(capacity_factor=1.5)}, "model.routing.capacity_factor=1.5 does not work"),
        ({"parallel__ep": 2, "rl__weights": "in_place"}, "recipe.rl.weights=in_place with parallel.ep=2 has no whole"),
        (
            {"parallel__ep": 2, "parallel__zero_stage": 3, "rl__weights": "stream"},
            "recipe.rl.weights=stream with parallel.ep=2: a block with the experts of other ranks does not run here",
        ),
    ],
)
def test_what_does_not_work_is_refused_in_a_line(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    lines = find_problems(rolling(tmp_path, **MIXTURE | changes), world_size=2)
    assert any(says in line for line in lines), lines
