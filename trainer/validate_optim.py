"""What the optimizer asks of precision, layout and model."""

from __future__ import annotations

import torch

from kernels.adamw.quantized import BLOCK
from models.config import ModelConfig
from models.config import problems as model_problems
from parallel.dims import ParallelDims, divisors
from parallel.dims import problems as dims_problems
from parallel.parallelize import dim_of_shard
from parallel.problem import Problem, change, multiples, values
from trainer.config import TrainConfig
from trainer.optim import choose_kernel, precision_problems
from trainer.validate_tensor import parameter_shapes, tp_dim


def optimizer_problems(config: TrainConfig) -> list[str]:
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
            Problem(
                f"parallel.cpu_offload=true updates weights in host memory, where the kernel that {asked} needs does "
                "not run",
                values("parallel.cpu_offload", [False]),
                change(optim__kernel="torch", optim__state_dtype="fp32", precision__master="fp32"),
            )
        )
    if precision.master == "bf16" and precision.reduce == "fp32" and parallel.zero_stage == 3:
        found.append(
            Problem(
                "precision.reduce=fp32 with precision.master=bf16 and parallel.zero_stage=3: "
                "fully_shard adds the gradients of micro-batches in the dtype of the weights",
                values("precision.reduce", ["bf16"]),
                values("parallel.zero_stage", [0, 1, 2], near=2),
            )
        )
    return found


def block_problems(config: TrainConfig, model: ModelConfig, world_size: int) -> list[Problem]:
    """Rows that are no whole blocks of 8-bit moments, or that the layout cuts inside of one; none for an illegal
    layout or model."""
    if config.optim.state_dtype != "int8" or dims_problems(config.parallel, world_size) or model_problems(model):
        return []
    why = f"optim.state_dtype=int8 quantizes blocks of {BLOCK} elements of a row"
    otherwise = values("optim.state_dtype", ["bf16", "fp32"])
    if model.hidden_size % BLOCK:
        return [
            Problem(
                f"{why}, and model.hidden_size={model.hidden_size}, the length of most, is no multiple",
                values("model.hidden_size", multiples(BLOCK, model.hidden_size), near=model.hidden_size),
                otherwise,
            )
        ]
    dims, stage = ParallelDims.resolve(config.parallel, world_size), config.parallel.zero_stage
    cut: dict[tuple[int, int], list[str]] = {}  # columns and their pieces
    for name, shape in parameter_shapes(model).items():
        if len(shape) >= 2 and shape[-1] % BLOCK == 0:  # trainer.adamw_kernel.is_quantized
            piece = longest_piece_of_a_row(name, shape, model, config, dims)
            if piece != shape[-1] and piece % BLOCK:
                cut.setdefault((shape[-1], piece), []).append(name)
    over = f" with parallel.zero_stage={stage} over {dims.dp_shard * dims.cp} ranks" if stage == 3 else ""
    return [
        Problem(
            f"{why}, and parallel.tp={dims.tp}{over} cuts the {columns} columns of {_some(names)} into pieces of "
            f"{piece}",
            values("parallel.tp", divisors(world_size), near=dims.tp),
            values("parallel.zero_stage", [2, 1, 0]) if stage == 3 else None,
            otherwise,
        )
        for (columns, piece), names in cut.items()
    ]


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def longest_piece_of_a_row(
    name: str, shape: torch.Size, model: ModelConfig, config: TrainConfig, dims: ParallelDims
) -> int:
    """Elements of a row of a parameter that one rank holds: trainer.adamw_kernel counts them when they are there.

    tp cuts first; then fully_shard, and no other stage, may cut rows too (parallel.parallelize.dim_of_shard).
    """
    by_tp = tp_dim(name, shape, model, dims.tp)
    last = len(shape) - 1
    piece = -(-shape[last] // dims.tp) if by_tp == last else shape[last]
    if config.parallel.zero_stage < 3:
        return piece
    is_spread = dims.ep > 1 and len(shape) == 3
    ranks = dims.expert_shard if is_spread else dims.dp_shard * dims.cp
    matrices = shape[0] // dims.ep if is_spread else shape[0]
    cut = dim_of_shard(shape, ranks, cut=() if by_tp is None else (by_tp,), num_local=matrices)
    return -(-piece // ranks) if cut == last else piece
