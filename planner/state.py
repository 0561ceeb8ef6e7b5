"""Bytes of training state on every rank, exactly: what `parallel.data.state_bytes` measures of a running step.

Between backward and update, with P parameters of which a rank computes with p (after tp, ep and pp), of which it owns
the part o of N (ZeRO's shard axis), and dtypes c (compute), m (master), r (reduction), in bytes:

    stage   parameters   gradients        masters             AdamW
    0       p c          p r [+ o m]      p m, 0 if m is c    moments of p
    1       p c          p r [+ o m]      o m, 0 if m is c    moments of o
    2       p c          o r [+ o m]      o m, 0 if m is c    moments of o
    3       o m          o m              0                   moments of o

[+ o m]: where r is not m, widened for the update. Rows of a parameter are cut into N parts of ceil(rows / N), the last
ones shorter or empty; buffers of gradients, and stage 3's parameters, are padded to whole parts. Moments in int8 are a
byte an element and an fp32 scale for each 256 of a row, of matrices whose rows are such blocks; those of others fp32.
Muon keeps one momentum of each hidden matrix in m.

A parameter that is not trained (adapters beside it are) has p c at stages 0 to 2 and o c at stage 3, and nothing else.
So has each of a model beside the trained one, at stage 3 whatever the run's is (trainer/frozen.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from parallel.buckets import cut_dim
from parallel.parallelize import dim_of_shard
from parallel.tensor import chunk_bounds
from planner.job import Job
from planner.shapes import Parameter

BLOCK = 256
"""Elements of a row that share a scale in 8-bit moments (kernels/adamw/quantized.py, which planner may not import)."""
STEP_BYTES = 4
"""The optimizer's count of updates, fp32."""
MOMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class StateBytes:
    """Of one rank."""

    parameters: int = 0  # what the model computes with
    gradients: int = 0
    master: int = 0  # copies that are updated, where these are not the parameters
    optimizer: int = 0
    num_parameters: int = 0  # that the rank computes with, a gathered one counted whole
    num_owned: int = 0  # of those, that it updates
    beside: int = 0  # of a reference or teacher; on the host or on the device

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(*(a + b for a, b in zip(self.values, other.values, strict=True)))

    def times(self, count: int) -> StateBytes:
        return StateBytes(*(count * value for value in self.values))

    @property
    def values(self) -> tuple[int, ...]:
        known = (self.parameters, self.gradients, self.master, self.optimizer)
        return *known, self.num_parameters, self.num_owned, self.beside

    @property
    def total(self) -> int:
        """Of the model that is trained."""
        return self.parameters + self.gradients + self.master + self.optimizer


@dataclass(frozen=True)
class Coordinates:
    """Of a rank, without its replica, on which no byte depends."""

    pp: int
    shard: int  # over dp_shard x cp
    tp: int


@dataclass(frozen=True)
class RankState:
    """What some ranks hold alike."""

    bytes: StateBytes
    example: Coordinates  # of the first of them
    count: int  # of all ranks, replicas included


def rank_states(job: Job, *, largest: bool = False) -> list[RankState]:
    """Of every distinct rank, by pipeline stage, the largest first; or only that one, the first of each stage."""
    found: list[RankState] = []
    known: dict[object, StateBytes] = {}
    for pp in range(job.dims.pp):
        parameters = job.parameters(pp)
        if largest:
            at, which = Coordinates(pp, 0, 0), frozenset(parameters.items())
            if which not in known:
                known[which] = state_of_rank(job, parameters, at)
            found.append(RankState(known[which], at, 1))
            continue
        alike: dict[StateBytes, list[Coordinates]] = {}
        beside = None if job.beside is None else job.beside.parameters(pp)
        for at in _coordinates(job, pp):
            state = state_of_rank(job, parameters, at)
            if job.beside is not None and beside is not None:
                state = replace(state, beside=state_of_rank(job.beside, beside, at).parameters)
            alike.setdefault(state, []).append(at)
        for state, places in sorted(alike.items(), key=lambda pair: -pair[0].total):
            found.append(RankState(state, places[0], len(places) * job.dims.dp_replicate))
    return found


def state_of_rank(job: Job, parameters: Mapping[Parameter, int], at: Coordinates) -> StateBytes:
    """Of the rank at these coordinates, whose stages have these parameters, so many of each."""
    total = StateBytes(optimizer=STEP_BYTES)
    for parameter, count in parameters.items():
        total += _of_parameter(job, parameter, at).times(count)
    return total


def _coordinates(job: Job, pp: int) -> Iterator[Coordinates]:
    for shard in range(job.dims.dp_shard * job.dims.cp):
        for tp in range(job.dims.tp):
            yield Coordinates(pp, shard, tp)


def _of_parameter(job: Job, parameter: Parameter, at: Coordinates) -> StateBytes:
    dims = job.dims
    spread = parameter.is_expert and dims.ep > 1
    num_shards, shard = dims.dp_shard * dims.cp, at.shard
    ep = (1, 0)
    if spread:
        num_shards, (shard, ep_rank) = dims.expert_shard, divmod(at.shard, dims.ep)
        ep = (dims.ep, ep_rank)
    local = parameter.local(tp=(dims.tp, at.tp), ep=ep)
    if job.parallel.zero_stage == 3:
        return _fully_sharded(job, parameter, local, num_shards, shard, spread=spread)
    if not (job.trained and parameter.is_trained):
        return StateBytes(local.numel() * job.precision.compute_dtype.itemsize, num_parameters=local.numel())
    return _whole_parameters(job, parameter, local, num_shards if job.parallel.zero_stage else 1, shard)


def _whole_parameters(job: Job, parameter: Parameter, local: torch.Size, num_shards: int, shard: int) -> StateBytes:
    """Stages 0 to 2 (parallel/zero.py)."""
    shard = shard if num_shards > 1 else 0
    compute, master, reduce = _itemsizes(job)
    dim = cut_dim(local, num_shards)
    owned = _cut(local, dim, num_shards, shard)
    padded = -(-local[dim] // num_shards) * (local.numel() // local[dim])
    scatters = job.parallel.zero_stage == 2 and num_shards > 1
    gradients = padded * reduce * (1 if scatters else num_shards)
    if job.precision.reduce_dtype != job.precision.master_dtype:
        gradients += owned.numel() * master
    # Rows of each matrix of a stack are not contiguous, and so no view that an optimizer could walk.
    is_view = job.precision.master_dtype == job.precision.compute_dtype and (dim == 0 or local[0] == 1)
    return StateBytes(
        parameters=local.numel() * compute,
        gradients=gradients,
        master=0 if is_view else owned.numel() * master,
        optimizer=_moments(job, parameter, owned),
        num_parameters=local.numel(),
        num_owned=owned.numel(),
    )


def _fully_sharded(
    job: Job, parameter: Parameter, local: torch.Size, num_shards: int, shard: int, *, spread: bool
) -> StateBytes:
    """Stage 3: fully_shard pads what it keeps and what it reduces to whole parts."""
    compute, master, _ = _itemsizes(job)
    cut = {dim for dim in (parameter.tp_dim if job.dims.tp > 1 else None, 0 if spread else None) if dim is not None}
    dim = dim_of_shard(parameter.shape, num_shards, cut=cut, num_local=local[0])
    elements = -(-local[dim] // num_shards) * (local.numel() // local[dim])
    if not (job.trained and parameter.is_trained):
        return StateBytes(elements * compute, num_parameters=local.numel())
    padded, owned = elements * master, _cut(local, dim, num_shards, shard)
    return StateBytes(padded, padded, 0, _moments(job, parameter, owned), local.numel(), owned.numel())


def _cut(shape: torch.Size, dim: int, num_ranks: int, rank: int) -> torch.Size:
    first, last = chunk_bounds(shape[dim], num_ranks, rank)
    return torch.Size((*shape[:dim], last - first, *shape[dim + 1 :]))


def _moments(job: Job, parameter: Parameter, owned: torch.Size) -> int:
    if job.optimizer == "muon" and parameter.is_hidden_matrix:
        return owned.numel() * job.precision.master_dtype.itemsize
    if job.state_dtype == "int8":
        if len(parameter.shape) < 2 or parameter.shape[-1] % BLOCK:
            return 2 * 4 * owned.numel()
        return 2 * (owned.numel() + 4 * math.prod((*owned[:-1], owned[-1] // BLOCK)))
    return 2 * MOMENT_BYTES[job.state_dtype] * owned.numel()


def _itemsizes(job: Job) -> tuple[int, int, int]:
    precision = job.precision
    return precision.compute_dtype.itemsize, precision.master_dtype.itemsize, precision.reduce_dtype.itemsize


def count_parameters(parameters: Counter[Parameter]) -> int:
    """Elements of whole parameters."""
    return sum(count * parameter.shape.numel() for parameter, count in parameters.items())
