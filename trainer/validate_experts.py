"""What the axes of a layout ask of a mixture of experts."""

from __future__ import annotations

from models.config import ModelConfig
from parallel.dims import ParallelDims, divisors
from parallel.dims import problems as dims_problems
from trainer.config import TrainConfig


def expert_problems(config: TrainConfig, model: ModelConfig, world_size: int) -> list[str]:
    """Every reason why the experts of a model cannot be spread as asked, one line each; none for an illegal layout."""
    parallel, moe = config.parallel, model.moe
    if dims_problems(parallel, world_size):
        return []
    if not moe.num_experts:
        without = f"parallel.ep={parallel.ep} shares out experts, and model.moe.num_experts=0 has none; use ep=1"
        return [without] if parallel.ep > 1 else []
    found = []
    if moe.num_experts % parallel.ep:
        dims = ParallelDims.resolve(parallel, world_size)
        legal = [d for d in divisors(moe.num_experts) if dims.dp_shard * dims.cp % d == 0]
        found.append(
            f"parallel.ep={parallel.ep} does not divide model.moe.num_experts={moe.num_experts}, and ranks share "
            f"experts equally; use {', '.join(map(str, legal))}"
        )
    if moe.intermediate_size % parallel.tp:
        legal = divisors(moe.intermediate_size)
        found.append(
            f"parallel.tp={parallel.tp} does not divide model.moe.intermediate_size={moe.intermediate_size}, and ranks "
            f"share the inner features of an expert equally; use {', '.join(map(str, legal))}"
        )
    if parallel.ep > 1 and config.train.compile:
        found.append(
            f"train.compile=true does not work with parallel.ep={parallel.ep}: a block whose tokens travel in numbers "
            "that the host must know is not one graph; use train.compile=false"
        )
    return found
