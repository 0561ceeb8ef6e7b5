"""recipe.neftune_alpha: the same noise on every layout, and none where nothing is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.parity.harness import Outcome, changed, run_on
from tests.parity.test_sft import same, tuning
from tests.pool import RankPool
from trainer.recipes import problems
from trainer.validate import find_problems

NOISE = {"recipe__neftune_alpha": 15.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("noise")


@pytest.fixture(scope="module")
def reference(ranks: RankPool, folder: Path) -> Outcome:
    """One process, one micro-batch."""
    return run_on(ranks, 1, changed(tuning(folder), folder / "one", **NOISE))


LAYOUTS: dict[str, dict[str, Any]] = {
    "cp": {"parallel__cp": 2},
    "tp with sequence parallelism": {"parallel__tp": 2, "parallel__sequence_parallel": True},
    "pp": {"parallel__pp": 2, "train__micro_batch_size": 1},
    "zero3, recomputed": {"parallel__zero_stage": 3, "model__activation_checkpoint": "full"},
}


@pytest.mark.some(1)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_draw_as_one(ranks: RankPool, folder: Path, reference: Outcome, layout: str) -> None:
    """Noise by rank, by micro-batch, by the tokens that a rank has, or other noise where a block is recomputed."""
    same(run_on(ranks, 2, changed(tuning(folder), folder / layout, **NOISE, **LAYOUTS[layout])), reference)


def test_it_changes_training_and_no_validation(ranks: RankPool, folder: Path) -> None:
    """Noise that is never added, or that blurs what is measured."""
    setting = {"train__steps": 1, "train__eval_interval": 1, "optim__lr": 0.0, "data__validation_fraction": 0.3}
    setting |= {"train__global_batch_size": 2, "train__eval_batches": 1}
    plain, noisy = (
        run_on(ranks, 1, changed(tuning(folder), folder / f"validated {len(noise)}", **setting, **noise)).metrics[0]
        for noise in ({}, NOISE)
    )
    assert noisy["validation_loss"] == plain["validation_loss"]
    assert noisy["loss"] != plain["loss"]


def test_a_run_resumes_to_the_same_bits(ranks: RankPool, folder: Path) -> None:
    """Draws that begin again with the process."""
    setting = {"train__global_batch_size": 3, "train__micro_batch_size": 1, "schedule__name": "constant"} | NOISE
    whole = run_on(ranks, 1, changed(tuning(folder), folder / "whole", **setting, train__steps=4))
    half = changed(tuning(folder), folder / "half", **setting, train__steps=2)
    half.checkpoint.at_end = True
    run_on(ranks, 1, half)
    half.train.steps = 4
    assert run_on(ranks, 1, half).losses == whole.losses


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf])
def test_what_is_no_size_is_refused(folder: Path, alpha: float) -> None:
    config = changed(tuning(folder), folder / "refused", recipe__neftune_alpha=alpha)
    (problem,) = find_problems(config, world_size=1)
    assert (
        problem == f"recipe.neftune_alpha={alpha} must be finite and not negative; use recipe.neftune_alpha=0.0 or 5.0"
    )


def test_other_recipes_and_documents_that_see_one_another_have_no_use_for_it(folder: Path) -> None:
    """A setting that somebody believes in."""
    config = changed(tuning(folder), folder / "refused", **NOISE)
    config.recipe.name = "dpo"
    says = "recipe.neftune_alpha=15.0 has no effect with recipe.name=dpo; use recipe.neftune_alpha=0.0"
    assert says in [str(problem) for problem in problems(config)]
    config.recipe.name, config.data.mask_documents, config.data.conversations.packing = "sft", False, False
    (problem,) = find_problems(config, world_size=1)
    assert problem.startswith("recipe.neftune_alpha=15.0 with data.mask_documents=false: noise goes by the length")
