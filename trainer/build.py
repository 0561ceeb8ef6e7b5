"""From a configuration to the state of a run: model, data parallelism, optimizer and passes, put together once."""

from __future__ import annotations

import torch
import torch.distributed as dist

from kernels.fp8 import ScalingRecipe
from models.decoder import Decoder
from models.fp8 import Fp8Linears, apply_fp8, linears_in_fp8
from models.fp8_producers import apply_producers
from models.init import SCORE_HEAD
from models.invariant import make_batch_invariant
from models.layers.embedding_noise import EmbeddingNoise
from models.layers.router import Router
from models.lora import apply_adapters, learning_rates
from models.registry import build_model
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
from trainer.passes import PlainPasses
from trainer.pipelined import PipelinedPasses, pipeline_layout
from trainer.routing import RoutingMonitor
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
        # Rows of rollouts are as many as it takes to pack them.
        num_sequences=None if config.data.source == "prompts" else config.train.global_batch_size,
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
        ScalingRecipe(precision.fp8_recipe, gradient=FP8_GRADIENTS[precision.fp8_gradient]),
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


def check_loss_runs(config: TrainConfig, device: torch.device) -> None:
    """Raises ValueError where train.loss_kernel=triton asks for a GPU that is not there."""
    if config.train.loss_kernel == "triton" and device.type != "cuda":
        raise ValueError(f"train.loss_kernel=triton needs CUDA, and this runs on {device}; use train.loss_kernel=auto")
