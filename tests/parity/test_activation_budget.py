"""Activation budgets in layouts, through the real trainer, against one process that keeps everything."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.parity.harness import References, assert_same_model, changed, run_on, text_corpus
from tests.pool import RankError, RankPool

SHAPE: dict[str, Any] = {
    "model__num_layers": 4,
    "model__dropout": 0.1,
    "data__mask_documents": True,
    "train__steps": 3,
    "train__micro_batch_size": 2,
    "schedule__warmup_steps": 1,
}
BLOCK_INPUT = 2 * 24 * 36 * 4
"""Bytes of a micro-batch: sequences x tokens x features of fp32."""
COMPILED = {"train__compile": True, "train__compile_backend": "aot_eager"}
TP = {"parallel__tp": 2}


@pytest.fixture(scope="module")
def references(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> References:
    folder = tmp_path_factory.mktemp("budget")
    return References(ranks, text_corpus(folder), folder, {"model": SHAPE}, splits=(1, 8), feature_parts=(2, 4))


def within(inputs: float) -> dict[str, Any]:
    """A budget of so many inputs of blocks."""
    return {
        "model__activation_checkpoint": "budget",
        "model__activation_memory_gib": inputs * BLOCK_INPUT / 2**30,
    }


@pytest.mark.thorough
@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("world_size", "inputs", "changes"),
    [
        (2, 18, {"parallel__zero_stage": 3}),
        (2, 12, {**TP, "parallel__sequence_parallel": True}),
        (2, 12, {**TP, **COMPILED, "parallel__zero_stage": 1}),
        (2, 11, {"parallel__pp": 2, "parallel__pp_schedule": "zero_bubble"}),
    ],
)
def test_blocks_that_keep_different_things_train_the_same_model(
    ranks: RankPool, references: References, tmp_path: Path, world_size: int, inputs: float, changes: dict[str, Any]
) -> None:
    """A call counted otherwise in recomputation, a block that keeps what another was to keep, ranks that disagree."""
    reference = references.of("model")
    config = changed(reference.config, tmp_path / "run", **changes, **within(inputs))
    assert_same_model(run_on(ranks, world_size, config, timeout=240), reference)
    used = json.loads((tmp_path / "run" / "run.json").read_text())["kernels"]["activation_checkpoint"]
    assert re.fullmatch(r"budget: (\d of \d blocks keep [^;]*){2,}; .* GiB per micro-batch, .* ms computed again", used)
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    event = next(e for e in map(json.loads, events) if e["kind"] == "activations")
    assert 0 < event["gib"] <= config.model.activation_memory_gib
    assert event["recomputed_seconds"] > 0


def test_a_budget_below_the_inputs_of_blocks_is_refused_on_all_ranks_with_the_smallest_one(
    ranks: RankPool, references: References, tmp_path: Path
) -> None:
    """A stage that refuses while the others wait for it, or advice that would be refused as well."""
    config = references.of("model").config
    pipeline = {"parallel__pp": 2, "parallel__pp_split": [3, 1]}
    with pytest.raises(RankError, match="is less than the inputs of the blocks") as error:
        run_on(ranks, 2, changed(config, tmp_path / "small", **pipeline, **within(2)))
    found = re.search(r"use model.activation_memory_gib=([\d.]+)", str(error.value))
    assert found is not None
    smallest = 3 * BLOCK_INPUT / 2**30
    assert smallest <= float(found[1]) < smallest + 1.01e-4
