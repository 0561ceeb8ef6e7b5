"""parallelize: everything that is applied to a model from outside, in the one order that works.

    activation checkpointing   rewrites block.forward
    compile                    compiles that, one graph per block
    offload                    hooks around the compiled block
    data parallelism           fully_shard on meta parameters, or hooks on real ones; then memory is allocated

A model is built on the meta device. After `parallelize` every parameter has memory on its device, sharded where the
layout says so, and unspecified values: fill `masters`, then call `publish`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from parallel.activation_checkpoint import ActivationCheckpoint, apply_activation_checkpoint, apply_offload
from parallel.data import DataParallel, is_spread_over_ep
from parallel.dims import ParallelConfig
from parallel.fully_sharded import FullyShardedDataParallel
from parallel.mesh import Meshes
from parallel.precision import PrecisionConfig
from parallel.regions import local_tensor
from parallel.zero import WholeParameters


@dataclass(frozen=True)
class BlockOptions:
    """What happens to each block before data parallelism."""

    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile_backend: str | None = None  # None: not compiled
    in_parts: bool = False  # something in a block stays outside of compiled graphs
    of_block: Mapping[str, ActivationCheckpoint] = field(default_factory=dict)  # budget: by name in model.blocks


def parallelize(
    model: nn.Module,
    mesh: Meshes,
    config: ParallelConfig,
    *,
    precision: PrecisionConfig,
    blocks: BlockOptions,
    device: torch.device,
) -> DataParallel:
    """Apply the layout to `model` (on meta, with a ModuleList `blocks`), in place; the interface to its state."""
    # Recomputation inside a graph with tensor-parallel parameters fails: AOTAutograd (2.11, 2.13) then tries to save
    # their device mesh for backward. Around the graph it works; what the graph saves is dropped and made again. The
    # same where attention over cp or split backward part the graph: what contains both would not be compiled at all.
    in_parts = blocks.in_parts or mesh.batch["cp"].size() > 1
    outside = mesh.state["tp"].size() > 1 or in_parts
    if blocks.compile_backend is not None:
        # Blocks of one kind share their graphs, but a constant of a layer (the site of its dropout, a window) makes one
        # of its own. Beyond the limit, 8, one graph is an error and several fall back to eager code.
        limit = 8 * len(list(model.blocks.children()))  # type: ignore[union-attr]
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
        dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, limit)
    for name, block in model.blocks.named_children():  # type: ignore[union-attr]
        checkpointing = blocks.of_block.get(name, blocks.activation_checkpoint)
        around = outside and checkpointing.mode in ("full", "offload")
        if not around:
            apply_activation_checkpoint(block, checkpointing)
        if blocks.compile_backend is not None:
            compile_block(block, backend=blocks.compile_backend, in_parts=in_parts)
        if around:
            apply_activation_checkpoint(block, checkpointing)
        if checkpointing.mode == "offload":
            apply_offload(block, pin_memory=device.type == "cuda")
    if config.zero_stage == 3:
        return _shard_fully(model, mesh, config, precision=precision, device=device)
    model.to(precision.compute_dtype)
    model.to_empty(device=device)
    return WholeParameters(
        model,
        mesh=mesh,
        zero_stage=config.zero_stage,
        units=forward_units(model),
        master_dtype=precision.master_dtype,
        reduce_dtype=precision.reduce_dtype,
        bucket_mb=config.bucket_mb,
    )


def compile_block(block: nn.Module, *, backend: str, in_parts: bool = False) -> None:
    """Compile block.forward to one graph, or to those before and behind what stays eager in it (`in_parts`).

    Hooks on the block stay outside the graph, parameter names as they are. Inside `eager_blocks` it runs as before.
    """
    # dynamic=False: a graph per shape. Of a second shape torch would make one graph for any, find that for the first
    # shape as well, and a checkpoint around the block would be recomputed by another graph than it was made by.
    compiled = torch.compile(block.forward, backend=backend, fullgraph=not in_parts, dynamic=False)
    block.forward = block.compiled_forward = _Forward(eager=block.forward, compiled=compiled)  # type: ignore[assignment]


class _Forward:
    """Of a compiled block, which something else may be wrapped around."""

    def __init__(self, *, eager: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        self.chosen = self.compiled = compiled
        self.eager = eager

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.chosen(*args, **kwargs)


@contextmanager
def eager_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, a model's compiled blocks run as they were: for passes of which each has a shape, and would make a graph,
    of its own. Whoever runs these blocks meanwhile runs them so, in any thread; other models are not concerned."""
    blocks = [block for block in model.blocks.children() if hasattr(block, "compiled_forward")]  # type: ignore[union-attr]
    forwards: list[Any] = [block.compiled_forward for block in blocks]
    before = [forward.chosen for forward in forwards]
    for forward in forwards:
        forward.chosen = forward.eager
    try:
        yield
    finally:
        for forward, chosen in zip(forwards, before, strict=True):
            forward.chosen = chosen


def forward_units(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Modules in forward order with the names of the parameters that must be in place when each runs."""
    names = [name for name, _ in model.named_parameters()]
    tail_module = getattr(model, "final_norm", None)
    in_tail = [n for n in names if n.startswith(("final_norm.", "head."))] if tail_module is not None else []
    units: list[tuple[nn.Module, list[str]]] = []
    units.append((model, [n for n in names if not n.startswith("blocks.") and n not in in_tail]))
    for layer, block in model.blocks.named_children():  # type: ignore[union-attr]
        units.append((block, [n for n in names if n.startswith(f"blocks.{layer}.")]))
    if tail_module is not None:
        units.append((tail_module, in_tail))
    return units


def _shard_fully(
    model: nn.Module, mesh: Meshes, config: ParallelConfig, *, precision: PrecisionConfig, device: torch.device
) -> DataParallel:
    """ZeRO-3 through FSDP2: one group per block, one for embedding, final norm and head together.

    Experts that are spread over ep are a group of their own, over the ranks that hold the same, gathered with their
    block.

    The last group stays gathered from the root's forward to its backward, so a tied table and a loss that is computed
    from the head's weight inside the root's forward see one gathered tensor.
    """
    _convert(model, trained=precision.master_dtype, frozen=precision.compute_dtype)
    replicated = mesh.state["dp_replicate"].size() > 1
    pipelined = mesh.state["pp"].size() > 1
    options: dict[str, Any] = {
        # Inputs stay as they are: casting them would round the fp32 rotary tables that every block is given.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=precision.compute_dtype, reduce_dtype=precision.reduce_dtype, cast_forward_inputs=False
        ),
        "reshard_after_forward": True,
    }
    if config.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    with_replicas = replicated and not pipelined
    over = _shard_options(mesh.state, "shard", with_replicas=with_replicas)
    for block in model.blocks:  # type: ignore[union-attr]
        experts = next((module for module in block.modules() if _all_spread_over_ep(module)), None)
        if experts is not None:
            assert mesh.experts is not None
            fully_shard(experts, **options, **_shard_options(mesh.experts, "expert_shard", with_replicas=with_replicas))
            _run_hooks_around(block, experts)
        fully_shard(block, **options, **over)
    fully_shard(model, **(options | over | {"reshard_after_forward": False}))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sum, do not average. The forced SUM keeps gloo (and NCCL's zero-copy path) usable: the default would ask
            # for a reduction that multiplies first, which gloo does not have.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=torch.device("cpu") if config.cpu_offload else device)
    assert isinstance(model, FSDPModule)
    return FullyShardedDataParallel(
        model,
        mesh=mesh,
        replicas=mesh.state["dp_replicate"] if replicated and pipelined else None,
        reduce_dtype=precision.reduce_dtype,
    )


def _convert(model: nn.Module, *, trained: torch.dtype, frozen: torch.dtype) -> None:
    """Give parameters, on meta, the dtypes they are kept in: what no update changes needs no more than is computed
    with."""
    model.to(trained)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad and frozen != trained:
                setattr(module, name, nn.Parameter(parameter.to(frozen), requires_grad=False))


def _run_hooks_around(block: nn.Module, experts: nn.Module) -> None:
    """Gather and free experts with their block, not in the middle of its forward.

    There the hooks of fully_shard would break its graph in two, and selective checkpointing would record them: it
    expects the same ops in the same order when it recomputes, and what is gathered already is not gathered again.
    """
    for pre_hook in experts._forward_pre_hooks.values():
        block.register_forward_pre_hook(pre_hook, with_kwargs=True)
    for hook in experts._forward_hooks.values():
        block.register_forward_hook(hook)
    for hooks in (experts._forward_pre_hooks, experts._forward_pre_hooks_with_kwargs, experts._forward_hooks):
        hooks.clear()


def _all_spread_over_ep(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(map(is_spread_over_ep, parameters))


def _shard_options(view: DeviceMesh, axis: str, *, with_replicas: bool) -> dict[str, Any]:
    """Arguments of fully_shard that say over which ranks of a view, and how, parameters are cut."""
    size = view[axis].size()
    return {
        "mesh": view["dp_replicate", axis] if with_replicas else view[axis],
        "shard_placement_fn": lambda parameter: _shard_dim(parameter, size),
    }


def _shard_dim(parameter: nn.Parameter, shard_size: int) -> Shard | None:
    """What fully_shard is told: the dim it cuts, None for 0."""
    cut = (
        {place.dim for place in parameter.placements if isinstance(place, Shard)}
        if isinstance(parameter, DTensor)
        else set()
    )
    num_local = local_tensor(parameter).shape[0] if parameter.ndim else 1
    dim = dim_of_shard(parameter.shape, shard_size, cut=cut, num_local=num_local)
    return Shard(dim) if dim else None


def dim_of_shard(shape: torch.Size, shard_size: int, *, cut: Collection[int], num_local: int) -> int:
    """The dim fully_shard cuts of a parameter: 0, or one that divides evenly where that is better.

    shape: whole. cut: dims that tp and ep cut. num_local: what these leave of dim 0. Two cuts of one dim are right as
    well, but torch's own full_tensor and redistribute do not know them when uneven. And there are few experts: ranks
    above their number would hold nothing.
    """
    even = [dim for dim in range(1, len(shape)) if dim not in cut and shape[dim] % shard_size == 0]
    uneven_stack = len(shape) == 3 and num_local % shard_size
    return even[0] if even and (uneven_stack or (len(shape) == 2 and 0 in cut)) else 0
