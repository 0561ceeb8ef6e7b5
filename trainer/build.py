"""From a configuration to the state of a run: model, data parallelism, optimizer and passes, put together once."""

from __future__ import annotations

import torch
import torch.distributed as dist

from kernels.fp8 import Recipe
from kernels.grouped_linear import choose_grouped_linear
from models.adapter_config import adapted_layers
from models.config import ModelConfig
from models.decoder import Decoder
from models.flops import num_parameters
from models.fp8 import Fp8Linears, apply_fp8, linears_in_fp8
from models.fp8_producers import apply_producers
from models.init import SCORE_HEAD
from models.invariant import make_batch_invariant
from models.layers.attention import choose_attention
from models.layers.embedding_noise import EmbeddingNoise
from models.layers.mlp import GATED_KERNELS
from models.layers.router import Router
from models.lora import apply_adapters, learning_rates
from models.registry import build_model
from parallel.activation_budget import describe as describe_plan
from parallel.activation_checkpoint import ActivationCheckpoint
from parallel.data import DataParallel
from parallel.dims import ParallelDims
from parallel.fused import fused_parameters
from parallel.mesh import Meshes, groups_in_layers
from parallel.parallelize import BlockOptions, parallelize
from parallel.pipeline.layout import PipelineLayout
from parallel.pipeline.schedules import SPLIT_BACKWARD
from parallel.pipeline.weight_gradients import WeightGradients, defer_weight_gradients
from parallel.precision import FP8_GRADIENTS
from trainer.activations import plan_activations
from trainer.adapter_start import BEGUN
from trainer.config import TrainConfig
from trainer.graphed import GraphedPasses
from trainer.loss import Objective
from trainer.loss_scale import LossScale
from trainer.optim import build_optimizer
from trainer.optim import describe as describe_optimizer
from trainer.passes import PlainPasses
from trainer.pipelined import PipelinedPasses, pipeline_layout
from trainer.recipes import RECIPES
from trainer.recipes.pretrain import Pretrain
from trainer.routing import RoutingMonitor
from trainer.sequence import context_parallelism
from trainer.speculator import build_speculator_state
from trainer.step import Passes, TrainState


def build_state(
    config: TrainConfig, dims: ParallelDims, mesh: Meshes, device: torch.device, objective: Objective
) -> TrainState:
    """The state before its weights have values: fill `TrainState.weights`, then publish them. Collective.

    config: validated, with the model resolved (trainer.validate.finalize). objective: the recipe's; heads have theirs.
    """
    if config.model.speculator.kind != "none":
        return build_speculator_state(config, dims, mesh, device)
    pipeline = pipeline_layout(config.parallel, config.model, seq_len=config.train.seq_len)
    stages = None if pipeline is None else pipeline.of_rank(mesh.batch["pp"].get_local_rank())
    groups = groups_in_layers(mesh, config.parallel)
    with torch.device("meta"):
        model = build_model(config.model, seed=config.train.seed, groups=groups, stages=stages)
        if config.adapter.name != "none":
            apply_adapters(model, config.adapter, config.precision.compute_dtype)
    if config.recipe.neftune_alpha:
        model.embedding_noise = EmbeddingNoise(config.recipe.neftune_alpha, seed=config.train.seed)
    split_backward = pipeline is not None and pipeline.schedule in SPLIT_BACKWARD
    weight_gradients = defer_weight_gradients(model.blocks, at_once=(Router,)) if split_backward else None
    fp8 = _multiply_in_fp8(model, config, device) if config.precision.fp8 else None
    if config.train.batch_invariant:
        make_batch_invariant(model)
    checkpointing = _checkpointing(config)
    plan = plan_activations(model, config, groups, device) if checkpointing.mode == "budget" else {}
    data_parallel = parallelize(
        model,
        mesh,
        config.parallel,
        precision=config.precision,
        blocks=BlockOptions(
            checkpointing,
            config.train.compile_backend if config.train.compile else None,
            in_parts=split_backward,
            of_block={name: choice.checkpoint for name, choice in plan.items()},
        ),
        device=device,
    )
    if fp8 is not None and config.precision.fp8_all_gather:
        fp8.gather(model.blocks, config.precision.compute_dtype, device)
    model.train()
    passes: Passes = GraphedPasses() if config.train.cuda_graphs else PlainPasses()
    if pipeline is not None:
        passes = _pipelined(pipeline, config, mesh, data_parallel, weight_gradients, device)
    fused, begun = fused_parameters(model), dict[str, torch.Tensor]()
    if config.adapter.init == "pissa":
        begun = {
            f"{name}{BEGUN}": torch.empty_like(master)
            for name, master in data_parallel.masters.items()
            if name != SCORE_HEAD
        }
        fused |= {f"{name}{BEGUN}": parts for name, parts in fused.items() if f"{name}{BEGUN}" in begun}
    return TrainState(
        model=model,
        data_parallel=data_parallel,
        optimizer=build_optimizer(
            data_parallel.masters,
            config.optim,
            seed=config.train.seed,
            fused=fused,
            copies=data_parallel.copies,
            first=data_parallel.needed_first,
            lr_factors=learning_rates(config.adapter, data_parallel.masters),
        ),
        loss_scale=LossScale(config.precision, device),
        token_group=mesh.tokens.get_group(),
        device=device,
        grad_clip=config.train.grad_clip,
        objective=objective,
        fused=fused,
        routing=_monitor_routing(model, config, mesh, device) if config.model.moe.num_experts else None,
        fp8=fp8,
        passes=passes,
        stage_group=passes.group if isinstance(passes, PipelinedPasses) else None,
        copies=passes.copies if isinstance(passes, PipelinedPasses) else frozenset(),
        activation_plan=plan,
        begun=begun,
    )


def _pipelined(
    pipeline: PipelineLayout,
    config: TrainConfig,
    mesh: Meshes,
    data_parallel: DataParallel,
    weight_gradients: WeightGradients | None,
    device: torch.device,
) -> PipelinedPasses:
    return PipelinedPasses(
        pipeline,
        mesh=mesh,
        data_parallel=data_parallel,
        weight_gradients=weight_gradients,
        model=config.model,
        dtype=config.precision.compute_dtype,
        device=device,
        sequence_slices=mesh.state["tp"].size() if config.parallel.sequence_parallel else 1,
        trace=config.parallel.pp_trace,
    )


def _checkpointing(config: TrainConfig) -> ActivationCheckpoint:
    """What blocks keep for backward, by the names of the operations that really run."""
    save = config.model.activation_checkpoint_save
    if config.precision.fp8 and "aten.mm" in save:
        save = [*save, "lattice.fp8_matmul"]  # the same, in fp8
    if config.adapter.name != "none" and config.train.compile and {"aten.mm", "aten.addmm"} & set(save):
        save = [*save, "lattice.adapted_linear"]  # one op there (models/adapted_linear.py)
    if config.train.batch_invariant and {"aten.mm", "aten.addmm"} & set(save):
        save = [*save, "lattice.invariant_linear"]
    return ActivationCheckpoint(mode=config.model.activation_checkpoint, save=save)


def _monitor_routing(model: Decoder, config: TrainConfig, mesh: Meshes, device: torch.device) -> RoutingMonitor:
    return RoutingMonitor(
        model,
        config.model,
        global_batch_size=config.train.global_batch_size,
        group=mesh.tokens.get_group(),
        stages=mesh.batch["pp"].get_group() if config.parallel.pp > 1 else None,
        buffered=bool(config.parallel.ep_buffer),
        device=device,
    )


def _multiply_in_fp8(model: Decoder, config: TrainConfig, device: torch.device) -> Fp8Linears:
    """Collective over all ranks."""
    precision = config.precision
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, linears_in_fp8(model.blocks, skip=precision.fp8_skip))
    fp8 = Fp8Linears(
        Recipe(precision.fp8_recipe, gradient=FP8_GRADIENTS[precision.fp8_gradient]),
        names=sorted({name for part in names for name in part}),  # of all stages of a pipeline
        history_length=precision.fp8_amax_history,
        device=device,
    )
    apply_fp8(model.blocks, fp8)
    if precision.fp8_fused:
        fp8.producers = apply_producers(model.blocks, fp8, activation=config.model.activation)
    return fp8


def check_graphs_run(config: TrainConfig, device: torch.device) -> None:
    """Raises ValueError where train.cuda_graphs asks for a GPU that is not there."""
    if config.train.cuda_graphs and device.type != "cuda":
        raise ValueError(f"train.cuda_graphs=true needs CUDA, and this runs on {device}; use train.cuda_graphs=false")


def check_fp8_runs(config: TrainConfig, device: torch.device) -> None:
    """Raises ValueError where precision.compute=fp8 asks for tensor cores that a GPU does not have."""
    if config.precision.fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"precision.compute=fp8 needs a GPU of compute capability 8.9 or above, and {torch.cuda.get_device_name()} "
            "has less; use precision.compute=bf16"
        )


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


def _gated(model: ModelConfig, device: torch.device, *, compiled: bool) -> str:
    """What multiplies a gated network's halves, of the blocks that are no mixtures of experts."""
    if not model.gated_mlp:
        return "none"
    kernel = compiled and model.fused_projections and device.type == "cuda" and model.activation in GATED_KERNELS
    return "triton" if kernel else "torch"


def implementations(config: TrainConfig, dims: ParallelDims, state: TrainState, device: torch.device) -> dict[str, str]:
    """What really computes each part of a step, for run.json."""
    model, train = config.model, config.train
    used = {
        "attention": attention_used(config, device)
        + (", gradients alone; forward: paged, batch-invariant" if state.model.batch_invariant else ""),
        "loss": _loss(config),
        "projections": _projections(model, dims, state),
        "gated_mlp": _gated(model, device, compiled=train.compile),
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
        used[f"{name}_model"] = f"{num_parameters(other.model.config) / 1e6:,.1f}M parameters, trained beside"
    if model.speculator.kind != "none":
        used["loss"] = f"of {model.speculator.kind} heads; {used['loss']}"
    if config.adapter.name != "none":
        adapter, frozen = config.adapter, config.adapter.quantize
        kind = "dora" if adapter.dora else "rslora" if adapter.rank_stabilized else "lora"
        count = len(adapted_layers(adapter, model))
        kept = config.precision.compute if frozen == "none" else f"{frozen}, others {config.precision.compute}"
        used["adapters"] = f"{kind} of rank {adapter.rank} on {count} layers; frozen weights in {kept}"
    if model.moe.num_experts:
        sizes = (model.hidden_size, model.moe.intermediate_size // dims.tp)
        used["experts"] = choose_grouped_linear(device, config.precision.compute_dtype, *sizes)
        used["moe_permute"] = "triton" if device.type == "cuda" else "reference"
        if dims.ep > 1:
            used["experts"] += f", all_to_all({dims.ep}) of {_what_travels(config, dims)}"
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


def _loss(config: TrainConfig) -> str:
    kernel = RECIPES[config.recipe.name].computes_loss(config)
    compiled = kernel == Pretrain.loss_kernel and config.train.compiles_loss
    return kernel + (", compiled" if compiled else "")


def _what_travels(config: TrainConfig, dims: ParallelDims) -> str:
    """To experts on other ranks: parallel/expert.py."""
    if config.parallel.ep_buffer:
        return f"buffers ({config.parallel.ep_buffer:g} shares)"
    fixed = config.model.routing.capacity_factor > 0 and dims.cp == 1
    return "buffers (capacity)" if fixed else "rows"
