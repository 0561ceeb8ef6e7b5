"""Negative controls: what each way to spread, recompute or compile a run adds, broken on purpose, must be noticed.

Those of tensor, context, pipeline and expert parallelism, of latent attention and fp8 are beside their parity tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.faults import run_broken
from tests.parity.harness import (
    Outcome,
    Reference,
    assert_same_model,
    changed,
    make_reference,
    text_corpus,
    tiny_config,
)
from tests.pool import RankPool

SMALL: dict[str, Any] = {
    "train__steps": 2,
    "train__global_batch_size": 4,
    "train__micro_batch_size": 4,
    "model__num_layers": 2,
    "model__dropout": 0.1,
    "schedule__warmup_steps": 1,
}


@pytest.fixture(scope="module")
def reference(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("controls")
    return make_reference(ranks, tiny_config(folder / "one", text_corpus(folder), **SMALL), splits=(1, 2))


def _zero(stage: int, replicas: int = 1) -> dict[str, Any]:
    return {"parallel__zero_stage": stage, "parallel__dp_replicate": replicas, "train__micro_batch_size": 1}


def _recomputed(mode: str) -> dict[str, Any]:
    return {"model__activation_checkpoint": mode}


PIPELINED = {"parallel__pp": 2, "parallel__pp_schedule": "zero_bubble", "train__micro_batch_size": 3}
COMPILED = {"train__compile": True, "train__compile_backend": "aot_eager"}  # a fault brings a backend of its own

# ranks, layout, what must be noticed there
CONTROLS: list[tuple[int, dict[str, Any], list[str]]] = [
    (2, _zero(0, 2), ["replicas not summed"]),
    (4, _zero(1, 2), ["replicas not summed"]),
    (4, _zero(2, 2), ["replicas not summed"]),
    (2, _zero(1), ["shards not summed", "shards permuted", "nothing published"]),
    (2, _zero(2), ["shards not summed", "shards permuted", "nothing published"]),
    (2, _zero(3), ["shards not summed", "shards permuted"]),
    # Micro-batches of 3 and 1.
    (1, {"train__micro_batch_size": 3}, ["micro-batches weighted alike", "a micro-batch dropped"]),
    (2, _zero(1), ["a micro-batch dropped", "a micro-batch counted twice"]),
    (2, PIPELINED, ["micro-batches weighted alike", "a micro-batch dropped"]),
    (1, _recomputed("full"), ["another mask recomputed", "another input recomputed"]),
    (1, _recomputed("selective"), ["another mask recomputed", "another input recomputed"]),
    (1, _recomputed("offload"), ["another mask recomputed", "returned elsewhere"]),
    (1, COMPILED, ["a term lost in forward", "a term lost in backward"]),
]


@pytest.mark.parametrize(("world_size", "layout", "faults"), CONTROLS)
def test_a_fault_is_noticed_and_its_absence_is_not(
    ranks: RankPool, reference: Reference, tmp_path: Path, world_size: int, layout: dict[str, Any], faults: list[str]
) -> None:
    """A comparison that would pass whatever a layout computes."""

    def outcome(fault: str) -> Outcome:
        config = changed(reference.config, tmp_path / fault, **layout)
        found = ranks.run(world_size, run_broken, config, fault)[0]
        assert found is not None
        return found

    assert_same_model(outcome("nothing"), reference)
    for fault in faults:
        broken = outcome(fault)
        with pytest.raises(AssertionError):
            assert_same_model(broken, reference)
