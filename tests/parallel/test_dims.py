"""Layout arithmetic and its error messages."""

from __future__ import annotations

import pytest

from parallel.dims import ParallelConfig, ParallelDims, problems


def test_what_is_left_goes_to_dp_shard() -> None:
    """A wrong quotient would start collectives over the wrong ranks."""
    dims = ParallelDims.resolve(ParallelConfig(dp_replicate=2), world_size=8)
    assert (dims.dp_replicate, dims.dp_shard, dims.dp) == (2, 4, 8)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            ParallelConfig(dp_replicate=3),
            "parallel.dp_replicate=3 does not divide the 8 processes; use parallel.dp_replicate=1, 2, 4 or 8",
        ),
        (ParallelConfig(dp_shard=4), "use parallel.dp_shard=-1 or 8, or start 4 processes"),
        (ParallelConfig(dp_shard=0), "parallel.dp_shard=0 must be at least 1"),
        (ParallelConfig(zero_stage=4), "parallel.zero_stage=4"),
        (ParallelConfig(tp=3), "parallel.tp=3 does not divide the 8 processes; use parallel.tp=1, 2, 4 or 8"),
        (
            ParallelConfig(pp=3, zero_stage=1),
            "does not divide the 8 processes; use parallel.pp=1, 2, 4 or 8",
        ),
        (ParallelConfig(zero_stage=1, cpu_offload=True), "parallel.cpu_offload=true"),
        (ParallelConfig(bucket_mb=0.0), "parallel.bucket_mb=0.0"),
        (ParallelConfig(ep=0), "parallel.ep=0 must be at least 1"),
        (ParallelConfig(ep=3, tp=2), "parallel.ep=3 does not divide parallel.dp_shard x parallel.cp = 4, "),
        (ParallelConfig(ep=8, dp_replicate=2), "whose ranks share out the experts; use parallel.ep=1, 2 or 4"),
    ],
)
def test_a_wrong_layout_is_refused_with_field_value_and_fix(config: ParallelConfig, expected: str) -> None:
    """A layout that slips through would hang or crash after the process groups exist."""
    assert any(expected in line for line in problems(config, world_size=8)), problems(config, world_size=8)
    with pytest.raises(ValueError, match="parallel"):
        ParallelDims.resolve(config, world_size=8)


def test_all_problems_are_named_at_once() -> None:
    """One error per attempt costs one queue wait per error."""
    assert len(problems(ParallelConfig(dp_replicate=3, zero_stage=7, bucket_mb=0.0), world_size=8)) == 3
