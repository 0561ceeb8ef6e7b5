"""What the optimizer asks of precision, layout and model."""

from __future__ import annotations

import torch

from kernels.adamw.quantized import BLOCK
from models.config import ModelConfig
from parallel.dims import ParallelDims
from parallel.dims import problems as dims_problems
from trainer.config import TrainConfig
from trainer.optim import choose_kernel, precision_problems
from trainer.validate_tensor import has_mlp


def optimizer_problems(config: TrainConfig, model: ModelConfig, world_size: int) -> list[str]:
    """Every reason why the optimizer's settings (each legal by itself) cannot be used in this run, one line each."""
    optim, precision, parallel = config.optim, config.precision, config.parallel
    found = precision_problems(optim, master=precision.master)
    offloaded = torch.device("cpu")
    kernel = choose_kernel(optim, stochastic=precision.master == "bf16", device=offloaded)
    if parallel.cpu_offload and kernel == "triton":
        asked = (
            "optim.kernel=triton" if optim.kernel == "triton"
            else f"optim.state_dtype={optim.state_dtype}" if optim.state_dtype != "fp32"
            else "precision.master=bf16"
        )  # fmt: skip
        found.append(
            f"parallel.cpu_offload=true updates weights in host memory, where the kernel that {asked} needs does not "
            "run; use cpu_offload=false, or optim.kernel=torch with optim.state_dtype=fp32 and precision.master=fp32"
        )
    if precision.master == "bf16" and precision.reduce == "fp32" and parallel.zero_stage >= 2:
        found.append(
            f"precision.reduce=fp32 with precision.master=bf16 and parallel.zero_stage={parallel.zero_stage}: "
            "fully_shard adds the gradients of micro-batches in the dtype of the weights; use precision.reduce=bf16 or "
            "zero_stage 1"
        )
    if optim.state_dtype == "int8" and not dims_problems(parallel, world_size) and model.num_kv_heads is not None:
        found += _block_problems(config, model, ParallelDims.resolve(parallel, world_size))
    return found


def _block_problems(config: TrainConfig, model: ModelConfig, dims: ParallelDims) -> list[str]:
    """Rows that are no whole blocks of 8-bit moments, or that the layout cuts inside of one.

    What is special to an architecture is left to trainer.adamw_kernel, which looks at each parameter.
    """
    why = f"optim.state_dtype=int8 quantizes blocks of {BLOCK} elements of a row"
    otherwise = "or optim.state_dtype=bf16 or fp32"
    hidden = model.hidden_size
    if hidden % BLOCK:
        below = hidden // BLOCK * BLOCK
        nearest = f"{below} or {below + BLOCK}" if below else f"{BLOCK}"
        return [
            f"{why}, and model.hidden_size={hidden}, the length of most, is no multiple; use {nearest}, {otherwise}"
        ]
    found = []
    assert model.value_dim is not None  # resolved
    inner = {
        "model.num_heads x head_dim": model.num_heads * model.value_dim,
        "model.intermediate_size": model.intermediate_size if has_mlp(model) else 0,
        "model.moe.intermediate_size": model.moe.intermediate_size if model.moe.num_experts else 0,
    }
    for name, columns in inner.items():
        if columns % BLOCK == 0 and columns % dims.tp == 0 and columns // dims.tp % BLOCK:
            legal = [tp for tp in range(1, dims.tp) if columns % (tp * BLOCK) == 0]
            found.append(
                f"{why}, and parallel.tp={dims.tp} cuts {name}={columns} into pieces of {columns // dims.tp}; use "
                f"parallel.tp={' or '.join(map(str, legal))}, {otherwise}"
            )
    shard = dims.dp_shard * dims.cp
    if config.parallel.zero_stage >= 2 and dims.tp > 1 and hidden % shard == 0 and hidden // shard % BLOCK:
        found.append(
            f"{why}, and parallel.zero_stage={config.parallel.zero_stage} over {shard} ranks cuts the rows that "
            f"parallel.tp={dims.tp} leaves, of model.hidden_size={hidden}, into pieces of {hidden // shard}; use "
            f"zero_stage 0 or 1, {otherwise}"
        )
    return found
