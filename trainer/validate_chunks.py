"""What parallel.sp_chunks asks of a run."""

from __future__ import annotations

from parallel.dims import divisors
from parallel.pipeline.schedules import SCHEDULES, SPLIT_BACKWARD
from parallel.problem import Problem, values
from trainer.config import TrainConfig


def chunk_problems(config: TrainConfig) -> list[Problem]:
    """Every reason why this run cannot cut what sequence parallelism sends, one line each.

    Nothing of sequences that it cannot slice in the first place.
    """
    parallel, seq_len = config.parallel, config.train.seq_len
    chunks, found = f"parallel.sp_chunks={parallel.sp_chunks}", []
    whole = values("parallel.sp_chunks", [1])
    if parallel.sp_chunks == 1:
        return []
    if parallel.sp_chunks < 1:
        return [Problem(f"{chunks} must be at least 1, which does not cut anything", whole)]
    if not parallel.sequence_parallel:
        why = f"{chunks} cuts what sequence parallelism sends, and parallel.sequence_parallel=false"
        return [Problem(why, whole, values("parallel.sequence_parallel", [True]))]
    slices = max(1, parallel.cp) * max(1, parallel.tp)
    if seq_len % slices == 0 and seq_len // slices % parallel.sp_chunks:
        found.append(
            Problem(
                f"{chunks} does not divide the {seq_len // slices} tokens that a rank has of train.seq_len={seq_len}",
                values("parallel.sp_chunks", divisors(seq_len // slices), near=parallel.sp_chunks),
            )
        )
    if config.precision.fp8:
        found.append(
            Problem(
                f"{chunks} does not work with precision.compute=fp8, whose layers quantize the whole input of a branch "
                "at once",
                whole,
                values("precision.compute", ["bf16"]),
            )
        )
    if parallel.pp > 1 and parallel.pp_schedule in SPLIT_BACKWARD:
        found.append(
            Problem(
                f"{chunks} does not work with parallel.pp_schedule={parallel.pp_schedule}, whose layers put their "
                "weight gradients off",
                whole,
                values("parallel.pp_schedule", [name for name in SCHEDULES if name not in SPLIT_BACKWARD]),
            )
        )
    return found
