"""Several axes at once against one process: dropout, and one key/value head that ranks share. Other features on all
axes are in test_lattice.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.harness import References, assert_same_model, changed, run_on, text_corpus
from tests.pool import RankPool

SHAPE: dict[str, Any] = {
    "train__steps": 3,
    "train__micro_batch_size": 2,
    "model__hidden_size": 32,
    "model__num_heads": 8,
    "model__num_kv_heads": 4,
    "model__intermediate_size": 48,
}

# What the model is; each is trained by one process once.
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"model__tie_embeddings": True, "model__dropout": 0.1},
    # Two ranks of the tensor axis use the one key/value head; enough layers for two stages per rank.
    "one_kv": {"model__num_kv_heads": 1, "model__qkv_bias": True, "model__num_layers": 4, "data__mask_documents": True},
}

# (model, ranks, changes)
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("tied", 8, {"parallel__cp": 2, "parallel__pp": 2, "parallel__tp": 2, "parallel__sequence_parallel": True,
                 "parallel__zero_stage": 1, "parallel__pp_schedule": "gpipe"}),
    # Weight gradients put off.
    ("tied", 8, {"parallel__cp": 2, "parallel__pp": 2, "parallel__tp": 2, "parallel__zero_stage": 3,
                 "parallel__pp_schedule": "zero_bubble"}),
    ("one_kv", 4, {"parallel__tp": 2, "parallel__pp": 2, "parallel__sequence_parallel": True,
                   "parallel__zero_stage": 0, "parallel__pp_schedule": "zbv"}),
    # Micro-batches of 3, 3 and 2 sequences.
    ("one_kv", 8, {"parallel__cp": 2, "parallel__pp": 2, "parallel__tp": 2, "parallel__sequence_parallel": True,
                   "parallel__zero_stage": 1, "train__micro_batch_size": 3}),
]  # fmt: skip


@pytest.fixture(scope="module")
def references(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> References:
    folder = tmp_path_factory.mktemp("composed")
    variants = {name: SHAPE | changes for name, changes in MODELS.items()}
    return References(ranks, text_corpus(folder), folder, variants, splits=(1, 8), feature_parts=(2, 4))


@pytest.mark.some(1, unless_thorough=True)
@pytest.mark.parametrize(("model", "world_size", "changes"), LAYOUTS)
def test_axes_together_train_the_same_model(
    ranks: RankPool, references: References, tmp_path: Path, model: str, world_size: int, changes: dict[str, Any]
) -> None:
    """A gradient summed over one axis twice, a mask or dropout draw that knows one axis but not the other."""
    reference = references.of(model)
    config = changed(reference.config, tmp_path / "run", **{"train__micro_batch_size": 1} | changes)
    assert_same_model(run_on(ranks, world_size, config), reference)
