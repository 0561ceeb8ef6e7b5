"""What parallel.sp_chunks does not go with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from tests.parity.harness import changed, tiny_config
from trainer.config import ConfigError
from trainer.validate import finalize

CHUNKS = {"parallel__tp": 2, "parallel__sequence_parallel": True, "parallel__sp_chunks": 2}


@pytest.mark.parametrize(
    ("world_size", "changes", "expected"),
    [
        (2, {"parallel__tp": 2, "parallel__sp_chunks": 2}, "cuts what sequence parallelism sends"),
        (2, CHUNKS | {"parallel__sp_chunks": 0}, "parallel.sp_chunks=0 must be at least 1"),
        (
            2,
            CHUNKS | {"parallel__sp_chunks": 5},
            "parallel.sp_chunks=5 does not divide the 12 tokens that a rank has of train.seq_len=24",
        ),
        (2, CHUNKS | {"precision__compute": "fp8"}, "parallel.sp_chunks=2 does not work with precision.compute=fp8"),
        (
            4,
            CHUNKS | {"parallel__pp": 2, "parallel__pp_schedule": "zero_bubble"},
            "parallel.sp_chunks=2 does not work with parallel.pp_schedule=zero_bubble",
        ),
    ],
)
def test_chunks_that_would_do_nothing_or_something_else_are_refused(
    tmp_path: Path, world_size: int, changes: dict[str, Any], expected: str
) -> None:
    """An uneven chunk, an option that has no effect, layers that are replaced by others which do not know of it."""
    config = tiny_config(tmp_path, DataConfig(source="text", path=__file__), model__intermediate_size=48)
    with pytest.raises(ConfigError) as caught:
        finalize(changed(config, tmp_path, **changes), world_size=world_size)
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems
    finalize(changed(config, tmp_path, **CHUNKS), world_size=2)  # control
