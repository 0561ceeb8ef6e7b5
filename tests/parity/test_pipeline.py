"""Every pipeline schedule against one process, through the real trainer, in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from tests.launch.on_ranks import export_here
from tests.parity.harness import (
    Outcome,
    Reference,
    References,
    assert_same_model,
    changed,
    gradient_deviation,
    loss_deviation,
    run_and_count_graphs,
    run_on,
    text_corpus,
    tiny_config,
)
from tests.parity.on_pipeline_ranks import (
    FAULTS,
    count_gathers,
    count_messages,
    count_schedules,
    run_and_answer,
    run_broken,
    run_with_lengths,
)
from tests.pool import RankPool
from trainer.config import ConfigError
from trainer.validate import finalize

STEPS = 4
MODEL: dict[str, Any] = {
    "model__num_layers": 9,
    "train__global_batch_size": 12,
    "train__steps": STEPS,
    "schedule__warmup_steps": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"data__mask_documents": True},
    "dropout": {"model__dropout": 0.1, "data__mask_documents": True},
    "tied": {"model__tie_embeddings": True, "model__positions": "learned"},
    "tied_muon": {"model__tie_embeddings": True, "optim__name": "muon"},
    "biased": {"model__qkv_bias": True, "model__mlp_bias": True, "data__mask_documents": True},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def references(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> References:
    variants = {name: MODEL | {"train__micro_batch_size": 12} | changes for name, changes in VARIANTS.items()}
    return References(ranks, corpus, tmp_path_factory.mktemp("one-process"), variants, splits=(1, 4))


@pytest.fixture(scope="module")
def plain_reference(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """With sums over features in parts as well: what tp does, and compilers, which fuse products with sums."""
    variants = {"plain": MODEL | {"train__micro_batch_size": 12}}
    folder = tmp_path_factory.mktemp("in-parts")
    return References(ranks, corpus, folder, variants, splits=(1, 4), feature_parts=(2, 4)).of("plain")


def _assert_same_model(outcome: Outcome, reference: Reference) -> None:
    assert_same_model(outcome, reference)
    assert outcome.grad_norms == pytest.approx(reference.outcome.grad_norms, rel=1e-5)


# (variant, ranks, pp, schedule, zero_stage, micro_batch_size): with 12 sequences, 1 to 12 micro-batches
LAYOUTS = [
    ("masked", 4, 2, "gpipe", 1, 2),
    ("plain", 2, 2, "1f1b", 0, 12),
    ("dropout", 4, 2, "1f1b", 1, 2),
    ("tied", 4, 4, "1f1b", 0, 1),
    ("tied_muon", 4, 2, "1f1b", 1, 1),
    ("dropout", 4, 2, "interleaved_1f1b", 1, 2),
    ("biased", 4, 4, "zero_bubble", 1, 1),
    ("dropout", 2, 2, "zbv", 0, 4),
    ("tied", 4, 4, "zbv", 0, 2),
    ("biased", 4, 4, "dualpipev", 0, 1),
    ("dropout", 4, 2, "1f1b", 2, 2),
    ("biased", 4, 2, "zbv", 3, 2),
    ("dropout", 4, 2, "dualpipev", 2, 1),
    # Micro-batches of 4 and 2 sequences, and of 5, 5 and 2.
    ("dropout", 4, 2, "1f1b", 1, 4),
    ("tied", 4, 2, "zbv", 3, 4),
    ("masked", 2, 2, "interleaved_1f1b", 0, 5),
]


@pytest.mark.some(4)
@pytest.mark.parametrize(("variant", "world_size", "pp", "schedule", "stage", "micro_batch_size"), LAYOUTS)
def test_every_schedule_trains_the_same_model(
    ranks: RankPool,
    references: References,
    tmp_path: Path,
    variant: str,
    world_size: int,
    pp: int,
    schedule: str,
    stage: int,
    micro_batch_size: int,
) -> None:
    """A gradient lost, doubled or mixed up between stages or micro-batches; a tied table that drifts apart."""
    reference = references.of(variant)
    config = changed(
        reference.config,
        tmp_path / "run",
        parallel__zero_stage=stage,
        parallel__pp=pp,
        parallel__pp_schedule=schedule,
        train__micro_batch_size=micro_batch_size,
    )
    _assert_same_model(run_on(ranks, world_size, config), reference)


@pytest.mark.thorough
@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("variant", "schedule", "stage"),
    [("plain", "1f1b", 2), ("tied", "interleaved_1f1b", 3), ("tied", "zbv", 3)],
)  # fmt: skip
def test_replicas_of_sharded_stages_train_the_same_model(
    ranks: RankPool, references: References, tmp_path: Path, variant: str, schedule: str, stage: int
) -> None:
    """Replicas that drift apart, or whose sum forgets what came before the last backward or after it."""
    reference = references.of(variant)
    changes = {"parallel__dp_replicate": 2, "parallel__zero_stage": stage, "train__micro_batch_size": 1}
    config = changed(reference.config, tmp_path / "run", parallel__pp=2, parallel__pp_schedule=schedule, **changes)
    _assert_same_model(run_on(ranks, 8, config), reference)


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("variant", "schedule", "changes"),
    [
        ("dropout", "1f1b", {"model__activation_checkpoint": "full"}),
        ("dropout", "zero_bubble", {"model__activation_checkpoint": "full"}),
        (
            "dropout",
            "zbv",
            {"model__activation_checkpoint": "full", "parallel__zero_stage": 3, "train__micro_batch_size": 2},
        ),
        ("tied", "dualpipev", {"parallel__cpu_offload": True, "parallel__zero_stage": 3, "train__micro_batch_size": 2}),
        ("tied", "1f1b", {"parallel__pp_split": [7, 2]}),
        ("tied", "interleaved_1f1b", {"parallel__pp_split": [1, 3, 2, 1, 1, 1], "parallel__pp_stages_per_rank": 3}),
    ],
)
def test_what_is_applied_to_stages_changes_nothing(
    ranks: RankPool, references: References, tmp_path: Path, variant: str, schedule: str, changes: dict[str, Any]
) -> None:
    """Recomputation of the wrong micro-batch, weight gradients put off twice, a split that forgets a layer."""
    reference = references.of(variant)
    config = changed(
        reference.config,
        tmp_path / "run",
        parallel__pp=2,
        parallel__pp_schedule=schedule,
        **{"parallel__zero_stage": 1, "train__micro_batch_size": 4} | changes,
    )
    world_size = 4 if config.parallel.zero_stage == 3 else 2
    _assert_same_model(run_on(ranks, world_size, config, timeout=240), reference)


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("world_size", "schedule", "changes"),
    [
        (2, "zero_bubble", {}),
        (4, "zbv", {"parallel__tp": 2, "model__activation_checkpoint": "full", "parallel__pp_split": [1, 1, 6, 1]}),
    ],
)
def test_what_lies_between_put_off_layers_is_compiled(
    ranks: RankPool,
    plain_reference: Reference,
    tmp_path: Path,
    world_size: int,
    schedule: str,
    changes: dict[str, Any],
) -> None:
    """A weight gradient that a graph swallows or writes over before W needs it; blocks that quietly run eagerly."""
    changes = {"train__compile": True, "train__compile_backend": "aot_eager", "parallel__zero_stage": 1} | changes
    changes |= {"parallel__pp": 2, "parallel__pp_schedule": schedule, "train__micro_batch_size": 4}
    answers = ranks.run(world_size, run_and_count_graphs, changed(plain_reference.config, tmp_path / "run", **changes))
    _assert_same_model(answers[0][0], plain_reference)
    # Before attention's projections, between these and its output, behind that, between the MLP's two: whatever else.
    assert all(graphs >= 4 for _, graphs in answers)


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_the_comparison_notices_a_broken_pipeline(
    ranks: RankPool, references: References, tmp_path: Path, fault: str
) -> None:
    """Negative control: a collective left out, a weight gradient lost, hidden states of another sequence."""
    reference = references.of("tied")
    schedule = "zero_bubble" if fault == "lost_weight_gradient" else "1f1b"
    config = changed(
        reference.config, tmp_path / "run", parallel__pp=2, parallel__pp_schedule=schedule, train__micro_batch_size=4
    )
    outcome = ranks.run(2, run_broken, config, fault)[0]
    if fault == "norm_of_one_stage":
        assert outcome.grad_norms[0] != pytest.approx(reference.outcome.grad_norms[0], rel=1e-3)
    else:
        assert gradient_deviation(outcome, reference.outcome) > 1e-3


LAYOUT = {"parallel__pp": 2, "parallel__zero_stage": 1, "train__micro_batch_size": 2}


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, {}), (4, LAYOUT | {"parallel__pp_schedule": "zbv"})),
        ((4, LAYOUT), (1, {})),
        ((4, LAYOUT | {"parallel__pp_schedule": "zbv"}), (4, {"parallel__pp": 4})),
    ],
)
def test_a_checkpoint_moves_between_layouts(
    ranks: RankPool,
    references: References,
    tmp_path: Path,
    first: tuple[int, dict[str, Any]],
    second: tuple[int, dict[str, Any]],
) -> None:
    """A stage's tensors that are not saved, saved twice, or refused because another rank has not heard of them."""
    reference = references.of("tied")
    (world_size, changes), (other_world_size, other_changes) = first, second
    run_on(ranks, world_size, changed(reference.config, tmp_path / "first", checkpoint__interval=2, **changes))
    resume = str(tmp_path / "first" / "checkpoints" / "step_2")
    continued = run_on(
        ranks,
        other_world_size,
        changed(reference.config, tmp_path / "second", checkpoint__resume=resume, **other_changes),
    )
    assert continued.losses == pytest.approx(reference.outcome.losses[2:], rel=1e-6)
    assert continued.grad_norms == pytest.approx(reference.outcome.grad_norms[2:], rel=1e-4)


def test_a_pipeline_starts_from_what_a_pipeline_exported(
    ranks: RankPool, references: References, tmp_path: Path
) -> None:
    """A Hugging Face folder that a stage cannot read its part of, or that lacks a stage."""
    reference = references.of("masked")
    config = changed(
        reference.config, tmp_path / "run", checkpoint__at_end=True, **LAYOUT, parallel__pp_schedule="dualpipev"
    )
    run_on(ranks, 4, config)
    ranks.run(1, export_here, tmp_path / "run", tmp_path / "folder")
    start = {"model__family": "hf", "model__path": str(tmp_path / "folder"), "train__steps": 1}
    outcomes = [
        run_on(ranks, n, changed(config, tmp_path / f"from-{n}", checkpoint__at_end=False, **start, **changes))
        for n, changes in ((1, {"parallel__pp": 1, "parallel__pp_schedule": "1f1b"}), (2, {"parallel__zero_stage": 0}))
    ]
    assert outcomes[0].losses[0] < reference.outcome.losses[0]  # it learned
    assert loss_deviation(outcomes[1], outcomes[0]) <= 1e-6
    assert gradient_deviation(outcomes[1], outcomes[0]) <= 1e-5


@pytest.mark.parametrize(("schedule", "micro_batch_size"), [("1f1b", 2), ("zbv", 4)])
def test_validation_and_sample_do_not_depend_on_the_layout(
    ranks: RankPool, references: References, tmp_path: Path, schedule: str, micro_batch_size: int
) -> None:
    """A validation loss of one stage, of one micro-batch, or a sample that ranks draw differently."""
    reference = references.of("tied")
    ask = {"train__eval_interval": 2, "train__eval_batches": 2, "train__sample_tokens": 6}
    layout = LAYOUT | {"parallel__pp_schedule": schedule, "train__micro_batch_size": micro_batch_size}
    plain = ranks.run(1, run_and_answer, changed(reference.config, tmp_path / "plain", **ask))[0]
    piped = ranks.run(4, run_and_answer, changed(reference.config, tmp_path / "piped", **layout, **ask))
    assert all(answer["sample"] == plain["sample"] for answer in piped)
    assert all(answer["validation_loss"] == pytest.approx(plain["validation_loss"], rel=1e-6) for answer in piped)


def test_a_step_sends_each_hidden_state_and_each_gradient_once(
    ranks: RankPool, references: References, tmp_path: Path
) -> None:
    """A message sent twice, or a collective that grows with the micro-batches."""
    reference = references.of("tied")
    config = changed(reference.config, tmp_path / "run", parallel__pp=4, train__micro_batch_size=4, train__steps=1)
    counts = ranks.run(4, count_messages, config)
    ends, between = {"isend": 3, "irecv": 3}, {"isend": 6, "irecv": 6}
    assert [{k: v for k, v in c.items() if k.startswith("i")} for c in counts] == [ends, between, between, ends]
    # Valid tokens and loss over the (one) data rank, loss over the stages, the table that first and last stage share.
    assert [c["all_reduce"] for c in counts] == [4, 3, 3, 4]


def test_a_gather_starts_before_the_wait_for_the_message_and_costs_nothing(
    ranks: RankPool, references: References, tmp_path: Path
) -> None:
    """ZeRO-3 whose gathers wait for messages, are thrown away and done again, or hold more than a layer at a time."""
    reference = references.of("plain")
    changes = {"parallel__pp": 2, "parallel__zero_stage": 3, "train__micro_batch_size": 2}
    config = changed(reference.config, tmp_path / "run", **changes)
    for early, without in ranks.run(4, count_gathers, config):
        assert early.num_gathers == without.num_gathers > 0
        assert early.layers_in_memory == [0] * (2 * 3)  # F and B of three micro-batches
        assert early.started == [True] * (2 * 3)
        assert without.started == [False] * (2 * 3)  # negative control


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_micro_batches_of_different_lengths_train_the_same_model(
    ranks: RankPool, references: References, tmp_path: Path, schedule: str
) -> None:
    """Stages of a model that receive, mask or rotate a micro-batch in the shape of another."""
    changes = {"train__micro_batch_size": 1, "train__steps": 2}
    config = changed(references.of("masked").config, tmp_path / "alone", **changes)
    (alone,) = ranks.run(1, run_with_lengths, config)
    pipeline = {"parallel__pp": 2, "parallel__pp_schedule": schedule}
    outcome = ranks.run(2, run_with_lengths, changed(config, tmp_path / "run", **pipeline))[0]
    assert alone is not None
    assert outcome is not None
    assert loss_deviation(outcome, alone) <= 1e-6
    assert gradient_deviation(outcome, alone) <= 1e-5
    assert alone.losses[0] != pytest.approx(references.of("masked").outcome.losses[0], rel=1e-4)  # of whole sequences


def test_the_trace_shows_plan_and_execution(ranks: RankPool, references: References, tmp_path: Path) -> None:
    """A time line that lacks actions, or shows those of another step."""
    reference = references.of("plain")
    changes = {"parallel__pp": 2, "parallel__pp_schedule": "zero_bubble", "parallel__pp_trace": True}
    changes |= {"train__micro_batch_size": 4, "train__steps": 2, "train__eval_interval": 2}
    run_on(ranks, 2, changed(reference.config, tmp_path / "run", **changes))
    events = json.loads((tmp_path / "run" / "pipeline_trace.json").read_text())["traceEvents"]
    shown = [
        {(e["tid"], e["name"], e["args"]["stage"]) for e in events if e["ph"] == "X" and e["pid"] == process}
        for process in (0, 1)
    ]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 2 * 3 * 3  # ranks, micro-batches, F I W
    assert all(e["dur"] > 0 for e in events if e["ph"] == "X")
    started = [(e["pid"], e["tid"], e["name"]) for e in events if e["ph"] == "i"]
    assert sorted(started) == [(process, rank, f"reduce({rank})") for process in (0, 1) for rank in (0, 1)]
    assert (tmp_path / "run" / "pipeline_timeline.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_had_ended_starts_again_and_keeps_its_trace(
    ranks: RankPool, references: References, tmp_path: Path
) -> None:
    """A restart with nothing left to train that fails because there is nothing new to draw."""
    changes = {"parallel__pp": 2, "parallel__pp_trace": True, "train__micro_batch_size": 6, "train__steps": 1}
    changes |= {"schedule__warmup_steps": 0, "checkpoint__at_end": True}
    config = changed(references.of("plain").config, tmp_path / "run", **changes)
    run_on(ranks, 2, config)
    trace = (tmp_path / "run" / "pipeline_trace.json").read_bytes()
    (first, second) = ranks.run(2, run_and_answer, config)
    assert (first["step"], first["loss"]) == (second["step"], second["loss"]) == (1, None)
    assert (tmp_path / "run" / "pipeline_trace.json").read_bytes() == trace


def test_a_schedule_is_made_once(ranks: RankPool, references: References, tmp_path: Path) -> None:
    """Every step that builds the schedule of all ranks again before it launches anything."""
    changes = {"parallel__pp": 2, "parallel__pp_schedule": "zbv", "train__micro_batch_size": 4}
    config = changed(references.of("plain").config, tmp_path / "run", **changes)
    assert ranks.run(2, count_schedules, config) == [1, 1]


def test_run_json_and_the_start_say_what_is_planned(ranks: RankPool, references: References, tmp_path: Path) -> None:
    """A bubble of equal stages where they are not, of other micro-batches, or of another schedule.

    9 layers in stages of 7 and 2; 12 sequences in micro-batches of 5, 5 and 2. The plan by hand: rank 1 ends its second
    forward at 2 first + last and goes on with the third and a backward; then rank 0 has three backwards left.
    """
    reference = references.of("plain")
    changes = {"parallel__pp": 2, "parallel__pp_split": [7, 2], "parallel__pp_schedule": "gpipe"}
    changes |= {"parallel__zero_stage": 0, "train__micro_batch_size": 5, "train__steps": 1}
    run_on(ranks, 2, changed(reference.config, tmp_path / "run", **changes))
    told = json.loads((tmp_path / "run" / "run.json").read_text())["pipeline"]
    first, last = told.pop("forward_cost_of_stage")
    assert first + last == pytest.approx(2, abs=1e-3)
    assert first > 1.3
    length = 2 * first + last + 0.4 * last + 2 * last + 2 * 2.4 * first
    assert told.pop("bubble") == pytest.approx(1 - 3 * 2.4 * (first + last) / (2 * length), rel=1e-3)
    assert told == {
        "schedule": "gpipe",
        "layers_per_stage": [7, 2],
        "rank_of_stage": [0, 1],
        "num_microbatches": 3,
        "peak_activations": [3, 3],
    }
    start = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert ", pipeline gpipe(7+2), " in start["text"]
    assert start["text"].endswith("% bubble, 3 micro-batches kept")
    assert start["pipeline"]["schedule"] == "gpipe"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"parallel__pp_schedule": "2f2b"},
            "parallel.pp_schedule=2f2b is not a schedule; use parallel.pp_schedule=gpipe",
        ),
        ({"parallel__pp_split": [4, 4]}, "add up to model.num_layers=9; use parallel.pp_split=null or [4,5]"),
        ({"model__num_layers": 3, "parallel__pp_schedule": "zbv"}, "model.num_layers=3 does not fill them"),
        ({"parallel__pp_stages_per_rank": 0}, "parallel.pp_stages_per_rank=0 must be at least 1"),
        (
            {"train__compile": True, "parallel__pp_schedule": "zbv", "model__activation_checkpoint": "selective"},
            "model.activation_checkpoint=selective with train.compile=true picks operations of one graph",
        ),
        ({"parallel__pp": 1, "parallel__pp_split": [9]}, "parallel.pp_split=[9] has no effect with parallel.pp=1"),
        (
            {"parallel__pp": 1, "parallel__pp_schedule": "zbv"},
            "parallel.pp_schedule=zbv has no effect with parallel.pp=1",
        ),
        ({"parallel__pp": 1, "parallel__pp_stages_per_rank": 3}, "parallel.pp_stages_per_rank=3 has no effect with"),
        ({"parallel__pp_stages_per_rank": 1}, "has no effect on parallel.pp_schedule=1f1b, which has 1 on each rank"),
        (
            {"parallel__pp_stages_per_rank": 3, "parallel__pp_schedule": "zbv"},
            "parallel.pp_schedule=zbv, which has 2 on each rank",
        ),
        ({"parallel__pp": 1, "parallel__pp_trace": True}, "has no effect with parallel.pp=1, which has no pipeline"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(
    corpus: DataConfig, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    """A wrong pipeline that is found when process groups exist, or not at all."""
    config = tiny_config(tmp_path, corpus, **(MODEL | {"parallel__pp": 2} | changes))
    with pytest.raises(ConfigError) as raised:
        finalize(config, world_size=2)
    assert any(expected in problem for problem in raised.value.problems), raised.value.problems
