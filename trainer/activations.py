"""model.activation_checkpoint=budget: from a configuration and a model on meta to what every block keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.config import ModelConfig
from models.decoder import Decoder, MTPBlock
from models.layers.attention import build_context
from parallel.activation_budget import BlockCost, Choice, all_or_none, choose
from parallel.activation_cost import Rates, measure_block
from parallel.dims import ParallelDims
from parallel.groups import ModelParallel
from parallel.pipeline.stages import make_stages
from parallel.problem import Problem, values
from trainer.config import TrainConfig
from trainer.pipelined import pipeline_layout


def plan_activations(
    model: Decoder, config: TrainConfig, groups: ModelParallel, device: torch.device
) -> dict[str, Choice]:
    """What each block of this rank keeps, by name in model.blocks, within model.activation_memory_gib.

    model: before anything was applied to it. config: without `problems`, so that the inputs of the blocks fit.
    """
    assert config.model.activation_memory_gib is not None
    costs = block_costs(model, config, groups, device)
    choices = choose(list(costs.values()), int(config.model.activation_memory_gib * 2**30))
    return dict(zip(costs, choices, strict=True))


def problems(config: TrainConfig, model: ModelConfig, world_size: int) -> list[Problem]:
    """Why model.activation_memory_gib cannot be kept, one line; config, with this resolved model, has no other problem.

    The inputs of the blocks are kept in any case.
    """
    if model.activation_checkpoint != "budget":
        return []
    assert model.activation_memory_gib is not None
    micro_batch, budget = config.train.micro_batch_size, int(model.activation_memory_gib * 2**30)
    needed = bytes_of_inputs(config, model, world_size)
    if needed <= budget:
        return []
    fitting = budget * micro_batch // needed
    # The digits shown must not round down, or the advice would be refused as well.
    enough = -(-needed * 10**4 // 2**30) / 10**4
    return [
        Problem(
            f"model.activation_memory_gib={model.activation_memory_gib} is less than the inputs of the blocks of a "
            "rank, which are kept in any case",
            values("model.activation_memory_gib", [enough]),
            values("train.micro_batch_size", [fitting] if fitting else []),
        )
    ]


def bytes_of_inputs(config: TrainConfig, model: ModelConfig, world_size: int) -> int:
    """Of all blocks of a rank and one micro-batch; of the stage of a pipeline that has most of them."""
    dims = ParallelDims.resolve(config.parallel, world_size)
    layout = pipeline_layout(config.parallel, model, seq_len=config.train.seq_len)
    stages = [make_stages([model.num_layers])] if layout is None else map(layout.of_rank, range(dims.pp))
    ahead = 2 * model.mtp.depth  # their blocks take a hidden state and an embedding
    inputs = max(sum(s.stop - s.start + ahead * s.is_last for s in of_rank) for of_rank in stages)
    tokens = config.train.seq_len // (dims.tp if config.parallel.sequence_parallel else 1)
    elements = config.train.micro_batch_size * tokens * model.hidden_size
    return inputs * elements * config.precision.compute_dtype.itemsize


def block_costs(
    model: Decoder, config: TrainConfig, groups: ModelParallel, device: torch.device
) -> dict[str, BlockCost]:
    """The cost of every block here by name. One of each kind is measured."""
    measured: dict[Any, BlockCost] = {}
    costs = {}
    for name, block in model.blocks.named_children():
        kind = (type(block), getattr(block.attention, "window", None))
        if kind not in measured:
            measured[kind] = _cost(block, config, groups, device)
        costs[name] = measured[kind]
    return costs


def _cost(block: nn.Module, config: TrainConfig, groups: ModelParallel, device: torch.device) -> BlockCost:
    """Of a micro-batch of whole size, and as if every token saw all before it: documents only make it cheaper."""
    train, dtype = config.train, config.precision.compute_dtype
    shape_of_tokens, masked = (train.micro_batch_size, train.seq_len), config.data.mask_documents
    slices = groups.tp.size() if groups.tp is not None and groups.sequence_parallel else 1
    shape = (train.micro_batch_size, train.seq_len // slices, config.model.hidden_size)
    mode = FakeTensorMode()
    with mode:
        inputs = [
            torch.empty(shape, device=device, dtype=dtype, requires_grad=True)
            for _ in range(2 if isinstance(block, MTPBlock) else 1)
        ]
        context = build_context(
            config.model,
            seq_len=train.seq_len,
            device=device,
            dtype=dtype,
            positions=None,
            documents=torch.empty(shape_of_tokens, dtype=torch.int32, device=device) if masked else None,
            samples=torch.empty(shape_of_tokens[0], dtype=torch.int64, device=device),
            groups=replace(groups, cp_ring=None, cp_ulysses=None),
        )
    rates = Rates()
    options = {"context": context}
    cost = measure_block(block, inputs, options, mode=mode, dtype=dtype, fused=train.compile, rates=rates)
    # Where a product with a tensor-parallel parameter is computed again inside a graph, AOTAutograd (2.11, 2.13) fails:
    # it tries to save the device mesh. With all products kept, or with all of the graph run again, none is.
    return all_or_none(cost) if train.compile and groups.tp is not None else cost
