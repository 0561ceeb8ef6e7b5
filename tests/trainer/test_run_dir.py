"""Which starts continue a run, which begin one, and which are refused because they would overwrite one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import trainer.run_dir as run_dir_module
from data.config import DataConfig
from data.tokenizer import load_tokenizer
from tests.parity.harness import changed, text_corpus, tiny_config
from tests.parity.interrupted import run_part_on
from tests.pool import RankPool
from tests.trainer.starts import Start, contents, start_on
from trainer.config import TrainConfig
from trainer.trainer import Trainer
from trainer.validate import finalize


def verified_over_the_patient_group(config: TrainConfig) -> bool:
    """Whether a start looks for its checkpoint over the group that the checkpoints are written with."""
    groups = []
    original = run_dir_module.resolve_resume

    def watch(resume: str, directory: Path, *, group: dist.ProcessGroup | None = None) -> Path | None:
        groups.append(group)
        return original(resume, directory, group=group)

    run_dir_module.resolve_resume = watch
    try:
        trainer = Trainer(finalize(config, world_size=dist.get_world_size()))
        patient = trainer.checkpoints.group
        trainer.close()
    finally:
        run_dir_module.resolve_resume = original
    return bool(groups) and all(group is patient for group in groups) and patient is not dist.group.WORLD


def test_large_checkpoints_are_verified_with_patience(ranks: RankPool, config: TrainConfig) -> None:
    """Ranks that wait for the one with the largest file, longer than train.timeout_seconds, and end the run."""
    assert all(ranks.run(2, verified_over_the_patient_group, config))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return text_corpus(tmp_path_factory.mktemp("starts"))


@pytest.fixture
def config(tmp_path: Path, corpus: DataConfig) -> TrainConfig:
    """Six steps, saved after every second."""
    return tiny_config(tmp_path / "run", corpus, train__steps=6, checkpoint__interval=2)


def steps_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_refused(ranks: RankPool, config: TrainConfig, *says: str, world_size: int = 2) -> None:
    """Starting is a ConfigError that says all this, on every rank, and leaves run.dir exactly as it was."""
    run_dir = Path(config.run.dir)
    before = contents(run_dir)
    existed = run_dir.exists()
    start = start_on(ranks, world_size, config)
    assert start.error == "ConfigError", start
    for words in says:
        assert words in start.message
    assert "\n" not in start.message
    assert run_dir.exists() == existed
    assert contents(run_dir) == before


def assert_ran(start: Start, *, resumed_from: Path | None, to: int = 6) -> None:
    assert start.error is None, start.message
    assert start.resumed_from == (None if resumed_from is None else str(resumed_from))
    assert start.last_step == to


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    ranks: RankPool, config: TrainConfig, tmp_path: Path
) -> None:
    """Training on from flipped bits, or beginning anew because of them."""
    reference = run_part_on(ranks, 2, changed(config, tmp_path / "whole"))
    assert_ran(start_on(ranks, 2, changed(config, tmp_path / "run", train__steps=5)), resumed_from=None, to=5)
    victim = next((tmp_path / "run" / "checkpoints" / "step_4").glob("*.distcp"))
    flipped = bytearray(victim.read_bytes())
    flipped[len(flipped) // 2] ^= 4
    victim.write_bytes(flipped)
    start = start_on(ranks, 2, config)
    assert_ran(start, resumed_from=tmp_path / "run" / "checkpoints" / "step_2")
    assert any("step_4 is damaged and not used" in text and victim.name in text for text in start.warnings)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # The first part ran under a schedule of five steps, so only what the checkpoint before it brought is compared.
    assert [line["loss"] for line in lines[:2]] == reference.of("loss")[:2]


def test_a_checkpoint_of_another_model_is_refused_with_the_fields(ranks: RankPool, config: TrainConfig) -> None:
    """Weights loaded into places where they mean something else, or an error about tensor names."""
    start_on(ranks, 1, config)
    other = changed(config, Path(config.run.dir), model__num_kv_heads=3, model__tie_embeddings=True, train__steps=8)
    assert_refused(
        ranks, other, "is of another model", "model.num_kv_heads=3 (checkpoint: 2)", "model.tie_embeddings=True"
    )
    # Negative control: what does not change the meaning of a weight may change.
    dropout = changed(config, Path(config.run.dir), model__dropout=0.2, train__steps=8)
    assert_ran(start_on(ranks, 2, dropout), resumed_from=Path(config.run.dir) / "checkpoints" / "step_6", to=8)


def test_a_checkpoint_of_other_data_is_refused(ranks: RankPool, config: TrainConfig) -> None:
    """A cursor that points into other data: samples repeated and skipped without a word."""
    start_on(ranks, 1, config)
    other = changed(config, Path(config.run.dir), train__seq_len=16, train__steps=8)
    assert_refused(ranks, other, "seq_len was 24 and is 16")


def test_never_resuming_in_a_directory_with_a_run_is_refused(ranks: RankPool, config: TrainConfig) -> None:
    """A run of weeks overwritten by a test; leftovers of a run that is still writing cleared away."""
    start_on(ranks, 1, config)
    run_dir = Path(config.run.dir)
    (run_dir / "checkpoints" / ".step_8.tmp").mkdir()  # what another process is just writing
    never = changed(config, run_dir, checkpoint__resume="never")
    assert_refused(ranks, never, f"run.dir={run_dir} already holds a run", "choose another run.dir")
    (run_dir / "metrics.jsonl").unlink()
    assert_refused(ranks, never, "already holds a run")  # its checkpoints would be overwritten


def test_a_restart_without_a_checkpoint_keeps_the_metrics_of_the_attempt_before(
    ranks: RankPool, config: TrainConfig
) -> None:
    """A crash before the first checkpoint that makes every restart fail, or loses what was logged."""
    run_dir = Path(config.run.dir)
    for attempt in (1, 2):
        assert run_part_on(ranks, 2, config, crash_before=2).ended == "crashed"
        assert attempt == 1 or (run_dir / "metrics.attempt1.jsonl").exists()
    assert_ran(start_on(ranks, 2, config), resumed_from=None)
    assert steps_of(run_dir) == [1, 2, 3, 4, 5, 6]
    for kept in ("metrics.attempt1.jsonl", "metrics.attempt2.jsonl"):
        assert json.loads((run_dir / kept).read_text())["step"] == 1


def test_another_configuration_does_not_take_over_a_run_without_a_checkpoint(
    ranks: RankPool, config: TrainConfig
) -> None:
    """A second experiment in the directory of the first, whose metrics then are those of neither."""
    assert run_part_on(ranks, 2, config, crash_before=2).ended == "crashed"
    other = changed(config, Path(config.run.dir), optim__lr=1e-4)
    assert_refused(ranks, other, "already holds a run of another configuration", "choose another run.dir")


def test_a_run_that_begins_from_the_checkpoint_of_another_survives_crashes(
    ranks: RankPool, config: TrainConfig, tmp_path: Path
) -> None:
    """A restart that goes back to where the run began, for ever; or that refuses its own metrics."""
    start_on(ranks, 1, config)
    theirs = tmp_path / "run" / "checkpoints" / "step_2"
    branch = changed(config, tmp_path / "branch", checkpoint__resume=str(theirs), optim__lr=1e-4)
    for crash_before, resumed_from in ((4, "step_2"), (6, "step_2")):
        crashed = run_part_on(ranks, 2, branch, crash_before=crash_before)
        assert crashed.of("step") == list(range(3, crash_before))
        assert crashed.resumed_from == resumed_from
    own = tmp_path / "branch" / "checkpoints" / "step_4"
    assert_ran(start_on(ranks, 2, branch), resumed_from=own)
    assert steps_of(tmp_path / "branch") == [3, 4, 5, 6]
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]  # where it came from is as it was


def test_a_checkpoint_from_elsewhere_does_not_overwrite_the_run_that_is_there(
    ranks: RankPool, config: TrainConfig, tmp_path: Path
) -> None:
    """A forgotten run.dir: the metrics of the run in it cut off at the step of the other's checkpoint."""
    start_on(ranks, 1, config)
    start_on(ranks, 1, changed(config, tmp_path / "other", train__seed=8))
    theirs = str(tmp_path / "other" / "checkpoints" / "step_2")
    assert_refused(
        ranks,
        changed(config, tmp_path / "run", checkpoint__resume=theirs),
        f"did not begin from checkpoint.resume={theirs}",
        "choose another run.dir",
    )


def test_fewer_steps_than_are_done_is_refused_and_a_finished_run_is_done(ranks: RankPool, config: TrainConfig) -> None:
    """A run that says "done: step 6" to train.steps=4, as if it had done what was asked."""
    assert_ran(start_on(ranks, 2, config), resumed_from=None)
    steps = steps_of(Path(config.run.dir))
    assert_refused(
        ranks, changed(config, Path(config.run.dir), train__steps=4), "train.steps=4 is less than the 6 steps"
    )
    start = start_on(ranks, 2, config)
    assert (start.error, start.last_step, steps_of(Path(config.run.dir))) == (None, 6, steps)


def test_stepping_back_needs_a_run_of_its_own(ranks: RankPool, config: TrainConfig, tmp_path: Path) -> None:
    """A later restart that takes the newest checkpoint, of the history that was given up."""
    start_on(ranks, 1, config)
    saved = tmp_path / "run" / "checkpoints"
    back: dict[str, Any] = {"checkpoint__resume": str(saved / "step_2"), "optim__lr": 1e-4}
    assert_refused(ranks, changed(config, tmp_path / "run", **back), "goes on to step_6", "choose another run.dir")
    assert_ran(start_on(ranks, 1, changed(config, tmp_path / "branch", **back)), resumed_from=saved / "step_2")
    newest = changed(config, tmp_path / "run", checkpoint__resume=str(saved / "step_6"), train__steps=8)
    assert_ran(start_on(ranks, 1, newest), resumed_from=saved / "step_6", to=8)


def test_tokens_keep_counting_when_the_batch_changes(ranks: RankPool, config: TrainConfig) -> None:
    """Tokens as step times batch: a run continued with a larger batch claims tokens it never saw."""
    start_on(ranks, 1, config)
    larger = changed(config, Path(config.run.dir), train__global_batch_size=16, train__steps=8)
    part = run_part_on(ranks, 2, larger)
    assert part.of("tokens")[-3:] == [6 * 8 * 24, 6 * 8 * 24 + 16 * 24, 6 * 8 * 24 + 2 * 16 * 24]
    assert [sample for sample, _, _ in part.rows[7]] == list(range(48, 64))  # nothing repeated, nothing left out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__vocab_size": 100}, "model.vocab_size=100 is smaller than the tokenizer's 300"),
        ({"train__device": "cuda"}, "torch sees no CUDA device"),
        ({"train__seq_len": 50_000, "model__max_seq_len": 50_000}, "use more data, or a smaller train.seq_len"),
        ({"train__eval_interval": 2, "data__validation_fraction": 0.0}, "data.validation_fraction=0"),
    ],
)
def test_what_only_data_and_devices_can_tell_is_a_configuration_error_too(
    ranks: RankPool, config: TrainConfig, changes: dict[str, Any], says: str
) -> None:
    """A start that is refused late and leaves half a run behind, which then refuses the corrected one."""
    assert_refused(ranks, changed(config, Path(config.run.dir), **changes), says)


def test_a_prompt_that_the_model_has_no_embeddings_for_is_refused_before_training(
    ranks: RankPool, config: TrainConfig, corpus: DataConfig, tmp_path: Path
) -> None:
    """An index error after the last step of a run on token arrays, whose tokenizer is only there to print text."""
    load_tokenizer(corpus).save(tmp_path / "tokenizer")
    np.save(tmp_path / "tokens.npy", np.arange(1000) % 40)
    tokens: dict[str, Any] = {"data__source": "tokens", "data__path": str(tmp_path / "tokens.npy")}
    config = changed(config, tmp_path / "run", **tokens, model__vocab_size=40, train__sample_tokens=3)
    config.data.tokenizer.path = str(tmp_path / "tokenizer")
    assert_refused(
        ranks, changed(config, tmp_path / "run", train__sample_prompt="tensor"), "train.sample_prompt='tensor'"
    )
    # Negative control: bytes below 40 have embeddings.
    assert_ran(start_on(ranks, 2, changed(config, tmp_path / "run", train__sample_prompt="!!!")), resumed_from=None)


def test_a_run_directory_that_cannot_be_made_is_named(ranks: RankPool, config: TrainConfig, tmp_path: Path) -> None:
    """A traceback from the first checkpoint."""
    (tmp_path / "file").write_text("")
    start = start_on(ranks, 2, changed(config, tmp_path / "file" / "run"))
    assert (start.error, start.message) == (
        "ConfigError",
        f"run.dir={tmp_path / 'file' / 'run'} cannot be created: Not a directory",
    )
