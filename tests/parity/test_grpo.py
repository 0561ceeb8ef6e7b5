"""recipe=grpo: rollouts and gradients are those of one process, whatever the layout."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from launch.compose import TRAIN, compose_for
from tests.parity.harness import Outcome, gradient_deviation, run_and_count_graphs, run_here, run_on
from tests.pool import RankPool
from tests.trainer.rl.rolling import rolling
from trainer.config import TrainConfig
from trainer.rl.config import RLConfig
from trainer.rl.twin import Twin, _put

SAMPLED = ("reward", "valid_tokens", "tokens", "completion_tokens", "truncated", "constant_groups", "groups_trained")
"""What depends on which tokens were drawn."""


@pytest.fixture(scope="module")
def reference(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process, rows of one rollout each."""
    folder = tmp_path_factory.mktemp("grpo")
    return run_on(ranks, 1, rolling(folder, train__micro_batch_size=1))


def same(found: Outcome, wanted: Outcome) -> None:
    for ours, theirs in zip(found.metrics, wanted.metrics, strict=True):
        assert [ours[name] for name in SAMPLED] == [pytest.approx(theirs[name], rel=1e-12) for name in SAMPLED]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-6)
        assert 0 < ours["sampler_max_delta"] < 1e-5
    assert gradient_deviation(found, wanted) < 2e-5


COMPILED = {"train__compile": True, "train__compile_backend": "aot_eager"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"parallel__zero_stage": 1},
    "zero2": {"parallel__zero_stage": 2},
    "zero3, gathered once": {"parallel__zero_stage": 3, "rl__weights": "gather"},
    "zero3, streamed": {"parallel__zero_stage": 3, "rl__weights": "stream"},
    "zero3, streamed, compiled": COMPILED | {"parallel__zero_stage": 3, "rl__weights": "stream"},
    "tp": {"parallel__tp": 2},
    "tp, sp": {"parallel__tp": 2, "parallel__sequence_parallel": True},
    "pp": {"parallel__pp": 2},
    "cp": {"parallel__cp": 2},
}
WIDER: dict[str, dict[str, Any]] = {
    "pp x zero3": {"parallel__pp": 2, "parallel__zero_stage": 3},
    "pp x cp": {"parallel__pp": 2, "parallel__cp": 2},
    "ring x ulysses": {"parallel__cp": 4, "parallel__cp_ulysses": 2},
    "cp x zero3, streamed": {"parallel__cp": 2, "parallel__zero_stage": 3, "rl__weights": "stream"},
    "cp x tp, sp": {"parallel__cp": 2, "parallel__tp": 2, "parallel__sequence_parallel": True},
    "tp, sp x zero3": {"parallel__tp": 2, "parallel__sequence_parallel": True, "parallel__zero_stage": 3},
    "tp, sp in chunks x pp x zero3": {"parallel__tp": 2, "parallel__sequence_parallel": True, "parallel__sp_chunks": 2}
    | {"parallel__pp": 2, "parallel__zero_stage": 3},
}
TIED: dict[str, dict[str, Any]] = {
    "pp x zero1, two stages a rank": {"parallel__zero_stage": 1, "parallel__pp_schedule": "interleaved_1f1b"},
    "pp x tp, sp": {"parallel__tp": 2, "parallel__sequence_parallel": True},
    "pp of four": {"parallel__pp": 4, "parallel__pp_schedule": "zero_bubble"},
}


def test_packing_and_micro_batches_change_nothing(ranks: RankPool, tmp_path: Path, reference: Outcome) -> None:
    """Weights of completions that depend on what stands beside them; a token that sees another completion."""
    same(run_on(ranks, 1, rolling(tmp_path, train__micro_batch_size=4)), reference)


def test_compiled_blocks_make_a_graph_of_few_shapes_and_train_as_eager_ones(
    ranks: RankPool, tmp_path: Path, reference: Outcome
) -> None:
    """A graph for every length of what was sampled, or for each step of the engine; rows that are filled up, or hold no
    completion at all, and count."""
    # An engine has launches of its own for fused projections, and for others the forward of the blocks.
    changes = COMPILED | {"train__micro_batch_size": 3, "model__fused_projections": False}
    ((found, graphs),) = ranks.run(1, run_and_count_graphs, rolling(tmp_path, **changes))
    assert graphs == 2  # of micro-batches of three rows and of the last one; the two layers share them
    same(found, reference)


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize("weights", ["stream", "gather"])
def test_shards_of_tps_shards_are_served(ranks: RankPool, tmp_path: Path, reference: Outcome, weights: str) -> None:
    """A gathered weight that is whole over one axis and a part over the other, taken for all of it or for none."""
    changes = {"parallel__tp": 2, "parallel__zero_stage": 3, "rl__weights": weights}
    same(run_on(ranks, 4, rolling(tmp_path, **changes)), reference)


@pytest.mark.some(2, unless_thorough=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_one(ranks: RankPool, tmp_path: Path, reference: Outcome, layout: str) -> None:
    """A group that is cut in two, seeds by rank, means of means, weights that an engine serves while they are gone."""
    same(run_on(ranks, 2, rolling(tmp_path, **LAYOUTS[layout])), reference)


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize("layout", WIDER)
def test_four_ranks_train_as_one(ranks: RankPool, tmp_path: Path, reference: Outcome, layout: str) -> None:
    """Completions that two ranks sample, or none; layers of another stage that are those of the step before; a token's
    numbers beside another token, where ranks have parts of rows."""
    same(run_on(ranks, 4, rolling(tmp_path, **WIDER[layout])), reference)


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize("layout", TIED)
def test_stages_train_as_one_rank_with_tied_embeddings(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    """A table that two stages hold and a served model has once; stages that do not follow one another on a rank."""
    model = {"model__tie_embeddings": True, "model__num_layers": 4}
    one = run_on(ranks, 1, rolling(tmp_path / "one", train__micro_batch_size=1, **model))
    same(run_on(ranks, 4, rolling(tmp_path / "four", **model | {"parallel__pp": 2} | TIED[layout])), one)


def test_weights_of_the_step_before_on_other_stages_would_be_seen(
    ranks: RankPool, tmp_path: Path, reference: Outcome
) -> None:
    """The negative control of the three above: stages that send each other their layers once."""
    found = ranks.run(2, with_weights_sent_once, rolling(tmp_path, parallel__pp=2))[0]
    assert found is not None
    first, second = found.metrics
    assert first["sampler_max_delta"] < 1e-5 < 1e-3 < second["sampler_max_delta"]
    with pytest.raises(AssertionError):
        same(found, reference)


def with_weights_sent_once(config: TrainConfig) -> Outcome | None:
    begun: dict[int, list[Any]] = {}

    def fill(twin: Twin) -> None:
        if id(twin) not in begun:
            fill_and_drop(twin)
            begun[id(twin)] = [getattr(place.module, place.kind).detach().clone() for place in twin._places]
        for place, tensor in zip(twin._places, begun[id(twin)], strict=True):
            _put(place, tensor)

    fill_and_drop = Twin.fill
    with mock.patch.object(Twin, "fill", fill):
        return run_here(config)


FAMILY = ("gspo", "cispo", "dapo", "dr_grpo", "rloo")
FURTHER = {"rl__minibatches": 2, "rl__entropy_weight": 0.01, "train__steps": 2, "schedule__name": "constant"}


def of_family(folder: Path, name: str, **changes: Any) -> TrainConfig:
    """A run with the settings of configs/recipe/NAME.yaml, whose second update is off-policy."""
    config = rolling(folder, **FURTHER, **changes)
    given, own = compose_for(TRAIN, [f"recipe={name}"]).recipe.rl, RLConfig()
    shipped = {f.name: value for f in fields(RLConfig) if (value := getattr(given, f.name)) != getattr(own, f.name)}
    config.recipe.rl = replace(config.recipe.rl, **shipped)
    # Random models end few completions, and dapo learns from no others.
    ends = Path(str(config.data.tokenizer.path)) / "generation_config.json"
    ends.write_text(json.dumps({"eos_token_id": list(range(0, 300, 7))}))
    return config


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["zero2", "cp", "pp"])
@pytest.mark.parametrize("name", FAMILY)
def test_two_ranks_train_the_whole_family_as_one(ranks: RankPool, tmp_path: Path, name: str, layout: str) -> None:
    """A loss, an advantage or a normalisation that no run had: ratios of sequences that are cut at ranks, counts of
    completions where there should be some of tokens, groups that are chosen by each rank for itself."""
    one = run_on(ranks, 1, of_family(tmp_path / "one", name, train__micro_batch_size=1))
    two = run_on(ranks, 2, of_family(tmp_path / "two", name, **LAYOUTS[layout]))
    assert [line["ratio"] == 1.0 for line in one.metrics] == [True, False]
    for ours, theirs in zip(two.metrics, one.metrics, strict=True):
        assert ours["valid_tokens"] == theirs["valid_tokens"] > 0
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for field in ("ratio", "clipped_above", "clipped_below", "entropy"):
            assert ours[field] == pytest.approx(theirs[field], rel=1e-5, abs=1e-6), field
    assert two.metrics[0]["groups_trained"] == one.metrics[0]["groups_trained"]
    assert gradient_deviation(two, one) < 2e-5
