"""recipe=kto and recipe=distill with adapters: every layout trains the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from models.adapter_config import AdapterConfig
from tests.data.conversing import chat_folder
from tests.parity.adapting import run_adapted
from tests.parity.harness import Outcome, changed, gradient_deviation, loss_deviation, norm_deviation, text_corpus
from tests.parity.test_distill import distilling
from tests.parity.test_kto import judging
from tests.parity.test_preferences import LAYOUTS, tiny_llama
from tests.pool import RankPool
from trainer.config import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes")
    for name, seed in (("policy", 0), ("reference", 1), ("student", 0), ("teacher", 1)):
        tiny_llama(path / name, seed)
    return path


@pytest.fixture(scope="module")
def corpus(folder: Path) -> DataConfig:
    config = text_corpus(folder)
    config.tokenizer.path = str(chat_folder(folder / "tokenizer"))
    return config


def adapting(config: TrainConfig) -> TrainConfig:
    config.adapter = AdapterConfig(name="lora", rank=3, alpha=6.0)
    return config


def same(found: Outcome, wanted: Outcome, names: tuple[str, ...]) -> None:
    assert loss_deviation(found, wanted) < 1e-6
    assert gradient_deviation(found, wanted) < 1e-5
    assert norm_deviation(found, wanted) < 1e-4
    assert all(name.rpartition(".")[2] in ("lora_a", "lora_b") for name in found.first_gradients)
    for name in names:
        ours, theirs = ([line[name] for line in outcome.metrics] for outcome in (found, wanted))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module")
def judged(ranks: RankPool, folder: Path) -> Outcome:
    return run_adapted(ranks, 1, adapting(judging(folder, "kto-one")))


@pytest.mark.some(1)
@pytest.mark.parametrize("layout", ["tp", "ring", "pp"])
def test_kto_trains_the_same_adapters(ranks: RankPool, folder: Path, judged: Outcome, layout: str) -> None:
    """A baseline by the policy without its adapters, or by a part of them."""
    config = changed(adapting(judging(folder, f"kto-{layout}")), folder / layout / "run", **LAYOUTS[layout])
    same(run_adapted(ranks, 2, config), judged, ("reward_chosen", "reward_rejected", "kl"))


@pytest.fixture(scope="module")
def distilled(ranks: RankPool, folder: Path, corpus: DataConfig) -> Outcome:
    return run_adapted(ranks, 1, adapting(distilling(folder, corpus, "distill-one")))


DISTILLED: dict[str, dict[str, Any]] = {
    "zero3": {"parallel__zero_stage": 3, "train__micro_batch_size": 2},
    "tp": LAYOUTS["tp"],
    "pp": LAYOUTS["pp"],
}


@pytest.mark.some(1)
@pytest.mark.parametrize("layout", list(DISTILLED))
def test_distillation_trains_the_same_adapters(
    ranks: RankPool, folder: Path, corpus: DataConfig, distilled: Outcome, layout: str
) -> None:
    """A teacher that has the student's adapters; one whose output layer is a shard."""
    config = adapting(distilling(folder, corpus, f"distill-{layout}"))
    same(run_adapted(ranks, 2, changed(config, folder / f"distill-{layout}", **DISTILLED[layout])), distilled, ("nll",))
