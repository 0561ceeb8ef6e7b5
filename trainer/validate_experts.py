"""What the axes of a layout ask of a mixture of experts."""

from __future__ import annotations

import math

from models.config import ModelConfig
from parallel.dims import ParallelDims, divisors
from parallel.dims import problems as dims_problems
from parallel.problem import Problem, change, values
from trainer.config import TrainConfig


def expert_problems(config: TrainConfig, model: ModelConfig, world_size: int) -> list[Problem]:
    """Every reason why the experts of a model cannot be spread as asked, one line each; none for an illegal layout."""
    parallel, moe = config.parallel, model.moe
    if dims_problems(parallel, world_size):
        return []
    if not moe.num_experts:
        why = f"parallel.ep={parallel.ep} shares out experts, and model.moe.num_experts=0 has none"
        none = change(parallel__ep=1, parallel__ep_buffer=None) if parallel.ep_buffer else values("parallel.ep", [1])
        return [Problem(why, none)] if parallel.ep > 1 else []
    found = []
    if moe.num_experts % parallel.ep:
        dims = ParallelDims.resolve(parallel, world_size)
        legal = [d for d in divisors(moe.num_experts) if dims.dp_shard * dims.cp % d == 0]
        found.append(
            Problem(
                f"parallel.ep={parallel.ep} does not divide model.moe.num_experts={moe.num_experts}, and ranks share "
                "experts equally",
                values("parallel.ep", legal, near=parallel.ep),
            )
        )
    if moe.intermediate_size % parallel.tp:
        found.append(
            Problem(
                f"parallel.tp={parallel.tp} does not divide model.moe.intermediate_size={moe.intermediate_size}, and "
                "ranks share the inner features of an expert equally",
                values("parallel.tp", divisors(math.gcd(world_size, moe.intermediate_size)), near=parallel.tp),
            )
        )
    if parallel.ep > 1 and config.train.compile and parallel.ep_buffer == 0:
        found.append(
            Problem(
                f"parallel.ep_buffer=0 with parallel.ep={parallel.ep} sends rows in numbers that the host must know, "
                "and with train.compile=true a block is one graph without it",
                values("parallel.ep_buffer", [float(parallel.ep)]),
                values("train.compile", [False]),
            )
        )
    return found
