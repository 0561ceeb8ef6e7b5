"""adapter=lora: every layout trains the same adapters, and what is frozen costs nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import models.hf
from data.config import DataConfig
from tests.parity.adapting import adapter_config, run_adapted, token_data
from tests.parity.harness import Outcome, changed, gradient_deviation, loss_deviation, norm_deviation, run_here
from tests.pool import RankPool
from trainer.config import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> DataConfig:
    return token_data(folder)


@pytest.fixture(scope="module")
def references(ranks: RankPool, folder: Path, corpus: DataConfig) -> dict[str, Outcome]:
    """One process."""
    return {name: run_adapted(ranks, 1, adapter_config(folder, corpus, name)) for name in ("llama", "mixtral")}


def same(found: Outcome, wanted: Outcome) -> None:
    assert loss_deviation(found, wanted) < 1e-6
    assert gradient_deviation(found, wanted) < 1e-5
    assert norm_deviation(found, wanted) < 1e-4


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"parallel__zero_stage": 0}),
    "zero1": (2, {"parallel__zero_stage": 1}),
    "zero2": (2, {"parallel__zero_stage": 2}),
    "zero3": (2, {"parallel__zero_stage": 3}),
    "tp": (2, {"parallel__tp": 2}),
    "sp": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "separate": (1, {"model__fused_projections": False}),
    "sp_separate": (
        2,
        {"parallel__tp": 2, "parallel__sequence_parallel": True, "model__fused_projections": False},
    ),
    "shared_heads": (4, {"parallel__tp": 4}),
    "cp": (2, {"parallel__cp": 2}),
    "pp": (2, {"parallel__pp": 2}),
    "zero3_tp": (4, {"parallel__zero_stage": 3, "parallel__tp": 2}),
    "zero2_pp": (4, {"parallel__zero_stage": 2, "parallel__pp": 2}),
    "recomputed": (1, {"model__activation_checkpoint": "full"}),
    "kept_products": (1, {"model__activation_checkpoint": "selective"}),
    "compiled": (2, {"parallel__tp": 2, "train__compile": True, "train__compile_backend": "aot_eager"}),
}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep": (2, {"parallel__ep": 2, "parallel__zero_stage": 1}),
    "tp": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "ep_tp_zero3": (4, {"parallel__ep": 2, "parallel__tp": 2, "parallel__zero_stage": 3}),
}


THOROUGH = ("zero1", "zero2", "sp_separate", "zero2_pp", "ddp", "recomputed")
"""Beside others that show nearly the same."""


def some(layouts: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.thorough] if name in THOROUGH else []) for name in layouts]


@pytest.mark.some(3)
@pytest.mark.parametrize("layout", some(LAYOUTS))
def test_layouts_train_the_same_adapters(
    ranks: RankPool, folder: Path, corpus: DataConfig, references: dict[str, Outcome], layout: str
) -> None:
    """A gradient of A or B that is one rank's summand, B at the rows of another part, a seed per rank."""
    size, changes = LAYOUTS[layout]
    same(
        run_adapted(ranks, size, changed(adapter_config(folder, corpus), folder / layout, **changes)),
        references["llama"],
    )


@pytest.mark.some(1)
@pytest.mark.parametrize("layout", list(EXPERT_LAYOUTS))
def test_layouts_train_the_same_adapters_of_experts(
    ranks: RankPool, folder: Path, corpus: DataConfig, references: dict[str, Outcome], layout: str
) -> None:
    """Experts whose adapters are not trained, or are by the tokens of one rank."""
    size, changes = EXPERT_LAYOUTS[layout]
    config = changed(adapter_config(folder, corpus, "mixtral"), folder / f"experts-{layout}", **changes)
    same(run_adapted(ranks, size, config), references["mixtral"])


QUANTIZED_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero3": (2, {"parallel__zero_stage": 3}),
    "sp": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "separate": (1, {"model__fused_projections": False}),
    "shared_heads": (4, {"parallel__tp": 4}),
    "compiled": (1, {"train__compile": True, "train__compile_backend": "aot_eager"}),
    "zero3_pp": (4, {"parallel__zero_stage": 3, "parallel__pp": 2}),
    # Weights in 4 bits, adapters and their moments in host memory, brought in block by block.
    "offloaded": (2, {"parallel__zero_stage": 3, "parallel__cpu_offload": True}),
}


DORA_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "sp": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "zero3_tp": (4, {"parallel__zero_stage": 3, "parallel__tp": 2}),
    "separate_zero1": (2, {"parallel__zero_stage": 1, "model__fused_projections": False}),
}


def weighing(folder: Path, corpus: DataConfig) -> TrainConfig:
    config = adapter_config(folder, corpus)
    config.adapter.dora = True
    config.run.dir += "-dora"
    return config


@pytest.fixture(scope="module")
def weighed(ranks: RankPool, folder: Path, corpus: DataConfig) -> Outcome:
    return run_adapted(ranks, 1, weighing(folder, corpus))


@pytest.mark.some(1)
@pytest.mark.parametrize("layout", list(DORA_LAYOUTS))
def test_layouts_train_the_same_lengths_of_rows(
    ranks: RankPool, folder: Path, corpus: DataConfig, weighed: Outcome, layout: str
) -> None:
    """The length of a part of a row; a gradient of one rank's features."""
    size, changes = DORA_LAYOUTS[layout]
    same(run_adapted(ranks, size, changed(weighing(folder, corpus), folder / f"dora-{layout}", **changes)), weighed)


@pytest.fixture(scope="module")
def quantized(ranks: RankPool, folder: Path, corpus: DataConfig) -> Outcome:
    return run_adapted(ranks, 1, quantizing(folder, corpus))


def quantizing(folder: Path, corpus: DataConfig, family: str = "llama_of_blocks") -> TrainConfig:
    """Of a model whose rows, cut over the ranks of tp, are whole blocks of 64."""
    config = adapter_config(folder, corpus, family)
    config.adapter.quantize = "nf4"
    return config


@pytest.mark.some(2)
@pytest.mark.parametrize("layout", list(QUANTIZED_LAYOUTS))
def test_layouts_train_beside_the_same_4_bits(
    ranks: RankPool, folder: Path, corpus: DataConfig, quantized: Outcome, layout: str
) -> None:
    """Scales of a part of a matrix, bytes at the place of another rank's."""
    size, changes = QUANTIZED_LAYOUTS[layout]
    same(run_adapted(ranks, size, changed(quantizing(folder, corpus), folder / f"nf4-{layout}", **changes)), quantized)


@pytest.fixture(scope="module")
def quantized_experts(ranks: RankPool, folder: Path, corpus: DataConfig) -> Outcome:
    return run_adapted(ranks, 1, quantizing(folder, corpus, "mixtral_of_blocks"))


@pytest.mark.thorough
@pytest.mark.some(1)
@pytest.mark.parametrize("layout", ["ep_tp_zero3", "compiled", "tp", "ep"])
def test_layouts_train_beside_the_same_experts_of_4_bits(
    ranks: RankPool, folder: Path, corpus: DataConfig, quantized_experts: Outcome, layout: str
) -> None:
    """Bytes of another expert, or those of another rank of tp; adapters of experts that are trained by some rows."""
    size, changes = (EXPERT_LAYOUTS | QUANTIZED_LAYOUTS)[layout]
    config = quantizing(folder, corpus, "mixtral_of_blocks")
    same(run_adapted(ranks, size, changed(config, folder / f"nf4-experts-{layout}", **changes)), quantized_experts)


def experts_read(config: TrainConfig) -> int:
    """Elements of experts' matrices that this rank reads from the folder of the base model."""
    found = 0
    read = models.hf._read

    def counting(folder: Any, name: str, *where: Any) -> Tensor:
        nonlocal found
        tensor = read(folder, name, *where)
        found += tensor.numel() if ".experts." in name else 0
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.hf, "_read", counting)
        run_here(config)
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("changes", [{"parallel__ep": 2}, {"parallel__zero_stage": 3}], ids=["ep", "zero3"])
def test_a_rank_reads_the_experts_that_it_has(
    ranks: RankPool, folder: Path, corpus: DataConfig, changes: dict[str, Any]
) -> None:
    """All of them on every rank: a folder of 90 GB as often as there are GPUs."""
    config = quantizing(folder, corpus, "mixtral_of_blocks")
    name = "-".join(changes)
    (whole,) = ranks.run(1, experts_read, changed(config, folder / f"read-{name}-1", train__steps=1))
    parts = ranks.run(2, experts_read, changed(config, folder / f"read-{name}-2", train__steps=1, **changes))
    assert sum(parts) == whole
    assert whole > 0
