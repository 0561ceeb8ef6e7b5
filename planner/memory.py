"""Memory of every distinct rank: exact state, modelled activations and workspaces, and the moment when most is held.

The peak is the largest of three moments:

    loss       all activations kept, and the workspace of the loss
    backward   the last block's backward: what it keeps is free again and what it computed again is there, with the
               gradients on their way and what communication holds
    end        the first block's backward: gradients of all parameters, and nothing kept any more

In the first two, stages 2 and 3 have no gradients yet where a step is one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.activations import block_bytes, layers_of, loss_bytes, most_kept
from planner.buffers import buffer_bytes
from planner.job import Job
from planner.shapes import Parameter, parameters_of
from planner.state import Coordinates, RankState, rank_states
from planner.traffic import bytes_less_in_fp8


@dataclass(frozen=True)
class RankMemory:
    """Of ranks that hold the same. Bytes."""

    state: RankState
    buffers: int  # of the model
    activations: float  # kept between forward and backward, at most
    loss: float  # workspace; 0 where there is no head
    communication: float  # gathered parameters, whole gradients and keys under way
    recomputation: float  # a block in its own backward
    peak: float

    @property
    def at(self) -> Coordinates:
        return self.state.example


def memory_of_ranks(job: Job, *, largest: bool = False) -> list[RankMemory]:
    """Of every distinct rank, or of the one of each pipeline stage that holds most."""
    kept = most_kept(job)
    return [_memory(job, state, kept[state.example.pp]) for state in rank_states(job, largest=largest)]


def _memory(job: Job, state: RankState, kept: float) -> RankMemory:
    stages = job.stages_of(state.example.pp)
    loss = loss_bytes(job) if any(stage.is_last for stage in stages) else 0.0
    layers = [layer for stage in stages for layer in layers_of(job, stage)]
    last = block_bytes(job, max(layers))
    units = _units(job, state.example.pp)
    root, under_way = _communication(job, units)
    held = state.bytes
    offloaded = job.parallel.cpu_offload
    buffers = buffer_bytes(job, state.example.pp)
    on_device = buffers + (0 if offloaded else held.total)
    sharded = job.parallel.zero_stage >= 2 and job.dims.dp_shard * job.dims.cp > 1
    early = on_device - (held.gradients if sharded and len(job.sequences) == 1 and not offloaded else 0)
    recomputed = last.all + last.gradients
    at_loss = early + kept + root + loss
    at_backward = early + kept - last.kept + recomputed + root + under_way
    at_end = on_device + recomputed + root + under_way
    return RankMemory(state, buffers, kept, loss, root + under_way, recomputed, max(at_loss, at_backward, at_end))


@dataclass(frozen=True)
class _Units:
    """Elements that this rank computes with, of what is gathered and reduced together."""

    outside: int  # of all blocks
    head: int  # of the output layer, or the table it shares
    block: int  # of the largest
    less: int  # bytes of its gathered weights that fp8 saves


def _units(job: Job, pp_rank: int) -> _Units:
    parameters = parameters_of(job.model, job.stages_of(pp_rank), tp=job.dims.tp)

    def elements(some: Mapping[Parameter, int]) -> int:
        return sum(n * p.local(tp=(job.dims.tp, 0), ep=(job.dims.ep, 0)).numel() for p, n in some.items())

    outside = {p: n for p, n in parameters.items() if not p.name.startswith("blocks.")}
    tables = [elements({p: 1}) for p in outside if p.name.startswith(("head.", "embedding."))]
    first_layer = max(layers_of(job, job.stages_of(pp_rank)[-1]))
    block = _of_block(job, first_layer)
    return _Units(elements(outside), max(tables, default=0), elements(block), bytes_less_in_fp8(job, block))


def _of_block(job: Job, layer: int) -> Mapping[Parameter, int]:
    """Parameters of one layer of its kind."""
    moe = job.model.moe.in_layer(layer)
    every = parameters_of(job.model, None, tp=job.dims.tp)
    alike = [n for n in range(job.model.num_layers) if job.model.moe.in_layer(n) == moe]
    others = job.model.num_layers - len(alike)
    found = {}
    for parameter, count in every.items():
        plain = ".mlp.gate" in parameter.name or ".mlp.up" in parameter.name or ".mlp.down" in parameter.name
        routed = any(part in parameter.name for part in (".experts.", ".router.", ".shared."))
        if not parameter.name.startswith("blocks.") or (moe and plain) or (not moe and routed):
            continue
        found[parameter] = max(1, round(count / (len(alike) if plain or routed else len(alike) + others)))
    return found


def _communication(job: Job, units: _Units) -> tuple[float, float]:
    """What stays gathered from forward on, and what gathered blocks, whole gradients and keys take in backward."""
    compute, reduce = job.precision.compute_dtype.itemsize, job.precision.reduce_dtype.itemsize
    num_shards = job.dims.dp_shard * job.dims.cp
    keys = 0.0
    if job.dims.cp_ring > 1:
        assert job.model.num_kv_heads is not None  # resolved
        assert job.model.head_dim is not None
        features = max(job.model.num_kv_heads / job.dims.tp, 1) * job.model.head_dim
        keys = 4.0 * job.tokens * features * compute  # of two ranks, keys and values
    if job.parallel.zero_stage == 3:
        blocks = 3 * (compute * units.block - units.less) + 2 * reduce * units.block  # gathered; gradients
        return compute * units.outside, compute * units.head + blocks + keys
    if job.parallel.zero_stage == 2 and num_shards > 1:
        cast = reduce if reduce != compute else 0
        return 0.0, (compute + cast) * (units.head + units.block) + keys
    return 0.0, compute * units.head + keys
