"""Training in fp8: layouts against one process, through the real trainer, and against training without it.

Rounding to fp8 has steps of 6% to 25%, so what deviates is decided by whether two runs quantize the same numbers:

    the same   dp, ZeRO, pp with whole micro-batches: sums of fp32 differ and nothing else. Tolerances of fp32.
    nearly     tp with scales that its ranks agree on: sums over features differ by 1e-7, which moves about one number
               of a million over the edge between two of fp8 (activations are left in fp32 here; bf16 would move one of
               a hundred). One that is moved changes gradients by up to 1e-2, and for most seeds none is: tolerances
               near those of fp32, of one seed in three. Scales of each rank's own miss them with every seed (control).
    others     cp, and tp of rowwise scales: scales of other parts. What that does, one process shows with other
               micro-batches, whose scales are of other parts too; twice their deviation is allowed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from models.mla_config import MLAConfig
from models.moe_config import MoEConfig
from models.mtp_config import MTPConfig
from tests.parity.harness import (
    Outcome,
    changed,
    gradient_deviation,
    loss_deviation,
    run_and_count_graphs,
    run_here,
    run_on,
    text_corpus,
    tiny_config,
)
from tests.parity.interrupted import run_part_on
from tests.parity.on_fp8_ranks import (
    run_with_fp32_activations,
    run_with_scales_of_each_rank,
    run_with_the_slices_of_a_sequence_permuted,
)
from tests.parity.test_resume import assert_same_bits, resumable
from tests.pool import RankPool
from trainer.config import ConfigError, TrainConfig
from trainer.validate import finalize

FP8: dict[str, Any] = {
    "precision__compute": "fp8",
    "model__hidden_size": 32,
    "model__intermediate_size": 64,
    "model__num_heads": 4,
    "model__head_dim": 16,
}
COMPILED = {"train__compile": True, "train__compile_backend": "aot_eager"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("fp8"))


class Runs:
    """Three steps on one process, once per configuration."""

    def __init__(self, ranks: RankPool, corpus: DataConfig, folder: Path) -> None:
        self.ranks, self.corpus, self.folder = ranks, corpus, folder
        self.made: dict[str, Outcome] = {}

    def config(self, name: str, **changes: Any) -> TrainConfig:
        return tiny_config(self.folder / name.replace(" ", "-"), self.corpus, **({"train__steps": 3} | FP8 | changes))

    def one(self, recipe: str, function: Any = run_here, **changes: Any) -> Outcome:
        name = f"{recipe} {function.__name__} {changes}"
        if name not in self.made:
            config = self.config(str(len(self.made)), precision__fp8_recipe=recipe, **changes)
            self.made[name] = self.ranks.run(1, function, config)[0]
        return self.made[name]

    def several(self, folder: Path, recipe: str, function: Any, world_size: int = 2, **changes: Any) -> Outcome:
        config = changed(self.config("x", precision__fp8_recipe=recipe), folder / "run", **changes)
        return self.ranks.run(world_size, function, config)[0]


@pytest.fixture(scope="module")
def runs(ranks: RankPool, corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, corpus, tmp_path_factory.mktemp("one-process"))


def _tp(*, sequence_parallel: bool) -> dict[str, Any]:
    return {"parallel__tp": 2, "parallel__sequence_parallel": sequence_parallel}


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("rowwise", {"parallel__zero_stage": 0}),
        ("rowwise", {"parallel__zero_stage": 3}),
        ("tensorwise_delayed", {"parallel__zero_stage": 1}),
        ("tensorwise_delayed", {"parallel__zero_stage": 2}),
        ("tensorwise_delayed", {"parallel__pp": 2, "parallel__pp_schedule": "1f1b"}),
        ("block128", {"parallel__pp": 2, "parallel__pp_schedule": "gpipe", "parallel__zero_stage": 0}),
    ],
)
def test_whole_micro_batches_are_trained_on_alike(
    runs: Runs, tmp_path: Path, recipe: str, changes: dict[str, Any]
) -> None:
    """Scales or amax of one rank, a weight that is quantized before it has come, a layer with another one's history."""
    reference = runs.one(recipe)
    outcome = runs.several(tmp_path, recipe, run_here, **changes)
    assert loss_deviation(outcome, reference) <= 1e-6
    assert gradient_deviation(outcome, reference) <= 1e-5


def _some_seed_agrees(
    runs: Runs, folder: Path, recipe: str, model: dict[str, Any], function: Any, **layout: Any
) -> bool:
    """Whether for one seed of three the run is that of one process, as closely as in fp32: an error is one for all."""
    for seed in (7, 8, 9):
        changes = model | {"train__seed": seed}
        reference = runs.one(recipe, run_with_fp32_activations, **changes)
        outcome = runs.several(folder / str(seed), recipe, function, **changes, **layout)
        if loss_deviation(outcome, reference) <= 1e-6 and gradient_deviation(outcome, reference) <= 1e-4:
            return True
    return False


@pytest.mark.some(2)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise_dynamic", "tensorwise_delayed"])
def test_tensor_parallel_ranks_quantize_the_numbers_of_one_process(
    runs: Runs, tmp_path: Path, recipe: str, sequence_parallel: bool
) -> None:
    """A scale of a rank's own shard."""
    layout = _tp(sequence_parallel=sequence_parallel)
    assert _some_seed_agrees(runs, tmp_path, recipe, {}, run_with_fp32_activations, **layout)


@pytest.mark.exhaustive
def test_ranks_that_share_keys_have_the_scales_of_one_process(runs: Runs, tmp_path: Path) -> None:
    """Four ranks, two heads of keys: scales of q, k and v by themselves, where one process has one of all three; or
    three histories of delayed scaling for one. Gradients of shared keys are summands, and rounded as such: the forward
    pass is what is the same."""
    function, recipe = run_with_fp32_activations, "tensorwise_delayed"
    layout = {**_tp(sequence_parallel=True), "parallel__tp": 4}
    outcome, reference = runs.several(tmp_path, recipe, function, 4, **layout), runs.one(recipe, function)
    assert outcome.losses[0] == pytest.approx(reference.losses[0], rel=1e-6)
    assert loss_deviation(outcome, reference) <= 2e-4


LATENT = {
    "model__family": "deepseek_v3",
    "model__mla": MLAConfig(kv_rank=16, q_rank=32, nope_dim=16, rope_dim=16, value_dim=16),
    "model__num_kv_heads": None,
    "model__head_dim": None,
    "model__mtp": MTPConfig(depth=1),
}
EXPERTS = {"model__moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=32, num_shared=1)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", [LATENT, EXPERTS], ids=["latent+mtp", "experts"])
def test_other_blocks_quantize_the_numbers_of_one_process(runs: Runs, tmp_path: Path, model: dict[str, Any]) -> None:
    """Projections that are whole on every rank and see some tokens; shared experts, whose input has been gathered."""
    layout = _tp(sequence_parallel=True)
    assert _some_seed_agrees(runs, tmp_path, "tensorwise_delayed", model, run_with_fp32_activations, **layout)


@pytest.mark.thorough
def test_ranks_that_agree_on_no_scale_are_noticed(runs: Runs, tmp_path: Path) -> None:
    """Negative control."""
    layout = _tp(sequence_parallel=False)
    assert not _some_seed_agrees(runs, tmp_path, "tensorwise_dynamic", {}, run_with_scales_of_each_rank, **layout)


def _sensitivity(runs: Runs, recipe: str) -> float:
    """What other micro-batches, and so scales of other tokens, do to the gradients of one process."""
    others = [runs.one(recipe, train__micro_batch_size=size) for size in (2, 8)]
    return max(gradient_deviation(other, runs.one(recipe)) for other in others)


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, _tp(sequence_parallel=True)),
        (2, {"parallel__cp": 2}),
        (4, {"parallel__cp": 2, "parallel__zero_stage": 3, **_tp(sequence_parallel=True)}),
    ],
    ids=["tp2+sp", "cp2", "cp2-tp2+sp-zero3"],
)
def test_scales_of_other_parts_do_what_other_micro_batches_do(
    runs: Runs, tmp_path: Path, world_size: int, changes: dict[str, Any]
) -> None:
    """Tokens or gradients of the wrong rank."""
    outcome = runs.several(tmp_path, "rowwise", run_here, world_size, **changes)
    assert loss_deviation(outcome, runs.one("rowwise")) <= 1e-3
    assert gradient_deviation(outcome, runs.one("rowwise")) <= 2 * _sensitivity(runs, "rowwise")


def test_permuted_tokens_are_more_than_other_micro_batches(runs: Runs, tmp_path: Path) -> None:
    """Negative control."""
    outcome = runs.several(
        tmp_path, "rowwise", run_with_the_slices_of_a_sequence_permuted, **_tp(sequence_parallel=True)
    )
    assert gradient_deviation(outcome, runs.one("rowwise")) > 4 * _sensitivity(runs, "rowwise")


@pytest.mark.thorough
def test_compiled_tensor_parallel_blocks_train_the_same_model(runs: Runs, tmp_path: Path) -> None:
    """A collective for a scale that a graph drops."""
    changes = COMPILED | _tp(sequence_parallel=True)
    assert _some_seed_agrees(runs, tmp_path, "tensorwise_dynamic", {}, run_with_fp32_activations, **changes)


FUSED = {"precision__fp8_fused": True}


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("tensorwise_delayed", {"parallel__zero_stage": 3}),
        ("tensorwise_delayed", {"parallel__pp": 2, "parallel__pp_schedule": "1f1b"}),
        ("rowwise", {"parallel__zero_stage": 2}),
    ],
)
def test_layouts_train_alike_where_norms_and_swiglu_write_fp8(
    runs: Runs, tmp_path: Path, recipe: str, changes: dict[str, Any]
) -> None:
    """A norm's weight that is read before it has come, or an amax of one rank."""
    reference = runs.one(recipe, **FUSED)
    outcome = runs.several(tmp_path, recipe, run_here, **changes, **FUSED)
    assert loss_deviation(outcome, reference) <= 1e-6
    assert gradient_deviation(outcome, reference) <= 1e-5


@pytest.mark.some(1)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_norms_and_swiglu_write_the_numbers_of_one_process(
    runs: Runs, tmp_path: Path, sequence_parallel: bool
) -> None:
    """The gradient of a norm's input, which is a sum over ranks, taken before that sum; a norm that writes this rank's
    tokens where all are multiplied."""
    layout, function = _tp(sequence_parallel=sequence_parallel), run_with_fp32_activations
    assert _some_seed_agrees(runs, tmp_path, "tensorwise_delayed", FUSED, function, **layout)


@pytest.mark.some(1)
@pytest.mark.parametrize("recipe", ["tensorwise_delayed", "rowwise"])
def test_norms_and_swiglu_that_write_fp8_train_the_model_of_layers_that_quantize(runs: Runs, recipe: str) -> None:
    """What differs is the order of sums in norms, and which numbers that moves over an edge between two of fp8."""
    for seed in (7, 8, 9):
        ours, plain = (
            runs.one(recipe, run_with_fp32_activations, train__seed=seed, precision__fp8_fused=fused)
            for fused in (True, False)
        )
        if loss_deviation(ours, plain) <= 1e-6 and gradient_deviation(ours, plain) <= 1e-4:
            return
    pytest.fail("for no seed of three")


@pytest.mark.some(3)
@pytest.mark.parametrize("fused", [False, True], ids=["by layers", "by producers"])
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("tensorwise_delayed", {"model__activation_checkpoint": "full"}),
        ("tensorwise_delayed", {"model__activation_checkpoint": "selective"}),
        ("rowwise", {"model__activation_checkpoint": "offload"}),
        ("tensorwise_delayed", COMPILED),
        ("rowwise", COMPILED | {"model__activation_checkpoint": "full"}),
    ],
    ids=["full", "selective", "offload", "compiled", "compiled-full"],
)
def test_recomputed_and_compiled_blocks_train_the_same_model(
    runs: Runs, recipe: str, changes: dict[str, Any], fused: bool
) -> None:
    """An amax that is recorded in a graph once and for all, or scales that moved before the forward is run again; a
    producer's stand-in without memory that is read, or offloaded as if it had some."""
    fused_too = FUSED if fused else {}
    reference, outcome = runs.one(recipe, **fused_too), runs.one(recipe, **fused_too, **changes)
    assert loss_deviation(outcome, reference) <= 1e-6
    assert gradient_deviation(outcome, reference) <= 1e-5


@pytest.mark.some(1)
@pytest.mark.parametrize("recipe", ["tensorwise_delayed", "tensorwise_dynamic"])
def test_layers_of_one_kind_share_their_graphs(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, recipe: str
) -> None:
    """A graph for each layer, whose number or scales are constants in it: 32 layers would compile for minutes."""
    changes = FP8 | COMPILED | FUSED | {"precision__fp8_recipe": recipe, "model__num_layers": 3}
    changes["precision__fp8_fused"] = recipe == "tensorwise_delayed"
    config = tiny_config(tmp_path / "run", corpus, **changes, train__steps=3, train__eval_interval=0)
    ((_, graphs),) = ranks.run(1, run_and_count_graphs, config)
    assert graphs == (2 if recipe == "tensorwise_delayed" else 1)  # a run's first step finds its own scales


@pytest.mark.some(2)
@pytest.mark.parametrize("recipe", ["tensorwise_dynamic", "tensorwise_delayed", "rowwise", "block128"])
def test_the_loss_falls_as_in_fp32(runs: Runs, recipe: str) -> None:
    """A recipe that learns slower: forty steps, of which the last ten are within 2% of fp32's."""
    exact = runs.one("tensorwise_dynamic", train__steps=40, train__micro_batch_size=8, precision__compute="fp32").losses
    losses = runs.one(recipe, train__steps=40, train__micro_batch_size=8).losses
    assert sum(exact[-10:]) < 0.75 * 10 * exact[0]
    assert sum(losses[-10:]) == pytest.approx(sum(exact[-10:]), rel=0.02)
    assert losses[0] != exact[0]  # nothing was quantized


@pytest.mark.thorough
def test_delayed_scaling_continues_bitwise(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """Scales of 1, or of one step, after a resume."""
    delayed = FP8 | {"precision__fp8_recipe": "tensorwise_delayed", "parallel__zero_stage": 1}
    config = resumable(tmp_path / "whole", corpus, **delayed)
    reference = run_part_on(ranks, 2, config)
    stopped = changed(config, tmp_path / "stopped")
    run_part_on(ranks, 2, stopped, crash_before=8)
    continued = run_part_on(ranks, 2, stopped)
    assert continued.resumed_from == "step_5"
    assert_same_bits(continued, reference)
    assert {"fp8/history", "fp8/scale"} <= reference.state_at_end.keys()
    assert (reference.state_at_end["fp8/history"][:12] > 0).all()  # of every layer and step
    assert not reference.state_at_end["fp8/history"][12:].any()


def test_the_run_says_what_is_in_fp8(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """bf16 experts in a run that is said to be in fp8."""
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=32, num_shared=1)
    config = tiny_config(
        tmp_path / "run", corpus, **FP8, train__steps=3, model__moe=moe, precision__fp8_skip=["blocks.0."]
    )
    outcome = run_on(ranks, 1, config)
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert said["kernels"]["linear"] == "fp8, tensorwise_dynamic, gradients e5m2, 4 layers"
    assert said["kernels"]["fp8_inputs"] == "quantized by the layers"
    assert said["kernels"]["experts"].endswith(", bf16")
    assert said["precision"]["compute"] == "fp8"
    assert outcome.losses[0] > 0


def test_the_run_says_what_writes_fp8(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """A path that is asked for and silently not taken."""
    layout = _tp(sequence_parallel=True) | {"precision__fp8_recipe": "tensorwise_delayed"}
    config = tiny_config(tmp_path / "run", corpus, **FP8, **layout, **FUSED, train__steps=3)
    run_on(ranks, 2, config)
    said = json.loads((tmp_path / "run" / "run.json").read_text())["kernels"]["fp8_inputs"]
    layers = config.model.num_layers
    assert said == (
        f"written by 0 norms and {layers} activations; not by {2 * layers} (norm: parallel.sequence_parallel=true "
        "gathers what it makes)"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"precision__fp8_fused": True},
            "fp8_fused=true does not work with precision.fp8_recipe=tensorwise_dynamic, whose scales are found in what "
            "norms and SwiGLU have written; use precision.fp8_recipe=tensorwise_delayed or rowwise, or",
        ),
        ({"parallel__pp": 2, "parallel__pp_schedule": "zero_bubble"}, "use parallel.pp_schedule=gpipe or 1f1b, or"),
        (
            {"model__intermediate_size": 50},
            "blocks.0.mlp.gate has 50 features out by 32 in; use 48 or 64 for 50, or precision.fp8_skip=[mlp.gate_up]",
        ),
        (
            {"model__intermediate_size": 48, "parallel__tp": 2},
            "24 by 32 on each of parallel.tp=2 ranks; use 32 or 64 for 48",
        ),
        ({"precision__fp8_skip": ["attn"]}, "precision.fp8_skip=attn is in the name of no linear layer; they are atte"),
        ({"precision__fp8_skip": ["blocks"]}, "leaves no layer in fp8"),
        ({"precision__master": "fp16"}, "precision.master=fp16 must be fp32 or that of precision.compute (bf16)"),
    ],
)
def test_what_does_not_run_is_refused(corpus: DataConfig, changes: dict[str, Any], says: str) -> None:
    """A traceback from a matrix product, on every rank."""
    with pytest.raises(ConfigError) as error:
        finalize(tiny_config(Path("unused"), corpus, **(FP8 | changes)), world_size=4)
    assert says in error.value.problems[0]


def test_layers_whose_sizes_do_not_fit_can_be_left_out(corpus: DataConfig) -> None:
    """Negative control: the fix that is offered."""
    changes = FP8 | {"model__intermediate_size": 50, "precision__fp8_skip": ["mlp"]}
    assert finalize(tiny_config(Path("unused"), corpus, **changes), world_size=4)
