"""recipe.reference=adapter: the policy without its adapters is the model beside it that they are for, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.adapter_config import AdapterConfig
from tests.data.preferring import preference_config
from tests.parity.adapting import run_adapted
from tests.parity.harness import Outcome, changed
from tests.parity.test_kto import ANSWERS, judging
from tests.parity.test_kto import ROWS as JUDGED
from tests.parity.test_preferences import ROWS, preferring, tiny_llama
from tests.pool import RankPool
from trainer.config import TrainConfig
from trainer.validate import find_problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("switched-off")
    tiny_llama(path / "policy", 0)
    return path


def adapting(config: TrainConfig, **settings: Any) -> TrainConfig:
    config.adapter = AdapterConfig(name="lora", rank=3, alpha=6.0, **settings)
    config.recipe.reference_path = None
    return config


def comparing(folder: Path, name: str, **changes: Any) -> TrainConfig:
    """recipe=dpo, a pair in each of its sequences."""
    return adapting(preferring(folder, name, packing=False, train__global_batch_size=len(ROWS) - 1, **changes))


def same_bits(found: Outcome, wanted: Outcome, names: tuple[str, ...]) -> None:
    for name in ("loss", "grad_norm", *names):
        assert [line[name] for line in found.metrics] == [line[name] for line in wanted.metrics], name


def both(ranks: RankPool, size: int, config: TrainConfig, names: tuple[str, ...]) -> Outcome:
    """A run by the model beside the policy, after one by the policy itself was found to be the same."""
    wanted = run_adapted(ranks, size, config)
    beside = changed(config, Path(config.run.dir).with_name("adapter"))
    beside.recipe.reference = "adapter"
    assert find_problems(beside, world_size=size) == []
    same_bits(run_adapted(ranks, size, beside), wanted, names)
    return wanted


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "bf16": (1, {"precision__compute": "bf16"}),
    "zero3": (2, {"parallel__zero_stage": 3}),
    "tp": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "zero3_tp": (4, {"parallel__zero_stage": 3, "parallel__tp": 2}),
    "pp": (2, {"parallel__pp": 2, "train__micro_batch_size": 2}),
    "compiled": (1, {"train__compile": True, "train__compile_backend": "aot_eager"}),
}


THOROUGH = ("bf16", "zero3_tp", "pp", "compiled")


@pytest.mark.some(2)
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.thorough] if name in THOROUGH else []) for name in LAYOUTS]
)
def test_a_policy_without_its_adapters_is_its_reference(ranks: RankPool, folder: Path, layout: str) -> None:
    """Adapters that are not all switched off, or not on again; a graph that was compiled with them."""
    size, changes = LAYOUTS[layout]
    outcome = both(ranks, size, comparing(folder, layout, **changes), ("reward_margin", "logp_chosen"))
    assert abs(outcome.metrics[0]["reward_margin"]) > 0.01  # else nothing would show that they were off


def test_lengths_of_rows_are_switched_off_too(ranks: RankPool, folder: Path) -> None:
    """DoRA's factors that stay."""
    config = adapting(comparing(folder, "dora"), dora=True)
    both(ranks, 2, changed(config, folder / "dora" / "run", parallel__tp=2), ("reward_margin",))


def test_kto_compares_with_the_same_reference(ranks: RankPool, folder: Path) -> None:
    config = adapting(judging(folder, "kto", parallel__zero_stage=3))
    config.data = preference_config(folder / "kto", JUDGED, packing=False, too_long="error")
    config.data.source = "unpaired_preferences"
    config.train.global_batch_size = ANSWERS - ANSWERS % 2
    both(ranks, 2, config, ("reward_chosen", "kl"))
    config.recipe.reference = "precomputed"
    (line,) = find_problems(config, world_size=1)
    assert line.startswith("recipe.reference=precomputed is not there for recipe.name=kto; use recipe.reference=model")
