"""model.activation_checkpoint=budget: from a configuration and a model on meta to what every block keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.decoder import Decoder, MTPBlock
from models.layers.attention import build_context
from parallel.activation_budget import BlockCost, BudgetTooSmallError, Choice, all_or_none, choose
from parallel.activation_cost import Rates, measure_block
from parallel.groups import ModelParallel
from trainer.config import ConfigError, TrainConfig


def plan_activations(
    model: Decoder, config: TrainConfig, groups: ModelParallel, device: torch.device
) -> dict[str, Choice]:
    """What each block of this rank keeps, by name in model.blocks, within model.activation_memory_gib. Collective.

    model: before anything was applied to it. Raises ConfigError on every rank when the inputs of the blocks of any of
    them are more than that, naming the smallest budget that all ranks can keep.
    """
    assert config.model.activation_memory_gib is not None
    costs = block_costs(model, config, groups, device)
    budget = int(config.model.activation_memory_gib * 2**30)
    choices, smallest = [], 0
    try:
        choices = choose(list(costs.values()), budget)
    except BudgetTooSmallError as error:
        smallest = error.smallest
    on_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(on_ranks, smallest)
    if max(on_ranks):
        # The digits shown must not round down, or the advice would be refused as well.
        needed = -(-max(on_ranks) * 10**4 // 2**30) / 10**4
        raise ConfigError(
            [
                f"model.activation_memory_gib={config.model.activation_memory_gib} is less than the inputs of the "
                f"blocks, which are kept in any case; use at least {needed:.4f}, or a smaller train.micro_batch_size"
            ]
        )
    return dict(zip(costs, choices, strict=True))


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
