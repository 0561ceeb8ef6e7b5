"""What of a batch belongs to a rank of the cp axis, and which configurations cannot be split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from data.batch import Batch
from models.config import ModelConfig
from parallel.dims import ParallelConfig
from trainer.config import ConfigError, LoopConfig, TrainConfig
from trainer.sequence import split_batch
from trainer.validate import finalize


@pytest.mark.parametrize("ulysses", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_a_part_has_the_tokens_labels_and_positions_of_its_chunks_and_all_documents(masked: bool, ulysses: int) -> None:
    """Labels of other tokens than those that predict them."""
    index = torch.arange(16).expand(3, 16)
    documents = index // 5 if masked else None
    batch = Batch(tokens=index, labels=index + 1, positions=index % 5, documents=documents, samples=torch.arange(3))
    parts = [split_batch(batch, cp_rank=rank, cp_size=4, cp_ulysses=ulysses) for rank in range(4)]
    if not masked:
        assert parts[1].tokens[0].tolist() == [2, 3, 12, 13]
    assert sorted(torch.cat([part.tokens[0] for part in parts]).tolist()) == list(range(16))
    for part in parts:
        assert part.indices is not None
        assert torch.equal(part.tokens[0], part.indices)
        assert torch.equal(part.labels, part.tokens + 1)
        assert torch.equal(part.positions, part.tokens % 5)
        assert part.documents is batch.documents
        assert part.samples is batch.samples
        assert (part.cut is None) == (not masked or ulysses == 4)
    assert split_batch(batch, cp_rank=0, cp_size=1) is batch


def _config(**changes: Any) -> TrainConfig:
    config = TrainConfig(
        train=LoopConfig(seq_len=32, global_batch_size=4, micro_batch_size=1, device="cpu"),
        model=ModelConfig(hidden_size=48, num_heads=6, num_kv_heads=2),
        parallel=ParallelConfig(cp=4),
    )
    for key, value in changes.items():
        group, name = key.split("__")
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"train__seq_len": 36},
            r"train.seq_len=36 does not divide into 2 x parallel.cp=4 chunks; use train.seq_len=24, 32, 40 or 48, or",
        ),
        ({"parallel__cp": 3}, "parallel.cp=3 does not divide the 8 processes; use parallel.cp=2, 4 or 8, or start"),
        (
            {"parallel__cp_method": "rings"},
            "parallel.cp_method=rings is unknown; use parallel.cp_method=ring or",
        ),
        ({"parallel__cp_method": "ulysses"}, "parallel.cp=4 does not divide model.num_heads=6"),
        (
            {"parallel__cp_ulysses": 3},
            "parallel.cp_ulysses=3 does not divide parallel.cp=4; use parallel.cp_ulysses=1 or",
        ),
        ({"parallel__cp_ulysses": 4}, "use parallel.cp_ulysses=1 or 2"),
        ({"parallel__cp_ulysses": 2, "parallel__cp_method": "ulysses"}, "parallel.cp_ulysses=2 is the inner part"),
        ({"parallel__cp_ulysses": 2, "model__num_heads": 3, "model__num_kv_heads": 3}, "use parallel.cp_ulysses=1"),
        ({"model__attention": "flex"}, "model.attention=flex does not work with parallel.cp_method=ring"),
        ({"model__attention": "sdpa"}, "model.attention=sdpa does not work with parallel.cp_method=ring"),
        (
            {"train__compile": True, "model__activation_checkpoint": "selective"},
            "model.activation_checkpoint=selective with train.compile=true picks operations of one graph",
        ),
        (
            {"model__activation_checkpoint": "budget", "model__activation_memory_gib": 1.0},
            "model.activation_checkpoint=budget does not work with parallel.cp=4",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_with_field_value_and_fix(changes: dict[str, Any], expected: str) -> None:
    """A hang, or an error from the middle of a layer on every rank, after the process groups exist."""
    finalize(_config(), world_size=8)
    changes = changes | {"train__timeout_seconds": 0.0}  # another problem hides none of these
    with pytest.raises(ConfigError) as error:
        finalize(_config(**changes), world_size=8)
    assert any(expected in line for line in error.value.problems), error.value.problems
