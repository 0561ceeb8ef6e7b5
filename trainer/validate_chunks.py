"""What parallel.sp_chunks asks of a run."""

from __future__ import annotations

from parallel.dims import divisors
from parallel.pipeline.schedules import SPLIT_BACKWARD
from trainer.config import TrainConfig


def chunk_problems(config: TrainConfig) -> list[str]:
    """Every reason why this run cannot cut what sequence parallelism sends, one line each.

    Nothing of sequences that it cannot slice in the first place.
    """
    parallel, seq_len = config.parallel, config.train.seq_len
    chunks, found = f"parallel.sp_chunks={parallel.sp_chunks}", []
    if parallel.sp_chunks == 1:
        return []
    if parallel.sp_chunks < 1:
        return [f"{chunks} must be at least 1, which does not cut anything; use 1"]
    if not parallel.sequence_parallel:
        return [
            f"{chunks} cuts what sequence parallelism sends, and parallel.sequence_parallel=false; use sp_chunks=1, or "
            "sequence_parallel=true"
        ]
    slices = max(1, parallel.cp) * max(1, parallel.tp)
    if seq_len % slices == 0 and seq_len // slices % parallel.sp_chunks:
        near = [n for n in divisors(seq_len // slices) if n <= 2 * parallel.sp_chunks][-3:]
        found.append(
            f"{chunks} does not divide the {seq_len // slices} tokens that a rank has of train.seq_len={seq_len}; "
            f"use {' or '.join(map(str, near))}"
        )
    if config.precision.fp8:
        found.append(
            f"{chunks} does not work with precision.compute=fp8, whose layers quantize the whole input of a branch at "
            "once; use sp_chunks=1, or precision.compute=bf16"
        )
    if parallel.pp > 1 and parallel.pp_schedule in SPLIT_BACKWARD:
        found.append(
            f"{chunks} does not work with parallel.pp_schedule={parallel.pp_schedule}, whose layers put their weight "
            "gradients off; use sp_chunks=1, or pp_schedule=gpipe, 1f1b or interleaved_1f1b"
        )
    return found
