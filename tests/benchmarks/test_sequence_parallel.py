"""The measurement of parallel.sp_chunks runs; what it measures is for GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.sequence_parallel import LLAMA3_8B, measure
from tests.pool import RankError, RankPool

SMALL = replace(LLAMA3_8B, hidden_size=24, intermediate_size=36, num_heads=4, num_kv_heads=2, max_seq_len=16)


def _measured(chunks: list[int]) -> dict[str, Any]:
    return measure(SMALL, torch.device("cpu"), seq_len=12, batch=2, chunks=chunks, modes=["eager"], repeats=1)


def test_a_block_is_measured_for_every_number_of_chunks(ranks: RankPool) -> None:
    """A program that nobody ran since a signature changed."""
    result = ranks.run(2, _measured, [1, 3])[0]
    assert result["tp"] == 2
    assert list(result["ms"]) == ["eager, 1 chunks", "eager, 3 chunks"]
    assert all(ms > 0 for ms in (*result["ms"].values(), result["ms_of_collectives_alone"]))
    with pytest.raises(RankError, match="--chunks 4 does not divide the 6 tokens of a rank"):
        ranks.run(2, _measured, [4])
