"""The trainer when numbers are not finite, when it validates and when it samples, on every ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import trainer.passes as passes_module
from data.config import DataConfig
from tests.parity.harness import changed, run_on, text_corpus, tiny_config
from tests.parity.interrupted import whole_state
from tests.pool import RankPool
from trainer.config import TrainConfig
from trainer.gradients import local_shard_of
from trainer.trainer import Trainer, TrainingDiverged
from trainer.validate import finalize

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("trainer"))


# ---- loss or gradients that are not finite


@dataclass
class Faulty:
    """A run into which faults were planted. Filled by `run_with_faults`, on every rank."""

    diverged: str | None = None  # message of TrainingDiverged
    lines: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    unchanged: list[int] = field(default_factory=list)  # steps that left weights and moments bit for bit as they were


def run_with_faults(config: TrainConfig, plant: Callable[[Trainer, int], None], steps: list[int]) -> Faulty:
    """Train; `plant` is called on the last rank only, before each of these steps."""
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    result = Faulty()
    launch = trainer._launch_step
    real_loss = passes_module.forward_loss_sum
    real_finish = trainer.state.data_parallel.finish_backward

    def watched() -> None:
        step = trainer.state.step + 1
        if step in steps and dist.get_rank() == dist.get_world_size() - 1:
            plant(trainer, step)
        before = {n: t for n, t in whole_state(trainer).items() if not n.startswith("loss_scale/")}
        launch()
        after = whole_state(trainer)
        if all(torch.equal(after[name].nan_to_num(7.0), t.nan_to_num(7.0)) for name, t in before.items()):
            result.unchanged.append(step)
        passes_module.forward_loss_sum = real_loss
        trainer.state.data_parallel.finish_backward = real_finish  # type: ignore[method-assign]

    trainer._launch_step = watched  # type: ignore[method-assign]
    try:
        trainer.run()
    except TrainingDiverged as error:
        result.diverged = str(error)
    finally:
        passes_module.forward_loss_sum = real_loss
        trainer.close()
    dist.barrier()  # rank 0 has written the last line
    run_dir = Path(config.run.dir)
    result.lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    result.events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return result


def infinite_loss(trainer: Trainer, step: int) -> None:
    """This rank's loss overflows in the forward."""
    real = passes_module.forward_loss_sum
    passes_module.forward_loss_sum = lambda state, batch, **rest: real(state, batch, **rest) * float("inf")


def infinite_gradient(trainer: Trainer, step: int) -> None:
    """One element of one gradient overflows: the loss is finite."""
    parallel = trainer.state.data_parallel
    real = parallel.finish_backward

    def finish() -> None:
        real()
        held = [m.grad for m in parallel.masters.values() if m.grad is not None and local_shard_of(m.grad).numel()]
        local_shard_of(held[-1]).view(-1)[-1] = float("inf")

    parallel.finish_backward = finish  # type: ignore[method-assign]


def nan_weight(trainer: Trainer, step: int) -> None:
    """A weight that is NaN from now on, as after an update that went wrong."""
    held = [m for m in trainer.state.data_parallel.masters.values() if local_shard_of(m).numel()]
    local_shard_of(held[-1]).detach().view(-1)[-1] = float("nan")
    trainer.state.data_parallel.publish()


def short(tmp_path: Path, corpus: DataConfig, **changes: Any) -> TrainConfig:
    return tiny_config(tmp_path / "run", corpus, **({"train__steps": 6} | changes))


def skipped_of(result: Faulty) -> list[int]:
    return [event["step"] for event in result.events if event["kind"] == "skipped_step"]


# At stage 0 gradients are the same on all ranks: one rank alone cannot have another.
@pytest.mark.some(3)
@pytest.mark.parametrize(
    ("plant", "stage"), [*((infinite_loss, stage) for stage in STAGES), *((infinite_gradient, s) for s in STAGES[1:])]
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, plant: Callable[[Trainer, int], None], stage: int
) -> None:
    """Ranks that disagree and drift apart; moments, or the step count, that a skipped step changes."""
    config = short(tmp_path, corpus, parallel__zero_stage=stage)
    for result in ranks.run(2, run_with_faults, config, plant, [3]):
        assert result.diverged is None
        assert result.unchanged == [3]
    assert skipped_of(result) == [3]
    assert [line["skipped_steps"] for line in result.lines] == [0, 0, 1, 1, 1, 1]
    assert [line.get("nonfinite", False) for line in result.lines] == [False, False, True, False, False, False]
    assert (result.lines[2]["loss"] is None) == (plant is infinite_loss)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_stays_not_finite_ends_after_the_steps_it_is_given(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, stage: int
) -> None:
    """Weeks of steps that change nothing; skipped steps that are counted although there were good ones between."""
    config = short(tmp_path, corpus, parallel__zero_stage=stage, train__max_skipped_steps=2, train__steps=9)

    def ends(plant: Callable[[Trainer, int], None], steps: list[int]) -> list[Faulty]:
        name = f"{plant.__name__}-{len(steps)}"
        return ranks.run(2, run_with_faults, changed(config, tmp_path / name), plant, steps)

    for result in ends(nan_weight, [3]):
        assert result.diverged is not None
        assert "2 in a row (train.max_skipped_steps=2)" in result.diverged
        assert [line["step"] for line in result.lines] == [1, 2, 3, 4]
    for result in ends(infinite_loss, [2, 4, 6]):  # negative control: never two in a row
        assert result.diverged is None
        assert result.lines[-1]["skipped_steps"] == 3


def test_a_run_stops_at_once_if_it_is_told_to(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """train.nonfinite=stop that stops one rank only, or saves the state it stops at."""
    config = short(tmp_path, corpus, train__nonfinite="stop", checkpoint__interval=3)
    for result in ranks.run(2, run_with_faults, config, infinite_loss, [3]):
        assert result.diverged is not None
        assert "step 3: loss inf" in result.diverged or "step 3: loss nan" in result.diverged
        assert "train.nonfinite=stop" in result.diverged
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.some(1)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_overflow_in_fp16_halves_the_scale_and_is_no_fault(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, stage: int
) -> None:
    """A scale that is applied to the loss but not taken out of the gradients, or that grows and shrinks on its own."""
    fp16: dict[str, Any] = {"precision__compute": "fp16", "precision__loss_scale": 256.0}
    config = short(
        tmp_path,
        corpus,
        train__steps=9,
        train__nonfinite="stop",
        parallel__zero_stage=stage,
        precision__loss_scale_growth_interval=3,
        **fp16,
    )
    for result in ranks.run(2, run_with_faults, config, infinite_loss, [3]):
        assert result.diverged is None
        assert result.unchanged == [3]
    # The scale of a step is the one its loss was multiplied by, so each change shows in the line after it.
    assert [line["loss_scale"] for line in result.lines] == [256, 256, 256, 128, 128, 128, 256, 256, 256]
    assert [line["skipped_steps"] for line in result.lines] == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert skipped_of(result) == [3]
    # Whatever the scale, loss and gradient norm are those of the unscaled run, to the precision of fp16.
    other = run_on(ranks, 2, changed(config, tmp_path / "other", precision__loss_scale=4096.0))
    for line, loss, norm in list(zip(result.lines, other.losses, other.grad_norms, strict=True))[:2]:
        assert line["loss"] == pytest.approx(loss, rel=1e-3)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize(("before", "after", "scale"), [("bf16", "fp16", 256.0), ("fp16", "bf16", 1.0)])
def test_a_run_that_changes_its_precision_begins_with_a_scale_of_its_own(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path, before: str, after: str, scale: float
) -> None:
    """The 1.0 of a bf16 checkpoint under fp16: gradients underflow for thousands of steps, and nothing says so."""
    config = short(tmp_path, corpus, train__steps=4, checkpoint__at_end=True, precision__loss_scale=256.0)
    run_on(ranks, 1, changed(config, tmp_path / "run", precision__compute=before))
    seen = ranks.run(1, first_scale, changed(config, tmp_path / "run", precision__compute=after, train__steps=5))[0]
    assert seen == scale


def first_scale(config: TrainConfig) -> float:
    """The loss scale a start begins with."""
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    try:
        return trainer.state.loss_scale.scale.item()
    finally:
        trainer.close()


# ---- validation and sampling


def test_validation_does_not_disturb_training(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """A validation that draws from the training's random stream, moves its cursor, or leaves the model in eval mode."""
    for stage, changes in ((1, {"precision__compute": "bf16"}), (2, {}), (3, {"data__mask_documents": True})):
        config = tiny_config(
            tmp_path / f"{stage}", corpus, train__steps=7, model__dropout=0.1, parallel__zero_stage=stage, **changes
        )
        without = run_on(ranks, 2, config)
        validated = run_on(
            ranks, 2, changed(config, tmp_path / f"{stage}v", train__eval_interval=2, train__eval_batches=3)
        )
        assert [line["step"] for line in validated.metrics if "validation_loss" in line] == [2, 4, 6, 7]
        assert validated.losses == without.losses
        assert validated.grad_norms == without.grad_norms
        assert all(torch.equal(validated.weights[n], w) for n, w in without.weights.items())


def sample_here(config: TrainConfig) -> tuple[str | None, bool]:
    """Train and sample; the sample, and whether the model trains again afterwards."""
    trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
    try:
        return trainer.run()["sample"], trainer.state.model.training
    finally:
        trainer.close()


def test_every_layout_samples_the_same_text_on_every_rank(ranks: RankPool, corpus: DataConfig, tmp_path: Path) -> None:
    """Ranks that draw different tokens and then wait for each other; stale weights; dropout that is left on."""
    sampling = {"train__sample_tokens": 20, "train__sample_prompt": "rank"}
    config = tiny_config(tmp_path / "run", corpus, train__steps=4, model__num_layers=1, model__dropout=0.2, **sampling)
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {}),
        **{f"stage{stage}": (2, {"parallel__zero_stage": stage}) for stage in STAGES},
        "hsdp": (4, {"parallel__zero_stage": 3, "parallel__dp_replicate": 2}),
        "compiled": (
            2,
            {"parallel__zero_stage": 3, "train__compile": True, "train__compile_backend": "aot_eager"},
        ),
    }
    samples = set()
    for name, (world_size, changes) in layouts.items():
        for sample, training in ranks.run(world_size, sample_here, changed(config, tmp_path / name, **changes)):
            assert training
            samples.add(sample)
    (sample,) = samples
    assert sample is not None
    assert sample.startswith("rank")
    assert len(sample) > len("rank") + 10


def test_a_prompt_longer_than_the_window_and_an_empty_one_are_continued(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """An index beyond the window, an empty window."""
    for prompt in ("shard mesh " * 40, ""):
        config = tiny_config(
            tmp_path / f"{len(prompt)}", corpus, train__steps=1, schedule__warmup_steps=0, train__sample_tokens=5,
            train__sample_prompt=prompt,
        )  # fmt: skip
        ((sample, _),) = ranks.run(1, sample_here, config)
        assert sample is not None
        assert sample.startswith(prompt)
        assert len(sample) > len(prompt)


def _waits_of(config: TrainConfig) -> list[float]:
    """data_wait_seconds by a clock that batches move on by a second, and what a recipe computes of them by ten."""
    trainer = Trainer(finalize(config, world_size=1))
    clock = [0.0]

    def after(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            clock[0] += seconds
            return call(*args)

        return called

    trainer.recipe.collect = after(1.0, trainer.recipe.collect)  # type: ignore[method-assign]
    trainer.recipe.prepare = after(10.0, trainer.recipe.prepare)  # type: ignore[method-assign]
    with mock.patch("trainer.trainer.time", SimpleNamespace(perf_counter=lambda: clock[0])):
        trainer.run()
    trainer.close()
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["data_wait_seconds"] for line in lines]


def test_what_a_recipe_computes_of_its_batches_is_no_wait_for_data(
    ranks: RankPool, corpus: DataConfig, tmp_path: Path
) -> None:
    """The forward of a reference model, by which a third of a step seemed to wait for data."""
    assert ranks.run(1, _waits_of, short(tmp_path, corpus, train__steps=3))[0] == [1.0] * 3
