"""What really computes each part of a step, for run.json: asked of the functions that decide it."""

from __future__ import annotations

from typing import Any

import torch

from kernels.attention import sdpa
from kernels.backend import runs_triton
from kernels.grouped_linear import choose_grouped_linear
from kernels.low_rank import has_low_rank_kernel
from kernels.rows import has_kernel
from models.adapter_config import adapted_layers
from models.config import ModelConfig
from models.decoder import Decoder
from models.flops import num_parameters
from models.fp8_producers import writes_fp8
from models.layers.attention import choose_attention
from models.layers.mlp import MLP, gated_kernel
from models.layers.moe import GroupedLinear
from parallel.activation_budget import describe as describe_plan
from parallel.dims import ParallelDims
from trainer.config import TrainConfig
from trainer.loss import choose_loss_kernel
from trainer.optim import describe as describe_optimizer
from trainer.pipelined import PipelinedPasses
from trainer.recipes import RECIPES
from trainer.recipes.dpo import DirectPreferenceOptimization
from trainer.recipes.recipe import Recipe
from trainer.sequence import context_parallelism
from trainer.step import TrainState

PROBE_TOKENS = 512
"""Of a sequence that torch is asked about: what it takes depends on dtype, heads and masks, not on more tokens."""


def attention_used(config: TrainConfig, device: torch.device) -> str:
    """The implementation of attention and why, for run.json. Raises ValueError where the one asked for does not run."""
    used = choose_attention(
        config.model,
        device,
        config.precision.compute_dtype,
        documents=config.data.mask_documents,
        cp_method=config.parallel.cp_method if config.parallel.cp > 1 else None,
    )
    if used.name == "flex" and config.model.activation_checkpoint == "budget":
        raise ValueError(
            "model.activation_checkpoint=budget cannot measure model.attention=flex, which is no single operation; use "
            "model.attention=triton or sdpa, or activation_checkpoint=selective or full"
        )
    return str(used)


def _projections(model: ModelConfig, dims: ParallelDims, state: TrainState) -> str:
    """Which projections of one input are one product, and why not where they could be."""
    layers = sorted({name.split(".")[-2] for name in state.fused})
    used = f"{' and '.join(layers)} fused" if layers else "separate"
    assert model.num_kv_heads is not None  # resolved
    if model.fused_projections and not model.mla.kv_rank and dims.tp > model.num_kv_heads:
        used += f"; q, k and v are not: parallel.tp={dims.tp} ranks share model.num_kv_heads={model.num_kv_heads}"
    return used


def _attention(config: TrainConfig, dims: ParallelDims, state: TrainState, device: torch.device) -> str:
    used = attention_used(config, device)
    if used.split()[0] == "sdpa" and device.type == "cuda" and dims.cp == 1:
        used += f"; {_sdpa_backend(config, dims, device)}"
    return used + (", gradients alone; forward: paged, batch-invariant" if state.model.batch_invariant else "")


def _sdpa_backend(config: TrainConfig, dims: ParallelDims, device: torch.device) -> str:
    """Which of its kernels torch takes on this rank."""
    model, dtype = config.model, config.precision.compute_dtype
    assert model.num_kv_heads is not None
    assert model.head_dim is not None
    assert model.value_dim is not None  # resolved
    T, heads = min(config.train.seq_len, PROBE_TOKENS), model.num_heads // dims.tp
    key_heads = max(1, model.num_kv_heads // dims.tp)
    sizes = ((heads, model.head_dim), (key_heads, model.head_dim), (key_heads, model.value_dim))
    q, k, v = (torch.empty(1, T, *size, dtype=dtype, device=device, requires_grad=True) for size in sizes)
    mask = None
    if model.positions == "alibi":
        mask = torch.zeros(1, heads, T, T, dtype=dtype, device=device)
    elif config.data.mask_documents or model.sliding_window is not None:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=device)
    return sdpa.backend(q, k, v, mask)


def _gated(config: TrainConfig, state: TrainState, device: torch.device) -> str:
    """What multiplies a gated network's halves, of the networks of this rank that are no experts."""
    model = config.model
    networks = [module for module in state.model.modules() if isinstance(module, MLP) and module.gated]
    written = sum(map(writes_fp8, networks))
    found = [f"triton, to fp8 ({written} of {len(networks)})"] if written else []
    if written < len(networks):
        compiled, fused = config.train.compile, model.fused_projections
        kernel = gated_kernel(model.activation, fused=fused, device_type=device.type, compiled=compiled)
        found.append("torch" if kernel is None else "triton")
    return "; ".join(found) or "none"


def _adapters(config: TrainConfig, state: TrainState, device: torch.device) -> dict[str, str]:
    """What adapters are, and what runs of this rank's frozen weights and products that are no experts'."""
    adapter, frozen = config.adapter, config.adapter.quantize
    kind = "dora" if adapter.dora else "rslora" if adapter.rank_stabilized else "lora"
    count = len(adapted_layers(adapter, config.model))
    kept = config.precision.compute if frozen == "none" else f"{frozen}, others {config.precision.compute}"
    used = {"adapters": f"{kind} of rank {adapter.rank} on {count} layers; frozen weights in {kept}"}
    layers: list[Any] = [m for m in state.model.modules() if not isinstance(m, GroupedLinear)]
    found = [how for layer in layers if (how := getattr(layer, "adaptation", None)) is not None]
    probe = torch.empty(1, dtype=config.precision.compute_dtype, device=device)
    if found:
        by_kernel = sum(has_low_rank_kernel(probe, len(how.rows) * how.rank) for how in found)
        passes = "forward and backward" if config.train.compile else "backward; forward: torch"
        used["low_rank"] = f"triton ({by_kernel} of {len(found)} layers), {passes}" if by_kernel else "torch"
    if frozen == "nf4":
        used["nf4"] = "triton" if runs_triton(probe) else "reference"
    return used


def _experts(config: TrainConfig, dims: ParallelDims, device: torch.device) -> str:
    """What multiplies with them, with their adapters, and how rows reach them."""
    model, adapter, dtype = config.model, config.adapter, config.precision.compute_dtype
    sizes = (model.hidden_size, model.moe.intermediate_size // dims.tp)
    used = choose_grouped_linear(device, dtype, *sizes)
    if any(".experts." in layer for layer in adapted_layers(adapter, model)):
        of_adapters = choose_grouped_linear(device, dtype, *sizes, adapter.rank)
        used += f" (adapters of rank {adapter.rank}: {of_adapters})" if of_adapters != used else ""
    if dims.ep > 1:
        used += f", all_to_all({dims.ep}) of {_what_travels(config, dims)}"
    return used


def implementations(config: TrainConfig, dims: ParallelDims, state: TrainState, device: torch.device) -> dict[str, str]:
    """What really computes each part of a step, for run.json."""
    model, train = config.model, config.train
    used = {
        "attention": _attention(config, dims, state, device),
        "loss": _loss(config, device),
        "projections": _projections(model, dims, state),
        "gated_mlp": _gated(config, state, device),
        "products": "batch-invariant" if state.model.batch_invariant else "torch",
        "blocks": f"torch.compile({train.compile_backend})" if train.compile else "eager",
        "passes": "CUDA graphs" if train.cuda_graphs else "eager",
        "activation_checkpoint": model.activation_checkpoint
        + (f": {describe_plan(list(state.activation_plan.values()))}" if state.activation_plan else ""),
        **describe_optimizer(state.optimizer, config.optim),
        "context_parallel": context_parallelism(config.parallel, dims, documents=config.data.mask_documents),
        "data_parallel": f"zero{config.parallel.zero_stage}",
        "pipeline": state.passes.layout.summary if isinstance(state.passes, PipelinedPasses) else "none",
    }
    for name, other in state.beside.items():
        assert isinstance(other.model, Decoder)
        trained = "its adapters and head trained" if other.model.adapted else "trained"
        used[f"{name}_model"] = f"{num_parameters(other.model.config) / 1e6:,.1f}M parameters, {trained} beside"
    if model.speculator.kind != "none":
        used["loss"] = f"of {model.speculator.kind} heads; {used['loss']}"
    if config.adapter.name != "none":
        used |= _adapters(config, state, device)
    if model.moe.num_experts:
        used["experts"] = _experts(config, dims, device)
        used["moe_permute"] = "triton" if device.type == "cuda" else "reference"
    if state.fp8 is not None:
        precision = config.precision
        used["linear"] = (
            f"fp8, {precision.fp8_recipe}, gradients {precision.fp8_gradient}, {len(state.fp8.names)} layers"
        )
        used["fp8_inputs"] = state.fp8.producers
        if (gathered := state.fp8.gathered) is not None:
            of_rank = " of rank 0" if dims.pp > 1 else ""
            used["fp8_weights"] = f"{len(gathered.weights)} of {gathered.of}{of_rank} gathered in fp8"
        if model.moe.num_experts:
            used["experts"] += ", bf16"
    return used


def _loss(config: TrainConfig, device: torch.device) -> str:
    used = RECIPES[config.recipe.name].computes_loss(config)
    if used == Recipe.loss_kernel:
        kernel = choose_loss_kernel(config, device.type)
        return used if kernel == "torch" else f"{used}, {kernel}"
    probe = torch.empty(1, dtype=config.precision.compute_dtype, device=device)
    by_kernel = used == DirectPreferenceOptimization.loss_kernel and has_kernel(probe)
    return f"{used}, triton" if by_kernel else used


def _what_travels(config: TrainConfig, dims: ParallelDims) -> str:
    """To experts on other ranks: parallel/expert.py."""
    if config.parallel.ep_buffer:
        return f"buffers ({config.parallel.ep_buffer:g} shares)"
    fixed = config.model.routing.capacity_factor > 0 and dims.cp == 1
    return "buffers (capacity)" if fixed else "rows"
