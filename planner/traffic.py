"""Bytes that a rank sends in a step, by axis and collective.

Of a buffer of n bytes over N ranks an all-gather, reduce-scatter or all-to-all sends n (N - 1) / N, an all-reduce twice
that (ring algorithms; NCCL's "bus bandwidth" is these bytes over time). With M micro-batches:

    shard       stage 1: gradients reduce-scattered and parameters gathered once; 2: gradients in every micro-batch;
                3: parameters of blocks gathered in forward and backward of every micro-batch, others once; gradients
                in each
    replicas    what is left of gradients all-reduced once; stage 0: whole gradients
    tp          of a block, two sums of the residual stream in forward and two in backward: all-reduces, or with
                sequence parallelism gathers and scatters, of which backward gathers what forward scattered
    cp          ring and allgather: keys and values forward, twice that backward; ulysses: q, k, v and output, both ways
    ep          rows to their experts and back, both ways
    pp          hidden states, and their gradients, between stages
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.activations import layers_of
from planner.job import Job
from planner.shapes import Parameter, parameters_of


@dataclass(frozen=True)
class Transfer:
    """One collective over one axis, in all of a step, sent by a rank."""

    axis: str
    collective: str
    bytes: float
    calls: int
    in_layers: bool = False  # computation of the same layer waits for it


def traffic(job: Job, pp_rank: int = 0) -> list[Transfer]:
    """Of a rank with these stages."""
    found = [*_data_parallel(job, pp_rank), *_in_layers(job, pp_rank), *_pipeline(job, pp_rank)]
    return [transfer for transfer in found if transfer.bytes]


def plain_ddp_bytes(job: Job) -> float:
    """What one all-reduce of all gradients over all ranks would send, with the whole model on each."""
    elements = sum(count * parameter.shape.numel() for parameter, count in parameters_of(job.model, None, tp=1).items())
    return 2 * _sent(elements * job.precision.reduce_dtype.itemsize, job.dims.world_size)


def _sent(num_bytes: float, num_ranks: int) -> float:
    return num_bytes * (num_ranks - 1) / num_ranks


def local_elements(job: Job, pp_rank: int) -> tuple[int, int]:
    """That a rank computes with: all but experts that are spread over ep, and those."""
    tp, ep = (job.dims.tp, 0), (job.dims.ep, 0)
    plain = spread = 0
    for parameter, count in parameters_of(job.model, job.stages_of(pp_rank), tp=job.dims.tp).items():
        elements = count * parameter.local(tp=tp, ep=ep).numel()
        if parameter.is_expert and job.dims.ep > 1:
            spread += elements
        else:
            plain += elements
    return plain, spread


def bytes_less_in_fp8(job: Job, parameters: Mapping[Parameter, int]) -> int:
    """What one gather of these parameters does not move, because they travel in fp8."""
    num_shards, compute = job.dims.dp_shard * job.dims.cp, job.precision.compute_dtype.itemsize
    return sum(
        count * parameter.shape.numel() * (compute - 1)
        for parameter, count in parameters.items()
        if parameter.travels_in_fp8(job.precision, num_shards)
    )


def _data_parallel(job: Job, pp_rank: int) -> list[Transfer]:
    dims, stage = job.dims, job.parallel.zero_stage
    compute, reduce = job.precision.compute_dtype.itemsize, job.precision.reduce_dtype.itemsize
    found = []
    plain, spread = local_elements(job, pp_rank)
    shard = dims.dp_shard * dims.cp
    for elements, num_shards, suffix in ((plain, shard, ""), (spread, dims.expert_shard, " of experts")):
        if stage == 0:
            num = num_shards * dims.dp_replicate
            found.append(Transfer(f"data{suffix}", "all_reduce", 2 * _sent(elements * reduce, num), 1))
            continue
        scatters = len(job.sequences) if stage >= 2 else 1
        gathers = 2 * len(job.sequences) if stage == 3 else 1
        gathered = gathers * elements * compute
        if stage == 3 and not suffix:
            parameters = parameters_of(job.model, job.stages_of(pp_rank), tp=dims.tp)
            outside = sum(
                count * parameter.local(tp=(dims.tp, 0), ep=(dims.ep, 0)).numel()
                for parameter, count in parameters.items()
                if not parameter.name.startswith("blocks.")
            )
            # What is outside of blocks stays from forward to backward.
            gathered -= len(job.sequences) * outside * compute + gathers * bytes_less_in_fp8(job, parameters)
        axis = f"shard{suffix}"
        found.append(Transfer(axis, "reduce_scatter", scatters * _sent(elements * reduce, num_shards), scatters))
        found.append(Transfer(axis, "all_gather", _sent(gathered, num_shards), gathers))
        replicas = 2 * _sent(elements / num_shards * reduce, dims.dp_replicate)
        found.append(Transfer(f"replicas{suffix}", "all_reduce", replicas, 1))
    return found


def _in_layers(job: Job, pp_rank: int) -> list[Transfer]:
    dims, model, size = job.dims, job.model, job.precision.compute_dtype.itemsize
    layers = [layer for stage in job.stages_of(pp_rank) for layer in layers_of(job, stage)]
    experts = sum(model.moe.in_layer(layer) for layer in layers)
    again = 1 if model.activation_checkpoint in ("full", "offload") else 0  # forward is run once more
    tokens = sum(job.sequences) * job.seq_len // dims.cp  # in a step
    passes = len(job.sequences) * len(layers)
    found = []
    if dims.tp > 1:
        sums = tokens * model.hidden_size * size * len(layers)
        if job.parallel.sequence_parallel:
            one = _sent(sums, dims.tp)
            found.append(Transfer("tp", "all_gather", (4 + 2 * again) * one, 4 * passes, True))
            found.append(Transfer("tp", "reduce_scatter", (4 + 2 * again) * one, 4 * passes, True))
        else:
            found.append(Transfer("tp", "all_reduce", (4 + 2 * again) * 2 * _sent(sums, dims.tp), 4 * passes, True))
    if dims.cp > 1:
        found += _context(job, tokens, len(layers), passes, again)
    if dims.ep > 1:
        rows = tokens * model.moe.top_k * (job.parallel.ep_buffer or 1.0) * model.hidden_size * size
        sent = _sent(rows, dims.ep) * experts
        calls = 4 * experts * len(job.sequences)
        found.append(Transfer("ep", "all_to_all", (4 + 2 * again) * sent, calls, True))
    return found


def _context(job: Job, tokens: int, num_layers: int, passes: int, again: int) -> list[Transfer]:
    model, dims, size = job.model, job.dims, job.precision.compute_dtype.itemsize
    assert model.num_kv_heads is not None  # resolved
    assert model.head_dim is not None
    assert model.value_dim is not None
    heads, kv_heads = model.num_heads / dims.tp, max(model.num_kv_heads / dims.tp, 1)
    keys = kv_heads * (model.head_dim + model.value_dim)
    found = []
    if dims.cp_ring > 1:
        # Each rank's keys and values go to all others; backward once more, and their gradients back.
        one = tokens * keys * size * (dims.cp_ring - 1) * num_layers
        name = "all_gather" if job.parallel.cp_method == "allgather" else "send_receive"
        found.append(Transfer("cp", name, (3 + again) * one, 3 * passes, True))
    if dims.cp_ulysses > 1:
        one = tokens * (heads * (model.head_dim + model.value_dim) + keys) * size * num_layers
        found.append(Transfer("cp", "all_to_all", (2 + again) * _sent(one, dims.cp_ulysses), 8 * passes, True))
    return found


def _pipeline(job: Job, pp_rank: int) -> list[Transfer]:
    if job.pipeline is None:
        return []
    owner, size = job.pipeline.owner, job.precision.compute_dtype.itemsize
    tokens = sum(job.sequences) * job.seq_len // job.dims.cp
    if job.parallel.sequence_parallel:
        tokens //= job.dims.tp
    neighbours = [other for stage in job.stages_of(pp_rank) for other in (stage.index - 1, stage.index + 1)]
    messages = sum(0 <= other < len(owner) and owner[other] != pp_rank for other in neighbours)
    calls = messages * len(job.sequences)
    return [Transfer("pp", "send_receive", messages * tokens * job.model.hidden_size * size, calls, True)]
