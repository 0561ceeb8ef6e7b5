"""Bytes that layers send over tp, cp and ep while they compute: of each axis, what planner/traffic.py says.

T tokens of a step on a rank, L layers of width D on it. A layer has two branches, attention and MLP (experts).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from planner.activations import CHUNK_TOKENS, layers_of
from planner.job import Job
from planner.shapes import Parameter, parameters_of

STATISTICS = 4 * 4
"""Bytes of a token that the loss adds up over the words of all ranks, in fp32."""


@dataclass(frozen=True)
class Transfer:
    """One collective over one axis, in all of a step, sent by a rank."""

    axis: str
    collective: str
    bytes: float
    calls: int
    in_layers: bool = False  # computation of the same layer waits for it
    at_end: bool = False  # between backward and the end of the update: nothing hides it


def sent(num_bytes: float, num_ranks: int) -> float:
    """Of a buffer, by each of so many ranks, in an all-gather, a reduce-scatter or an all-to-all."""
    return num_bytes * (num_ranks - 1) / num_ranks


def in_layers(job: Job, pp_rank: int) -> list[Transfer]:
    """Of a rank with these stages, all but messages between stages."""
    model, dims = job.model, job.dims
    layers = [layer for stage in job.stages_of(pp_rank) for layer in layers_of(job, stage)]
    again = 1 if model.activation_checkpoint in ("full", "offload", "selective") else 0  # forward is run once more
    found = _tensor(job, pp_rank, len(layers), again) if dims.tp > 1 else []
    if dims.cp > 1:
        found += _context(job, len(layers), again)
    if dims.ep > 1:
        experts = sum(model.moe.in_layer(layer) for layer in layers)
        size = job.precision.compute_dtype.itemsize
        rows = _tokens(job) * model.moe.top_k * (job.parallel.ep_buffer or 1.0) * model.hidden_size * size
        calls = (4 + 2 * again) * experts * len(job.sequences)
        found.append(Transfer("ep", "all_to_all", (4 + 2 * again) * sent(rows, dims.ep) * experts, calls, True))
    return found


def _tokens(job: Job) -> int:
    """Of a step."""
    return sum(job.sequences) * job.seq_len // job.dims.cp


# ---- tp


@dataclass(frozen=True)
class _Sums:
    """Collectives on activations of a token in a step: their number, and the features that they move."""

    calls: int
    features: int

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.calls + other.calls, self.features + other.features)

    def times(self, number: int) -> _Sums:
        return _Sums(number * self.calls, number * self.features)


def _tensor(job: Job, pp_rank: int, num_layers: int, again: int) -> list[Transfer]:
    model, stages, tp = job.model, job.stages_of(pp_rank), job.dims.tp
    is_last = any(stage.is_last for stage in stages)
    heads = 1 + model.mtp.depth if is_last else 0
    tables = any(stage.is_first for stage in stages) + (model.mtp.depth if is_last else 0)
    stream, enters = _Sums(1, model.hidden_size), _entering(job)
    entered = enters.times(num_layers) + stream.times(heads)  # gathered in forward, summed in backward
    left = stream.times(2 * num_layers + tables)  # the other way round
    left_again = stream.times(again * num_layers * _sums_run_again(job))
    summed = left + entered + left_again
    if job.parallel.sequence_parallel:
        gathered = entered + left + enters.times(again * num_layers)
        found = [_of_stream(job, "all_gather", gathered), _of_stream(job, "reduce_scatter", summed)]
    else:
        found = [_of_stream(job, "all_reduce", summed)]
    found.append(_partial_gradients(job, parameters_of(model, stages, tp=tp)))
    statistics = 2 * sent(_tokens(job) * STATISTICS * heads, tp)
    chunks = len(job.sequences) * heads * math.ceil(job.tokens / CHUNK_TOKENS)
    return [*found, Transfer("tp", "all_reduce", statistics, chunks, True)]


def _of_stream(job: Job, collective: str, sums: _Sums) -> Transfer:
    whole = _tokens(job) * sums.features * job.precision.compute_dtype.itemsize
    times = 2 if collective == "all_reduce" else 1
    return Transfer("tp", collective, times * sent(whole, job.dims.tp), sums.calls * len(job.sequences), True)


def _entering(job: Job) -> _Sums:
    """What a layer's two branches gather: latent attention those of its keys, and of queries if it has any."""
    mla, D = job.model.mla, job.model.hidden_size
    if not mla.kv_rank:
        return _Sums(2, 2 * D)
    return _Sums(3, D + (mla.q_rank or D) + mla.kv_rank + mla.rope_dim)


def _sums_run_again(job: Job) -> int:
    """Of the two sums that leave a layer: the last, whose result no gradient needs, is left out but where a compiled
    graph is run as a whole (parallel/parallelize.py), or something comes behind it."""
    whole = job.compiled and job.model.activation_checkpoint != "selective"
    return 2 if whole or not job.model.norm_first or job.model.dropout else 1


def _partial_gradients(job: Job, parameters: Mapping[Parameter, int]) -> Transfer:
    """Of what is whole on every rank, but sees other tokens or heads on each: its gradient is summed in every
    micro-batch, in the dtype of computation."""
    elements = calls = 0
    for parameter, count in parameters.items():
        partial = parameter.sees_own_heads or job.parallel.sequence_parallel
        if parameter.tp_dim is None and partial:
            elements += count * parameter.shape.numel()
            calls += count
    micro_batches = len(job.sequences)
    whole = elements * job.precision.compute_dtype.itemsize * micro_batches
    return Transfer("tp", "all_reduce", 2 * sent(whole, job.dims.tp), calls * micro_batches, True)


# ---- cp


def _context(job: Job, num_layers: int, again: int) -> list[Transfer]:
    """Ulysses repeats keys and values until its ranks divide their heads; a ring between its groups has them so."""
    model, dims = job.model, job.dims
    assert model.num_kv_heads is not None  # resolved
    assert model.head_dim is not None
    assert model.value_dim is not None
    width, tokens = model.head_dim + model.value_dim, _tokens(job) * num_layers
    kv_heads = math.lcm(max(model.num_kv_heads // dims.tp, 1), dims.cp_ulysses)
    size, passes = job.precision.compute_dtype.itemsize, num_layers * len(job.sequences)
    found = []
    if (n := dims.cp_ring) > 1:
        keys = tokens * kv_heads * width
        wide = keys * max(size, 4)  # gradients are added up in fp32
        if job.parallel.cp_method == "allgather":
            gathers = (1 + again) * passes
            found.append(Transfer("cp", "all_gather", (1 + again) * (n - 1) * keys * size, gathers, True))
            found.append(Transfer("cp", "reduce_scatter", (n - 1) * wide, passes, True))
        else:
            messages = (2 + again) * (n - 1)
            moved = messages * keys * size + n * wide
            found.append(Transfer("cp", "send_receive", moved, (messages + n) * passes, True))
    if dims.cp_ulysses > 1:
        heads = model.num_heads / dims.tp + kv_heads
        one_way = sent(tokens * heads * width * size, dims.cp_ulysses)
        found.append(Transfer("cp", "all_to_all", (2 + again) * one_way, 4 * (2 + again) * passes, True))
    return found
