"""recipe=grpo: what a run does, what it writes down, and what it refuses."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tokenizer import Tokenizer
from inference.config import EngineConfig
from models.lora import apply_adapters
from models.moe_config import MoEConfig
from models.registry import build_model
from tests.parity.harness import Outcome, changed, run_on, weight_deviation
from tests.pool import RankPool
from tests.trainer.rl.rolling import EVEN, ROWS, SEQ_LEN, even, rolling
from trainer.config import TrainConfig
from trainer.rl.config import RewardConfig
from trainer.rl.rewards import Answer
from trainer.rl.serving import Room, engine_config
from trainer.validate import find_problems

EXPERTS = {"model__moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=24)}
HERE = "tests.trainer.rl.test_grpo"
TIMES = ("seconds", "per_second", "mfu", "peak_memory_gib", "goodput")


def without_times(outcome: Outcome) -> list[dict[str, Any]]:
    return [{name: v for name, v in line.items() if not any(t in name for t in TIMES)} for line in outcome.metrics]


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"parallel__zero_stage": 3},
        pytest.param({"parallel__pp": 2}, marks=pytest.mark.thorough),
        {"parallel__pp": 2, "parallel__zero_stage": 3},
        pytest.param({"parallel__ep": 2} | EXPERTS, marks=pytest.mark.thorough),
    ],
    ids=["one", "zero3", "pp", "pp x zero3", "ep"],
)
def test_in_deterministic_mode_trainer_and_sampler_agree_to_the_bit(
    ranks: RankPool, tmp_path: Path, layout: dict[str, Any]
) -> None:
    """Rollouts whose probabilities are not the trainer's, in half precision; the next test is the control."""
    changes = {"train__batch_invariant": True, "precision__compute": "bf16", "train__global_batch_size": 8}
    for line in run_on(ranks, 2 if layout else 1, rolling(tmp_path, **changes | layout)).metrics:
        assert line["sampler_max_delta"] == line["sampler_kl"] == 0.0
        assert line["importance_weight"] == line["ratio"] == 1.0


def test_in_half_precision_they_otherwise_do_not(ranks: RankPool, tmp_path: Path) -> None:
    """Negative control: a difference that is never measured."""
    config = rolling(tmp_path, precision__compute="bf16", train__steps=1)
    (line,) = run_on(ranks, 1, config).metrics
    assert 1e-4 < line["sampler_max_delta"] < 0.2
    assert 0 < line["sampler_kl"] < 1e-3


SEVERAL = {"rl__minibatches": 2, "rl__epochs": 2, "train__steps": 6, "train__seq_len": 36, "schedule__name": "constant"}


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, {}),
        (2, {}),
        pytest.param(2, {"parallel__pp": 2}, marks=pytest.mark.thorough),
        pytest.param(2, {"parallel__cp": 2}, marks=pytest.mark.thorough),
    ],
    ids=["one", "two", "pp", "cp"],
)
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(
    ranks: RankPool, tmp_path: Path, size: int, layout: dict[str, Any]
) -> None:
    """Rollouts that are sampled again by other weights, prompts that come twice, ratios against newer policies."""
    whole = run_on(ranks, size, rolling(tmp_path / "whole", **SEVERAL | layout))
    config = rolling(tmp_path / "cut", **SEVERAL | layout | {"train__steps": 3})
    config.checkpoint.at_end = True
    run_on(ranks, size, config)
    config.train.steps = 6
    assert without_times(run_on(ranks, size, config)) == without_times(whole)
    # Of four updates by the same rollouts the first alone is on-policy.
    assert [line["ratio"] == 1.0 for line in whole.metrics] == [True, False, False, False, True, False]
    assert ["reward" in line for line in whole.metrics] == [True, False, False, False, True, False]


def test_rollouts_left_over_are_shared_out_over_another_number_of_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """A checkpoint that only as many ranks can read, or of which rollouts are lost."""
    config = rolling(tmp_path, **SEVERAL | {"train__steps": 3})
    config.checkpoint.at_end = True
    run_on(ranks, 2, config)
    config.train.steps = 4
    one = run_on(ranks, 1, config).metrics[-1]
    whole = run_on(ranks, 2, rolling(tmp_path / "whole", **SEVERAL | {"train__steps": 4})).metrics[-1]
    assert one["valid_tokens"] == whole["valid_tokens"]
    assert one["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def first(answer: Answer) -> float:
    """Equal for all completions of most prompts."""
    return float(int(answer.row["answer"]) % 3 == 0 and answer.token_ids[0] % 2 == 0)


def test_groups_that_teach_nothing_are_replaced(ranks: RankPool, tmp_path: Path) -> None:
    """A batch of which two thirds have no gradient; on two ranks other groups than on one."""
    changes = {"rl__sampling_rounds": 9, "rl__rewards": [RewardConfig(f"{HERE}:first")], "train__steps": 2}
    layouts = {"dp": (2, {}), "pp": (2, {"parallel__pp": 2}), "cp x pp": (4, {"parallel__cp": 2, "parallel__pp": 2})}
    alone = run_on(ranks, 1, rolling(tmp_path / "alone", **changes)).metrics
    found = [run_on(ranks, n, rolling(tmp_path / name, **changes | way)).metrics for name, (n, way) in layouts.items()]
    for one, two in zip(alone * len(found), [line for lines in found for line in lines], strict=True):
        assert one["sampling_rounds"] > 1
        assert one["groups_trained"] == 4
        assert one["constant_groups"] > 0.4
        for name in ("sampling_rounds", "groups_trained", "reward", "valid_tokens"):
            assert one[name] == two[name]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def sometimes(answer: Answer) -> float:
    if answer.token_ids[0] % 2:
        raise LookupError("no such thing")
    return float(len(answer.token_ids))


def test_completions_without_a_reward_are_left_out_and_counted(ranks: RankPool, tmp_path: Path) -> None:
    """A failure that nobody sees; one that ends a run although it is to go on, and the other way round."""
    changes = {"rl__rewards": [RewardConfig(f"{HERE}:sometimes"), RewardConfig(EVEN, 0.5)], "train__steps": 1}
    config = rolling(tmp_path, rl__bad_reward="skip", **changes)
    (line,) = run_on(ranks, 1, config).metrics
    assert 0 < line["reward_failures"] < 16
    assert line["reward"] == pytest.approx(line["reward_sometimes"] + 0.5 * line["reward_even"])
    assert "raised LookupError: no such thing" in (Path(config.run.dir) / "events.jsonl").read_text()
    with pytest.raises(AssertionError, match="RewardError: the reward function sometimes raised LookupError"):
        run_on(ranks, 2, rolling(tmp_path / "error", **changes))


def test_the_policy_is_held_near_the_reference(ranks: RankPool, tmp_path: Path) -> None:
    """A reference that moves with the policy, of which the divergence is always 0; one that does nothing."""
    changes = {"train__steps": 8, "optim__lr": 1e-2, "schedule__name": "constant"}
    free, held = (
        run_on(ranks, 1, rolling(tmp_path / str(weight), rl__kl_weight=weight, **changes)).metrics
        for weight in (1e-9, 30.0)
    )
    assert free[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert free[0]["grad_norm"] == pytest.approx(held[0]["grad_norm"], rel=1e-3)
    assert 0 < held[-1]["kl"] < free[-1]["kl"] / 2
    two = run_on(
        ranks, 2, rolling(tmp_path / "two", rl__kl_weight=30.0, parallel__zero_stage=3, **changes | {"train__steps": 2})
    ).metrics
    assert two[1]["kl"] == pytest.approx(held[1]["kl"], rel=1e-3)


def only_one(answer: Answer) -> float:
    """Differs within the group of one prompt."""
    return float(answer.row["answer"] == "0" and answer.token_ids[0] % 2 == 0)


def test_minibatches_of_nothing_are_no_updates(ranks: RankPool, tmp_path: Path) -> None:
    """Weights that the moments of Adam move on by, and a schedule that goes on, where nothing was learned."""
    changes = {
        "rl__sampling_rounds": 2,
        "rl__rewards": [RewardConfig(f"{HERE}:only_one")],
        "rl__minibatches": 2,
        "data__shuffle": False,
        "schedule__name": "constant",
    }
    one = run_on(ranks, 1, rolling(tmp_path / "one", **changes, train__steps=1))
    for size in (1, 2):
        config = rolling(tmp_path / str(size), **changes, train__steps=2)
        found = run_on(ranks, size, config)
        assert ["reward" in line for line in found.metrics] == [True, True]  # each by rollouts of its own
        assert [line["groups_trained"] for line in found.metrics] == [1, 0]
        assert [line["valid_tokens"] > 0 for line in found.metrics] == [True, False]
        assert weight_deviation(found, one) < (1e-5 if size == 2 else 1e-12)
        text = (Path(config.run.dir) / "events.jsonl").read_text()
        assert text.count("1 of recipe.rl.minibatches=2 have no completion to learn from, and make no update") == 1
        assert text.count('"nothing_learned"') == 1


def slow(answer: Answer) -> float:
    time.sleep(0.02)
    return even(answer)


def test_a_step_says_what_its_parts_took(ranks: RankPool, tmp_path: Path) -> None:
    """Rewards that are taken for sampling; models that are asked between rollouts and update, in no number."""
    changes = {"rl__rewards": [RewardConfig(f"{HERE}:slow")], "rl__reward_threads": 1, "rl__minibatches": 2}
    first, second = run_on(ranks, 1, rolling(tmp_path, rl__kl_weight=0.1, **changes)).metrics
    assert 16 * 0.02 <= first["reward_seconds"] < first["rollout_seconds"]
    assert second["logprob_seconds"] > 0  # of the reference alone
    assert 0 < first["logprob_seconds"] < first["step_seconds"]
    assert "reward_seconds" not in second


class Twice:
    """An environment that answers with the prompt's first column, once."""

    def start(self, prompt: str, row: dict[str, Any]) -> None:
        self.left, self.answer = 1, row["answer"]

    def reply(self, text: str) -> str | None:
        self.left -= 1
        return f" two {self.answer} " if self.left >= 0 else None


def test_turns_of_an_environment_are_put_between_those_of_the_model(ranks: RankPool, tmp_path: Path) -> None:
    """Tokens of the environment with a loss; text that is tokenised again and comes out as other tokens."""
    found = ranks.run(1, _episodes, rolling(tmp_path, rl__environment=f"{HERE}:Twice", rl__max_tokens=None))[0]
    assert any(len(spans) == 2 for _, spans, _, _ in found)
    for tokens, spans, logprobs, between in found:
        assert len(logprobs) == sum(end - begin for begin, end in spans)
        assert len(tokens) <= 40
        if len(spans) == 2:
            assert tokens[spans[0][1] : spans[1][0]] == between


def _episodes(config: TrainConfig) -> list[tuple[Any, ...]]:
    from trainer.trainer import Trainer
    from trainer.validate import finalize

    trainer = Trainer(finalize(config, world_size=1))
    try:
        trainer.run()
        recipe, tokenizer = trainer.recipe, trainer.train_data.tokenizer
        assert tokenizer is not None
        samples = recipe._samples["train"]  # type: ignore[attr-defined]
        # Every token ends a turn with some probability: random models end few.
        recipe._engine.eos_ids = frozenset(range(0, 300, 7))  # type: ignore[attr-defined]
        groups, _ = recipe._collector.groups(range(4), samples, size=4)  # type: ignore[attr-defined]
        return [
            (r.tokens, r.spans, r.logprobs, tokenizer.encode(f" two {samples[group.number].row['answer']} "))
            for group in groups
            for r in group.rollouts
        ]
    finally:
        trainer.close()


def test_completions_of_messages_end_as_the_template_ends_answers(ranks: RankPool, tmp_path: Path) -> None:
    """A policy that ends its turns as recipe=sft taught it, and is sampled on to the last token there is room for."""
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]
    config = rolling(tmp_path / "messages", rows=rows, rl__max_tokens=None, train__steps=1)
    folder = Path(str(config.data.tokenizer.path))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    tokenizer = Tokenizer.from_path(folder)
    (end,) = tokenizer.encode("<|im_end|>")
    ends, found = ranks.run(1, _completions, config)[0]
    assert ends == {tokenizer.eos_id, end, 7, 9}
    assert any(completion[-1] == end for completion, _ in found)
    for completion, reason in found:
        assert ends.isdisjoint(completion[:-1])
        assert reason == ("stop" if completion[-1] in ends else "length")
    plain = rolling(tmp_path / "text", rl__max_tokens=None, train__steps=1)
    ends, found = ranks.run(1, _completions, plain)[0]
    assert ends == {tokenizer.eos_id}
    assert any(end in completion[:-1] for completion, _ in found)  # the control


def _completions(config: TrainConfig) -> tuple[set[int], list[tuple[list[int], str]]]:
    """(what ends one, completions as (generated tokens, finish reason))."""
    from trainer.trainer import Trainer
    from trainer.validate import finalize

    trainer = Trainer(finalize(config, world_size=1))
    try:
        trainer.run()
        recipe: Any = trainer.recipe
        groups, _ = recipe._collector.groups(range(10), recipe._samples["train"], size=6)
        found = [rollout for group in groups for rollout in group.rollouts]
        return set(recipe._engine.eos_ids), [(one.tokens[one.spans[0][0] :], one.finish_reason) for one in found]
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"parallel__pp": 2, "rl__weights": "in_place"},
            "recipe.rl.weights=in_place with parallel.pp=2 has no whole weights anywhere; use recipe.rl.weights=gather",
        ),
        (
            {"parallel__pp": 2, "rl__weights": "stream"},
            "recipe.rl.weights=stream with parallel.pp=2: the blocks of other stages do not run here; use",
        ),
        (
            {"rl__weights": "stream", "parallel__zero_stage": 3, "parallel__tp": 2}
            | {"parallel__sequence_parallel": True},
            "recipe.rl.weights=stream with parallel.sequence_parallel=true: a block runs on slices of tokens",
        ),
        (
            {"rl__weights": "in_place", "parallel__zero_stage": 3},
            "recipe.rl.weights=in_place with parallel.zero_stage=3 has no whole weights anywhere; use "
            "recipe.rl.weights=gather or stream",
        ),
        (
            {"parallel__pp": 2, "rl__engine": EngineConfig(cuda_graphs=True)},
            "recipe.rl.engine.cuda_graphs=true with parallel.pp=2: gathered weights lie elsewhere each time",
        ),
        ({"train__global_batch_size": 10}, "do not divide into groups of recipe.rl.group_size=4; use"),
        ({"rl__loss": "clipped"}, "recipe.rl.loss=clipped is unknown; use recipe.rl.loss=clip"),
        ({"model__dropout": 0.1}, "model.dropout=0.1 does not work with recipe.name=grpo: completions are sampled"),
        ({"rl__kl_weight": 0.1, "rl__kl_estimator": "k1"}, "as a loss its mean gradient is 0"),
        ({"recipe__reference_offload": True}, "recipe.reference_offload=True has no effect with recipe.rl.kl_weight=0"),
        ({"recipe__name": "pretrain"}, "recipe.rl is set and has no effect with recipe.name=pretrain; leave it out"),
        ({"rl__group_size": 1}, "recipe.rl.group_size=1 must be at least 2"),
        (
            {"rl__minibatches": 5},
            "recipe.rl.minibatches=5 of 4 prompts (train.global_batch_size=16 completions in groups",
        ),
        ({"rl__weights": "gather"}, "the model computes with whole weights already; use recipe.rl.weights=in_place"),
        ({"rl__rewards": []}, "recipe.rl.rewards is empty"),
        ({"rl__rewards": [RewardConfig(EVEN), RewardConfig("no")]}, "recipe.rl.rewards[1].function=no is unknown"),
        ({"rl__environment": "no:Where"}, "recipe.rl.environment=no:Where cannot be imported"),
        ({"rl__max_tokens": 40}, "recipe.rl.max_tokens=40 leaves no room for a prompt in train.seq_len=40"),
        ({"data__mask_documents": False}, "data.mask_documents=false lets the completions of a row see one another"),
    ],
)
def test_what_does_not_work_is_refused_in_a_line(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    lines = find_problems(rolling(tmp_path, **changes), world_size=2)
    assert any(says in line for line in lines), lines


def test_rows_that_are_no_prompts_are_refused_in_a_line(ranks: RankPool, tmp_path: Path) -> None:
    for name, row, says in (
        ("column", {"question": "one?"}, "data.prompts.field=prompt is neither text nor messages there; it has the"),
        ("empty", {"prompt": ""}, "its prompt has no tokens"),
        ("messages", {"prompt": [{"role": "user", "content": 3}]}, "the chat template refuses this conversation"),
    ):
        with pytest.raises(AssertionError, match=says):
            run_on(ranks, 1, rolling(tmp_path / name, rows=[*ROWS, row]))
    long = {"prompt": "one " * 60}
    (line, *_) = run_on(ranks, 1, rolling(tmp_path / "long", rows=[*ROWS, long])).metrics
    assert line["groups_trained"] == 4
    config = changed(rolling(tmp_path / "too", rows=[*ROWS, long]), tmp_path / "too" / "run")
    config.data.prompts.too_long = "error"
    with pytest.raises(AssertionError, match="leaves no room for an answer"):
        run_on(ranks, 1, config)


def test_the_shipped_recipes_are_legal() -> None:
    """A file of configs/recipe with a value that the code does not know."""
    from launch.compose import TRAIN, compose_for
    from trainer.rl.config import rl_problems

    for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"):
        config = compose_for(TRAIN, [f"recipe={name}"])
        assert config.recipe.name == "grpo"
        assert config.data.source == "prompts"
        assert rl_problems(config.recipe.rl) == []


@pytest.mark.parametrize("size", [1, 2])
def test_at_a_temperature_trainer_and_sampler_speak_of_the_tempered_policy(
    ranks: RankPool, tmp_path: Path, size: int
) -> None:
    """Log-probabilities of which one is tempered; in deterministic mode they are equal to the bit."""
    changes = {"rl__temperature": 0.7, "model__init_std": 0.3}
    stage = 3 if size == 2 else 0
    for line in run_on(ranks, size, rolling(tmp_path / "any", parallel__zero_stage=stage, **changes)).metrics:
        assert 0 < line["sampler_max_delta"] < 1e-4
    exact = {"train__batch_invariant": True, "precision__compute": "bf16", "train__global_batch_size": 8}
    config = rolling(tmp_path / "exact", parallel__zero_stage=stage, **changes | exact)
    for line in run_on(ranks, size, config).metrics:
        assert line["sampler_max_delta"] == line["sampler_kl"] == 0.0
        assert line["importance_weight"] == line["ratio"] == 1.0


def test_the_entropy_is_that_of_the_temperature(ranks: RankPool, tmp_path: Path) -> None:
    """The negative control of the one above: a temperature that nobody reads."""
    changes = {"model__init_std": 0.3, "train__steps": 1}
    cold, warm = (
        run_on(ranks, 1, rolling(tmp_path / str(t), rl__temperature=t, **changes)).metrics[0] for t in (0.5, 2.0)
    )
    assert cold["entropy"] < warm["entropy"] - 0.1


def test_rollouts_made_a_batch_ahead_are_learned_from_once_and_saved(ranks: RankPool, tmp_path: Path) -> None:
    """Rollouts that a resumed run makes again by newer weights; ratios of 1 although the weights have moved on."""
    changes = {"rl__rollout_lag": 1, "train__steps": 4, "schedule__name": "constant", "optim__lr": 1e-2}
    whole = run_on(ranks, 1, rolling(tmp_path / "whole", **changes))
    config = rolling(tmp_path / "cut", **changes | {"train__steps": 2})
    config.checkpoint.at_end = True
    run_on(ranks, 1, config)
    config.train.steps = 4
    assert without_times(run_on(ranks, 1, config)) == without_times(whole)
    assert [abs(line["ratio"] - 1) > 1e-5 for line in whole.metrics] == [False, True, True, True]
    assert len({line["reward"] for line in whole.metrics}) == 4


@pytest.mark.parametrize(
    ("asked", "stage", "adapter", "graphs"),
    [
        (None, 1, "none", True),
        (None, 3, "none", False),
        (None, 1, "lora", False),
        (False, 1, "none", False),
        (True, 1, "lora", True),
    ],
)
def test_rollouts_replay_graphs_where_weights_stay_and_launches_are_fused(
    tmp_path: Path, asked: bool | None, stage: int, adapter: str, graphs: bool
) -> None:
    changes = {"parallel__zero_stage": stage, "rl__overlap": stage < 3, "rl__rollout_lag": int(stage < 3)}
    config = rolling(tmp_path, rl__engine=EngineConfig(cuda_graphs=asked), **changes)
    config.adapter.name = adapter
    model = build_model(config.model, seed=0)
    if adapter != "none":
        apply_adapters(model, config.adapter, torch.float32)
    found = engine_config(config, Room(16, SEQ_LEN, 8), model)
    assert found.cuda_graphs is graphs
    assert found.warmup == (graphs and stage < 3)  # nothing is captured beside an update


@pytest.mark.parametrize("asked", [None, False, True])
def test_graphs_of_gathered_weights_are_refused(tmp_path: Path, asked: bool | None) -> None:
    config = rolling(tmp_path, parallel__zero_stage=3, rl__engine=EngineConfig(cuda_graphs=asked))
    found = "".join(find_problems(config, world_size=2))
    assert ("recipe.rl.engine.cuda_graphs=true with parallel.zero_stage=3" in found) == (asked is True)
